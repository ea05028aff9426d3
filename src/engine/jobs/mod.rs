//! Jobs: long work that outlives the call that started it, with numbered events.
//!
//! [`JobStore`] keeps them, [`JobRunner`] runs them on worker threads, [`quantize`] and
//! [`evaluate`] are what they do.

mod evaluate;
mod memory;
mod progress;
mod quantize;
mod runner;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use crate::artifact::store::digest;
use crate::calib::progress::SiteSqnr;
use crate::calib::task::QuantizeSpec;
use crate::engine::evaluator::Metrics;
use crate::engine::names::ModelId;
use crate::engine::registry::ModelView;
use crate::error::{Error, Result};

pub use memory::MemoryJobStore;
pub use runner::{JobRunner, RunnerParts};

/// Identifies a job: a ULID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct JobId(String);

impl JobId {
    /// A new id; later ones sort behind earlier ones, up to the millisecond.
    fn new() -> Self {
        Self(ulid::Ulid::generate().to_string())
    }

    /// An id that a client gave. Unknown ones are found out by the store.
    pub fn given(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a job does.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum JobSpec {
    /// Calibrate a checkpoint and store the result.
    Quantize(QuantizeJob),
    /// Measure a model on a data set.
    Evaluate(EvaluateJob),
}

/// A quantization to run.
#[derive(Clone, Debug, Serialize)]
pub struct QuantizeJob {
    /// Id of the new model.
    pub model: ModelId,
    /// Name of the checkpoint.
    pub checkpoint: String,
    /// Method, options, bits, policy, seed.
    pub request: QuantizeSpec,
    /// Which images calibrate it.
    pub images: ImageChoice,
    /// Labels to keep with the model.
    pub labels: BTreeMap<String, String>,
    /// What happens once the model is stored.
    pub afterwards: Afterwards,
}

/// What happens to a model once it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Afterwards {
    /// Nothing; the first call loads it.
    Keep,
    /// It is loaded on a device.
    Load,
}

/// Which images calibrate a model.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageChoice {
    /// So many images of a data set, drawn by the request's seed.
    Drawn {
        /// Name of the data set.
        dataset: String,
        /// Number of images.
        count: usize,
    },
    /// Exactly these images of a data set.
    Listed {
        /// Name of the data set.
        dataset: String,
        /// Paths relative to its folder.
        files: Vec<String>,
    },
    /// Images that came with the request.
    Inline {
        /// sha256 of each, in order: what identifies the request.
        digests: Vec<String>,
        /// The encoded images; given up when the job ends.
        #[serde(skip)]
        contents: Vec<Bytes>,
    },
}

impl ImageChoice {
    /// Images that came with the request.
    pub fn inline(contents: Vec<Bytes>) -> Self {
        Self::Inline { digests: contents.iter().map(|c| digest(c)).collect(), contents }
    }
}

/// An evaluation to run.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluateJob {
    /// The model.
    pub model: ModelId,
    /// Name of the data set.
    pub dataset: String,
    /// Number of images to draw; `None` evaluates all.
    pub limit: Option<usize>,
    /// Seed of the draw.
    pub seed: u64,
}

impl JobSpec {
    /// `quantize` or `evaluate`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Quantize(_) => "quantize",
            Self::Evaluate(_) => "evaluate",
        }
    }

    /// The model that the job makes or reads.
    pub fn model(&self) -> &ModelId {
        match self {
            Self::Quantize(job) => &job.model,
            Self::Evaluate(job) => &job.model,
        }
    }

    /// The model id that nobody else may make while this job is under way.
    pub fn target(&self) -> Option<&ModelId> {
        match self {
            Self::Quantize(job) => Some(&job.model),
            Self::Evaluate(_) => None,
        }
    }

    /// Equal for equal requests.
    ///
    /// # Errors
    /// `Internal` when the request cannot be written as JSON.
    pub fn fingerprint(&self) -> Result<String> {
        let json = serde_json::to_vec(self)
            .map_err(|error| Error::internal(format!("job as JSON: {error}")))?;
        Ok(digest(&json))
    }

    /// The request without the images that came with it.
    fn without_contents(&self) -> Self {
        let mut spec = self.clone();
        if let Self::Quantize(QuantizeJob {
            images: ImageChoice::Inline { contents, .. }, ..
        }) = &mut spec
        {
            contents.clear();
        }
        spec
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
    /// The latest progress.
    pub progress: Option<JobProgress>,
    /// Number of the newest event.
    pub last_sequence: u64,
    /// How it ended.
    pub outcome: Option<JobOutcome>,
}

