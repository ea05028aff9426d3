//! Following a job: its events in one shape, shown as progress until it ends or the user leaves.

use std::pin::pin;
use std::time::Duration;

use tonic::{Status, Streaming};

use crate::cli::client::is_broken;
use crate::cli::failure::{Failure, inner_status};
use crate::cli::progress::{Display, Step};
use crate::cli::render::seconds;
use crate::grpc::proto::{
    EvaluateEvent, EvaluateResult, EvaluationMetrics, JobProgress, QuantizeEvent, QuantizeResult,
    WatchRequest, evaluate_event, quantize_event,
};

/// Broken streams in a row without an event after which the command gives up.
const ATTEMPTS: u32 = 6;
/// Pause before a broken stream is continued, times the number of failures.
const PAUSE: Duration = Duration::from_millis(500);

/// An event of any kind of job.
pub(super) struct Event<R> {
    operation: String,
    sequence: u64,
    what: What<R>,
}

enum What<R> {
    Validated,
    Accepted,
    Progress(Box<JobProgress>, Option<EvaluationMetrics>),
    Done(R),
    Failed(Status),
    /// A heartbeat, or an event of a newer server.
    Nothing,
}

/// How long to stay with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Until it ends or Ctrl-C.
    ToTheEnd,
    /// Until the server has accepted it.
    UntilAccepted,
}

/// Where following a job ended.
pub(super) enum Outcome<R> {
    /// The request was only checked.
    Validated,
    /// The job goes on without us.
    Detached(String),
    /// The job succeeded.
    Done {
        /// Name of the operation.
        operation: String,
        /// What it made.
        result: R,
    },
}

/// Shows progress until the job ends. A stream that breaks, as those do whose connection the server
/// ends for its age, is continued by `watch`.
///
/// # Errors
/// `Refused` when the job failed; `Unfinished` when the stream keeps breaking or the user left.
pub(super) async fn follow<E, R>(
    mut events: Streaming<E>,
    watch: impl AsyncFn(WatchRequest) -> Result<Streaming<E>, Status>,
    patience: Patience,
    server: &str,
) -> Result<Outcome<R>, Failure>
where
    Event<R>: From<E>,
{
    let display = Display::new();
    let (mut operation, mut warnings) = (String::new(), 0);
    let (mut after_sequence, mut failures) = (0, 0);
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    loop {
        // Polled first, so that the signal is caught from the first event on.
        let event = tokio::select! {
            biased;
            _ = &mut interrupted => return Err(left(&operation, server)),
            event = events.message() => event,
        };
        let event = match event {
            Ok(Some(event)) => Event::from(event),
            Err(status) if operation.is_empty() => return Err(status.into()),
            ended => {
                let early = || Status::unavailable("the stream ended early");
                let status = ended.err().unwrap_or_else(early);
                let request = WatchRequest { name: operation.clone(), after_sequence };
                let again = tokio::select! {
                    _ = &mut interrupted => return Err(left(&operation, server)),
                    again = resume(&watch, request, status, &mut failures) => again,
                };
                events = again.map_err(|status| broken(&operation, server, status.message()))?;
                continue;
            }
        };
        failures = 0;
        after_sequence = after_sequence.max(event.sequence);
        if operation.is_empty() && !event.operation.is_empty() {
            operation.clone_from(&event.operation);
            display.say(&format!("job {operation}"));
        }
        match event.what {
            What::Validated => return Ok(Outcome::Validated),
            What::Accepted if patience == Patience::UntilAccepted => {
                return Ok(Outcome::Detached(operation));
            }
            What::Progress(progress, metrics) => {
                for warning in progress.warnings.iter().skip(warnings) {
                    display.say(&format!("warning: {}", warning.message));
                }
                warnings = warnings.max(progress.warnings.len());
                display.step(&step(*progress, metrics));
            }
            What::Done(result) => return Ok(Outcome::Done { operation, result }),
            What::Failed(status) => return Err(status.into()),
            What::Accepted | What::Nothing => {}
        }
    }
}

/// The stream once more, from behind the last event that was seen.
///
/// # Errors
/// The last refusal, when trying again does not help or was tried often enough.
async fn resume<E>(
    watch: &impl AsyncFn(WatchRequest) -> Result<Streaming<E>, Status>,
    request: WatchRequest,
    mut status: Status,
    failures: &mut u32,
) -> Result<Streaming<E>, Status> {
    while !request.name.is_empty() && *failures < ATTEMPTS && is_broken(&status) {
        *failures += 1;
        tokio::time::sleep(PAUSE * *failures).await;
        match watch(request.clone()).await {
            Ok(events) => return Ok(events),
            Err(refusal) => status = refusal,
        }
    }
    Err(status)
}

