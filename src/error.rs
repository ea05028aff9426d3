//! The one error type of the crate: variants name the caller's situation, not the place that failed.
//!
//! `grpc/status.rs` maps every variant to a gRPC status; the CLI prints the `Display` text.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with a caller's proof of who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCredentials {
    /// There is none.
    #[error("a bearer token, or a client certificate, is needed")]
    Missing,
    /// It is not one that this server believes; what exactly is wrong is the server's affair.
    #[error("the token or certificate is not valid here")]
    Invalid,
    /// It was valid once.
    #[error("the token has expired")]
    Expired,
}

/// What went wrong, from the caller's point of view.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value the caller gave is unusable; `field` is the request field or flag at fault.
    #[error("{field}: {reason}")]
    InvalidArgument {
        /// Request field (`images[3].content`, `options.groups`, `checkpoint`, ...).
        field: String,
        /// Why the value is refused, as a lower-case sentence without a full stop.
        reason: String,
    },
    /// A named thing does not exist.
    #[error("{kind} `{name}` does not exist")]
    NotFound {
        /// What was looked for: `model`, `checkpoint`, `dataset`, `operation`, ...
        kind: &'static str,
        /// The name that was given.
        name: String,
    },
    /// The name is taken by something else.
    #[error("{kind} `{name}` already exists")]
    AlreadyExists {
        /// What was to be created.
        kind: &'static str,
        /// The name that is taken.
        name: String,
    },
    /// The system is not in the state that the call needs (retrying unchanged will not help).
    #[error("{reason}")]
    FailedPrecondition {
        /// Which state is missing.
        reason: String,
    },
    /// The model left its device before the work's turn came.
    #[error("the model was unloaded while the call was on its way")]
    Unloaded,
    /// A queue or a limit is full; the call may be retried after the given time.
    #[error("{reason}")]
    Overloaded {
        /// Which limit was met.
        reason: String,
        /// When a retry is worthwhile.
        retry_after: Duration,
    },
    /// A quota is used up; somebody has to make room.
    #[error("{reason}")]
    QuotaExceeded {
        /// Whose quota: `uploads`, `client:ADDRESS`.
        subject: String,
        /// Which quota, and by how much.
        reason: String,
    },
    /// The caller does not say, or cannot show, who it is.
    #[error(transparent)]
    Unauthenticated(#[from] BadCredentials),
    /// The caller may not do this.
    #[error("{principal} may not do this: it needs {needs}")]
    PermissionDenied {
        /// Who it is.
        principal: String,
        /// What would help: `scope admin`, ...
        needs: String,
    },
    /// The caller, or someone on the caller's behalf, cancelled the work.
    #[error("cancelled")]
    Cancelled,
    /// The caller's deadline passed.
    #[error("deadline exceeded")]
    Deadline,
    /// The caller's deadline would pass before an answer can be there.
    #[error("an answer takes {needed:?}, longer than the call may take")]
    DeadlineTooShort {
        /// Time of the calculation alone.
        needed: Duration,
    },
    /// A device has too little memory for the work; waiting does not help by itself.
    #[error("{reason}")]
    DeviceMemory {
        /// What is too large for what.
        reason: String,
    },
    /// A device has failed for good; another process may have another one.
    #[error("the device is lost")]
    DeviceLost,
    /// A store that the work needs cannot be reached now; the call may be retried.
    #[error("the {what} is unavailable: {reason}")]
    Unavailable {
        /// `database`, `artifact store`.
        what: &'static str,
        /// What it answered, for the log.
        reason: String,
    },
    /// Another job is at work on the same thing.
    #[error("operation `{operation}` is making model `{model}`")]
    Busy {
        /// The model id.
        model: String,
        /// The other job's operation.
        operation: String,
    },
    /// A job ended because too many workers fell silent over it.
    #[error("{workers} workers died over this job, it is not tried again")]
    WorkersDied {
        /// How many.
        workers: u32,
    },
    /// The server is shutting down.
    #[error("the server is draining")]
    Draining,
    /// A stored file does not hold what was written.
    #[error("{path}: {reason}")]
    CorruptArtifact {
        /// The artifact's path or digest.
        path: String,
        /// What does not match.
        reason: String,
    },
    /// libtorch refused an operation (shape, memory, device).
    #[error("device: {source}")]
    Device {
        /// libtorch's own error.
        #[from]
        source: tch::TchError,
    },
    /// The operating system refused a file operation.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A broken invariant of this program.
    #[error("internal error: {reason}")]
    Internal {
        /// What was found broken.
        reason: String,
    },
}

impl Error {
    /// An unusable value of the request field or flag `field`.
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidArgument { field: field.into(), reason: reason.into() }
    }

    /// The same refusal on another field, for a value that came by another name.
    #[must_use]
    pub fn on_field(self, field: &str) -> Self {
        if let Self::InvalidArgument { reason, .. } = self {
            return Self::invalid(field, reason);
        }
        self
    }

    /// A file operation on `path` that failed.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// An artifact whose content is not what was stored.
    pub fn corrupt(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::CorruptArtifact { path: path.into(), reason: reason.into() }
    }

    /// The same error once more, for several callers that wait for one piece of work. Sources are
    /// reduced to what the client sees of them.
    #[must_use]
    pub fn replica(&self) -> Self {
        match self {
            Self::InvalidArgument { field, reason } => Self::invalid(field, reason),
            Self::NotFound { kind, name } => Self::NotFound { kind, name: name.clone() },
            Self::AlreadyExists { kind, name } => Self::AlreadyExists { kind, name: name.clone() },
            Self::FailedPrecondition { reason } => {
                Self::FailedPrecondition { reason: reason.clone() }
            }
            Self::Unloaded => Self::Unloaded,
            Self::Overloaded { reason, retry_after } => {
                Self::Overloaded { reason: reason.clone(), retry_after: *retry_after }
            }
            Self::QuotaExceeded { subject, reason } => {
                Self::QuotaExceeded { subject: subject.clone(), reason: reason.clone() }
            }
            Self::Unauthenticated(reason) => Self::Unauthenticated(*reason),
            Self::PermissionDenied { principal, needs } => {
                Self::PermissionDenied { principal: principal.clone(), needs: needs.clone() }
            }
            Self::Cancelled => Self::Cancelled,
            Self::Deadline => Self::Deadline,
            Self::DeadlineTooShort { needed } => Self::DeadlineTooShort { needed: *needed },
            Self::DeviceMemory { reason } => Self::DeviceMemory { reason: reason.clone() },
            Self::DeviceLost => Self::DeviceLost,
            Self::Draining => Self::Draining,
            Self::Unavailable { what, reason } => {
                Self::Unavailable { what, reason: reason.clone() }
            }
            Self::Busy { model, operation } => {
                Self::Busy { model: model.clone(), operation: operation.clone() }
            }
            Self::WorkersDied { workers } => Self::WorkersDied { workers: *workers },
            Self::CorruptArtifact { path, reason } => Self::corrupt(path, reason),
            Self::Device { source } => {
                Self::Device { source: tch::TchError::Torch(source.to_string()) }
            }
            Self::Io { path, source } => Self::io(path, source.kind().into()),
            Self::Internal { reason } => Self::internal(reason),
        }
    }

    /// Whether a full disk, or a quota, is the cause.
    pub fn is_disk_full(&self) -> bool {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. }
            if [StorageFull, QuotaExceeded, FileTooLarge].contains(&source.kind()))
    }

    /// A broken invariant.
    pub fn internal(reason: impl Into<String>) -> Self {
        Self::Internal { reason: reason.into() }
    }
}
