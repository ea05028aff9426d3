//! Stopping: in-process, and the binary by signals.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vitq::grpc::proto::longrunning::WaitOperationRequest;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::{
    GetModelRequest, JobMetadata, JobState, ListModelsRequest, QuantizeEvent, WatchRequest,
};

use crate::server::{
    TestServer, demo, details, digit, failure, medium, quick, refusal, result, slow,
};

/// The error that a stream broke with.
async fn broken<T: std::fmt::Debug>(stream: Streaming<T>) -> Status {
    stream.collect::<Result<Vec<_>, _>>().await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_gives_jobs_back_and_a_restart_finishes_them() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let mut running = server.quantization().quantize(medium("n")).await.unwrap().into_inner();
    let queued = server.quantization().quantize(quick("o")).await.unwrap().into_inner();
    let calibrates =
        |event: &QuantizeEvent| matches!(&event.event, Some(Event::Progress(p)) if p.units > 0);
    let last = loop {
        let event = running.next().await.unwrap().unwrap();
        if calibrates(&event) {
            break event;
        }
    };
    server.stop.cancel();
    for stream in [running, queued] {
        let status = broken(stream).await;
        assert_eq!(refusal(&status), (Code::Unavailable, String::new(), "DRAINING".to_owned()));
    }
    // Whether the connection, closing under the call, or the service refuses it: nothing new is
    // served. The client's transport reports the former as cancelled.
    let status = server.classify("m", vec![digit(0, 0)]).await.unwrap_err();
    assert!([Code::Unavailable, Code::Cancelled].contains(&status.code()), "{status}");
    server.stop().await;

    let server = TestServer::start(&data).await;
    let watch = WatchRequest { name: last.operation.clone(), after_sequence: last.sequence };
    let events = server.quantization().watch(watch).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    // The same numbered history goes on.
    let numbers: Vec<u64> = events.iter().map(|event| event.sequence).collect();
    let expected: Vec<u64> = (last.sequence + 1..).take(numbers.len()).collect();
    assert_eq!(numbers, expected);
    let resumed = result(events);
    let wait = WaitOperationRequest { name: last.operation, ..WaitOperationRequest::default() };
    let operation = server.operations().wait_operation(wait).await.unwrap().into_inner();
    let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
    assert_eq!((metadata.state(), metadata.attempt), (JobState::Succeeded, 2));
    // What an undisturbed run gives.
    let undisturbed = result(server.quantize(medium("p")).await.unwrap());
    assert_eq!(resumed.model.unwrap().digest, undisturbed.model.unwrap().digest);
    let get = GetModelRequest { model: "o".to_owned() };
    server.models().get_model(get).await.unwrap();
    server.stop().await;
}

/// The real program; killed when a test fails before it ends by itself.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) address: String,
}

impl Program {
    /// Through a shell, so that a test can set limits first.
    pub(crate) fn start(data: &std::path::Path, prelude: &str) -> Self {
        let script = format!(r#"{prelude} exec "$0" "$@""#);
        let mut child = Command::new("bash")
            .args(["-c", &script, env!("CARGO_BIN_EXE_vitq"), "serve"])
            .args(["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--device", "cpu"])
            .arg("--data-dir")
            .arg(data)
            .arg("--checkpoints")
            .arg(demo("checkpoints"))
            .arg("--datasets")
            .arg(demo("datasets"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Self { child, address }
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(self.address.clone()).unwrap().connect().await.unwrap()
    }

    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    pub(crate) fn wait(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_says_where_it_listens_and_ends_on_a_signal() {
    for signal in ["TERM", "INT"] {
        let data = tempfile::tempdir().unwrap();
        let program = Program::start(data.path(), "");
        let mut client = QuantizationServiceClient::new(program.channel().await);
        let mut running = client.quantize(slow("m")).await.unwrap().into_inner();
        assert!(running.next().await.unwrap().is_ok());
        program.signal(signal);
        assert_eq!(broken(running).await.code(), Code::Unavailable);
        drop(client);
        assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(0), "{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_the_job_and_lists_nothing() {
    let data = tempfile::tempdir().unwrap();
    // The database's tables are made, and its journal is empty, before space gets scarce.
    let program = Program::start(data.path(), "");
    program.signal("TERM");
    assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(0));
    // No file may grow beyond 512 KiB: an artifact of the digits model does, the database does not.
    let program = Program::start(data.path(), "trap '' XFSZ; ulimit -f 512;");
    let mut client = QuantizationServiceClient::new(program.channel().await);
    let stream = client.quantize(quick("m")).await.unwrap().into_inner();
    let events = stream.collect::<Result<Vec<_>, _>>().await.unwrap();
    assert!(!events.iter().any(|event| matches!(event.event, Some(Event::Result(_)))));
    let error = failure(events);
    assert_eq!(error.code, i32::from(Code::ResourceExhausted), "{error:?}");
    assert_eq!(details(&error).error_info().unwrap().reason, "DISK_FULL");
    let mut models = ModelServiceClient::new(program.channel().await);
    let listed = models.list_models(ListModelsRequest::default()).await.unwrap().into_inner();
    assert!(listed.models.is_empty());
    let objects = data.path().join("objects/sha256");
    assert_eq!(std::fs::read_dir(objects).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_announces_the_end_and_a_second_signal_does_not_wait() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), "");
    let mut health = HealthClient::new(program.channel().await);
    let watch = HealthCheckRequest { service: String::new() };
    let mut states = health.watch(watch).await.unwrap().into_inner();
    let mut next = async || states.next().await.unwrap().unwrap().status();
    // It listens a moment before it is ready.
    while next().await != ServingStatus::Serving {}
    program.signal("TERM");
    assert_eq!(next().await, ServingStatus::NotServing);
    // The open watch keeps the first drain going.
    program.signal("TERM");
    assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(143));
}
