//! The commands: one file each.

mod serve;

use clap::{Parser, Subcommand};

use crate::error::Result;

/// Quantizes vision transformers and serves them.
#[derive(Debug, Parser)]
#[command(name = "vitq", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server.
    Serve(Box<serve::Serve>),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// Whatever the command reports.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Serve(serve) => serve.run(),
        }
    }
}
