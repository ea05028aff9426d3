//! What the long-running commands have in common: logs, a runtime, the data folder, the probes.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::artifact::store::claim_folder;
use crate::cli::failure::Failure;
use crate::config::{ProcessConfig, Settings};
use crate::engine::{Engine, EngineConfig};
use crate::error::{Error, Result};
use crate::grpc::ops::{self, Probes};
use crate::kernels::Workers;
use crate::{device, shutdown, telemetry};

/// What holds as long as the process is to run.
pub(super) struct Process {
    /// Told when a signal stops the process.
    pub(super) stop: CancellationToken,
    /// What the probes say.
    pub(super) probes: Probes,
    _claim: Option<File>,
    _probes_end_last: DropGuard,
}

impl Process {
    /// The engine; none when the process is asked to stop first, as while it waits for a store.
    ///
    /// # Errors
    /// As [`Engine::start`].
    pub(super) async fn engine(&self, config: EngineConfig) -> Result<Option<Arc<Engine>>> {
        tokio::select! {
            started = Engine::start(config) => started.map(Some),
            () = self.stop.cancelled() => Ok(None),
        }
    }

    /// Claims the data folder if the process uses it, and answers probes.
    ///
    /// # Errors
    /// `FailedPrecondition` when the folder is another process's; `Io` when the port cannot be used.
    pub(super) async fn start(config: &ProcessConfig) -> Result<Self> {
        let claim = config.uses_data_dir().then(|| claim(&config.data_dir)).transpose()?;
        let stop = shutdown::on_signal()?;
        let listener = listen(config.ops_listen).await?;
        let (probes, probing) = (Probes::default(), CancellationToken::new());
        probes.alive.set(true);
        tokio::spawn(ops::serve(listener, probes.clone(), probing.clone()));
        Ok(Self { stop, probes, _claim: claim, _probes_end_last: probing.drop_guard() })
    }
}

/// The data folder for this process; who cannot have it is told by which setting it is meant.
fn claim(data_dir: &Path) -> Result<File> {
    claim_folder(data_dir).map_err(|error| {
        if let Error::Io { path, source } = error {
            return Error::io(format!("data-dir: {}", path.display()), source);
        }
        error
    })
}

/// Runs such a command to its end, unless its settings have problems.
///
/// # Errors
/// Whatever `work` gives; `Unusable` for unusable settings; `Io` without threads.
pub(super) fn run(
    config: &ProcessConfig,
    settings: &Settings,
    problems: impl FnOnce() -> Vec<Error>,
    work: impl Future<Output = Result<()>>,
) -> Result<(), Failure> {
    let runtime = Runtime::new().map_err(|error| Error::io("tokio runtime", error))?;
    let telemetry = runtime.block_on(async { telemetry::start(&config.log) });
    let telemetry = telemetry.map_err(Failure::of_setting)?;
    tracing::info!(settings = settings.line(), "configuration");
    device::warn_without_gpu(&config.device, device::open_cuda_libraries());
    Workers::share_among(config.threads());
    // Before the first thread computes: each takes over the number that it finds.
    tch::set_num_threads(i32::try_from(config.threads()).unwrap_or(i32::MAX));
    let result = match problems() {
        none if none.is_empty() => runtime.block_on(work).map_err(Failure::of_setting),
        problems => Err(Failure::Unusable(problems)),
    };
    telemetry.end();
    // Work that outlived the drain must not keep the process.
    runtime.shutdown_background();
    result
}

/// A socket on an address.
///
/// # Errors
/// `Io`.
pub(super) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| Error::io(format!("port {address}"), error))
}
