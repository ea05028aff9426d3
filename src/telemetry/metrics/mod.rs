//! Metrics: what is noted, in one line each, by the rest of the crate.
//!
//! [`table`] says what there is. Counters and histograms are noted as things happen, gauges are read
//! when somebody asks ([`Samples`]).

mod classification;
mod gpus;
mod recorder;
mod samples;
pub mod table;

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use metrics::{SharedString, counter, histogram};

use crate::error::{Error, Result};

pub use classification::Classification;
pub use gpus::sample as sample_gpus;
pub use recorder::{render, start, upkeep};
pub use samples::Samples;

/// Label of models that are not known, or too many.
const OTHER: &str = "_other";
/// Models and versions that get labels of their own, in the life of a process.
const MAX_MODELS: usize = 2000;
/// Digits of a digest that make a version's label.
const VERSION: usize = 12;
/// Reasons of failures that a device is to blame for.
const DEVICE_FAILURES: [&str; 3] = ["device", "oom", "internal"];

/// The labels of a model.
#[derive(Clone, Debug)]
pub struct ModelLabels {
    model: SharedString,
    version: SharedString,
}

impl ModelLabels {
    /// Of a model that the registry has. After very many, they are those of unknown ones.
    pub fn of(id: &str, digest: &str) -> Self {
        let version = digest.get(..VERSION).unwrap_or(digest);
        let (Some(model), Some(version)) = (bounded(id), bounded(version)) else {
            return Self::unknown();
        };
        Self {
            model: SharedString::from_shared(model),
            version: SharedString::from_shared(version),
        }
    }

    /// Of whatever the registry does not have.
    pub fn unknown() -> Self {
        Self { model: OTHER.into(), version: OTHER.into() }
    }
}

/// A label, as long as there are not too many.
fn bounded(label: &str) -> Option<Arc<str>> {
    static SEEN: LazyLock<Mutex<HashSet<Arc<str>>>> = LazyLock::new(Mutex::default);
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = seen.get(label) {
        return Some(Arc::clone(known));
    }
    if seen.len() >= 2 * MAX_MODELS {
        return None;
    }
    let label = Arc::<str>::from(label);
    seen.insert(Arc::clone(&label));
    Some(label)
}

/// Notes that a call came in.
pub fn call_started(method: &SharedString) {
    counter!(table::CALLS_STARTED.name, "grpc_method" => method.clone()).increment(1);
}

/// Notes a call that is over: gRPC's name of its status, its time, and the bytes of its messages.
pub fn call_ended(
    method: &SharedString,
    status: &'static str,
    time: Duration,
    (received, sent): (u64, u64),
) {
    let labels = [("grpc_method", method.clone()), ("grpc_status", status.into())];
    histogram!(table::CALL_DURATION.name, &labels).record(time);
    histogram!(table::CALL_RECEIVED.name, &labels).record(received as f64);
    histogram!(table::CALL_SENT.name, &labels).record(sent as f64);
}

/// Notes a batch that a device has answered.
pub fn batch(model: &Arc<str>, images: usize, compute: Duration) {
    let labels = [("model", model_label(model))];
    counter!(table::BATCHES_RUN.name, &labels).increment(1);
    counter!(table::IMAGES.name, &labels).increment(images as u64);
    histogram!(table::BATCH_SIZE.name, &labels).record(images as f64);
    histogram!(table::COMPUTE_DURATION.name, &labels).record(compute);
}

fn model_label(model: &Arc<str>) -> SharedString {
    bounded(model).map_or(OTHER.into(), SharedString::from_shared)
}

/// Notes how a job ended, or that it was given back, and after what time on its worker.
pub fn job_ended(kind: impl Into<SharedString>, result: &'static str, time: Option<Duration>) {
    let labels = [("kind", kind.into()), ("result", result.into())];
    counter!(table::JOBS_ENDED.name, &labels).increment(1);
    if let Some(time) = time {
        histogram!(table::JOB_DURATION.name, &labels).record(time);
    }
}

/// Notes what became of a shard of an evaluation that this process had taken.
pub fn shard_left(result: &'static str) {
    counter!(table::SHARDS.name, "result" => result).increment(1);
}

/// Notes that a job of this process was given to another worker.
pub fn lease_lost() {
    counter!(table::LEASES_LOST.name).increment(1);
}

/// Notes that this process took a job whose worker gave no sign of life: a dead worker notes nothing.
pub fn job_taken_over() {
    counter!(table::TAKEOVERS.name).increment(1);
}

/// Notes that a model is about to be loaded: failures of its device are counted from 0.
pub fn model_loading(id: &str, digest: &str) {
    let labels = ModelLabels::of(id, digest);
    for reason in DEVICE_FAILURES {
        let labels = [("model", labels.model.clone()), ("reason", reason.into())];
        counter!(table::FAILURES.name, &labels).absolute(0);
    }
}

/// Notes that a model was loaded, or could not be.
pub fn model_loaded<T>(result: &Result<T>, time: Duration) {
    histogram!(table::LOAD_DURATION.name, "result" => outcome(result)).record(time);
}

/// Notes that a GPU's kernels cannot be used.
pub fn gpu_fallback() {
    counter!(table::GPU_FALLBACKS.name).increment(1);
}

/// Notes an operation on the artifact store. What is not there is no failure of the store.
pub fn store_operation<T>(op: &'static str, result: &Result<T>) {
    let result = match result {
        Err(Error::NotFound { .. }) => "not_found",
        other => outcome(other),
    };
    counter!(table::STORE_OPERATIONS.name, "op" => op, "result" => result).increment(1);
}

/// Notes that a cache had what was asked for.
pub fn cache_hit(cache: &'static str) {
    counter!(table::CACHE_HITS.name, "cache" => cache).increment(1);
}

fn outcome<T>(result: &Result<T>) -> &'static str {
    match result {
        Ok(_) => "ok",
        Err(_) => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded() {
        let known = ModelLabels::of("m", &"0123456789abcdef".repeat(4));
        assert_eq!((&*known.model, &*known.version), ("m", "0123456789ab"));
        let many: Vec<_> =
            (0..2 * MAX_MODELS).map(|n| ModelLabels::of(&format!("m{n}"), "v")).collect();
        assert_eq!(&*many[0].model, "m0");
        let last = many.last().unwrap();
        assert_eq!((&*last.model, &*last.version), (OTHER, OTHER));
        assert_eq!(&*ModelLabels::of("m", "v").model, "m", "who has a label keeps it");
    }
}
