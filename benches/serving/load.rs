//! `vitq load-test` in a process of its own, as a client would be.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::subject::Subject;

/// One measured load.
pub(crate) struct Report(Value);

impl Report {
    /// A number by its path: `overall.latency_seconds.p99`.
    pub(crate) fn number(&self, path: &str) -> f64 {
        let value = path.split('.').fold(&self.0, |value, key| &value[key]);
        value.as_f64().unwrap_or_else(|| panic!("{path} is {value}"))
    }

    /// Requests by status.
    pub(crate) fn statuses(&self) -> &Value {
        &self.0["overall"]["statuses"]
    }
}

/// Puts a load on the subject's server; `flags` are those of `vitq load-test`.
pub(crate) async fn load(subject: &Subject, flags: &str) -> Report {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitq"));
    command
        .args(["load-test", "--json", "--timeout", "30", "--server", &subject.url])
        .args(flags.split_whitespace())
        .stderr(Stdio::inherit());
    if !flags.contains("--images ") {
        command.arg("--images").arg(&subject.images);
    }
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "the load test failed: {flags}");
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
    Report(report["steps"][0].take())
}
