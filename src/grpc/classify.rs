//! `InferenceService`; its stream is in `classify_stream`.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::classify_stream;
use super::events::Messages;
use super::fields::{count, duration};
use super::proto::inference_service_server::InferenceService;
use super::proto::{
    self, ClassifyRequest, ClassifyResponse, ClassifyStreamRequest, ClassifyStreamResponse,
    classify_item::Outcome,
};
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
    /// Ends streams when the server is about to.
    goodbye: CancellationToken,
}

impl Inference {
    pub(super) fn new(engine: Arc<Engine>, goodbye: CancellationToken) -> Self {
        Self { engine, goodbye }
    }
}

#[tonic::async_trait]
impl InferenceService for Inference {
    async fn classify(
        &self,
        request: Request<ClassifyRequest>,
    ) -> Result<Response<ClassifyResponse>, Status> {
        let caller = Caller::of(&request);
        Ok(Response::new(classify(&self.engine, request.into_inner(), caller).await?))
    }

    type ClassifyStreamStream = Messages<ClassifyStreamResponse>;

    async fn classify_stream(
        &self,
        request: Request<Streaming<ClassifyStreamRequest>>,
    ) -> Result<Response<Self::ClassifyStreamStream>, Status> {
        let caller = Caller::of(&request);
        let (engine, goodbye) = (Arc::clone(&self.engine), self.goodbye.clone());
        let answers = classify_stream::answers(engine, request.into_inner(), caller, goodbye);
        Ok(Response::new(answers))
    }
}

/// Answers one request.
///
/// # Errors
/// `InvalidArgument`; as [`crate::engine::classify::Classifier::classify`].
pub(super) async fn classify(
    engine: &Engine,
    request: ClassifyRequest,
    caller: Caller,
) -> Result<ClassifyResponse> {
    let top_k = top_k(request.top_k);
    let reply = engine.classifier.classify(call(request, caller)?).await?;
    Ok(response(reply, top_k))
}

fn call(request: ClassifyRequest, caller: Caller) -> Result<ClassifyCall> {
    let Caller { client, deadline } = caller;
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
