//! Stopping under load: nothing that was admitted fails.
//!
//! Every failure that is not one of [`was_not_admitted`] is one of an admitted call. Clients here have
//! one connection and make no second one.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::model::State;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::{ClassifyRequest, GetModelRequest, Image, LoadModelRequest};

use crate::admission::was_not_admitted;
use crate::raw::host;
use crate::server::{digit, quick};
use crate::shutdown::Program;

/// A channel of one connection, after which there is none.
async fn only_connection(program: &Program) -> Channel {
    let (host, used) = (host(&program.address).to_owned(), Arc::<AtomicBool>::default());
    let connector = tower::service_fn(move |_: http::Uri| {
        let (host, used) = (host.clone(), Arc::clone(&used));
        async move {
            if used.swap(true, Ordering::Relaxed) {
                return Err(io::Error::from(ErrorKind::ConnectionRefused));
            }
            Ok(TokioIo::new(TcpStream::connect(host).await?))
        }
    });
    let endpoint = Endpoint::from_shared(program.address.clone()).unwrap();
    endpoint.connect_with_connector(connector).await.unwrap()
}

async fn classify(channel: &Channel) -> Result<(), Status> {
    let images = vec![Image { content: digit(3, 0).into() }];
    let request = ClassifyRequest { model: "m".to_owned(), images, ..Default::default() };
    let answer = InferenceServiceClient::new(channel.clone()).classify(request).await?;
    assert_eq!(answer.into_inner().items.len(), 1);
    Ok(())
}

async fn make(program: &Program) {
    let mut client = QuantizationServiceClient::new(program.channel().await);
    let mut events = client.quantize(quick("m")).await.unwrap().into_inner();
    while events.message().await.unwrap().is_some() {}
}

/// When a client's last call was answered, and how its next ended.
async fn until_refused(channel: Channel) -> (Option<Instant>, Status) {
    let mut answered = None;
    loop {
        match classify(&channel).await {
            Ok(()) => answered = Some(Instant::now()),
            Err(status) => return (answered, status),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_admitted_call_fails_when_the_server_is_stopped() {
    const CONNECTIONS: usize = 4;
    const CALLERS: usize = 4;
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), "export VITQ_DRAIN_DELAY=0.5;");
    make(&program).await;
    let mut callers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let channel = only_connection(&program).await;
        classify(&channel).await.unwrap();
        for _ in 0..CALLERS {
            callers.spawn(until_refused(channel.clone()));
        }
    }
    program.signal("TERM");
    let signalled = Instant::now();
    let ended = callers.join_all().await;
    assert_eq!(ended.len(), CONNECTIONS * CALLERS);
    for (_, status) in &ended {
        assert!(was_not_admitted(status), "an admitted call failed: {status:?}");
    }
    // Balancers had their time: everything went on meanwhile.
    let last = ended.iter().filter_map(|(answered, _)| *answered).max().unwrap();
    assert!(last > signalled + Duration::from_millis(300), "{:?}", last - signalled);
    assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(0));
}

/// The largest batch of the warm-up makes a load last.
async fn stop_while_loading(drain_timeout: &str) -> Result<(), Status> {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), "export VITQ_DRAIN_DELAY=0;");
    make(&program).await;
    program.signal("TERM");
    assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(0));

    let limits =
        format!("export VITQ_DRAIN_DELAY=0 VITQ_MAX_BATCH=512 VITQ_DRAIN_TIMEOUT={drain_timeout};");
    let program = Program::start(data.path(), &limits);
    let mut models = ModelServiceClient::new(program.channel().await);
    let mut loader = models.clone();
    let loading = tokio::spawn(async move {
        loader.load_model(LoadModelRequest { model: "m".to_owned() }).await.map(drop)
    });
    loop {
        let get = GetModelRequest { model: "m".to_owned() };
        let model = models.get_model(get).await.unwrap().into_inner().model.unwrap();
        match model.state() {
            State::Loading => break,
            State::Stored => {}
            other @ (State::Unspecified | State::Ready | State::Failed) => {
                panic!("loaded before anybody saw it: {other:?}")
            }
        }
    }
    drop(models);
    program.signal("TERM");
    let outcome = loading.await.unwrap();
    assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(0));
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_in_progress_is_finished_or_given_up_but_holds_nobody_up() {
    stop_while_loading("120").await.unwrap();
    let started = Instant::now();
    stop_while_loading("0").await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(60), "the load was waited for");
}
