//! `vitq serve`: the server.

use std::fs::File;
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::artifact::store::claim_folder;
use crate::cli::failure::Failure;
use crate::config::{ProcessConfig, ServeConfig};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::grpc::{self, Readiness, ops};
use crate::{device, shutdown, telemetry};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    config: ServeConfig,
}

impl Args {
    /// Runs until a signal stops it. Results of `--json` have no meaning here: logs have their own
    /// flag.
    ///
    /// # Errors
    /// `InvalidArgument` for an unusable flag; `Io` when a port or a folder cannot be used.
    pub(super) fn run(self) -> Result<(), Failure> {
        telemetry::start(&self.config.process.log)?;
        device::open_cuda_libraries();
        let runtime = Runtime::new().map_err(|error| Error::io("tokio runtime", error))?;
        let result = runtime.block_on(self.serve());
        // Work that outlived the drain must not keep the process.
        runtime.shutdown_background();
        Ok(result?)
    }

    async fn serve(self) -> Result<()> {
        let Self { config } = self;
        let devices = device::parse_list(&config.process.device)?;
        let _claim = claim(&config.process)?;
        let stop = shutdown::on_signal()?;
        let (listener, ops_listener) =
            (listen(config.listen).await?, listen(config.process.ops_listen).await?);
        let readiness = Readiness::new();
        let ops_stop = CancellationToken::new();
        let _ops_ends_last = ops_stop.clone().drop_guard();
        tokio::spawn(ops::serve(ops_listener, readiness.clone(), ops_stop));
        let engine = Engine::start(config.engine(devices)).await?;
        let address = listener.local_addr().map_err(|e| Error::io("gRPC port", e))?;
        announce(&format!("listening on http://{address}"));
        grpc::run(listener, engine, grpc::Running { config: config.server(), readiness, stop })
            .await
    }
}

/// The data folder, if the process uses it.
pub(super) fn claim(config: &ProcessConfig) -> Result<Option<File>> {
    config.uses_data_dir().then(|| claim_folder(&config.data_dir)).transpose()
}

pub(super) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| Error::io(format!("port {address}"), error))
}

/// Scripts read the address from stdout; everything else goes to the log.
#[allow(clippy::print_stdout, reason = "the command's output")]
fn announce(line: &str) {
    println!("{line}");
}
