//! `ModelInfer`, once or as a stream.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use super::describe::{VERSION, find};
use super::input::{Accepted, Input};
use super::output::{Output, tensors};
use super::parameters::{Schedule, flag, text};
use crate::engine::Engine;
use crate::engine::classify::{ClassifyCall, ClassifyReply};
use crate::engine::names::ModelId;
use crate::error::{Error, Result};
use crate::grpc::caller::Caller;
use crate::grpc::deadline;
use crate::grpc::proto::inference::{
    ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
};

/// Requests of one stream that are worked on at the same time.
const IN_FLIGHT: usize = 16;

/// Answers one request.
///
/// # Errors
/// `InvalidArgument` on the part at fault; `NotFound` for the model or its version; `Deadline`; what
/// classification reports; the first error of an image.
pub(super) async fn infer(
    engine: &Engine,
    request: ModelInferRequest,
    caller: Caller,
) -> Result<ModelInferResponse> {
    let ModelInferRequest {
        model_name,
        model_version,
        id,
        parameters,
        inputs,
        outputs,
        raw_input_contents,
    } = request;
    let model = find(engine, ("model_name", &model_name), &model_version).await?;
    let outputs = Output::read(outputs)?;
    let Schedule { priority, timeout } = Schedule::parse(&parameters)?;
    let timeout = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let Caller { client, deadline } = caller.until(timeout);
    let accepted = Accepted {
        side: model.record.model.preprocessing.image_size,
        images: engine.classifier.admission().capacity(),
    };
    let Input { images, field, form } = Input::read(inputs, raw_input_contents, accepted)?;
    // The model that was found, not the name: an alias may move in between.
    let model = ModelId::parse(&model.record.id, "model_name")?;
    let reply =
        classify(engine, ClassifyCall { client, model, images, field, priority, deadline }).await?;
    let ClassifyReply { items, model, .. } = reply;
    let logits = items.into_iter().collect::<Result<Vec<_>>>()?;
    let (outputs, raw_output_contents) = tensors(&outputs, &logits, &model.model, form)?;
    let parameters =
        [("model".to_owned(), text(&model.id)), ("digest".to_owned(), text(&model.digest))];
    Ok(ModelInferResponse {
        model_name,
        model_version: VERSION.to_owned(),
        id,
        parameters: parameters.into(),
        outputs,
        raw_output_contents,
    })
}

async fn classify(engine: &Engine, call: ClassifyCall) -> Result<ClassifyReply> {
    let deadline = call.deadline;
    // What admission says of images is of the request's one input.
    let call =
        async { engine.classifier.classify(call).await.map_err(|e| e.on_field("inputs[0]")) };
    match deadline {
        Some(deadline) => {
            tokio::time::timeout_at(deadline.into(), call).await.unwrap_or(Err(Error::Deadline))
        }
        None => call.await,
    }
}

/// Answers requests as they come, some at the same time, in their order. Each has the time of a
/// single call, and no more than is left to the stream.
pub(super) fn infer_all(
    engine: Arc<Engine>,
    requests: Streaming<ModelInferRequest>,
    caller: Caller,
) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + Send {
    let (started, answers) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(start_all(engine, requests, caller, started));
    ReceiverStream::new(answers).then(|pending: Pending| async {
        match pending?.await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(Error::internal(format!("inference: {error}")).into()),
        }
    })
}

/// An answer that is being worked on, until nobody waits for it any more.
type Pending = Result<AbortOnDropHandle<ModelStreamInferResponse>, Status>;

/// Starts requests while there is room, until the client ends the stream or leaves.
async fn start_all(
    engine: Arc<Engine>,
    mut requests: Streaming<ModelInferRequest>,
    caller: Caller,
    started: mpsc::Sender<Pending>,
) {
    while let Ok(place) = started.reserve().await {
        let request = tokio::select! {
            () = started.closed() => return,
            request = requests.message() => request,
        };
        match request {
            Ok(Some(request)) => {
                let own = Instant::now().checked_add(deadline::CLASSIFY);
                let answer = answer(Arc::clone(&engine), request, caller.clone().until(own));
                place.send(Ok(AbortOnDropHandle::new(tokio::spawn(answer))));
            }
            Ok(None) => return,
            Err(status) => return place.send(Err(status)),
        }
    }
}

/// A failed request leaves the stream open for those that follow.
async fn answer(
    engine: Arc<Engine>,
    request: ModelInferRequest,
    caller: Caller,
) -> ModelStreamInferResponse {
    let id = request.id.clone();
    match infer(&engine, request, caller).await {
        Ok(mut response) => {
            // There is one answer per request, and this is it.
            response.parameters.insert("triton_final_response".to_owned(), flag(true));
            ModelStreamInferResponse {
                error_message: String::new(),
                infer_response: Some(response),
            }
        }
        Err(error) => ModelStreamInferResponse {
            error_message: Status::from(error).message().to_owned(),
            infer_response: Some(ModelInferResponse { id, ..ModelInferResponse::default() }),
        },
    }
}
