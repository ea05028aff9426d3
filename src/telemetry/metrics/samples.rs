//! What is read when somebody asks, instead of being noted whenever it changes: depths, ages, sizes.

use std::fmt::Write as _;

use super::table::Metric;

/// Values of gauges at one moment.
#[derive(Debug, Default)]
pub struct Samples(Vec<Sample>);

#[derive(Debug)]
struct Sample {
    metric: &'static Metric,
    labels: Vec<String>,
    value: f64,
}

impl Samples {
    /// Adds a value, with one value for each label of the metric.
    pub fn add(&mut self, metric: &'static Metric, labels: &[&str], value: f64) {
        debug_assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.0.push(Sample { metric, labels, value });
    }

    /// Adds the values of others.
    pub fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    /// The text that Prometheus reads.
    pub fn render(mut self) -> String {
        let mut text = String::new();
        self.0.sort_by_key(|sample| sample.metric.name);
        let mut before = "";
        for Sample { metric, labels, value } in &self.0 {
            let name = metric.name;
            // Writing to a string does not fail.
            if name != before {
                let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} gauge", metric.help);
            }
            let pairs: Vec<String> = metric
                .labels
                .iter()
                .zip(labels)
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                .collect();
            let labels = match pairs.is_empty() {
                true => String::new(),
                false => format!("{{{}}}", pairs.join(",")),
            };
            let _ = writeln!(text, "{name}{labels} {value}");
            before = name;
        }
        text
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::table::{MODELS_LOADED, QUEUE_DEPTH};

    #[test]
    fn samples_of_a_metric_stand_together_below_its_help() {
        let mut samples = Samples::default();
        samples.add(&QUEUE_DEPTH, &["a", "bulk"], 0.0);
        samples.add(&MODELS_LOADED, &[], 2.0);
        samples.add(&QUEUE_DEPTH, &["b\"\\\n", "bulk"], 1.5);
        let (loaded, depth) = (MODELS_LOADED.help, QUEUE_DEPTH.help);
        assert_eq!(
            samples.render(),
            format!(
                "# HELP vitq_models_loaded {loaded}\n# TYPE vitq_models_loaded gauge\n\
                 vitq_models_loaded 2\n\
                 # HELP vitq_queue_depth {depth}\n# TYPE vitq_queue_depth gauge\n\
                 vitq_queue_depth{{model=\"a\",priority=\"bulk\"}} 0\n\
                 vitq_queue_depth{{model=\"b\\\"\\\\\\n\",priority=\"bulk\"}} 1.5\n"
            )
        );
    }
}
