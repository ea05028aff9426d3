//! Outcomes as JSON in the database, and back.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::broken;
use crate::artifact::store::ModelRecord;
use crate::engine::jobs::{Evaluation, JobOutcome, JobOutput};
use crate::error::{Error, Result};

pub(super) fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::internal(format!("as JSON: {error}")))
}

pub(super) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        tracing::error!(%error, "unreadable JSON in the database");
        broken()
    })
}

pub(super) fn outcome_to_json(outcome: &JobOutcome) -> Result<String> {
    to_json(&match outcome.as_deref() {
        Ok(JobOutput::Quantized(record)) => Stored::Quantized(Box::new((**record).clone())),
        Ok(JobOutput::Evaluated(evaluation)) => Stored::Evaluated(evaluation.clone()),
        Err(error) => Stored::Failed(Failure::from(&**error)),
    })
}

pub(super) fn outcome_from_json(text: &str) -> Result<JobOutcome> {
    Ok(match from_json(text)? {
        Stored::Quantized(record) => Ok(Arc::new(JobOutput::Quantized(Arc::from(record)))),
        Stored::Evaluated(evaluation) => Ok(Arc::new(JobOutput::Evaluated(evaluation))),
        Stored::Failed(failure) => Err(Arc::new(failure.into())),
    })
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stored {
    Quantized(Box<ModelRecord>),
    Evaluated(Evaluation),
    Failed(Failure),
}

/// An [`Error`] as its clients see it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Failure {
    InvalidArgument { field: String, reason: String },
    NotFound { kind: String, name: String },
    AlreadyExists { kind: String, name: String },
    FailedPrecondition { reason: String },
    Overloaded { reason: String, retry_after: Duration },
    QuotaExceeded { subject: String, reason: String },
    Cancelled,
    Deadline,
    DeadlineTooShort { needed: Duration },
    DeviceMemory { reason: String },
    DeviceLost,
    Draining,
    Unavailable { reason: String },
    Busy { model: String, operation: String },
    WorkersDied { workers: u32 },
    CorruptArtifact { path: String, reason: String },
    Device { reason: String },
    DiskFull { path: String },
    Io { path: String, reason: String },
    Internal { reason: String },
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error {
            Error::InvalidArgument { field, reason } => {
                Self::InvalidArgument { field: field.clone(), reason: reason.clone() }
            }
            Error::NotFound { kind, name } => {
                Self::NotFound { kind: (*kind).to_owned(), name: name.clone() }
            }
            Error::AlreadyExists { kind, name } => {
                Self::AlreadyExists { kind: (*kind).to_owned(), name: name.clone() }
            }
            Error::FailedPrecondition { reason } => {
                Self::FailedPrecondition { reason: reason.clone() }
            }
            Error::Overloaded { reason, retry_after } => {
                Self::Overloaded { reason: reason.clone(), retry_after: *retry_after }
            }
            Error::QuotaExceeded { subject, reason } => {
                Self::QuotaExceeded { subject: subject.clone(), reason: reason.clone() }
            }
            // Calls are refused so, never jobs.
            Error::Unauthenticated(_) | Error::PermissionDenied { .. } | Error::Unloaded => {
                Self::FailedPrecondition { reason: error.to_string() }
            }
            Error::Cancelled => Self::Cancelled,
            Error::Deadline => Self::Deadline,
            Error::DeadlineTooShort { needed } => Self::DeadlineTooShort { needed: *needed },
            Error::DeviceMemory { reason } => Self::DeviceMemory { reason: reason.clone() },
            Error::DeviceLost => Self::DeviceLost,
            Error::Draining => Self::Draining,
            Error::Unavailable { what: _, reason } => Self::Unavailable { reason: reason.clone() },
            Error::Busy { model, operation } => {
                Self::Busy { model: model.clone(), operation: operation.clone() }
            }
            Error::WorkersDied { workers } => Self::WorkersDied { workers: *workers },
            Error::CorruptArtifact { path, reason } => {
                Self::CorruptArtifact { path: path.clone(), reason: reason.clone() }
            }
            Error::Device { source: tch::TchError::Torch(reason) } => {
                Self::Device { reason: reason.clone() }
            }
            Error::Device { source } => Self::Device { reason: source.to_string() },
            Error::Io { path, .. } if error.is_disk_full() => {
                Self::DiskFull { path: path.display().to_string() }
            }
            Error::Io { path, source } => {
                Self::Io { path: path.display().to_string(), reason: source.to_string() }
            }
            Error::Internal { reason } => Self::Internal { reason: reason.clone() },
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::InvalidArgument { field, reason } => Self::InvalidArgument { field, reason },
            Failure::NotFound { kind, name } => Self::NotFound { kind: known(&kind), name },
            Failure::AlreadyExists { kind, name } => {
                Self::AlreadyExists { kind: known(&kind), name }
            }
            Failure::FailedPrecondition { reason } => Self::FailedPrecondition { reason },
            Failure::Overloaded { reason, retry_after } => Self::Overloaded { reason, retry_after },
            Failure::QuotaExceeded { subject, reason } => Self::QuotaExceeded { subject, reason },
            Failure::Cancelled => Self::Cancelled,
            Failure::Deadline => Self::Deadline,
            Failure::DeadlineTooShort { needed } => Self::DeadlineTooShort { needed },
            Failure::DeviceMemory { reason } => Self::DeviceMemory { reason },
            Failure::DeviceLost => Self::DeviceLost,
            Failure::Draining => Self::Draining,
            Failure::Unavailable { reason } => Self::Unavailable { what: "store", reason },
            Failure::Busy { model, operation } => Self::Busy { model, operation },
            Failure::WorkersDied { workers } => Self::WorkersDied { workers },
            Failure::CorruptArtifact { path, reason } => Self::CorruptArtifact { path, reason },
            Failure::Device { reason } => Self::Device { source: tch::TchError::Torch(reason) },
            Failure::DiskFull { path } => Self::io(path, io::ErrorKind::StorageFull.into()),
            Failure::Io { path, reason } => Self::io(path, io::Error::other(reason)),
            Failure::Internal { reason } => Self::Internal { reason },
        }
    }
}

