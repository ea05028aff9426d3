//! `vitq serve`: the server.

use crate::cli::check_config;
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::cli::process::{Process, listen, run};
use crate::config::{ServeConfig, Settings};
use crate::device;
use crate::error::{Error, Result};
use crate::grpc;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    config: ServeConfig,
    /// Print what is in force and where it comes from, and do nothing else.
    #[arg(long)]
    print_config: bool,
}

impl Args {
    /// Runs until a signal stops it. Results of `--json` have no meaning here: logs have their own
    /// flag.
    ///
    /// # Errors
    /// `Unusable` for unusable settings; `Io` when a port or a folder cannot be used.
    pub(super) fn run(self, settings: &Settings, output: &Output) -> Result<(), Failure> {
        if self.print_config {
            return check_config::print(settings, output);
        }
        let config = &self.config;
        run(&config.process, settings, || config.problems(settings), serve(config))
    }
}

async fn serve(config: &ServeConfig) -> Result<()> {
    let devices = device::parse_list(&config.process.device)?;
    let security = config.security.open(config.listen)?;
    let process = Process::start(&config.process).await?;
    let listener = listen(config.listen).await?;
    let Some(engine) = process.engine(config.engine(devices)).await? else { return Ok(()) };
    let address = listener.local_addr().map_err(|e| Error::io("gRPC port", e))?;
    let scheme = if security.is_encrypted() { "https" } else { "http" };
    announce(&format!("listening on {scheme}://{address}"));
    let (stop, probes) = (process.stop.clone(), process.probes.clone());
    let config = config.server(security);
    grpc::run(listener, engine, grpc::Running { config, probes, stop }).await
}

/// Scripts read the address from stdout; everything else goes to the log.
#[allow(clippy::print_stdout, reason = "the command's output")]
fn announce(line: &str) {
    println!("{line}");
}
