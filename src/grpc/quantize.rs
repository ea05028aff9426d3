//! `QuantizationService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::auth::principal;
use super::events::{self, EventSource, Messages};
use super::fields::{
    checked_priority, request_id, role_bits_from, seconds, stem_head_from, timestamp,
};
use super::models;
use super::proto::quantization_service_server::QuantizationService;
use super::proto::{
    self, QuantizeEvent, QuantizeRequest, WatchRequest, quantize_event::Event,
    quantize_request::Calibration,
};
use super::trace;
use crate::calib::task::QuantizeSpec;
use crate::engine::Engine;
use crate::engine::jobs::{
    Afterwards, ImageChoice, JobEvent, JobEventKind, JobOutput, JobRunner, JobSpec, NewJob,
    QuantizeJob,
};
use crate::engine::names::ModelId;
use crate::error::{Error, Result};
use crate::quant::Precision;

/// Most labels of a model, and the longest key or value in bytes.
const MAX_LABELS: (usize, usize) = (64, 256);

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Quantization {
    engine: Arc<Engine>,
}

impl Quantization {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl QuantizationService for Quantization {
    type QuantizeStream = Messages<QuantizeEvent>;
    type WatchStream = Messages<QuantizeEvent>;

    async fn quantize(
        &self,
        request: Request<QuantizeRequest>,
    ) -> Result<Response<Self::QuantizeStream>, Status> {
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
        Ok(Response::new(events::watch(&self.engine.jobs, request, "quantize", event).await?))
    }
}

fn new_job(request: QuantizeRequest, principal: String) -> Result<NewJob> {
    let QuantizeRequest {
        checkpoint,
        method,
        options,
        weight_bits,
        activation_bits,
        stem_head,
        seed,
        model_id,
        labels,
        load_after,
        request_id: id,
        validate_only: _,
        role_bits,
        priority,
        calibration,
    } = request;
    let priority = checked_priority(priority)?;
    let (most, longest) = MAX_LABELS;
    if labels.len() > most || labels.iter().any(|(k, v)| k.len().max(v.len()) > longest) {
        let reason = format!("at most {most} labels of at most {longest} bytes");
        return Err(Error::invalid("labels", reason));
    }
    let spec = QuantizeSpec {
        method,
        options,
        weight_bits: Precision::new(weight_bits, "weight_bits")?,
        activation_bits: Precision::new(activation_bits, "activation_bits")?,
        stem_head: stem_head_from(stem_head)?,
        seed,
        role_bits: role_bits_from(role_bits)?,
    };
    let job = QuantizeJob {
        model: ModelId::parse(&model_id, "model_id")?,
        checkpoint,
        pinned: None,
        request: spec,
        images: images(calibration)?,
        labels,
        afterwards: if load_after { Afterwards::Load } else { Afterwards::Keep },
    };
    let (spec, request_id) = (JobSpec::Quantize(job), request_id(id)?);
    Ok(NewJob { spec, request_id, priority, principal, trace: None })
}

fn images(calibration: Option<Calibration>) -> Result<ImageChoice> {
    match calibration {
        None => Err(Error::invalid("calibration", "give a dataset or images")),
        Some(Calibration::Images(proto::CalibrationImages { images })) => {
            let contents = images.into_iter().map(|proto::Image { content }| content).collect();
            Ok(ImageChoice::inline(contents))
        }
        Some(Calibration::Dataset(proto::CalibrationDataset { name, count, files })) => {
            if files.is_empty() {
                let count = usize::try_from(count).unwrap_or(usize::MAX);
                return Ok(ImageChoice::Drawn { dataset: name, count });
            }
            if count != 0 {
                return Err(Error::invalid("dataset.count", "must be 0 when files are given"));
            }
            Ok(ImageChoice::Listed { dataset: name, files })
        }
    }
}

fn validated() -> QuantizeEvent {
    let event = Some(Event::Validated(proto::RequestValidated {}));
    QuantizeEvent { operation: String::new(), sequence: 0, time: None, event }
}

fn event(source: &EventSource, event: JobEvent) -> QuantizeEvent {
    let JobEvent { sequence, time, kind } = event;
    let operation = source.operation.clone();
    let event = match kind {
        JobEventKind::Accepted => Event::Accepted(proto::JobAccepted { replayed: source.replayed }),
        JobEventKind::Progress(progress) => {
            Event::Progress(events::progress(&source.operation, *progress))
        }
        JobEventKind::Ended(outcome) => match events::ended(source, outcome, result) {
            Ok(result) => Event::Result(result),
            Err(error) => Event::Error(error),
        },
        JobEventKind::Heartbeat => Event::Heartbeat(proto::JobHeartbeat {}),
    };
    QuantizeEvent { operation, sequence, time: Some(timestamp(time)), event: Some(event) }
}

/// The result of a quantization job; `None` for another kind of job.
pub(super) fn result(jobs: &JobRunner, output: &JobOutput) -> Option<proto::QuantizeResult> {
    let JobOutput::Quantized(record) = output else { return None };
    let view = jobs.registry().view_of(record);
    Some(proto::QuantizeResult {
        report: Some(models::report(&view.record.report)),
        calibration_time: Some(seconds(view.record.calibration_seconds)),
        model: Some(models::model(&view)),
    })
}
