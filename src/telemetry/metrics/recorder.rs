//! Where counters and histograms are kept: one recorder per process.

use std::sync::OnceLock;

use metrics::{Unit, counter, describe_counter, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;

use super::samples::Samples;
use super::table::{ALL, Kind, Metric};

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
                // What has not happened yet is 0; with labels it is not known which.
                if labels.is_empty() {
                    counter!(*name).absolute(0);
                }
            }
            Kind::Histogram(_) => describe_histogram!(*name, *help),
            Kind::Gauge | Kind::Process => {}
        }
    }
    Collector::default().describe();
}
