//! `vitq load-test`: load on a server, and what it makes of it.

mod report;
mod target;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use crate::bench::load::search::{Found, Goal, find_capacity};
use crate::bench::load::{Load, Measured, Mix, Plan, run};
use crate::cli::args;
use crate::cli::classify::Priority;
use crate::cli::client::{ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::cli::predict::list_images;
use crate::error::{Error, Result};

use target::{Requests, ServerTarget};

/// Requests a second that a search for the capacity begins with.
const FIRST_RATE: f64 = 10.0;

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("load").required(true).multiple(true)
    .args(["rate", "concurrency", "find_capacity"])))]
pub(super) struct Args {
    /// Model id, and how often it is asked compared to the others; may be repeated.
    #[arg(long = "model", value_name = "ID[=WEIGHT]", required = true, value_parser = weighted)]
    models: Vec<(String, f64)>,
    /// JPEG, PNG or WebP files, or folders of them; may be repeated.
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    images: Vec<PathBuf>,
    /// Open loop: requests a second, on average, at random times; of several, comma-separated, each is
    /// measured.
    #[arg(long, value_name = "RATE,…", value_delimiter = ',', value_parser = positive_number,
          conflicts_with = "concurrency")]
    rate: Vec<f64>,
    /// Closed loop: clients, each of which waits for its answer before it asks again.
    #[arg(long, value_name = "CLIENTS", value_parser = args::positive)]
    concurrency: Option<usize>,
    /// Search the largest rate that the server bears, from `--rate` on.
    #[arg(long, conflicts_with = "concurrency")]
    find_capacity: bool,
    /// With `--find-capacity`: seconds within which 99 of 100 answers are to come.
    #[arg(long, value_name = "SECONDS", value_parser = args::seconds, requires = "find_capacity")]
    p99: Option<Duration>,
    /// Seconds of each measurement.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = args::seconds)]
    duration: Duration,
    /// Requests of each measurement, if they are sent before its time is over.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Seconds of load before each measurement.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = args::seconds)]
    warm_up: Duration,
    /// Images per request.
    #[arg(long, value_name = "N", default_value = "1", value_parser = args::positive)]
    images_per_request: usize,
    /// Labels per image.
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    /// Whether somebody waits for the answers.
    #[arg(long, value_name = "NAME", default_value = "interactive")]
    priority: Priority,
    /// Seconds after which a request is given up.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = args::timeout)]
    timeout: Duration,
    /// Connections that the requests are spread over.
    #[arg(long, value_name = "N", default_value = "4", value_parser = args::positive)]
    connections: usize,
    /// Open loop: requests that may be on their way; more are counted and not sent.
    #[arg(long, value_name = "N", default_value = "10000", value_parser = args::positive)]
    max_outstanding: usize,
    /// Seed of the times and of the choice of models and images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    server: ServerArgs,
}

/// `ID` or `ID=WEIGHT`.
fn weighted(text: &str) -> Result<(String, f64), String> {
    match text.split_once('=') {
        None => Ok((text.to_owned(), 1.0)),
        Some((id, weight)) => Ok((id.to_owned(), positive_number(weight)?)),
    }
}

