//! `EvaluationService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::auth::principal;
use super::events::{self, EventSource, Messages};
use super::fields::{checked_priority, request_id, timestamp};
use super::proto::evaluation_service_server::EvaluationService;
use super::proto::{self, EvaluateEvent, EvaluateRequest, WatchRequest, evaluate_event::Event};
use super::trace;
use crate::engine::Engine;
use crate::engine::jobs::{
    self, EvaluateJob, Figures, JobEvent, JobEventKind, JobOutput, JobProgress, JobRunner, JobSpec,
    NewJob,
};
use crate::engine::names::ModelId;
use crate::error::Result;

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Evaluation {
    engine: Arc<Engine>,
}

impl Evaluation {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl EvaluationService for Evaluation {
    type EvaluateStream = Messages<EvaluateEvent>;
    type WatchStream = Messages<EvaluateEvent>;

    async fn evaluate(
        &self,
        request: Request<EvaluateRequest>,
    ) -> Result<Response<Self::EvaluateStream>, Status> {
        let principal = principal(&request).name.to_string();
        let trace = trace::of(&request);
        let request = request.into_inner();
        let validate_only = request.validate_only;
        let job = NewJob { trace, ..new_job(request, principal)? };
        if validate_only {
            self.engine.jobs.check(job.spec).await?;
            return Ok(Response::new(events::only(validated())));
        }
        Ok(Response::new(events::submit(&self.engine.jobs, job, event).await?))
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        Ok(Response::new(events::watch(&self.engine.jobs, request, "evaluate", event).await?))
    }
}

fn new_job(request: EvaluateRequest, principal: String) -> Result<NewJob> {
    let EvaluateRequest { model, dataset, limit, seed, request_id: id, validate_only: _, priority } =
        request;
    let priority = checked_priority(priority)?;
    let job = EvaluateJob {
        model: ModelId::parse(&model, "model")?,
        alias: None,
        dataset,
        limit: (limit > 0).then(|| usize::try_from(limit).unwrap_or(usize::MAX)),
        seed,
    };
    let (spec, request_id) = (JobSpec::Evaluate(job), request_id(id)?);
    Ok(NewJob { spec, request_id, priority, principal, trace: None })
}

fn validated() -> EvaluateEvent {
    let event = Some(Event::Validated(proto::RequestValidated {}));
    EvaluateEvent { operation: String::new(), sequence: 0, time: None, event }
}

fn event(source: &EventSource, event: JobEvent) -> EvaluateEvent {
    let JobEvent { sequence, time, kind } = event;
    let operation = source.operation.clone();
    let event = match kind {
        JobEventKind::Accepted => Event::Accepted(proto::JobAccepted { replayed: source.replayed }),
        JobEventKind::Progress(progress) => {
            Event::Progress(evaluate_progress(&source.operation, *progress))
        }
        JobEventKind::Ended(outcome) => match events::ended(source, outcome, result) {
            Ok(result) => Event::Result(result),
            Err(error) => Event::Error(error),
        },
        JobEventKind::Heartbeat => Event::Heartbeat(proto::JobHeartbeat {}),
    };
    EvaluateEvent { operation, sequence, time: Some(timestamp(time)), event: Some(event) }
}

fn evaluate_progress(operation: &str, progress: JobProgress) -> proto::EvaluateProgress {
    let figures = progress.figures.as_ref().filter(|figures| figures.metrics.images > 0);
    proto::EvaluateProgress {
        metrics: figures.map(metrics),
        progress: Some(events::progress(operation, progress)),
    }
}

/// The result of an evaluation job; `None` for another kind of job.
pub(super) fn result(_: &JobRunner, output: &JobOutput) -> Option<proto::EvaluateResult> {
    let JobOutput::Evaluated(evaluation) = output else { return None };
    let jobs::Evaluation { model, model_version, dataset, figures, warnings } = evaluation;
    Some(proto::EvaluateResult {
        model: model.to_string(),
        model_version: model_version.clone(),
        dataset: dataset.clone(),
        metrics: Some(metrics(figures)),
        warnings: warnings.clone(),
    })
}

fn metrics(figures: &Figures) -> proto::EvaluationMetrics {
    let Figures { metrics, images_per_second } = figures;
    let compared = metrics.compared > 0;
    proto::EvaluationMetrics {
        images: metrics.images,
        top1_percent: metrics.top1(),
        top5_percent: metrics.top5(),
        agreement_percent: compared.then(|| metrics.agreement()),
        sqnr_db: compared.then(|| metrics.sqnr_db()),
        images_per_second: *images_per_second,
    }
}
