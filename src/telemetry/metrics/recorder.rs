//! Where counters and histograms are kept: one recorder per process.

use std::sync::OnceLock;

use metrics::{Label, Unit, counter, describe_counter, describe_histogram, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;

use super::samples::Samples;
use super::table::{self, ALL, Kind, Metric};

/// Series that begin at 0, by the values of their labels. Of one that began with its first event, an
/// alert would not see that event.
const FROM_ZERO: [(&Metric, &[&[&str]]); 3] = [
    (
        &table::JOBS_ENDED,
        &[&["quantize", "evaluate"], &["succeeded", "failed", "cancelled", "released"]],
    ),
    (&table::LOAD_DURATION, &[&["ok", "failed"]]),
    (
        &table::STORE_OPERATIONS,
        &[&["put", "get", "contains", "list", "delete"], &["ok", "not_found", "failed"]],
    ),
];

/// Starts to record, if nobody did; before that, whatever is noted is forgotten.
pub fn start() {
    handle();
}

/// Everything that was recorded, and the samples, as the text that Prometheus reads.
pub fn render(samples: Samples) -> String {
    Collector::default().collect();
    let mut text = handle().render();
    text.push_str(&samples.render());
    text
}

/// Sorts what was recorded into its buckets; until then it takes memory.
pub fn upkeep() {
    handle().run_upkeep();
}

fn handle() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let mut builder = PrometheusBuilder::new();
        for Metric { name, kind, .. } in ALL {
            if let Kind::Histogram(bounds) = kind {
                let matcher = Matcher::Full((*name).to_owned());
                builder = builder
                    .set_buckets_for_metric(matcher, bounds)
                    .expect("the table has no histogram without buckets");
            }
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another recorder takes this process's metrics");
        }
        describe();
        handle
    })
}

fn describe() {
    for Metric { name, kind, help, labels } in ALL {
        match kind {
            Kind::Counter => {
                describe_counter!(*name, Unit::Count, *help);
                // What has not happened yet is 0; with labels it is known of a few only.
                if labels.is_empty() {
                    counter!(*name).absolute(0);
                }
            }
            Kind::Histogram(_) => describe_histogram!(*name, *help),
            Kind::Gauge | Kind::Process => {}
        }
    }
    Collector::default().describe();
    for (Metric { name, kind, labels, .. }, values) in FROM_ZERO {
        for values in combinations(values) {
            let labels: Vec<Label> = labels
                .iter()
                .zip(values)
                .map(|(label, value)| Label::from_static_parts(label, value))
                .collect();
            if let Kind::Histogram(_) = kind {
                drop(histogram!(*name, labels)); // to name it is enough
            } else {
                counter!(*name, labels).absolute(0);
            }
        }
    }
}

/// One of each, in every way.
fn combinations(values: &[&[&'static str]]) -> Vec<Vec<&'static str>> {
    values.iter().fold(vec![Vec::new()], |begun, next| {
        let extended = begun.iter().flat_map(|begun: &Vec<&'static str>| {
            next.iter().map(move |value| [&begun[..], &[*value]].concat())
        });
        extended.collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_sees_the_first_event_as_a_step_from_zero() {
        start();
        let text = render(Samples::default());
        for series in [
            "vitq_jobs_total{kind=\"evaluate\",result=\"failed\"}",
            "vitq_jobs_total{kind=\"quantize\",result=\"released\"}",
            "vitq_model_load_duration_seconds_count{result=\"failed\"}",
            "vitq_store_operations_total{op=\"get\",result=\"failed\"}",
            "vitq_job_takeovers_total",
        ] {
            assert!(text.contains(&format!("\n{series} ")), "no {series} in\n{text}");
        }
    }
}