fn positive_number(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("must be a number above 0".to_owned()),
    }
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let images = self.read_images()?;
        let weights = self.models.iter().map(|(_, weight)| *weight).collect();
        let mix = Mix::new(weights, images.len(), self.images_per_request)?;
        let names: Vec<String> = self.models.iter().map(|(id, _)| id.clone()).collect();
        block_on(async move {
            let requests = Requests {
                models: names.clone(),
                images,
                top_k: self.top_k,
                priority: self.priority.into(),
                timeout: self.timeout,
            };
            let target = ServerTarget::connect(&self.server, self.connections, requests).await?;
            let (capacity, steps) = self.measure(&Arc::new(target), &mix).await?;
            self.show(capacity, &steps, &names, output)
        })
    }

    fn read_images(&self) -> Result<Vec<Bytes>> {
        let mut files = Vec::new();
        for path in &self.images {
            if path.is_dir() {
                for sample in list_images(path)? {
                    files.push(path.join(sample.name));
                }
            } else {
                files.push(path.clone());
            }
        }
        let read = |path: PathBuf| match std::fs::read(&path) {
            Ok(bytes) => Ok(Bytes::from(bytes)),
            Err(error) => Err(Error::io(path, error)),
        };
        files.into_iter().map(read).collect()
    }

    /// The capacity, if it was to be found, and every load that was measured.
    async fn measure(
        &self,
        target: &Arc<ServerTarget>,
        mix: &Mix,
    ) -> Result<(Option<f64>, Vec<Measured>)> {
        let plan = |load| Plan {
            load,
            mix: mix.clone(),
            warm_up: self.warm_up,
            time: self.duration,
            requests: self.requests,
            seed: self.seed,
        };
        let open = |rate| plan(Load::Open { rate, outstanding: self.max_outstanding });
        if self.find_capacity {
            let first = self.rate.first().copied().unwrap_or(FIRST_RATE);
            let goal = Goal { p99: self.p99 };
            let search =
                find_capacity(first, goal, async |rate| run(Arc::clone(target), &open(rate)).await);
            let Found { rate, steps } = search.await?;
            return Ok((rate, steps));
        }
        let plans = match self.concurrency {
            Some(clients) => vec![plan(Load::Closed { clients })],
            None => self.rate.iter().map(|rate| open(*rate)).collect(),
        };
        let mut steps = Vec::with_capacity(plans.len());
        for plan in &plans {
            steps.push(run(Arc::clone(target), plan).await?);
        }
        Ok((None, steps))
    }

    /// Prints what was measured; fails if nothing was answered, or no capacity found.
    fn show(
        &self,
        capacity: Option<f64>,
        steps: &[Measured],
        names: &[String],
        output: &Output,
    ) -> Result<(), Failure> {
        let mut text = report::table(steps, names);
        if self.find_capacity {
            text.push_str(&match capacity {
                Some(rate) => format!("\ncapacity: {rate:.1} requests/s"),
                None => "\ncapacity: less than every rate that was tried".to_owned(),
            });
            let last = steps.last().filter(|step| step.due() == 0);
            if let Some(rate) = last.and_then(|step| step.offered_rate) {
                let seconds = self.duration.as_secs_f64();
                text.push_str(&format!(
                    "\nat {rate:.3} requests/s none was due within {seconds} s: the search ended"
                ));
            }
        }
        let json = json!({
            "server": self.server.server,
            "images_per_request": self.images_per_request,
            "clients": self.concurrency,
            "seed": self.seed,
            "capacity": capacity,
            "steps": steps.iter().map(|step| step.json(names)).collect::<Vec<_>>(),
        });
        output.result(text, &json)?;
        if steps.iter().all(|step| step.overall().good() == 0) {
            return Err(Failure::Unfinished("no request was answered".to_owned()));
        }
        if self.find_capacity && capacity.is_none() {
            let reason = "no capacity was found: no rate that was tried was borne";
            return Err(Failure::Unfinished(reason.to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(flags: &str) -> Result<Args, clap::Error> {
        let base = "load-test --model m --images i";
        let words = base.split(' ').chain(flags.split_whitespace());
        Command::try_parse_from(words).map(|command| command.args)
    }

    #[test]
    fn one_kind_of_load_is_asked_for() {
        for (flags, understood) in [
            ("--rate 10", true),
            ("--rate 10,20.5 --duration 1 --requests 5", true),
            ("--concurrency 4", true),
            ("--find-capacity --p99 0.1", true),
            ("--find-capacity --rate 100", true),
            ("", false),
            ("--rate 10 --concurrency 4", false),
            ("--find-capacity --concurrency 4", false),
            ("--rate 10 --p99 0.1", false),
            ("--rate 0", false),
            ("--rate inf", false),
            ("--concurrency 0", false),
            ("--rate 1 --timeout -1", false),
            ("--rate 1 --timeout 0", false),
        ] {
            assert_eq!(parse(flags).is_ok(), understood, "{flags}");
        }
    }

    #[test]
    fn models_have_weights() {
        let args = parse("--rate 1 --model n=2.5").unwrap();
        assert_eq!(args.models, [("m".to_owned(), 1.0), ("n".to_owned(), 2.5)]);
        assert!(parse("--rate 1 --model n=0").is_err());
    }

    #[test]
    fn folders_and_files_are_images() {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in [("b.png", "2"), ("a.png", "1"), ("notes.txt", "no")] {
            std::fs::write(root.path().join(name), content).unwrap();
        }
        let mut args = parse("--rate 1").unwrap();
        args.images = vec![root.path().join("b.png"), root.path().to_path_buf()];
        assert_eq!(args.read_images().unwrap(), ["2", "1", "2"]);
        args.images = vec![root.path().join("absent.png")];
        assert!(matches!(args.read_images(), Err(Error::Io { .. })));
    }
}
