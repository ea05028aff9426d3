//! The only way from an [`Error`] to a gRPC status, with standard details that programs can read.

use std::collections::HashMap;
use std::time::Duration;

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _, pb};

use crate::error::{BadCredentials, Error};

/// Domain of every [`ErrorDetails`] reason.
const DOMAIN: &str = "vitq.dev";
/// Reason of an error that a full disk caused.
const DISK_FULL: &str = "DISK_FULL";
/// When a call that met an unreachable store should be tried again.
const RETRY_STORE: Duration = Duration::from_secs(5);
/// When a client of a draining server should try again: another one may answer at once.
const RETRY_ELSEWHERE: Duration = Duration::from_secs(1);

impl From<Error> for Status {
    /// Internal causes are logged here, under an id that the client gets instead of them.
    fn from(error: Error) -> Self {
        let id = ulid::Ulid::generate().to_string();
        let status = status(&error, &id);
        let is_ours = matches!(error, Error::Unavailable { .. });
        if is_ours || [Code::Internal, Code::DataLoss].contains(&status.code()) {
            tracing::error!(id, error = &error as &dyn std::error::Error, "call failed");
        }
        status
    }
}

/// The status of an error that was logged already under `id`.
pub(super) fn status(error: &Error, id: &str) -> Status {
    let (code, reason, mut details) = details(error);
    let mut metadata = HashMap::new();
    let message = if code == Code::Internal {
        details.set_request_info(id, "");
        metadata.insert("log_id".to_owned(), id.to_owned());
        format!("internal error, the server's log has it as {id}")
    } else if reason == DISK_FULL {
        "the server's disk is full".to_owned() // its path is nobody's business
    } else {
        if let Error::InvalidArgument { field, .. } = error {
            metadata.insert("field".to_owned(), field.clone());
        }
        if let Error::Busy { model, operation } = error {
            metadata.insert("model".to_owned(), model.clone());
            metadata.insert("operation".to_owned(), operation.clone());
        }
        if let Error::PermissionDenied { principal, needs } = error {
            metadata.insert("principal".to_owned(), principal.clone());
            metadata.insert("needs".to_owned(), needs.clone());
        }
        if let Error::Unavailable { what, .. } = error {
            metadata.insert("store".to_owned(), (*what).to_owned());
            format!("the {what} cannot be reached, try again") // its answer is for the log
        } else {
            error.to_string()
        }
    };
    details.set_error_info(reason, DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

/// The reason of a message beyond the server's limit.
pub(crate) const MESSAGE_TOO_LARGE: &str = "MESSAGE_TOO_LARGE";

/// What clients are told instead of a status without details, which only tonic and the services that
/// come with it make; `None` if that is no error.
pub(super) fn explained(bare: &Status) -> Option<Status> {
    let code = bare.code();
    let (code, reason) = if code == Code::Ok {
        return None;
    } else if [Code::OutOfRange, Code::ResourceExhausted].contains(&code) {
        // What it says of a message, as it comes or once it is decompressed.
        (Code::ResourceExhausted, MESSAGE_TOO_LARGE)
    } else if code == Code::Internal {
        (code, "MALFORMED_MESSAGE")
    } else {
        (code, code_name(code))
    };
    let message = match bare.message() {
        "" if code == Code::Unimplemented => "the server has no such call",
        other => other.strip_prefix("Error, decoded ").unwrap_or(other),
    };
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Some(Status::with_error_details(code, message, details))
}

/// gRPC's own name of a code.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// An item's error within a response, or a job's within an event.
pub(super) fn rpc_status(status: &Status) -> pb::Status {
    // The details of a status are such a message; without details there are no bytes.
    let details = pb::Status::decode(status.details()).map(|full| full.details);
    pb::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: details.unwrap_or_default(),
    }
}

fn details(error: &Error) -> (Code, String, ErrorDetails) {
    let none = ErrorDetails::new();
    match error {
        Error::InvalidArgument { field, reason } => (
            Code::InvalidArgument,
            "INVALID_ARGUMENT".to_owned(),
            ErrorDetails::with_bad_request_violation(field, reason),
        ),
        Error::NotFound { kind, name } => {
            (Code::NotFound, of_kind(kind, "NOT_FOUND"), resource(kind, name, error))
        }
        Error::AlreadyExists { kind, name } => {
            (Code::AlreadyExists, of_kind(kind, "ALREADY_EXISTS"), resource(kind, name, error))
        }
        Error::FailedPrecondition { .. } | Error::Unloaded => {
            (Code::FailedPrecondition, "FAILED_PRECONDITION".to_owned(), none)
        }
        Error::Overloaded { retry_after, .. } => (
            Code::ResourceExhausted,
            "QUEUE_FULL".to_owned(),
            ErrorDetails::with_retry_info(Some(*retry_after)),
        ),
        Error::QuotaExceeded { subject, reason } => (
            Code::ResourceExhausted,
            "QUOTA_EXCEEDED".to_owned(),
            ErrorDetails::with_quota_failure_violation(subject, reason),
        ),
        Error::Unauthenticated(credentials) => {
            let reason = match credentials {
                BadCredentials::Missing => "MISSING_TOKEN",
                BadCredentials::Invalid => "INVALID_TOKEN",
                BadCredentials::Expired => "EXPIRED_TOKEN",
            };
            (Code::Unauthenticated, reason.to_owned(), none)
        }
        Error::PermissionDenied { .. } => {
            (Code::PermissionDenied, "PERMISSION_DENIED".to_owned(), none)
        }
        Error::Cancelled => (Code::Cancelled, "CANCELLED".to_owned(), none),
        Error::Deadline => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".to_owned(), none),
        Error::DeadlineTooShort { .. } => {
            (Code::DeadlineExceeded, "DEADLINE_TOO_SHORT".to_owned(), none)
        }
        Error::DeviceMemory { .. } => (Code::ResourceExhausted, "GPU_MEMORY".to_owned(), none),
        Error::DeviceLost => (
            Code::Unavailable,
            "DEVICE_LOST".to_owned(),
            ErrorDetails::with_retry_info(Some(RETRY_ELSEWHERE)),
        ),
        Error::Draining => (
            Code::Unavailable,
            "DRAINING".to_owned(),
            ErrorDetails::with_retry_info(Some(RETRY_ELSEWHERE)),
        ),
        Error::Unavailable { .. } => (
            Code::Unavailable,
            "STORE_UNAVAILABLE".to_owned(),
            ErrorDetails::with_retry_info(Some(RETRY_STORE)),
        ),
        Error::Busy { .. } => (Code::Aborted, "MODEL_BUSY".to_owned(), none),
        Error::WorkersDied { .. } => (Code::Aborted, "WORKERS_DIED".to_owned(), none),
        Error::CorruptArtifact { path, .. } => {
            (Code::DataLoss, "CORRUPT_ARTIFACT".to_owned(), resource("artifact", path, error))
        }
        Error::Io { .. } if error.is_disk_full() => {
            (Code::ResourceExhausted, DISK_FULL.to_owned(), none)
        }
        Error::Io { .. } => (Code::Internal, "IO".to_owned(), none),
        Error::Device { .. } => (Code::Internal, "DEVICE".to_owned(), none),
        Error::Internal { .. } => (Code::Internal, "INTERNAL".to_owned(), none),
    }
}

fn of_kind(kind: &str, situation: &str) -> String {
    format!("{}_{situation}", kind.to_ascii_uppercase())
}

fn resource(kind: &str, name: &str, error: &Error) -> ErrorDetails {
    ErrorDetails::with_resource_info(kind, name, "", error.to_string())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn every_error() -> Vec<(Error, Code, &'static str)> {
        let name = || "x".to_owned();
        let io = |kind: io::ErrorKind| Error::io("/secret/path", kind.into());
        vec![
            (Error::invalid("a.b", "is bad"), Code::InvalidArgument, "INVALID_ARGUMENT"),
            (Error::NotFound { kind: "model", name: name() }, Code::NotFound, "MODEL_NOT_FOUND"),
            (
                Error::AlreadyExists { kind: "model", name: name() },
                Code::AlreadyExists,
                "MODEL_ALREADY_EXISTS",
            ),
            (
                Error::FailedPrecondition { reason: name() },
                Code::FailedPrecondition,
                "FAILED_PRECONDITION",
            ),
            (Error::Unloaded, Code::FailedPrecondition, "FAILED_PRECONDITION"),
            (
                Error::Overloaded { reason: name(), retry_after: Duration::from_millis(200) },
                Code::ResourceExhausted,
                "QUEUE_FULL",
            ),
            (
                Error::QuotaExceeded { subject: name(), reason: name() },
                Code::ResourceExhausted,
                "QUOTA_EXCEEDED",
            ),
            (BadCredentials::Missing.into(), Code::Unauthenticated, "MISSING_TOKEN"),
            (BadCredentials::Invalid.into(), Code::Unauthenticated, "INVALID_TOKEN"),
            (BadCredentials::Expired.into(), Code::Unauthenticated, "EXPIRED_TOKEN"),
            (
                Error::PermissionDenied { principal: name(), needs: name() },
                Code::PermissionDenied,
                "PERMISSION_DENIED",
            ),
            (Error::Cancelled, Code::Cancelled, "CANCELLED"),
            (
                Error::DeadlineTooShort { needed: Duration::from_secs(1) },
                Code::DeadlineExceeded,
                "DEADLINE_TOO_SHORT",
            ),
            (Error::DeviceMemory { reason: name() }, Code::ResourceExhausted, "GPU_MEMORY"),
            (Error::DeviceLost, Code::Unavailable, "DEVICE_LOST"),
            (Error::Deadline, Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (Error::Draining, Code::Unavailable, "DRAINING"),
            (
                Error::Unavailable { what: "database", reason: "secret".into() },
                Code::Unavailable,
                "STORE_UNAVAILABLE",
            ),
            (Error::Busy { model: name(), operation: name() }, Code::Aborted, "MODEL_BUSY"),
            (Error::WorkersDied { workers: 3 }, Code::Aborted, "WORKERS_DIED"),
            (Error::corrupt("d", "flipped"), Code::DataLoss, "CORRUPT_ARTIFACT"),
            (io(io::ErrorKind::StorageFull), Code::ResourceExhausted, "DISK_FULL"),
            (io(io::ErrorKind::PermissionDenied), Code::Internal, "IO"),
            (
                Error::Device { source: tch::TchError::Torch("secret".into()) },
                Code::Internal,
                "DEVICE",
            ),
            (Error::internal("secret"), Code::Internal, "INTERNAL"),
        ]
    }

    #[test]
    fn every_error_has_a_code_a_reason_and_a_domain() {
        for (error, code, reason) in every_error() {
            let status = status(&error, "id");
            let info = status.get_details_error_info().unwrap();
            assert_eq!((status.code(), info.reason.as_str()), (code, reason), "{error}");
            assert_eq!(info.domain, DOMAIN);
            assert!(status.details().len() < 4096);
        }
    }

    #[test]
    fn internal_causes_stay_in_the_log() {
        for (error, code, _) in every_error() {
            let status = Status::from(error);
            assert!(!status.message().contains("secret"), "{status}");
            if code == Code::Internal {
                let id = status.get_details_request_info().unwrap().request_id;
                assert!(status.message().contains(&id));
            }
        }
    }

    #[test]
    fn fields_retries_and_resources_are_machine_readable() {
        let status = Status::from(Error::invalid("images[3].content", "is empty"));
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "images[3].content");
        let overloaded =
            Error::Overloaded { reason: String::new(), retry_after: Duration::from_secs(2) };
        let retry = Status::from(overloaded).get_details_retry_info().unwrap();
        assert_eq!(retry.retry_delay, Some(Duration::from_secs(2)));
        let missing = Error::NotFound { kind: "model", name: "a".into() };
        let resource = Status::from(missing).get_details_resource_info().unwrap();
        assert_eq!((&*resource.resource_type, &*resource.resource_name), ("model", "a"));
    }

    #[test]
    fn an_items_error_keeps_its_details() {
        let status = Status::from(Error::invalid("images[0].content", "is empty"));
        let rpc = rpc_status(&status);
        assert_eq!(rpc.code, i32::from(Code::InvalidArgument));
        assert_eq!(rpc.details.len(), 2);
    }
}
