//! Stopping: in-process, and the binary by signals.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vitq::grpc::proto::ListModelsRequest;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;

use crate::server::{TestServer, demo, details, digit, failure, quick, slow};

#[tokio::test(flavor = "multi_thread")]
async fn draining_ends_jobs_and_tells_their_watchers() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let running = server.quantization().quantize(slow("n")).await.unwrap().into_inner();
    let queued = server.quantization().quantize(quick("o")).await.unwrap().into_inner();
    server.stop.cancel();
    for stream in [running, queued] {
        let error = failure(stream.collect::<Result<Vec<_>, _>>().await.unwrap());
        assert_eq!(error.code, i32::from(Code::Unavailable));
        assert_eq!(details(&error).error_info().unwrap().reason, "DRAINING");
    }
    // Whether the connection, closing under the call, or the service refuses it: nothing new is
    // served. The client's transport reports the former as cancelled.
    let status = server.classify("m", vec![digit(0, 0)]).await.unwrap_err();
    assert!([Code::Unavailable, Code::Cancelled].contains(&status.code()), "{status}");
    server.stop().await;
}

/// The real program; killed when a test fails before it ends by itself.
struct Program {
    child: Child,
    address: String,
}

impl Program {
    /// Through a shell, so that a test can set limits first.
    fn start(data: &std::path::Path, prelude: &str) -> Self {
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

    async fn channel(&self) -> Channel {
        Channel::from_shared(self.address.clone()).unwrap().connect().await.unwrap()
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    fn wait(mut self) -> Option<i32> {
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
        let error = failure(running.collect::<Result<Vec<_>, _>>().await.unwrap());
        assert_eq!(error.code, i32::from(Code::Unavailable));
        drop(client);
        assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(0), "{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_the_job_and_lists_nothing() {
    let data = tempfile::tempdir().unwrap();
    // No file may grow beyond 64 KiB: an artifact of the digits model does.
    let program = Program::start(data.path(), "trap '' XFSZ; ulimit -f 64;");
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
    for folder in ["models", "objects/sha256"] {
        let count = std::fs::read_dir(data.path().join(folder)).unwrap().count();
        assert_eq!(count, 0, "{folder}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_announces_the_end_and_a_second_signal_does_not_wait() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), "");
    let mut health = HealthClient::new(program.channel().await);
    let watch = HealthCheckRequest { service: String::new() };
    let mut states = health.watch(watch).await.unwrap().into_inner();
    let mut next = async || states.next().await.unwrap().unwrap().status();
    assert_eq!(next().await, ServingStatus::Serving);
    program.signal("TERM");
    assert_eq!(next().await, ServingStatus::NotServing);
    // The open watch keeps the first drain going.
    program.signal("TERM");
    assert_eq!(tokio::task::block_in_place(|| program.wait()), Some(143));
}
