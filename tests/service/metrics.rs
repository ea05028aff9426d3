//! The operators' port over a real socket: metrics after traffic, probes, health over gRPC.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt as _;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vitq::grpc::ops::{self, Probes};
use vitq::grpc::proto::{
    ClassifyRequest, EvaluateRequest, GetModelRequest, Image, LoadModelRequest, UnloadModelRequest,
};
use vitq::telemetry::metrics::table::{ALL, Kind, Metric};

use crate::evaluate::evaluate;
use crate::server::{Setup, TestServer, digit, drawn, quick, result};
use crate::uploads::bring_digits;

/// An operators' port.
struct Ops {
    address: String,
    _stops_when_dropped: DropGuard,
}

impl Ops {
    async fn start(probes: Probes) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        tokio::spawn(ops::serve(listener, probes, stop.clone()));
        Self { address, _stops_when_dropped: stop.drop_guard() }
    }

    /// Status code and body of a page.
    async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn scrape(&self) -> Scrape {
        let (status, text) = self.get("/metrics").await;
        assert_eq!(status, 200);
        Scrape::read(text)
    }

    async fn health(&self) -> HealthClient<Channel> {
        let url = format!("http://{}", self.address);
        HealthClient::new(Channel::from_shared(url).unwrap().connect().await.unwrap())
    }
}

/// Values by name and labels.
struct Scrape {
    text: String,
    values: BTreeMap<String, f64>,
}

impl Scrape {
    fn read(text: String) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let values = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        });
        Self { values: values.collect(), text }
    }

    /// 0 for what is not there.
    fn value(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(0.0)
    }

    /// The sum over all labels that contain this text.
    fn sum(&self, name: &str, label: &str) -> f64 {
        let lines = self.values.iter();
        let ours = lines.filter(|(key, _)| {
            key.strip_prefix(name).is_some_and(|rest| {
                (rest.is_empty() || rest.starts_with('{')) && rest.contains(label)
            })
        });
        ours.map(|(_, value)| value).sum()
    }
}

/// Whether NVIDIA's driver shows a GPU.
fn has_gpu() -> bool {
    std::fs::read_dir("/proc/driver/nvidia/gpus").is_ok_and(|mut gpus| gpus.next().is_some())
}