/// What the user left behind, and how to come back to it.
fn left(operation: &str, server: &str) -> Failure {
    if operation.is_empty() {
        return Failure::Unfinished("stopped before the server accepted the job".to_owned());
    }
    Failure::Unfinished(format!("detached, the job goes on\n{}", how_to_return(operation, server)))
}

fn broken(operation: &str, server: &str, reason: &str) -> Failure {
    if operation.is_empty() {
        return Failure::Unfinished(format!("the server accepted no job: {reason}"));
    }
    let hint = how_to_return(operation, server);
    Failure::Unfinished(format!("the connection broke, the job may go on: {reason}\n{hint}"))
}

/// The commands that watch and cancel a job.
pub(super) fn how_to_return(operation: &str, server: &str) -> String {
    format!(
        "  watch:  vitq jobs watch {operation} --server {server}\n  \
         cancel: vitq jobs cancel {operation} --server {server}"
    )
}

/// A progress event as the display wants it.
pub(super) fn step(progress: JobProgress, metrics: Option<EvaluationMetrics>) -> Step {
    let mut notes = Vec::new();
    if progress.images_total > 0 {
        notes.push(format!("{}/{} images", progress.images, progress.images_total));
    }
    if let Some(site) = progress.sites.last() {
        notes.push(format!("{} {} {:.1} dB", site.path, site.operand, site.sqnr_db));
    }
    if let Some(metrics) = metrics {
        notes.push(format!("top-1 {:.2} %", metrics.top1_percent));
    }
    if let Some(loss) = progress.loss {
        notes.push(format!("loss {loss:.3e}"));
    }
    if let Some(eta) = &progress.eta {
        notes.push(format!("{:.0} s left", seconds(eta)));
    }
    Step {
        stage: progress.stage,
        unit: progress.unit.into(),
        units: progress.units.into(),
        note: notes.join(", "),
    }
}

impl From<QuantizeEvent> for Event<QuantizeResult> {
    fn from(event: QuantizeEvent) -> Self {
        let QuantizeEvent { operation, sequence, time: _, event } = event;
        let what = match event {
            Some(quantize_event::Event::Validated(_)) => What::Validated,
            Some(quantize_event::Event::Accepted(_)) => What::Accepted,
            Some(quantize_event::Event::Progress(progress)) => {
                What::Progress(Box::new(progress), None)
            }
            Some(quantize_event::Event::Result(result)) => What::Done(result),
            Some(quantize_event::Event::Error(status)) => What::Failed(inner_status(status)),
            Some(quantize_event::Event::Heartbeat(_)) | None => What::Nothing,
        };
        Self { operation, sequence, what }
    }
}

impl From<EvaluateEvent> for Event<EvaluateResult> {
    fn from(event: EvaluateEvent) -> Self {
        let EvaluateEvent { operation, sequence, time: _, event } = event;
        let what = match event {
            Some(evaluate_event::Event::Validated(_)) => What::Validated,
            Some(evaluate_event::Event::Accepted(_)) => What::Accepted,
            Some(evaluate_event::Event::Progress(event)) => {
                What::Progress(Box::new(event.progress.unwrap_or_default()), event.metrics)
            }
            Some(evaluate_event::Event::Result(result)) => What::Done(result),
            Some(evaluate_event::Event::Error(status)) => What::Failed(inner_status(status)),
            Some(evaluate_event::Event::Heartbeat(_)) | None => What::Nothing,
        };
        Self { operation, sequence, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_tells_images_accuracy_and_remaining_time() {
        let progress = JobProgress {
            stage: "evaluate".to_owned(),
            unit: 2,
            units: 15,
            images: 64,
            images_total: 450,
            eta: Some(prost_types::Duration { seconds: 3, nanos: 400_000_000 }),
            ..JobProgress::default()
        };
        let metrics = EvaluationMetrics { top1_percent: 95.25, ..EvaluationMetrics::default() };
        let step = step(progress, Some(metrics));
        assert_eq!((step.unit, step.units), (2, 15));
        assert_eq!(step.note, "64/450 images, top-1 95.25 %, 3 s left");
    }

    #[test]
    fn leaving_a_job_says_how_to_return() {
        let Failure::Unfinished(text) = left("operations/1", "http://host:1") else { panic!() };
        assert!(text.contains("vitq jobs watch operations/1 --server http://host:1"), "{text}");
        assert!(text.contains("vitq jobs cancel operations/1"), "{text}");
    }
}
