//! What serving costs and how it behaves (`cargo bench --bench serving`): throughput and latency over
//! the bare executor's, overload, fairness, and classification beside a calibration.
//!
//! The server runs in this process, the load comes from `vitq load-test` in another. Every part
//! prints its figures as a JSON line, and all of them are in the table at the end. See
//! docs/performance.md.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are its output")]

mod load;
mod parts;
mod subject;

use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};
use vitq::exec::Backend;

use subject::{Subject, SubjectKind};

#[derive(Debug, Parser)]
struct Args {
    /// What to measure.
    #[arg(
        long,
        value_name = "PART,…",
        value_delimiter = ',',
        default_value = "throughput,latency,overload,fairness,calibration"
    )]
    parts: Vec<Part>,
    /// On which models.
    #[arg(
        long,
        value_name = "MODEL,…",
        value_delimiter = ',',
        default_value = "digits-vit-minmax,digits-vit-ubb,deit-small-minmax"
    )]
    models: Vec<SubjectKind>,
    /// Seconds of each measurement; a part has two to six of them.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Measurements of each kind, alternating, where a ratio is wanted.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of libtorch; one per core unless given.
    #[arg(long)]
    threads: Option<i32>,
    /// Largest batch, and the bare executor's.
    #[arg(long, default_value_t = 8)]
    max_batch: usize,
    /// Arithmetic of the server's models and of the bare one.
    #[arg(long, default_value_t = Backend::Integer)]
    executor: Backend,
    /// Images that may be in the server.
    #[arg(long, default_value_t = 64)]
    queue_images: usize,
    /// cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Part {
    Throughput,
    Latency,
    Overload,
    Fairness,
    Calibration,
}

/// Figures of a part by name.
type Figures = Vec<(&'static str, Value)>;

#[tokio::main]
async fn main() {
    let args = Args::parse();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = args.threads.unwrap_or(i32::try_from(cores).unwrap_or(1));
    // Before the first thread computes: each takes over the number that it finds.
    tch::set_num_threads(threads);
    let mut table = vec!["| model | part | figure | value |\n|---|---|---|---|".to_owned()];
    for kind in &args.models {
        let subject = Subject::start(*kind, &args).await;
        for part in &args.parts {
            let figures = match part {
                Part::Throughput => parts::throughput(&subject, &args).await,
                Part::Latency => parts::latency(&subject, &args).await,
                Part::Overload => parts::overload(&subject, &args).await,
                Part::Fairness => parts::fairness(&subject, &args).await,
                Part::Calibration => parts::calibration(&subject, &args).await,
            };
            let [model, part] = [name(kind), name(part)];
            let rows = figures.iter().map(|(figure, value)| {
                format!("| {model} | {part} | {figure} | {} |", text(value))
            });
            table.extend(rows);
            let mut line = Map::from_iter(figures.into_iter().map(|(k, v)| (k.to_owned(), v)));
            for (key, value) in [
                ("model", json!(model)),
                ("part", json!(part)),
                ("threads", json!(threads)),
                ("cores", json!(cores)),
                ("max_batch", json!(args.max_batch)),
                ("executor", json!(args.executor.name())),
                ("seconds", json!(args.seconds)),
            ] {
                line.insert(key.to_owned(), value);
            }
            println!("{}", Value::from(line));
        }
        subject.stop().await;
    }
    println!("\n{}", table.join("\n"));
}

fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().unwrap().get_name().to_owned()
}

/// Numbers with four significant digits, everything else as JSON.
fn text(value: &Value) -> String {
    match value.as_f64() {
        Some(number) if number != 0.0 && value.is_f64() => {
            let digits = (3.0 - number.abs().log10().floor()).clamp(0.0, 9.0) as usize;
            format!("{number:.digits$}")
        }
        _ => value.to_string(),
    }
}
