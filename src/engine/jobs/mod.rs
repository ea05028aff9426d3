//! Jobs: long work that outlives the call that started it, with numbered events.
//!
//! [`JobStore`] keeps them in a database, [`JobRunner`] runs them on worker threads, `quantize` and
//! `evaluate` are what they do.

mod evaluate;
mod progress;
mod quantize;
mod runner;
mod spec;
mod store;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::artifact::store::ModelRecord;
use crate::calib::progress::SiteSqnr;
use crate::engine::evaluator::Metrics;
use crate::engine::names::ModelId;
use crate::error::{Error, Result};
use crate::telemetry::TraceContext;

pub use runner::{JobRunner, RunnerParts};
pub use spec::{Afterwards, EvaluateJob, ImageChoice, JobSpec, QuantizeJob};
pub(super) use store::standing_of;
pub use store::{
    Claimed, JobFilter, JobLimits, JobStore, Lease, Shard, ShardLease, ShardWorker, Standing,
    Workload,
};

/// Identifies a job: a ULID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct JobId(String);

impl JobId {
    /// A new id. Those of one process sort in the order they were made, those of several up to
    /// their clocks.
    fn new() -> Self {
        static GENERATOR: Mutex<ulid::Generator> = Mutex::new(ulid::Generator::new());
        let mut generator = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        let id = generator.generate().unwrap_or_else(|full| full.commit_overflow_increment());
        Self(id.to_string())
    }

    /// An id that a client gave. Unknown ones are found out by the store.
    pub fn given(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The job's name on the wire.
    pub fn operation(&self) -> String {
        format!("operations/{self}")
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Waiting for a worker.
    Queued,
    /// A worker computes.
    Running,
    /// Asked to stop while running.
    Cancelling,
    /// Ended with a result.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Ended because somebody asked for it.
    Cancelled,
}

impl JobState {
    const ALL: [Self; 6] = [
        Self::Queued,
        Self::Running,
        Self::Cancelling,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The state as text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of that [`JobState::name`].
    ///
    /// # Errors
    /// `InvalidArgument` on `state`.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::invalid("state", format!("must be one of {names}"))
        })
    }

    /// Where a job stands that ended this way.
    fn of(outcome: &JobOutcome) -> Self {
        match outcome {
            Ok(_) => Self::Succeeded,
            Err(error) if matches!(**error, Error::Cancelled) => Self::Cancelled,
            Err(_) => Self::Failed,
        }
    }

    /// Whether the job has ended.
    pub fn is_done(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// A job as the store knows it.
#[derive(Clone, Debug)]
pub struct JobRecord {
    /// The job's id.
    pub id: JobId,
    /// What it does.
    pub spec: Arc<JobSpec>,
    /// Where it stands.
    pub state: JobState,
    /// When it was accepted.
    pub created: Timestamp,
    /// When a worker took it.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// When something last happened to it.
    pub updated: Timestamp,
    /// The latest progress.
    pub progress: Option<JobProgress>,
    /// Number of the newest event.
    pub last_sequence: u64,
    /// How it ended.
    pub outcome: Option<JobOutcome>,
    /// How often a worker took it.
    pub attempt: u64,
    /// Who runs it: machine and process; `None` unless it is running.
    pub worker: Option<String>,
    /// The call that asked for it.
    pub trace: Option<TraceContext>,
}

/// How a job ended.
pub type JobOutcome = std::result::Result<Arc<JobOutput>, Arc<Error>>;

/// What a job gave.
#[derive(Clone, Debug)]
pub enum JobOutput {
    /// Of a [`QuantizeJob`]: the model as it was stored.
    Quantized(Arc<ModelRecord>),
    /// Of an [`EvaluateJob`].
    Evaluated(Evaluation),
}

/// A finished evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// The model.
    pub model: ModelId,
    /// Digest of the artifact that was evaluated.
    pub model_version: String,
    /// Name of the data set.
    pub dataset: String,
    /// The figures.
    pub figures: Figures,
    /// Remarks.
    pub warnings: Vec<String>,
}

/// Figures of an evaluation, final or so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Accuracy and fidelity.
    pub metrics: Metrics,
    /// Images per second, decoding included.
    pub images_per_second: f64,
}

/// Progress of a job.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct JobProgress {
    /// What is being done.
    pub stage: String,
    /// Units done within the stage.
    pub unit: usize,
    /// Units of the stage; 0 if it has none.
    pub units: usize,
    /// Images seen so far; of an evaluation never fewer than were told before.
    pub images: usize,
    /// Images in all.
    pub images_total: usize,
    /// Time since a worker took the job.
    pub elapsed: Duration,
    /// Expected time to the end of the stage.
    pub eta: Option<Duration>,
    /// Operands finished since the previous progress.
    pub sites: Vec<SiteSqnr>,
    /// Loss of the latest iteration, where something is learned.
    #[serde(default)]
    pub loss: Option<f64>,
    /// What went wrong so far without ending the job.
    #[serde(default, with = "store::failures")]
    pub warnings: Vec<Arc<Error>>,
    /// Figures so far, of an evaluation.
    pub figures: Option<Figures>,
}

/// A numbered event of a job.
#[derive(Clone, Debug)]
pub struct JobEvent {
    /// Position in the job's history, from 1.
    pub sequence: u64,
    /// When it happened.
    pub time: Timestamp,
    /// What happened.
    pub kind: JobEventKind,
}

/// What happened to a job.
#[derive(Clone, Debug)]
pub enum JobEventKind {
    /// It was accepted.
    Accepted,
    /// It goes on.
    Progress(Box<JobProgress>),
    /// It ended. Nothing follows.
    Ended(JobOutcome),
    /// Nothing happened for a while. Told to watchers, never stored; carries the number of the event
    /// before it.
    Heartbeat,
}

/// A job to be stored.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What it does.
    pub spec: JobSpec,
    /// The client's id of the call; a repeated one finds the same job.
    pub request_id: Option<String>,
    /// Larger ones go first.
    pub priority: i32,
    /// Who asks: what quotas are counted by.
    pub principal: String,
    /// The call that asks.
    pub trace: Option<TraceContext>,
}

/// What [`JobStore::submit`] did.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// The job.
    pub id: JobId,
    /// Whether it is new, or an earlier call's.
    pub novelty: Novelty,
}

/// Whether a submission made a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Novelty {
    /// It did.
    New,
    /// An earlier call had made it: one with the same request id, or one for the same work.
    Replayed,
}
