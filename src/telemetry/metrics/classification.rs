//! What is noted of a classification, however it ends.

use std::time::{Duration, Instant};

use metrics::{counter, histogram};

use super::{ModelLabels, table};
use crate::error::Error;

/// Of calls that were answered; images of theirs may have failed.
const OK: &str = "ok";
/// Of calls whose callers have left.
const CANCELLED: &str = "cancelled";
/// Of calls whose time was over.
const DEADLINE: &str = "deadline";

/// A classification under way. One that is dropped before its end was given up by its caller.
#[derive(Debug)]
pub struct Classification {
    started: Instant,
    labels: ModelLabels,
    /// When its caller gives up.
    deadline: Option<Instant>,
    /// Images without an outcome so far.
    open: u64,
    is_over: bool,
}

impl Classification {
    /// Of so many images, by a model that is not known yet.
    pub fn start(images: usize, deadline: Option<Instant>) -> Self {
        Self {
            started: Instant::now(),
            labels: ModelLabels::unknown(),
            deadline,
            open: images as u64,
            is_over: false,
        }
    }

    /// Says which model answers.
    pub fn by(&mut self, labels: ModelLabels) {
        self.labels = labels;
    }

    /// Notes an image that was answered.
    pub fn answered(&mut self, decode: Duration, queue: Duration) {
        self.open = self.open.saturating_sub(1);
        let labels = [("model", self.labels.model.clone())];
        histogram!(table::DECODE_DURATION.name, &labels).record(decode);
        histogram!(table::QUEUE_DURATION.name, &labels).record(queue);
    }

    /// Notes an image whose answer was known.
    pub fn recalled(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    /// Notes an image that failed by itself.
    pub fn failed(&mut self, error: &Error) {
        self.open = self.open.saturating_sub(1);
        let is_unreadable = matches!(error, Error::InvalidArgument { .. });
        let reason = if is_unreadable { "decode" } else { reason(error) };
        self.fail(reason, 1);
    }

    /// Notes that the call was answered.
    pub fn end(mut self) {
        self.over(OK);
    }

    /// Notes that the call was refused, with all of its images that have no outcome.
    pub fn refused(mut self, error: &Error) {
        self.over(reason(error));
    }

    fn over(&mut self, status: &'static str) {
        self.is_over = true;
        let ModelLabels { model, version } = self.labels.clone();
        let labels = [("model", model.clone()), ("version", version), ("status", status.into())];
        counter!(table::REQUESTS.name, &labels).increment(1);
        let time = self.started.elapsed();
        histogram!(table::REQUEST_DURATION.name, "model" => model).record(time);
        if self.open > 0 && status != OK {
            self.fail(status, self.open);
        }
    }

    fn fail(&self, reason: &'static str, images: u64) {
        let labels = [("model", self.labels.model.clone()), ("reason", reason.into())];
        counter!(table::FAILURES.name, &labels).increment(images);
    }
}

impl Drop for Classification {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        self.over(if is_late { DEADLINE } else { CANCELLED });
    }
}

/// An error as a label.
fn reason(error: &Error) -> &'static str {
    match error {
        Error::Overloaded { .. } | Error::QuotaExceeded { .. } => "queue_full",
        Error::Deadline | Error::DeadlineTooShort { .. } => DEADLINE,
        Error::Cancelled => CANCELLED,
        Error::InvalidArgument { .. } => "invalid",
        Error::NotFound { .. } => "not_found",
        Error::DeviceMemory { .. } => "oom",
        Error::Device { .. } | Error::DeviceLost => "device",
        Error::Draining | Error::Unavailable { .. } => "unavailable",
        Error::AlreadyExists { .. }
        | Error::FailedPrecondition { .. }
        | Error::Unloaded
        | Error::Busy { .. }
        | Error::WorkersDied { .. } => "precondition",
        Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => "denied",
        Error::CorruptArtifact { .. } | Error::Io { .. } | Error::Internal { .. } => "internal",
    }
}
