//! The operators' port, in plaintext: `/livez`, `/readyz`, `/metrics`, and health over gRPC.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::health_server::HealthServer;

use super::Flag;
use super::health::HealthChecks;
use crate::device;
use crate::engine::Engine;
use crate::telemetry::metrics::{self, Samples, table};

/// What Prometheus calls its text.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How often what was measured is sorted into buckets.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the probes tell.
#[derive(Clone, Debug, Default)]
pub struct Probes {
    /// Whether the process takes calls, or jobs.
    pub readiness: Flag,
    /// Whether it can still do its work; if not, it is to be started again.
    pub alive: Flag,
    engine: Arc<OnceLock<Weak<Engine>>>,
}

impl Probes {
    /// Says whose models and jobs are asked for. The first engine stays.
    pub fn attach(&self, engine: &Arc<Engine>) {
        self.engine.get_or_init(|| Arc::downgrade(engine));
    }

    /// The engine, once there is one and as long as it is there.
    pub(super) fn engine(&self) -> Option<Arc<Engine>> {
        self.engine.get().and_then(Weak::upgrade)
    }
}

/// Serves the probes until stopped.
pub async fn serve(listener: TcpListener, probes: Probes, stop: CancellationToken) {
    metrics::start();
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "probes listen");
    }
    let serving =
        axum::serve(listener, router(probes)).with_graceful_shutdown(stop.cancelled_owned());
    tokio::select! {
        served = async { serving.await } => {
            if let Err(error) = served {
                tracing::error!(%error, "the probes' port failed");
            }
        }
        () = upkeep() => {}
    }
}

/// Never ends.
async fn upkeep() {
    let mut pause = tokio::time::interval(UPKEEP);
    loop {
        pause.tick().await;
        metrics::upkeep();
    }
}

fn router(probes: Probes) -> Router {
    let health = HealthServer::new(HealthChecks::new(probes.clone()));
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(scrape))
        .route_service("/grpc.health.v1.Health/{method}", health)
        .with_state(probes)
}

#[allow(clippy::unused_async, reason = "axum's handlers are async")]
async fn livez(State(probes): State<Probes>) -> (StatusCode, &'static str) {
    if probes.alive.is_set() {
        (StatusCode::OK, "alive\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "stuck\n")
    }
}

#[allow(clippy::unused_async, reason = "axum's handlers are async")]
async fn readyz(State(probes): State<Probes>) -> (StatusCode, &'static str) {
    if probes.readiness.is_set() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

async fn scrape(State(probes): State<Probes>) -> impl IntoResponse {
    let mut samples = match probes.engine() {
        Some(engine) => engine.sample().await,
        None => Samples::default(),
    };
    let cuda = device::cuda_version();
    let build = [env!("CARGO_PKG_VERSION"), env!("BUILT_WITH_LIBTORCH"), &cuda];
    samples.add(&table::BUILD, &build, 1.0);
    let gpus = tokio::task::spawn_blocking(metrics::sample_gpus);
    samples.extend(gpus.await.unwrap_or_default());
    ([(header::CONTENT_TYPE, METRICS_TYPE)], metrics::render(samples))
}
