//! Job events as streams of proto messages: what quantization and evaluation share.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::fields::{count, duration};
use super::proto;
use super::status::{rpc_status, status};
use crate::calib::progress::SiteSqnr;
use crate::engine::jobs::{
    JobEvent, JobId, JobOutcome, JobOutput, JobProgress, JobRunner, NewJob, Novelty, Submitted,
};
use crate::error::{Error, Result};

/// A stream of response messages.
pub(super) type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Collection of operation names.
const COLLECTION: &str = "operations/";

/// The job of a name on the wire.
///
/// # Errors
/// `InvalidArgument` on `name`.
pub(super) fn job_id(name: &str) -> Result<JobId> {
    match name.strip_prefix(COLLECTION) {
        Some(id) if !id.is_empty() => Ok(JobId::given(id)),
        _ => Err(Error::invalid("name", "an operation is named `operations/<id>`")),
    }
}

/// What a stream needs to turn a job's events into its own messages.
#[derive(Debug)]
pub(super) struct EventSource {
    /// Who runs it.
    pub(super) jobs: Arc<JobRunner>,
    /// Name of the operation.
    pub(super) operation: String,
    /// Whether an earlier call had made the job.
    pub(super) replayed: bool,
}

/// Submits a job and streams its events, each through `convert`.
///
/// # Errors
/// As [`JobRunner::submit`].
pub(super) async fn submit<T: 'static>(
    jobs: &Arc<JobRunner>,
    job: NewJob,
    convert: fn(&EventSource, JobEvent) -> T,
) -> Result<Messages<T>> {
    let Submitted { id, novelty } = jobs.submit(job).await?;
    let events = jobs.watch(&id, 0).await?;
    let replayed = novelty == Novelty::Replayed;
    let source = EventSource { jobs: Arc::clone(jobs), operation: id.operation(), replayed };
    Ok(convert_all(events, source, convert))
}

/// Streams the events of the job of `kind` that a client names, from where it broke off.
///
/// # Errors
/// `NotFound`; `InvalidArgument` on `name` for a job of another kind.
pub(super) async fn watch<T: 'static>(
    jobs: &Arc<JobRunner>,
    request: proto::WatchRequest,
    kind: &str,
    convert: fn(&EventSource, JobEvent) -> T,
) -> Result<Messages<T>> {
    let proto::WatchRequest { name, after_sequence } = request;
    let id = job_id(&name)?;
    let found = jobs.store().get(&id).await?.spec.kind();
    if found != kind {
        return Err(Error::invalid("name", format!("this is a job of kind {found}, not {kind}")));
    }
    let events = jobs.watch(&id, after_sequence).await?;
    let source = EventSource { jobs: Arc::clone(jobs), operation: name, replayed: false };
    Ok(convert_all(events, source, convert))
}

/// The stream of one message: the request is fine.
pub(super) fn only<T: Send + 'static>(message: T) -> Messages<T> {
    Box::pin(tokio_stream::once(Ok(message)))
}

fn convert_all<T: 'static>(
    events: tokio::sync::mpsc::Receiver<Result<JobEvent>>,
    source: EventSource,
    convert: fn(&EventSource, JobEvent) -> T,
) -> Messages<T> {
    let converted =
        move |event: Result<JobEvent>| Ok(convert(&source, event.map_err(Status::from)?));
    Box::pin(ReceiverStream::new(events).map(converted))
}

/// How a job ended, as a message of its kind or an error.
pub(super) fn ended<T>(
    source: &EventSource,
    outcome: JobOutcome,
    of_kind: fn(&JobRunner, &JobOutput) -> Option<T>,
) -> std::result::Result<T, tonic_types::pb::Status> {
    let error = |error: &Error| rpc_status(&status(error, &source.operation));
    match outcome {
        Ok(output) => of_kind(&source.jobs, &output)
            .ok_or_else(|| error(&Error::internal("output of another kind"))),
        // The cause was logged, under the operation's name, when the job ended.
        Err(cause) => Err(error(&cause)),
    }
}

/// Progress of an operation, without the figures of an evaluation.
pub(super) fn progress(operation: &str, progress: JobProgress) -> proto::JobProgress {
    let JobProgress {
        stage,
        unit,
        units,
        images,
        images_total,
        elapsed,
        eta,
        sites,
        loss,
        warnings,
        figures: _,
    } = progress;
    proto::JobProgress {
        stage,
        unit: count(unit),
        units: count(units),
        images: count(images),
        images_total: count(images_total),
        elapsed: Some(duration(elapsed)),
        eta: eta.map(duration),
        sites: sites.into_iter().map(site).collect(),
        loss,
        // Their causes were logged, under the operation's name, when they came.
        warnings: warnings.iter().map(|error| rpc_status(&status(error, operation))).collect(),
    }
}

fn site(site: SiteSqnr) -> proto::SiteSqnr {
    let SiteSqnr { path, operand, sqnr_db } = site;
    proto::SiteSqnr { path, operand, sqnr_db }
}
