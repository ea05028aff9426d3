//! The command line: a plain list of subcommands, one file each.
//!
//! Exit codes: 0 success, 1 failed, 2 usage. Results go to stdout, progress and errors to stderr.

mod args;
mod bench;
mod classify;
mod client;
mod evaluate;
mod failure;
mod follow;
mod generate;
mod inspect;
mod jobs;
mod methods;
mod models;
mod output;
mod predict;
mod progress;
mod quantize;
mod render;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;
use output::Output;

/// Quantizes vision transformers after training, and serves them over gRPC.
#[derive(Debug, Parser)]
#[command(name = "vitq", version, about)]
struct Cli {
    /// Print results, and errors, as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server.
    Serve(Box<serve::Args>),
    /// Quantize a checkpoint on a server and watch the progress.
    Quantize(quantize::Args),
    /// Classify images with a model of a server.
    Classify(classify::Args),
    /// Measure the accuracy of a server's model on a data set.
    Evaluate(evaluate::Args),
    /// List, load and remove the models of a server.
    Models(models::Args),
    /// List, watch, await and cancel the jobs of a server.
    Jobs(jobs::Args),
    /// Show the quantization methods and their options.
    Methods(methods::Args),
    /// Compare methods, models and bit widths in this process.
    Bench(bench::Args),
    /// Compute logits in this process.
    Predict(predict::Args),
    /// Show what an artifact holds.
    Inspect(inspect::Args),
    /// Write a checkpoint with generated weights, for speed tests.
    Generate(generate::Args),
}

/// Runs the program with this process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(cli.json);
    match cli.command.run(&output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(&output),
    }
}

impl Command {
    fn run(self, output: &Output) -> Result<(), Failure> {
        match self {
            Self::Serve(args) => args.run(),
            Self::Quantize(args) => args.run(output),
            Self::Classify(args) => args.run(output),
            Self::Evaluate(args) => args.run(output),
            Self::Models(args) => args.run(output),
            Self::Jobs(args) => args.run(output),
            Self::Methods(args) => args.run(output),
            Self::Bench(args) => args.run(output),
            Self::Predict(args) => args.run(output),
            Self::Inspect(args) => args.run(output),
            Self::Generate(args) => args.run(output),
        }
    }
}
