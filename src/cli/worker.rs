//! `vitq worker`: runs the jobs that servers accept, and serves nothing.

use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::cli::failure::Failure;
use crate::cli::serve::{claim, listen};
use crate::config::WorkerConfig;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::grpc::{Readiness, ops};
use crate::{device, shutdown, telemetry};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    config: WorkerConfig,
}

impl Args {
    /// Runs until a signal stops it; the jobs that run then are given back.
    ///
    /// # Errors
    /// `InvalidArgument` for an unusable flag; `Io` when a port or a folder cannot be used;
    /// `Unavailable` when the database or the store cannot be reached.
    pub(super) fn run(self) -> Result<(), Failure> {
        telemetry::start(&self.config.process.log)?;
        device::open_cuda_libraries();
        let runtime = Runtime::new().map_err(|error| Error::io("tokio runtime", error))?;
        let result = runtime.block_on(self.work());
        // Work that outlived the drain must not keep the process.
        runtime.shutdown_background();
        Ok(result?)
    }

    async fn work(self) -> Result<()> {
        let Self { config } = self;
        let devices = device::parse_list(&config.process.device)?;
        let engine_config = config.engine(devices)?;
        let _claim = claim(&config.process)?;
        let stop = shutdown::on_signal()?;
        let readiness = Readiness::new();
        let ops_stop = CancellationToken::new();
        let _ops_ends_last = ops_stop.clone().drop_guard();
        let ops_listener = listen(config.process.ops_listen).await?;
        tokio::spawn(ops::serve(ops_listener, readiness.clone(), ops_stop));
        let engine = Engine::start(engine_config).await?;
        readiness.set(true);
        tracing::info!(workers = config.workers, "working");
        stop.cancelled().await;
        readiness.set(false);
        engine.jobs.stop();
        match tokio::time::timeout(config.process.drain_timeout, engine.jobs.stopped()).await {
            Ok(stopped) => stopped,
            Err(_) => {
                tracing::warn!(
                    "the drain timeout is over, a job that still runs is left to others"
                );
                Ok(())
            }
        }
    }
}
