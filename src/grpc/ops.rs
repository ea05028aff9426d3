//! Plaintext probes for operators: `/livez` and `/readyz`.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::Flag;

/// What the probes tell.
#[derive(Clone, Debug, Default)]
pub struct Probes {
    /// Whether the process takes calls, or jobs.
    pub readiness: Flag,
    /// Whether it can still do its work; if not, it is to be started again.
    pub alive: Flag,
}

/// Serves the probes until stopped.
pub async fn serve(listener: TcpListener, probes: Probes, stop: CancellationToken) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "probes listen");
    }
    let serving =
        axum::serve(listener, router(probes)).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = serving {
        tracing::error!(%error, "the probes' port failed");
    }
}

fn router(probes: Probes) -> Router {
    Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).with_state(probes)
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
