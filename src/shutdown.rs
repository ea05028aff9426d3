//! From signals to a token: the first SIGTERM or SIGINT asks to stop, the second ends the process.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};

/// Exit status after a second signal: 128 + SIGTERM, as a shell reports it.
const KILLED: i32 = 143;

/// A token that the first SIGTERM or SIGINT cancels. Within a tokio runtime.
///
/// # Errors
/// `Io` when the signals cannot be listened to.
pub fn on_signal() -> Result<CancellationToken> {
    let listen = |kind| signal(kind).map_err(|error| Error::io("signal handler", error));
    let (mut terminate, mut interrupt) =
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        either(&mut terminate, &mut interrupt).await;
        tracing::info!("asked to stop; a second signal ends the process at once");
        stop.cancel();
        either(&mut terminate, &mut interrupt).await;
        std::process::exit(KILLED);
    });
    Ok(token)
}

async fn either(a: &mut Signal, b: &mut Signal) {
    tokio::select! {
        _ = a.recv() => {}
        _ = b.recv() => {}
    }
}
