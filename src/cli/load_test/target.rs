//! A server as the target of a load.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

use crate::bench::load::{Choice, Outcome, Refusal, ServerSide, Target};
use crate::cli::client::{Connection, MAX_ANSWER, ServerArgs, in_time};
use crate::cli::failure::Failure;
use crate::grpc::code_name;
use crate::grpc::proto::classify_item::Outcome as ItemOutcome;
use crate::grpc::proto::inference_service_client::InferenceServiceClient;
use crate::grpc::proto::{ClassifyRequest, ClassifyResponse, Image};

/// What requests are made of.
#[derive(Debug)]
pub(super) struct Requests {
    /// Model ids.
    pub(super) models: Vec<String>,
    /// Image files.
    pub(super) images: Vec<Bytes>,
    /// Labels per image.
    pub(super) top_k: u32,
    /// The priority on the wire.
    pub(super) priority: i32,
    /// When a request is given up.
    pub(super) timeout: Duration,
}

/// A server over several connections, which take turns.
pub(super) struct ServerTarget {
    clients: Vec<InferenceServiceClient<Connection>>,
    next: AtomicUsize,
    requests: Requests,
}

impl ServerTarget {
    /// Opens the connections.
    ///
    /// # Errors
    /// As [`ServerArgs::connect`].
    pub(super) async fn connect(
        server: &ServerArgs,
        connections: usize,
        requests: Requests,
    ) -> Result<Self, Failure> {
        let mut clients = Vec::with_capacity(connections);
        for _ in 0..connections {
            let client = InferenceServiceClient::new(server.connect().await?);
            clients.push(client.max_decoding_message_size(MAX_ANSWER));
        }
        Ok(Self { clients, next: AtomicUsize::new(0), requests })
    }

    fn request(&self, choice: Choice) -> Request<ClassifyRequest> {
        let Requests { models, images, top_k, priority, timeout } = &self.requests;
        let chosen = images.iter().cycle().skip(choice.first_image).take(choice.images);
        let mut request = Request::new(ClassifyRequest {
            model: models[choice.model].clone(),
            images: chosen.map(|content| Image { content: content.clone() }).collect(),
            top_k: *top_k,
            priority: *priority,
        });
        request.set_timeout(*timeout);
        request
    }
}

impl Target for ServerTarget {
    async fn send(&self, choice: Choice) -> Outcome {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let mut client = self.clients[turn % self.clients.len()].clone();
        match in_time(client.classify(self.request(choice)).await) {
            Ok(response) => Outcome::Answered(server_side(&response.into_inner())),
            Err(status) => Outcome::Failed(refusal(&status)),
        }
    }
}

fn server_side(response: &ClassifyResponse) -> ServerSide {
    let failed = |outcome: &Option<ItemOutcome>| !matches!(outcome, Some(ItemOutcome::Result(_)));
    let time = |time: Option<prost_types::Duration>| {
        time.and_then(|time| Duration::try_from(time).ok()).unwrap_or_default()
    };
    let timings = response.timings.unwrap_or_default();
    ServerSide {
        queue: time(timings.queue),
        decode: time(timings.decode),
        compute: time(timings.compute),
        total: time(timings.total),
        batch_size: response.batch_size,
        failed_images: response.items.iter().filter(|item| failed(&item.outcome)).count(),
        cached_images: response.items.iter().filter(|item| item.cached).count(),
    }
}

fn refusal(status: &Status) -> Refusal {
    let retry = status.get_details_retry_info();
    Refusal {
        code: code_name(status.code()),
        message: status.message().to_owned(),
        retry_after: retry.and_then(|retry| retry.retry_delay),
    }
}