fn health(service: &str) -> Request<HealthCheckRequest> {
    Request::new(HealthCheckRequest { service: service.to_owned() })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_told_after_some_traffic() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let ops = Ops::start(server.probes.clone()).await;
    let before = ops.scrape().await;
    bring_digits(&server, "brought").await;
    let mut request = quick("counted");
    request.calibration = drawn("brought", 8);
    result(server.quantize(request).await.unwrap());
    let images = vec![digit(0, 0), b"no image".to_vec(), digit(1, 0)];
    server.classify("counted", images).await.unwrap();
    let evaluation = EvaluateRequest {
        model: "counted".to_owned(),
        dataset: "brought".to_owned(),
        limit: 4,
        ..EvaluateRequest::default()
    };
    evaluate(&server, evaluation).await.unwrap();
    let unknown = server.classify("nobody-has-this", vec![digit(0, 0)]).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let after = ops.scrape().await;
    for Metric { name, kind, labels, .. } in ALL {
        if *labels == ["gpu_uuid"] && !has_gpu() {
            assert!(!after.text.contains(name), "{name} without a GPU");
            continue;
        }
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
            Kind::Process if name.ends_with("_total") => "counter",
            Kind::Process => "gauge",
        };
        let typed = format!("# TYPE {name} {kind}\n");
        assert_eq!(after.text.matches(&typed).count(), 1, "{typed} in\n{}", after.text);
        let sample = match kind {
            "histogram" => format!("\n{name}_bucket{{"),
            _ if labels.is_empty() => format!("\n{name} "),
            _ => format!("\n{name}{{"),
        };
        assert!(after.text.contains(&sample), "no value of {name}");
        for label in *labels {
            let of_metric = |line: &&str| line.starts_with(sample.trim_start());
            let line = after.text.lines().find(of_metric).unwrap();
            assert!(line.contains(&format!("{label}=\"")), "{label} is missing in {line}");
        }
    }
    let grown = |name: &str, label: &str| after.sum(name, label) - before.sum(name, label);
    let requests = "vitq_inference_requests_total";
    assert_eq!(grown(requests, "model=\"counted\""), 1.0);
    assert!(grown(requests, "model=\"_other\"") >= 1.0);
    assert!(!after.text.contains("nobody-has-this"), "clients do not choose labels");
    assert_eq!(grown("vitq_inference_images_total", "model=\"counted\""), 2.0);
    assert_eq!(grown("vitq_batch_size_sum", "model=\"counted\""), 2.0);
    assert_eq!(grown("vitq_queue_duration_seconds_count", "model=\"counted\""), 2.0);
    let failures = "vitq_inference_failures_total{model=\"counted\",reason=\"decode\"}";
    assert_eq!(after.value(failures), 1.0);
    assert_eq!(after.value("vitq_queue_depth{model=\"counted\",priority=\"interactive\"}"), 0.0);
    assert!(after.text.contains("vitq_queue_depth{model=\"counted\",priority=\"bulk\"} 0"));
    assert!(grown("vitq_jobs_total", "kind=\"quantize\",result=\"succeeded\"") >= 1.0);
    for reason in ["device", "oom", "internal"] {
        let failures =
            format!("vitq_inference_failures_total{{model=\"counted\",reason=\"{reason}\"}}");
        assert!(after.values.contains_key(&failures), "an alert would miss the first {reason}");
    }
    assert!(grown("vitq_cache_hits_total", "cache=\"copies\"") >= 1.0);
    let bytes = after.value("vitq_model_bytes{model=\"counted\"}");
    let mut models = server.models();
    let get = GetModelRequest { model: "counted".to_owned() };
    let model = models.get_model(get).await.unwrap().into_inner().model.unwrap();
    let resident = model.resident_bytes;
    assert!(bytes > 0.0 && bytes == resident as f64, "{bytes} {resident}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_and_who_is_refused_are_told_apart() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::with(&data, Setup { queue_images: 4, ..Setup::default() }).await;
    let ops = Ops::start(server.probes.clone()).await;
    server.make("small-queue").await;
    let reason = |reason: &str| {
        format!("vitq_inference_failures_total{{model=\"small-queue\",reason=\"{reason}\"}}")
    };
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let mut client = server.inference();
        let images = vec![Image { content: digit(0, 0).into() }; 2];
        let model = "small-queue".to_owned();
        let request = ClassifyRequest { model, images, ..ClassifyRequest::default() };
        calls.spawn(async move { client.classify(request).await });
    }
    let mut refused = 0.0;
    while let Some(answer) = calls.join_next().await {
        if let Err(status) = answer.unwrap() {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            refused += 1.0;
        }
    }
    let scrape = ops.scrape().await;
    assert_eq!(scrape.value(&reason("queue_full")), 2.0 * refused);
    // How long a call takes is not known; one of these times is too short for it, and long enough to
    // reach the server.
    let times = [1, 2, 4, 8, 16].map(|tenths| Duration::from_micros(500 * tenths));
    for time in times.into_iter().cycle() {
        let mut late = Request::new(ClassifyRequest {
            model: "small-queue".to_owned(),
            images: vec![Image { content: digit(0, 0).into() }],
            ..ClassifyRequest::default()
        });
        late.set_timeout(time);
        let _ = server.inference().classify(late).await; // whatever the client is told
        if ops.scrape().await.value(&reason("deadline")) >= 1.0 {
            break;
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ports_tell_the_health_of_server_process_and_models() {
    let data = tempfile::tempdir().unwrap();
    let probes = Probes::default();
    let early = Ops::start(probes).await;
    assert_eq!(early.get("/readyz").await.0, 503, "nothing serves yet");
    let status = early.health().await.check(health("")).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);

    let server = TestServer::start(&data).await;
    let ops = Ops::start(server.probes.clone()).await;
    server.make("m").await;
    let clients = [ops.health().await, HealthClient::new(server.channel.clone())];
    for mut client in clients.clone() {
        let mut status = async |service: &str| {
            client.check(health(service)).await.map(|answer| answer.into_inner().status())
        };
        use ServingStatus::{NotServing, Serving};
        for service in ["", "liveness", "vitq.v1.InferenceService"] {
            assert_eq!(status(service).await.unwrap(), Serving, "{service}");
        }
        assert_eq!(status("model/m").await.unwrap(), NotServing, "it is stored, not loaded");
        for unknown in ["model/other", "model/Not An Id", "vitq.v1.Nothing"] {
            assert_eq!(status(unknown).await.unwrap_err().code(), Code::NotFound, "{unknown}");
        }
    }
    let [mut on_ops, mut on_data] = clients;
    let mut states = on_data.watch(health("model/m")).await.unwrap().into_inner();
    let mut coming = on_data.watch(health("model/later")).await.unwrap().into_inner();
    let first = coming.next().await.unwrap().unwrap().status();
    assert_eq!(first, ServingStatus::ServiceUnknown);
    let mut next = async || states.next().await.unwrap().unwrap().status();
    assert_eq!(next().await, ServingStatus::NotServing);
    let load = LoadModelRequest { model: "m".to_owned() };
    server.models().load_model(load).await.unwrap();
    assert_eq!(next().await, ServingStatus::Serving);
    let unload = UnloadModelRequest { model: "m".to_owned() };
    server.models().unload_model(unload).await.unwrap();
    assert_eq!(next().await, ServingStatus::NotServing);
    drop((states, coming, on_data));

    assert_eq!((ops.get("/livez").await.0, ops.get("/readyz").await.0), (200, 200));
    server.stop().await;
    assert_eq!((ops.get("/livez").await.0, ops.get("/readyz").await.0), (200, 503));
    assert_eq!(ops.get("/elsewhere").await.0, 404);
    let status = on_ops.check(health("")).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);
    let status = on_ops.check(health("liveness")).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::Serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_carry_the_id_of_the_request() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let ask = async |id: Option<&'static str>, model: &str| {
        let mut request = Request::new(GetModelRequest { model: model.to_owned() });
        if let Some(id) = id {
            request.metadata_mut().insert("x-request-id", id.parse().unwrap());
        }
        server.models().get_model(request).await
    };
    let refused = ask(Some("order-7"), "nobody").await.unwrap_err();
    assert_eq!(refused.metadata().get("x-request-id").unwrap(), "order-7");
    server.make("m").await;
    let answered = ask(Some("order-8"), "m").await.unwrap();
    assert_eq!(answered.metadata().get("x-request-id").unwrap(), "order-8");
    let (a, b) = (ask(None, "m").await.unwrap(), ask(Some("a \"quote\""), "m").await.unwrap());
    for answer in [a, b] {
        let id = answer.metadata().get("x-request-id").unwrap().to_str().unwrap();
        assert_eq!(id.len(), 26, "{id}");
    }
    server.stop().await;
}
