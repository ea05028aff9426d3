//! `vitq check-config`: what a server or a worker would run with, and whether it could.

use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
use std::mem;

use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::output::{Output, columns};
use crate::config::{ServeConfig, Settings, WorkerConfig};
use crate::device;
use crate::error::Error;

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
    /// Prints every setting with its origin, unless some have no value that could be shown.
    ///
    /// # Errors
    /// `Unusable`, with everything that is wrong.
    pub(super) fn run(self, settings: &mut Settings, output: &Output) -> Result<(), Failure> {
        let mut problems = mem::take(&mut settings.mistakes);
        if problems.is_empty() {
            print(settings, output)?;
        }
        device::open_cuda_libraries();
        problems.extend(match &self.of {
            None => of_server(&self.serve, settings),
            Some(Of::Serve(config)) => of_server(config, settings),
            Some(Of::Worker(config)) => config.problems(settings),
        });
        if problems.is_empty() { Ok(()) } else { Err(Failure::Unusable(problems)) }
    }
}

fn of_server(config: &ServeConfig, settings: &Settings) -> Vec<Error> {
    let mut problems = config.problems(settings);
    let files = config.security.open(config.listen).err();
    problems.extend(files.filter(|error| !is_absence(error)));
    problems
}

/// Whether a file is not there, or none: its path is among the problems already.
fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. }
        if [NotFound, NotADirectory, IsADirectory].contains(&source.kind()))
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
