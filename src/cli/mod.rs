//! The command line: a plain list of subcommands, one file each.
//!
//! Exit codes: 0 success, 1 failed, 2 usage. Results go to stdout, progress and errors to stderr.

mod args;
mod bench;
mod check_config;
mod checkpoints;
mod classify;
mod client;
mod datasets;
mod evaluate;
mod failure;
mod follow;
mod generate;
mod healthcheck;
mod inspect;
mod jobs;
mod load_test;
mod methods;
mod models;
mod output;
mod predict;
mod process;
mod progress;
mod quantize;
mod render;
mod serve;
mod token;
mod upload;
mod uploads;
mod worker;

use std::env;
use std::ffi::OsString;
use std::mem;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use failure::Failure;
use output::Output;

use crate::config::{self, Parsed, Settings};
use crate::telemetry;

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
    /// Run jobs for servers that share a database with this process.
    Worker(Box<worker::Args>),
    /// Make a token for a server's --tokens file.
    Token(token::Args),
    /// Show what a server or a worker would run with, and check it.
    CheckConfig(Box<check_config::Args>),
    /// Ask a server whether it is ready.
    Healthcheck(healthcheck::Args),
    /// Quantize a checkpoint on a server and watch the progress.
    Quantize(quantize::Args),
    /// Classify images with a model of a server.
    Classify(classify::Args),
    /// Measure the accuracy of a server's model on a data set.
    Evaluate(evaluate::Args),
    /// Put load on a server and measure its latencies, or search its capacity.
    LoadTest(load_test::Args),
    /// List, load and remove the models of a server.
    Models(models::Args),
    /// List, upload and delete the float checkpoints of a server.
    Checkpoints(checkpoints::Args),
    /// List, upload and delete the data sets of a server.
    Datasets(datasets::Args),
    /// List the uploads of a server, on their way or complete.
    Uploads(uploads::Args),
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
    let (cli, mut settings) = match parse() {
        Ok(parsed) => parsed,
        Err(error) => return refuse(&error),
    };
    let output = Output::new(cli.json);
    match cli.command.run(&mut settings, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(&output),
    }
}

/// The command line as it is defined: what the documents say of it is held to this.
pub fn command() -> clap::Command {
    Cli::command()
}

/// This process's arguments, with its environment and its configuration file.
fn parse() -> Result<(Cli, Settings), clap::Error> {
    let command = command();
    let arguments: Vec<_> = env::args_os().collect();
    // What is not Unicode is no variable of ours.
    let text = |(name, value): (OsString, OsString)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    };
    let variables: Vec<_> = env::vars_os().filter_map(text).collect();
    let Parsed { matches, settings } = config::parse(&command, &arguments, &variables)?;
    Ok((Cli::from_arg_matches(&matches)?, settings))
}

/// Prints clap's help, or what it says of a wrong command line: as JSON if that asks for it.
fn refuse(error: &clap::Error) -> ExitCode {
    let asks_for_json = env::args_os().skip(1).take_while(|a| a != "--").any(|a| a == "--json");
    if !error.use_stderr() || !asks_for_json {
        error.exit()
    }
    let text = error.to_string();
    let message = text.split("\n\nUsage:").next().unwrap_or_default();
    let message = message.split("\n\nFor more information").next().unwrap_or_default();
    let message = message.trim().trim_start_matches("error: ").replace("\nerror: ", "\n");
    Failure::Usage(message).report(&Output::new(true))
}

impl Command {
    fn run(self, settings: &mut Settings, output: &Output) -> Result<(), Failure> {
        if !settings.mistakes.is_empty() && !matches!(self, Self::CheckConfig(_)) {
            return Err(Failure::Unusable(mem::take(&mut settings.mistakes)));
        }
        if matches!(self, Self::Bench(_) | Self::Predict(_)) {
            telemetry::log_warnings();
        }
        match self {
            Self::Serve(args) => args.run(settings, output),
            Self::Worker(args) => args.run(settings),
            Self::Token(args) => args.run(output),
            Self::CheckConfig(args) => args.run(settings, output),
            Self::Healthcheck(args) => args.run(output),
            Self::Quantize(args) => args.run(output),
            Self::Classify(args) => args.run(output),
            Self::Evaluate(args) => args.run(output),
            Self::LoadTest(args) => args.run(output),
            Self::Models(args) => args.run(output),
            Self::Checkpoints(args) => args.run(output),
            Self::Datasets(args) => args.run(output),
            Self::Uploads(args) => args.run(output),
            Self::Jobs(args) => args.run(output),
            Self::Methods(args) => args.run(output),
            Self::Bench(args) => args.run(output),
            Self::Predict(args) => args.run(output),
            Self::Inspect(args) => args.run(output),
            Self::Generate(args) => args.run(output),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_plans_are_flags_of_quantize_and_bench() {
        let quantize = "vitq quantize --checkpoint c --method repq --calib-dataset d";
        let bench = "vitq bench --checkpoint c --val v --calib d --methods repq --out o";
        for command in [quantize, bench] {
            for (flags, understood) in [
                ("--bits 4 --weights-only", true),
                ("--weight-bits 4 --activation-bits float", true),
                ("--bits 4 --role-bits reduction=8/8 --role-bits query_key=8", true),
                ("--weight-bits 4 --activation-bits 8 --weights-only", false),
                ("--bits float", false),
                ("--weight-bits 2 --activation-bits 4", false),
            ] {
                let text = format!("{command} {flags}");
                let parsed = Cli::try_parse_from(text.split(' '));
                assert_eq!(parsed.is_ok(), understood, "{text}");
            }
        }
    }
}
