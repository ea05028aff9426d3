//! `vitq worker`: runs the jobs that servers accept, and serves nothing.

use std::sync::Arc;

use crate::cli::failure::Failure;
use crate::cli::process::{Process, run};
use crate::config::{Settings, WorkerConfig};
use crate::device;
use crate::error::Result;
use crate::grpc;

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
    /// `Unusable` for unusable settings; `Io` when a port or a folder cannot be used; `Unavailable`
    /// when the database or the store cannot be reached.
    pub(super) fn run(self, settings: &Settings) -> Result<(), Failure> {
        let config = &self.config;
        run(&config.process, settings, || config.problems(settings), work(config))
    }
}

async fn work(config: &WorkerConfig) -> Result<()> {
    let devices = device::parse_list(&config.process.device)?;
    let engine_config = config.engine(devices)?;
    let process = Process::start(&config.process).await?;
    let Some(engine) = process.engine(engine_config).await? else { return Ok(()) };
    process.probes.attach(&engine);
    tracing::info!(workers = config.workers, "working");
    let alive = process.probes.alive.clone();
    let watch = grpc::watchdog(Arc::clone(&engine), config.process.stuck_after, alive);
    let ready = async {
        engine.wait_for_store().await;
        process.probes.readiness.set(true);
        std::future::pending().await
    };
    tokio::select! {
        () = ready => {}
        () = process.stop.cancelled() => {}
        () = watch => {}
    }
    process.probes.readiness.set(false);
    engine.jobs.stop();
    match tokio::time::timeout(config.process.drain_timeout, engine.jobs.stopped()).await {
        Ok(stopped) => stopped,
        Err(_) => {
            tracing::warn!("the drain timeout is over, a job that still runs is left to others");
            Ok(())
        }
    }
}
