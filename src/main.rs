//! The `vitq` binary: parses flags, runs the command, turns errors into exit codes.

use std::process::ExitCode;

use clap::Parser;
use vitq::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vitq: {error}");
            ExitCode::FAILURE
        }
    }
}
