//! Answers that are kept by content.

use vitq::engine::response_cache::CacheLimits;
use vitq::grpc::proto::{ClassifyItem, ClassifyResponse, QuantizeRequest, SetAliasRequest};

use crate::server::{Setup, TestServer, digit, quick, result};

async fn start(data: &tempfile::TempDir) -> TestServer {
    let response_cache = CacheLimits { bytes: 1 << 20, lifetime: None };
    TestServer::with(data, Setup { response_cache, ..Setup::default() }).await
}

fn cached(response: &ClassifyResponse) -> Vec<bool> {
    response.items.iter().map(|item| item.cached).collect()
}

/// The items as if nothing had been cached.
fn outcomes(response: &ClassifyResponse) -> Vec<ClassifyItem> {
    let items = response.items.clone().into_iter();
    items.map(|item| ClassifyItem { cached: false, ..item }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_bytes_get_the_same_answer_without_work() {
    let data = tempfile::tempdir().unwrap();
    let server = start(&data).await;
    server.make("m").await;
    let first = server.classify("m", vec![digit(1, 0), digit(2, 0)]).await.unwrap();
    assert_eq!(cached(&first), [false, false]);
    let mixed = vec![digit(3, 0), digit(2, 0), b"no image".to_vec(), digit(1, 0)];
    let second = server.classify("m", mixed.clone()).await.unwrap();
    assert_eq!(cached(&second), [false, true, false, true]);
    assert_eq!(second.batch_size, 1, "only what is new is computed");
    assert_eq!(outcomes(&second)[1], first.items[1]);
    assert_eq!(outcomes(&second)[3], first.items[0]);
    // An error is not an answer: it is found out again.
    let third = server.classify("m", mixed).await.unwrap();
    assert_eq!(cached(&third), [true, true, false, true]);
    assert_eq!(outcomes(&third), outcomes(&second));
    let all = server.classify("m", vec![digit(1, 0)]).await.unwrap();
    assert_eq!((cached(&all), all.batch_size), (vec![true], 0));
    assert_eq!((&all.model_version, &all.model), (&first.model_version, &first.model));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_has_its_own_answers() {
    let data = tempfile::tempdir().unwrap();
    let server = start(&data).await;
    let digest = server.make("m").await.model.unwrap().digest;
    let four = QuantizeRequest { weight_bits: 4, activation_bits: 4, ..quick("n") };
    let other = result(server.quantize(four).await.unwrap()).model.unwrap().digest;
    let alias = async |model: &str| {
        let request = SetAliasRequest { alias: "a".to_owned(), model: model.to_owned() };
        server.models().set_alias(request).await.unwrap();
    };
    let ask = async || server.classify("a", vec![digit(4, 1)]).await.unwrap();
    alias("m").await;
    let (before, again) = (ask().await, ask().await);
    assert_eq!((cached(&before), cached(&again)), (vec![false], vec![true]));
    alias("n").await;
    let after = ask().await;
    assert_eq!((cached(&after), &after.model_version), (vec![false], &other));
    assert_ne!(outcomes(&after), outcomes(&before));
    // The first model's answers are still known.
    alias("m").await;
    let back = ask().await;
    assert_eq!((cached(&back), &back.model_version), (vec![true], &digest));
    assert_eq!(outcomes(&back), outcomes(&before));
    server.stop().await;
}
