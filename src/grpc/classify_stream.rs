//! `ClassifyStream`: many classifications on one stream, answered as they get ready.
//!
//! A task per stream reads requests and runs each as a task of its own. It stops reading while as many
//! are on their way as may be, or while the client does not take its answers, and HTTP/2's flow
//! control holds the client back. When the client leaves, the task and what it started are dropped:
//! images that no device has begun with are not computed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use super::caller::Caller;
use super::classify::classify;
use super::deadline;
use super::events::Messages;
use super::proto::classify_stream_response::Outcome;
use super::proto::{ClassifyRequest, ClassifyStreamRequest, ClassifyStreamResponse};
use super::status::rpc_status;
use crate::engine::Engine;
use crate::error::{Error, Result};

/// Requests of one stream that are on their way at once.
const IN_FLIGHT: usize = 32;

/// The answers to a stream of requests, until all are given or `goodbye` is said.
pub(super) fn answers(
    engine: Arc<Engine>,
    requests: Streaming<ClassifyStreamRequest>,
    caller: Caller,
    goodbye: CancellationToken,
) -> Messages<ClassifyStreamResponse> {
    let (sender, receiver) = mpsc::channel(1);
    let stream = Stream {
        engine,
        caller,
        model: String::new(),
        in_flight: JoinSet::new(),
        answers: sender,
        end: None,
    };
    tokio::spawn(stream.run(requests, goodbye).in_current_span());
    Box::pin(ReceiverStream::new(receiver))
}

/// A stream that is being answered.
struct Stream {
    engine: Arc<Engine>,
    /// Who asks, and when they give up the whole stream.
    caller: Caller,
    /// What the latest request that named one was for.
    model: String,
    in_flight: JoinSet<ClassifyStreamResponse>,
    answers: mpsc::Sender<Result<ClassifyStreamResponse, Status>>,
    /// How the stream ends after what is in flight; `None` while it is read.
    end: Option<Result<(), Status>>,
}

impl Stream {
    async fn run(
        mut self,
        mut requests: Streaming<ClassifyStreamRequest>,
        goodbye: CancellationToken,
    ) {
        while self.end.is_none() || !self.in_flight.is_empty() {
            let is_read = self.end.is_none();
            let has_room = self.in_flight.len() < IN_FLIGHT;
            let went_well = tokio::select! {
                biased;
                () = self.answers.closed() => return,
                Some(done) = self.in_flight.join_next() => self.send(done).await,
                () = goodbye.cancelled(), if is_read => {
                    self.end = Some(Err(Error::Draining.into()));
                    Ok(())
                }
                message = requests.message(), if is_read && has_room => {
                    self.take(message);
                    Ok(())
                }
            };
            if went_well.is_err() {
                return; // the client has left
            }
        }
        if let Some(Err(status)) = self.end {
            let _ = self.answers.send(Err(status)).await; // as above
        }
    }

    /// Starts on a request, or takes note that there are no more.
    fn take(&mut self, message: Result<Option<ClassifyStreamRequest>, Status>) {
        let ClassifyStreamRequest { id, request, timeout } = match message {
            Ok(Some(message)) => message,
            Ok(None) => return self.end = Some(Ok(())),
            Err(status) => return self.end = Some(Err(status)),
        };
        let request = request.map(|request| self.with_model(request));
        let (engine, caller) = (Arc::clone(&self.engine), self.caller.clone());
        let answer = async move {
            let answer = match request {
                Some(request) => answer(&engine, request, timeout, caller).await,
                None => Err(Error::invalid("request", "is missing")),
            };
            let outcome = match answer {
                Ok(response) => Outcome::Response(response),
                Err(error) => Outcome::Error(rpc_status(&Status::from(error))),
            };
            ClassifyStreamResponse { id, outcome: Some(outcome) }
        };
        self.in_flight.spawn(answer.in_current_span());
    }

    /// The request for its own model, or that of an earlier one.
    fn with_model(&mut self, mut request: ClassifyRequest) -> ClassifyRequest {
        if request.model.is_empty() {
            request.model.clone_from(&self.model);
        } else {
            self.model.clone_from(&request.model);
        }
        request
    }

    /// Hands an answer to the client; fails when the client has left.
    async fn send(&mut self, done: Result<ClassifyStreamResponse, JoinError>) -> Result<(), ()> {
        match done {
            Ok(answer) => self.answers.send(Ok(answer)).await.map_err(drop),
            // Whose answer is missing is not known any more: the stream cannot go on.
            Err(error) => {
                let error = Error::internal(format!("an answer was lost: {error}"));
                self.end = Some(Err(error.into()));
                Ok(())
            }
        }
    }
}

/// Answers a request within its time and the stream's.
async fn answer(
    engine: &Engine,
    request: ClassifyRequest,
    timeout: Option<prost_types::Duration>,
    caller: Caller,
) -> Result<super::proto::ClassifyResponse> {
    let allowed = match timeout {
        Some(timeout) => Duration::try_from(timeout)
            .map_err(|_| Error::invalid("timeout", "must be a positive duration"))?,
        None => deadline::CLASSIFY,
    };
    let caller = caller.until(Instant::now().checked_add(allowed));
    let Some(deadline) = caller.deadline else {
        return classify(engine, request, caller).await;
    };
    tokio::time::timeout_at(deadline.into(), classify(engine, request, caller))
        .await
        .unwrap_or(Err(Error::Deadline))
}
