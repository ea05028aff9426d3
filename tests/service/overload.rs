//! More than fits: who is refused, how, and what becomes of those who were let in.

use std::time::Duration;

use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vitq::grpc::proto::{ClassifyPriority, ClassifyRequest, ClassifyResponse, Image};

use crate::raw::{CLASSIFY, Raw, classification};
use crate::server::{Setup, TestServer, digit, refusal};

/// Calls that are on their way at the same time.
const FLOOD: usize = 300;

fn request(model: &str, images: usize) -> ClassifyRequest {
    let image = Image { content: digit(3, 0).into() };
    ClassifyRequest {
        model: model.to_owned(),
        images: vec![image; images],
        ..ClassifyRequest::default()
    }
}

/// Sends calls of one image at once; what became of them.
async fn flood(server: &TestServer, model: &str) -> Vec<Result<ClassifyResponse, Status>> {
    let mut calls = JoinSet::new();
    for _ in 0..FLOOD {
        let (mut client, request) = (server.inference(), request(model, 1));
        calls.spawn(async move { Ok(client.classify(request).await?.into_inner()) });
    }
    calls.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_fit_is_told_when_to_come_back_and_who_fits_is_answered() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::with(&data, Setup { queue_images: 4, ..Setup::default() }).await;
    server.make("m").await;
    server.classify("m", vec![digit(0, 0)]).await.unwrap();
    let (mut refused, mut sent) = (0, 0);
    // On a starved machine calls may come no faster than they are answered.
    while refused == 0 && sent < 10 * FLOOD {
        sent += FLOOD;
        for outcome in flood(&server, "m").await {
            match outcome {
                Ok(response) => assert!(response.items[0].outcome.is_some()),
                Err(status) => {
                    let expected =
                        (Code::ResourceExhausted, String::new(), "QUEUE_FULL".to_owned());
                    assert_eq!(refusal(&status), expected);
                    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
                    let retry = retry.expect("every refusal says when to come back");
                    assert!((Duration::from_millis(10)..=Duration::from_secs(5)).contains(&retry));
                    refused += 1;
                }
            }
        }
    }
    assert!((1..sent).contains(&refused), "{refused} of {sent} refused");
    // An answer may arrive before its places are given back.
    all_places_are_free(&server).await;
    server.classify("m", vec![digit(0, 0); 4]).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_one_model_leaves_room_for_another() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::with(&data, Setup { queue_images: 20, ..Setup::default() }).await;
    for model in ["flood", "light"] {
        server.make(model).await;
        server.classify(model, vec![digit(0, 0)]).await.unwrap();
    }
    let flood = flood(&server, "flood");
    let light = async {
        for _ in 0..20 {
            server.classify("light", vec![digit(0, 0)]).await.unwrap();
        }
    };
    let (outcomes, ()) = tokio::join!(flood, light);
    assert!(outcomes.iter().any(Result::is_err), "the flood was none");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_call_ends_with_its_deadline_and_gives_its_places_back() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    server.classify("m", vec![digit(0, 0)]).await.unwrap();
    // What 64 images take is known by now to be more than this.
    let (image, raw) = (digit(3, 0), Raw::connect(&server.url()).await);
    for (limit, images) in [("1u", 1), ("10m", 64)] {
        all_places_are_free(&server).await;
        let body = classification(&vec![&image[..]; images]);
        let status = raw.status(CLASSIFY, &[("grpc-timeout", limit)], body).await;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        let (_, _, reason) = refusal(&status);
        let reasons = ["DEADLINE_TOO_SHORT", "DEADLINE_EXCEEDED"];
        assert!(reasons.contains(&reason.as_str()), "{reason}");
    }
    // A client that leaves, too.
    all_places_are_free(&server).await;
    let mut client = server.inference();
    let left = tokio::time::timeout(Duration::from_millis(5), client.classify(request("m", 64)));
    assert!(left.await.is_err());
    all_places_are_free(&server).await;
    server.classify("m", vec![digit(0, 0); 64]).await.unwrap();
    server.stop().await;
}

async fn all_places_are_free(server: &TestServer) {
    while server.engine.classifier.admission().images() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities_are_known_ones_and_both_are_answered() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    for priority in [ClassifyPriority::Interactive, ClassifyPriority::Bulk] {
        let request = ClassifyRequest { priority: priority.into(), ..request("m", 2) };
        let response = server.inference().classify(request).await.unwrap().into_inner();
        assert_eq!(response.items.len(), 2);
    }
    let unknown = ClassifyRequest { priority: 7, ..request("m", 1) };
    let status = server.inference().classify(unknown).await.unwrap_err();
    let expected = (Code::InvalidArgument, "priority".to_owned(), "INVALID_ARGUMENT".to_owned());
    assert_eq!(refusal(&status), expected);
    server.stop().await;
}
