//! The connection to a server.

use std::future::Future;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::cli::failure::Failure;
use crate::error::Error;

/// A server that does not answer within this time counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Job streams may be silent for long: pings keep routers from forgetting the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Largest answer that is accepted, in bytes: a long list of models with their reports.
pub(super) const MAX_ANSWER: usize = 64 << 20;

/// Which server to ask.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// The server's URL.
    #[arg(long, value_name = "URL", env = "VITQ_SERVER", default_value = "http://127.0.0.1:50051")]
    pub(super) server: String,
}

impl ServerArgs {
    /// Opens a connection.
    ///
    /// # Errors
    /// `Usage` for text that is no URL, `Unreachable` when nobody answers.
    pub(super) async fn connect(&self) -> Result<Channel, Failure> {
        let endpoint = Endpoint::from_shared(self.server.clone())
            .map_err(|error| Failure::Usage(format!("--server {}: {error}", self.server)))?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        endpoint.connect().await.map_err(|error| Failure::Unreachable {
            server: self.server.clone(),
            reason: innermost(&error),
        })
    }
}

/// Runs a client's work on a runtime of its own.
///
/// # Errors
/// What the work reports; `Local` when the system gives no threads.
pub(super) fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("runtime", error))?
        .block_on(work)
}

/// The transport's outer errors only say that something failed.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
