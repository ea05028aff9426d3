//! `InferenceService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::fields::{count, duration};
use super::proto::inference_service_server::InferenceService;
use super::proto::{self, ClassifyRequest, ClassifyResponse, classify_item::Outcome};
use super::status::rpc_status;
use crate::engine::Engine;
use crate::engine::classify::{ClassifyCall, ClassifyReply, RankedClass};
use crate::engine::names::ModelId;
use crate::error::{Error, Result};

/// Labels per image when the client does not say.
const DEFAULT_TOP_K: usize = 5;

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Inference {
    engine: Arc<Engine>,
}

impl Inference {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl InferenceService for Inference {
    async fn classify(
        &self,
        request: Request<ClassifyRequest>,
    ) -> Result<Response<ClassifyResponse>, Status> {
        let call = call(request.into_inner())?;
        let reply = self.engine.classifier.classify(call).await?;
        Ok(Response::new(response(reply)))
    }
}

fn call(request: ClassifyRequest) -> Result<ClassifyCall> {
    let ClassifyRequest { model, images, top_k } = request;
    if images.is_empty() {
        return Err(Error::invalid("images", "at least one image is needed"));
    }
    Ok(ClassifyCall {
        model: ModelId::parse(&model, "model")?,
        images: images.into_iter().map(|proto::Image { content }| content).collect(),
        top_k: match top_k {
            0 => DEFAULT_TOP_K,
            given => usize::try_from(given).unwrap_or(usize::MAX),
        },
    })
}

fn response(reply: ClassifyReply) -> ClassifyResponse {
    let ClassifyReply { items, queue, decode, compute, total, batch_size, model_version, model } =
        reply;
    ClassifyResponse {
        items: items.into_iter().map(item).collect(),
        timings: Some(proto::Timings {
            queue: Some(duration(queue)),
            decode: Some(duration(decode)),
            compute: Some(duration(compute)),
            total: Some(duration(total)),
        }),
        batch_size: count(batch_size),
        model_version,
        model,
    }
}

fn item(result: Result<Vec<RankedClass>>) -> proto::ClassifyItem {
    let outcome = match result {
        Ok(ranked) => Outcome::Result(proto::Classification {
            labels: ranked.into_iter().map(label).collect(),
        }),
        Err(error) => Outcome::Error(rpc_status(&Status::from(error))),
    };
    proto::ClassifyItem { outcome: Some(outcome) }
}

fn label(ranked: RankedClass) -> proto::Label {
    let RankedClass { index, label, probability, logit } = ranked;
    proto::Label { index: count(index), label, probability, logit }
}