/// Errors within other JSON.
pub(in crate::engine::jobs) mod failures {
    use std::sync::Arc;

    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::Failure;
    use crate::error::Error;

    pub(in crate::engine::jobs) fn serialize<S: Serializer>(
        errors: &[Arc<Error>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(errors.iter().map(|error| Failure::from(&**error)))
    }

    pub(in crate::engine::jobs) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Arc<Error>>, D::Error> {
        let failures = Vec::<Failure>::deserialize(deserializer)?;
        Ok(failures.into_iter().map(|failure| Arc::new(failure.into())).collect())
    }
}

/// The kinds of things that errors name.
fn known(kind: &str) -> &'static str {
    const KINDS: [&str; 6] = ["artifact", "checkpoint", "dataset", "image", "model", "operation"];
    KINDS.into_iter().find(|known| *known == kind).unwrap_or("resource")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_what_they_were() {
        let text = || "text".to_owned();
        let second = Duration::from_secs(1);
        let errors = [
            Error::invalid("field", "reason"),
            Error::NotFound { kind: "checkpoint", name: text() },
            Error::AlreadyExists { kind: "model", name: text() },
            Error::FailedPrecondition { reason: text() },
            Error::Overloaded { reason: text(), retry_after: second },
            Error::QuotaExceeded { subject: text(), reason: text() },
            Error::Cancelled,
            Error::Deadline,
            Error::DeadlineTooShort { needed: second },
            Error::DeviceMemory { reason: text() },
            Error::DeviceLost,
            Error::Draining,
            Error::Unavailable { what: "store", reason: text() },
            Error::Busy { model: text(), operation: text() },
            Error::WorkersDied { workers: 3 },
            Error::corrupt("path", "reason"),
            Error::Device { source: tch::TchError::Torch(text()) },
            Error::io("path", io::ErrorKind::StorageFull.into()),
            Error::io("path", io::Error::other("text")),
            Error::internal("reason"),
        ];
        for error in errors {
            let error = Arc::new(error);
            let json = outcome_to_json(&Err(Arc::clone(&error))).unwrap();
            let again = outcome_from_json(&json).unwrap().unwrap_err();
            assert_eq!(again.to_string(), error.to_string());
            assert_eq!(again.is_disk_full(), error.is_disk_full());
            assert_eq!(std::mem::discriminant(&*again), std::mem::discriminant(&*error), "{json}");
        }
    }
}
