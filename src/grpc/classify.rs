//! `InferenceService`.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Response, Status};

use super::auth::principal;
use super::deadline;
use super::fields::{count, duration};
use super::proto::inference_service_server::InferenceService;
use super::proto::{self, ClassifyRequest, ClassifyResponse, classify_item::Outcome};
use super::status::rpc_status;
use crate::engine::Engine;
use crate::engine::batcher::Priority;
use crate::engine::classify::{ClassifyCall, ClassifyReply, ImageInput, RankedClass};
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
        let (client, deadline) = (principal(&request).name, deadline::of(&request));
        let request = request.into_inner();
        let top_k = top_k(request.top_k);
        let reply = self.engine.classifier.classify(call(request, client, deadline)?).await?;
        Ok(Response::new(response(reply, top_k)))
    }
}

fn call(
    request: ClassifyRequest,
    client: Arc<str>,
    deadline: Option<Instant>,
) -> Result<ClassifyCall> {
    let ClassifyRequest { model, images, top_k: _, priority } = request;
    if images.is_empty() {
        return Err(Error::invalid("images", "at least one image is needed"));
    }
    let image = |proto::Image { content }| ImageInput::Encoded(content);
    Ok(ClassifyCall {
        client,
        model: ModelId::parse(&model, "model")?,
        images: images.into_iter().map(image).collect(),
        field: |index| format!("images[{index}].content"),
        priority: match proto::ClassifyPriority::try_from(priority) {
            Ok(proto::ClassifyPriority::Unspecified | proto::ClassifyPriority::Interactive) => {
                Priority::Interactive
            }
            Ok(proto::ClassifyPriority::Bulk) => Priority::Bulk,
            Err(_) => return Err(Error::invalid("priority", "is not one of the priorities")),
        },
        deadline,
    })
}

fn top_k(given: u32) -> usize {
    match given {
        0 => DEFAULT_TOP_K,
        given => usize::try_from(given).unwrap_or(usize::MAX),
    }
}

fn response(mut reply: ClassifyReply, top_k: usize) -> ClassifyResponse {
    let outcomes = std::mem::take(&mut reply.items).into_iter().zip(reply.cached.clone());
    let items = outcomes
        .map(|(outcome, cached)| item(outcome.map(|logits| reply.rank(&logits, top_k)), cached));
    let items = items.collect();
    let ClassifyReply { items: _, cached: _, queue, decode, compute, total, batch_size, model } =
        reply;
    ClassifyResponse {
        items,
        timings: Some(proto::Timings {
            queue: Some(duration(queue)),
            decode: Some(duration(decode)),
            compute: Some(duration(compute)),
            total: Some(duration(total)),
        }),
        batch_size: count(batch_size),
        model_version: model.digest.clone(),
        model: model.id.clone(),
    }
}

fn item(result: Result<Vec<RankedClass>>, cached: bool) -> proto::ClassifyItem {
    let outcome = match result {
        Ok(ranked) => Outcome::Result(proto::Classification {
            labels: ranked.into_iter().map(label).collect(),
        }),
        Err(error) => Outcome::Error(rpc_status(&Status::from(error))),
    };
    proto::ClassifyItem { outcome: Some(outcome), cached }
}

fn label(ranked: RankedClass) -> proto::Label {
    let RankedClass { index, label, probability, logit } = ranked;
    proto::Label { index: count(index), label, probability, logit }
}
