//! `InferenceService.ClassifyStream`.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use vitq::grpc::proto::classify_item::Outcome as ItemOutcome;
use vitq::grpc::proto::classify_stream_response::Outcome;
use vitq::grpc::proto::{
    ClassifyRequest, ClassifyResponse, ClassifyStreamRequest, ClassifyStreamResponse, Image,
};

use crate::server::{Setup, TestServer, details, digit, refusal};

/// Both ends of a stream.
struct Exchange {
    requests: mpsc::Sender<ClassifyStreamRequest>,
    answers: Streaming<ClassifyStreamResponse>,
}

impl Exchange {
    async fn open(server: &TestServer) -> Self {
        let (requests, receiver) = mpsc::channel(1);
        let stream = ReceiverStream::new(receiver);
        let answers = server.inference().classify_stream(stream).await.unwrap().into_inner();
        Self { requests, answers }
    }

    async fn send(&self, request: ClassifyStreamRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> ClassifyStreamResponse {
        self.answers.next().await.unwrap().unwrap()
    }

    /// Says that there is no more, and waits for what is left.
    async fn finish(self) -> Result<Vec<ClassifyStreamResponse>, Status> {
        drop(self.requests);
        self.answers.collect().await
    }
}

fn request(id: u64, model: &str, images: Vec<Vec<u8>>) -> ClassifyStreamRequest {
    let images = images.into_iter().map(|content| Image { content: content.into() }).collect();
    let request =
        ClassifyRequest { model: model.to_owned(), images, top_k: 10, ..Default::default() };
    ClassifyStreamRequest { id, request: Some(request), timeout: None }
}

fn response(answer: &ClassifyStreamResponse) -> &ClassifyResponse {
    match &answer.outcome {
        Some(Outcome::Response(response)) => response,
        other => panic!("{}: {other:?}", answer.id),
    }
}

/// Code and field or reason of a request's own error.
fn error(answer: &ClassifyStreamResponse) -> (Code, String) {
    let Some(Outcome::Error(status)) = &answer.outcome else { panic!("{answer:?}") };
    let details = details(status);
    let field = details.bad_request().and_then(|bad| bad.field_violations.first());
    let reason = || details.error_info().unwrap().reason.clone();
    (status.code.into(), field.map_or_else(reason, |violation| violation.field.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_answered_under_their_ids_as_classify_would() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    server.make("n").await;
    let exchange = Exchange::open(&server).await;
    // More than are on their way at once; the model is named when it changes.
    let model = |id| if id < 40 { "m" } else { "n" };
    let images = |id: u64| {
        let class = usize::try_from(id % 10).unwrap();
        vec![digit(class, 0); if id.is_multiple_of(7) { 3 } else { 1 }]
    };
    let reader = tokio::spawn(exchange.answers.collect::<Result<Vec<_>, _>>());
    for id in 0..60 {
        let named = if [0, 40].contains(&id) { model(id) } else { "" };
        exchange.requests.send(request(id, named, images(id))).await.unwrap();
    }
    drop(exchange.requests);
    let answers = reader.await.unwrap().unwrap();
    let answers: BTreeMap<u64, _> = answers.iter().map(|a| (a.id, response(a))).collect();
    assert_eq!(answers.keys().copied().collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
    for (id, answer) in answers {
        let unary = server.classify(model(id), images(id)).await.unwrap();
        assert_eq!((&answer.model, &answer.items), (&unary.model, &unary.items), "{id}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_request_fails_alone_and_the_stream_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::with(&data, Setup { queue_images: 4, ..Setup::default() }).await;
    server.make("m").await;
    // Loaded, and its pace known: a request without time is refused by that.
    server.classify("m", vec![digit(1, 0)]).await.unwrap();
    let mut exchange = Exchange::open(&server).await;
    let short = prost_types::Duration { seconds: 0, nanos: 1 };
    let negative = prost_types::Duration { seconds: -1, nanos: 0 };
    let of = |timeout| {
        let timeout = Some(timeout);
        ClassifyStreamRequest { timeout, ..request(9, "m", vec![digit(1, 0)]) }
    };
    let invalid = |field: &str| (Code::InvalidArgument, field.to_owned());
    for (bad, expected) in [
        (request(9, "", vec![digit(1, 0)]), invalid("model")),
        (request(9, "../m", vec![digit(1, 0)]), invalid("model")),
        (request(9, "absent", vec![digit(1, 0)]), (Code::NotFound, "MODEL_NOT_FOUND".to_owned())),
        (request(9, "m", vec![]), invalid("images")),
        (request(9, "m", vec![digit(1, 0); 5]), invalid("images")),
        (ClassifyStreamRequest { id: 9, request: None, timeout: None }, invalid("request")),
        (of(negative), invalid("timeout")),
        (of(short), (Code::DeadlineExceeded, "DEADLINE_TOO_SHORT".to_owned())),
    ] {
        exchange.send(bad).await;
        let answer = exchange.next().await;
        assert_eq!((answer.id, error(&answer)), (9, expected));
    }
    exchange.send(request(10, "m", vec![vec![], digit(1, 0)])).await;
    let answer = exchange.next().await;
    let outcomes: Vec<bool> = response(&answer)
        .items
        .iter()
        .map(|item| matches!(item.outcome, Some(ItemOutcome::Result(_))))
        .collect();
    assert_eq!((answer.id, outcomes), (10, vec![false, true]));
    assert!(exchange.finish().await.unwrap().is_empty());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_beyond_the_limit_ends_the_stream_after_what_was_read() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let mut exchange = Exchange::open(&server).await;
    exchange.send(request(1, "m", vec![digit(1, 0)])).await;
    exchange.send(request(2, "m", vec![vec![0; 33 << 20]])).await;
    assert_eq!(response(&exchange.next().await).items.len(), 1);
    let (code, _, reason) = refusal(&exchange.finish().await.unwrap_err());
    assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_on_one_stream_is_held_back_and_not_refused() {
    let data = tempfile::tempdir().unwrap();
    // As separate calls, most of these would find the server full.
    let server = TestServer::with(&data, Setup { queue_images: 41, ..Setup::default() }).await;
    server.make("m").await;
    let Exchange { requests, answers } = Exchange::open(&server).await;
    let sender = tokio::spawn(async move {
        for id in 0..500 {
            requests.send(request(id, "m", vec![digit(1, 0)])).await.unwrap();
        }
    });
    let answers = answers.collect::<Result<Vec<_>, _>>().await.unwrap();
    sender.await.unwrap();
    let answered = answers.iter().map(|answer| response(answer).items.len());
    assert_eq!(answered.sum::<usize>(), 500);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_gives_its_places_back() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::with(&data, Setup { queue_images: 40, ..Setup::default() }).await;
    server.make("m").await;
    let exchange = Exchange::open(&server).await;
    for id in 0..20 {
        exchange.send(request(id, "m", vec![digit(1, 0)])).await;
    }
    drop(exchange);
    // A call that takes the whole server is let in when nothing of the stream is left.
    let whole = loop {
        match server.classify("m", vec![digit(2, 0); 40]).await {
            Err(status) if status.code() == Code::ResourceExhausted => {}
            other => break other.unwrap(),
        }
    };
    assert_eq!(whole.items.len(), 40);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_answers_what_was_read_and_says_goodbye() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let mut exchange = Exchange::open(&server).await;
    exchange.send(request(1, "m", vec![digit(1, 0)])).await;
    assert_eq!(exchange.next().await.id, 1);
    let Exchange { requests, answers } = exchange;
    server.stop.cancel();
    let status = answers.collect::<Result<Vec<_>, _>>().await.unwrap_err();
    assert_eq!(refusal(&status), (Code::Unavailable, String::new(), "DRAINING".to_owned()));
    drop(requests);
    server.stop().await;
}
