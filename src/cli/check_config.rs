//! `vitq check-config`: what a server or a worker would run with, and whether it could.

use serde_json::json;

use crate::cli::args;
use crate::cli::failure::Failure;
use crate::cli::output::{Output, columns};
use crate::config::{ProcessConfig, ServeConfig, Settings, WorkerConfig};
use crate::error::{Error, Result};

/// Flags of the command.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    of: Option<Of>,
    #[command(flatten)]
    serve: ServeConfig,
}

/// Whose settings are checked.
#[derive(Debug, clap::Subcommand)]
enum Of {
    /// Check the settings of a server, as without a command.
    Serve(Box<ServeConfig>),
    /// Check the settings of a worker.
    Worker(Box<WorkerConfig>),
}

impl Args {
    /// Prints every setting with its origin.
    ///
    /// # Errors
    /// `Usage`, with everything that is wrong.
    pub(super) fn run(self, settings: &Settings, output: &Output) -> Result<(), Failure> {
        print(settings, output)?;
        let mut problems = settings.missing_paths();
        let of_command = match &self.of {
            None => check(&self.serve.process),
            Some(Of::Serve(config)) => check(&config.process),
            Some(Of::Worker(config)) => {
                let mut problems = check(&config.process);
                problems.extend(config.engine(Vec::new()).err());
                problems
            }
        };
        problems.extend(of_command.iter().map(Error::to_string));
        if problems.is_empty() {
            return Ok(());
        }
        Err(Failure::Usage(problems.join("\nerror: ")))
    }
}

fn check(config: &ProcessConfig) -> Vec<Error> {
    let log = config.log.filter().err();
    log.into_iter().chain(args::devices(&config.device).err()).collect()
}

/// Prints settings as a table, or as JSON.
///
/// # Errors
/// `Local` when stdout cannot be written.
pub(super) fn print(settings: &Settings, output: &Output) -> Result<(), Failure> {
    let mut lines = vec![["SETTING", "VALUE", "ORIGIN"].map(str::to_owned).to_vec()];
    lines.extend(settings.list.iter().map(|setting| {
        let value = setting.value.clone().unwrap_or_else(|| "-".to_owned());
        vec![setting.key.clone(), value, setting.origin.name().to_owned()]
    }));
    output.result(columns(&lines), &json!({ "settings": settings }))
}
