//! What was measured, for people.

use std::time::Duration;

use crate::bench::load::{Measured, Record};
use crate::cli::output::columns;

/// The name of all models together.
const ALL: &str = "all";

const HEADER: [&str; 15] = [
    "offered/s",
    "model",
    "requests",
    "good",
    "good/s",
    "images/s",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "p99.9 ms",
    "max ms",
    "queue ms",
    "decode ms",
    "compute ms",
    "batch",
];

/// A line per load and model, then what was refused and what the first of each status was told. Times
/// are in milliseconds: latencies from the intended start, and medians of what the server says.
pub(super) fn table(steps: &[Measured], names: &[String]) -> String {
    let mut lines = vec![HEADER.map(str::to_owned).to_vec()];
    let mut remarks = Vec::new();
    for step in steps {
        let overall = step.overall();
        if let [name] = names {
            lines.push(line(step, name, &overall));
        } else {
            let models = names.iter().zip(&step.models);
            lines.extend(models.map(|(name, record)| line(step, name, record)));
            lines.push(line(step, ALL, &overall));
        }
        remarks.extend(remarks_on(step, &overall));
    }
    [vec![columns(&lines)], remarks].concat().join("\n")
}

fn line(step: &Measured, name: &str, record: &Record) -> Vec<String> {
    // What came in time is counted for all models together; a model has its share of the good.
    let share = record.good() as f64 / step.overall().good().max(1) as f64;
    let goodput = step.goodput() * share;
    let latency = |share| ms(record.latency.quantile(share));
    vec![
        offered(step),
        name.to_owned(),
        record.requests().to_string(),
        record.good().to_string(),
        format!("{goodput:.1}"),
        format!("{:.1}", goodput * step.images_per_request as f64),
        latency(0.5),
        latency(0.9),
        latency(0.99),
        latency(0.999),
        latency(1.0),
        ms(record.queue.quantile(0.5)),
        ms(record.decode.quantile(0.5)),
        ms(record.compute.quantile(0.5)),
        format!("{:.1}", record.mean_batch()),
    ]
}

fn remarks_on(step: &Measured, overall: &Record) -> Vec<String> {
    let mut remarks = Vec::new();
    let refused = overall.statuses.iter().filter(|(status, _)| *status != "OK");
    for (status, count) in refused {
        let message = overall.messages.get(status).filter(|message| !message.is_empty());
        let message = message.map(|message| format!(": {message}")).unwrap_or_default();
        remarks.push(format!("{}: {count} x {status}{message}", offered(step)));
    }
    for (count, what) in [
        (overall.with_failed_images, "answers with failed images"),
        (overall.cached_images, "images answered from the cache"),
        (step.not_sent, "requests not sent: too many were on their way"),
    ] {
        if count > 0 {
            remarks.push(format!("{}: {count} {what}", offered(step)));
        }
    }
    remarks
}

fn offered(step: &Measured) -> String {
    step.offered_rate.map_or_else(|| "closed".to_owned(), |rate| format!("{rate:.1}"))
}

fn ms(time: Duration) -> String {
    format!("{:.2}", 1e3 * time.as_secs_f64())
}
