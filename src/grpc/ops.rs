//! Plaintext probes for operators: `/livez` and `/readyz`.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::Readiness;

/// Serves the probes until stopped.
pub async fn serve(listener: TcpListener, readiness: Readiness, stop: CancellationToken) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "probes listen");
    }
    let serving = axum::serve(listener, router(readiness))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await;
    if let Err(error) = serving {
        tracing::error!(%error, "the probes' port failed");
    }
}

fn router(readiness: Readiness) -> Router {
    Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .with_state(readiness)
}

#[allow(clippy::unused_async, reason = "axum's handlers are async")]
async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, &'static str) {
    if readiness.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}