/// How a job ended.
pub type JobOutcome = std::result::Result<Arc<JobOutput>, Arc<Error>>;

/// What a job gave.
#[derive(Clone, Debug)]
pub enum JobOutput {
    /// Of a [`QuantizeJob`].
    Quantized(ModelView),
    /// Of an [`EvaluateJob`].
    Evaluated(Evaluation),
}

/// A finished evaluation.
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Accuracy and fidelity.
    pub metrics: Metrics,
    /// Images per second, decoding included.
    pub images_per_second: f64,
}

/// Progress of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobProgress {
    /// What is being done.
    pub stage: String,
    /// Units done within the stage.
    pub unit: usize,
    /// Units of the stage; 0 if it has none.
    pub units: usize,
    /// Images seen so far.
    pub images: usize,
    /// Images in all.
    pub images_total: usize,
    /// Time since a worker took the job.
    pub elapsed: Duration,
    /// Expected time to the end of the stage.
    pub eta: Option<Duration>,
    /// Operands finished since the previous progress.
    pub sites: Vec<SiteSqnr>,
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
    Progress(JobProgress),
    /// It ended. Nothing follows.
    Ended(JobOutcome),
}

/// A job to be stored.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What it does.
    pub spec: JobSpec,
    /// The client's id of the call; a repeated one finds the same job.
    pub request_id: Option<String>,
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
    /// An earlier call with the same request id had made it.
    Replayed,
}

/// Keeps jobs and their events.
#[async_trait]
pub trait JobStore: Send + Sync + fmt::Debug {
    /// The job that an earlier call with this request id made.
    ///
    /// # Errors
    /// `InvalidArgument` on `request_id` when that call asked for something else.
    async fn find_request(&self, request_id: &str, fingerprint: &str) -> Result<Option<JobId>>;

    /// Adds a job as queued, with its first event.
    ///
    /// # Errors
    /// As [`JobStore::find_request`]; `AlreadyExists` while another job makes the same model;
    /// `Overloaded` when too many jobs wait.
    async fn submit(&self, job: NewJob) -> Result<Submitted>;

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    async fn get(&self, id: &JobId) -> Result<JobRecord>;

    /// At most `count` jobs, newest first, that are older than `before`.
    ///
    /// # Errors
    /// `Io` when the store cannot be read.
    async fn list(&self, before: Option<&JobId>, count: usize) -> Result<Vec<JobRecord>>;

    /// Forgets a job that has ended.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it has not ended.
    async fn delete(&self, id: &JobId) -> Result<()>;

    /// Takes the oldest queued job, which is running from now on.
    ///
    /// # Errors
    /// `Io` when the store cannot be read.
    async fn claim(&self) -> Result<Option<JobRecord>>;

    /// Notes that a job is to stop. A queued one ends at once, one that has ended stays as it is.
    ///
    /// # Errors
    /// `NotFound`.
    async fn request_cancel(&self, id: &JobId) -> Result<()>;

    /// Adds a progress event.
    ///
    /// # Errors
    /// `NotFound`.
    async fn report(&self, id: &JobId, progress: JobProgress) -> Result<()>;

    /// Ends a job, with its last event.
    ///
    /// # Errors
    /// `NotFound`.
    async fn finish(&self, id: &JobId, outcome: JobOutcome) -> Result<()>;

    /// Events with a larger sequence number than `after`, in order. Of a long history the oldest
    /// progress may be missing.
    ///
    /// # Errors
    /// `NotFound`.
    async fn events(&self, id: &JobId, after: u64) -> Result<Vec<JobEvent>>;

    /// Wakes at every new event of a job; the value is the newest sequence number.
    ///
    /// # Errors
    /// `NotFound`.
    async fn changes(&self, id: &JobId) -> Result<watch::Receiver<u64>>;
}
