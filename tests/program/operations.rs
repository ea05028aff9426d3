//! What operators see of the real program: configuration, probes, log lines, traces.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{ChildStderr, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Request};
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{CalibrationDataset, GetModelRequest, ListModelsRequest, QuantizeRequest};

use crate::program::{Process, Stores};

const FAILED: Option<i32> = Some(1);
const USAGE: Option<i32> = Some(2);
/// The caller's trace and span.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

fn vitq(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitq"));
    command.args(args).env_remove("VITQ_SERVER").envs(variables.iter().copied());
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Value and origin of a setting.
fn setting(output: &Output, key: &str) -> (String, String) {
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let list = json["settings"].as_array().unwrap();
    let found = list.iter().find(|setting| setting["key"] == key).unwrap();
    let text = |name: &str| found[name].as_str().unwrap_or("-").to_owned();
    (text("value"), text("origin"))
}

#[test]
fn flags_win_over_variables_variables_over_the_file_and_it_over_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vitq.toml");
    std::fs::write(&file, "queue-images = 1\nmax-batch = 2\nlisten = \"127.0.0.1:3\"\n").unwrap();
    let variables = [
        ("VITQ_CONFIG", file.to_str().unwrap()),
        ("VITQ_QUEUE_IMAGES", "10"),
        ("VITQ_MAX_BATCH", "20"),
        ("VITQ_DATABASE", "postgres://user:secret@host/db"),
    ];
    for command in
        [vec!["check-config"], vec!["check-config", "serve"], vec!["serve", "--print-config"]]
    {
        let args = [command, vec!["--queue-images", "100", "--device", "cpu", "--json"]].concat();
        let output = vitq(&args, &variables);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        let seen = |key: &str| setting(&output, key);
        assert_eq!(seen("queue-images"), ("100".to_owned(), "flag".to_owned()));
        assert_eq!(seen("max-batch"), ("20".to_owned(), "env".to_owned()));
        assert_eq!(seen("listen"), ("127.0.0.1:3".to_owned(), "file".to_owned()));
        assert_eq!(seen("workers"), ("1".to_owned(), "default".to_owned()));
        assert_eq!(seen("store"), ("-".to_owned(), "default".to_owned()));
        assert_eq!(seen("database"), ("(hidden)".to_owned(), "env".to_owned()));
        assert!(!String::from_utf8_lossy(&output.stdout).contains("secret"));
    }
}

#[test]
fn what_cannot_work_is_told_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vitq.toml");
    std::fs::write(&file, "queue_images = 1\n").unwrap();
    let config = ("VITQ_CONFIG", file.to_str().unwrap());
    for command in ["serve", "worker", "check-config"] {
        let output = vitq(&[command], &[config]);
        assert_eq!(output.status.code(), USAGE, "{command}");
        let text = stderr(&output);
        assert!(text.contains("`queue_images`, did you mean `queue-images`?"), "{text}");
        let output = vitq(&[command], &[("VITQ_QUEUE_IMAGE", "1")]);
        assert_eq!(output.status.code(), USAGE, "{command}");
        let text = stderr(&output);
        let words =
            "VITQ_QUEUE_IMAGE: unknown environment variable, did you mean `VITQ_QUEUE_IMAGES`?";
        assert!(text.contains(words), "{text}");
    }
    // Commands without settings do not mind.
    assert!(vitq(&["methods"], &[("VITQ_QUEUE_IMAGE", "1")]).status.success());
    let nowhere = folder.path().join("nowhere");
    let args = ["check-config", "--checkpoints", nowhere.to_str().unwrap(), "--log", "a=b=c"];
    let output = vitq(&args, &[]);
    assert_eq!(output.status.code(), USAGE);
    let text = stderr(&output);
    assert!(text.contains("checkpoints: ") && text.contains("does not exist"), "{text}");
    assert!(text.contains("log: "), "{text}");
    let output = vitq(&["check-config", "worker", "--device", "cpu"], &[]);
    assert_eq!(output.status.code(), USAGE, "a worker needs a database");
}

#[test]
fn what_a_start_would_refuse_is_told_by_the_check_and_the_start_alike() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (file, nowhere) = (file.to_str().unwrap(), folder.path().join("nowhere"));
    let nowhere = nowhere.to_str().unwrap();
    let data = folder.path().join("data");
    let elsewhere = ["--device", "cpu", "--ops-listen", "127.0.0.1:0", "--listen", "127.0.0.1:0"];
    let elsewhere = [&elsewhere[..], &["--data-dir", data.to_str().unwrap()]].concat();
    for (flag, value, words) in [
        ("--listen", "0.0.0.0:80", "listen: 0.0.0.0:80 is not a loopback address"),
        ("--store", "ftp://x", "store: must be"),
        ("--database", "foo://x", "database: must be"),
        ("--data-dir", file, "data-dir: "),
        ("--checkpoints", file, "checkpoints: "),
        ("--checkpoints", nowhere, "does not exist"),
        ("--datasets", file, "datasets: "),
        ("--log", "foo=bar=baz", "log: "),
        ("--device", "cuda:99", "device: cuda:99 is not there"),
    ] {
        let kept = elsewhere.chunks(2).filter(|pair| pair[0] != flag).flatten();
        let flags: Vec<&str> = kept.copied().chain([flag, value]).collect();
        for command in [&["serve"][..], &["check-config"], &["check-config", "serve"]] {
            let output = vitq(&[command, &flags].concat(), &[]);
            let text = stderr(&output);
            assert_eq!(output.status.code(), USAGE, "{command:?} {flag} {value}: {text}");
            assert!(text.contains(words), "{command:?} {flag} {value}: {text}");
        }
    }
    let taken = ["--listen", "127.0.0.1:4711", "--ops-listen", "127.0.0.1:4711", "--device", "cpu"];
    let output = vitq(&[&["check-config"][..], &taken].concat(), &[]);
    assert_eq!(output.status.code(), USAGE);
    assert!(stderr(&output).contains("ops-listen: 127.0.0.1:4711 is taken"), "{}", stderr(&output));
    // What a worker refuses.
    for command in [&["worker"][..], &["check-config", "worker"]] {
        let flags = ["--device", "cpu", "--checkpoints", nowhere, "--store", "ftp://x"];
        let output = vitq(&[command, &flags].concat(), &[]);
        assert_eq!(output.status.code(), USAGE, "{command:?}");
        let text = stderr(&output);
        for words in ["database: a worker needs", "checkpoints: ", "store: must be"] {
            assert!(text.contains(words), "{command:?}: {text}");
        }
    }
    // A certificate that cannot be used.
    let flags = ["check-config", "--tls-cert", file, "--tls-key", file, "--device", "cpu"];
    let output = vitq(&flags, &[]);
    assert_eq!(output.status.code(), USAGE);
    assert!(stderr(&output).contains("tls"), "{}", stderr(&output));
}

#[test]
fn everything_that_is_wrong_with_a_file_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vitq.toml");
    let content = "drain-delay = \"x\"\nmax-batch = -4\nexecutor = \"foo\"\none = 1\ntwo = 2\n\
                   checkpoints = \"/nowhere/at/all\"\ndevice = \"cpu\"\n";
    std::fs::write(&file, content).unwrap();
    let output = vitq(&["check-config", "--config", file.to_str().unwrap()], &[("VITQ_FOO", "1")]);
    assert_eq!(output.status.code(), USAGE);
    let text = stderr(&output);
    let wrong =
        ["drain-delay", "max-batch", "executor", "`one`", "`two`", "checkpoints", "VITQ_FOO"];
    assert!(wrong.iter().all(|words| text.contains(words)), "{text}");
    assert_eq!(text.matches("error: ").count(), wrong.len(), "{text}");
    assert!(!text.contains("Usage:"), "{text}");
    let output = vitq(&["serve", "--config", file.to_str().unwrap(), "--json"], &[]);
    assert_eq!(output.status.code(), USAGE);
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["fields"].as_array().unwrap().len(), 5, "{error}");
}

/// A server whose log is read.
struct Logged {
    _process: Process,
    _data: TempDir,
    channel: Channel,
    url: String,
    ops: String,
    /// The line that tells the configuration.
    configuration: String,
    log: std::io::Lines<BufReader<ChildStderr>>,
}

impl Logged {
    async fn start(flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let stores = Stores {
            flags: vec!["--data-dir".to_owned(), data.path().to_str().unwrap().to_owned()],
            variables: Vec::new(),
        };
        let mut program = stores.program("serve");
        program.args(["--listen", "127.0.0.1:0", "--drain-delay", "0"]).args(flags);
        program.envs(variables.iter().copied()).stderr(Stdio::piped());
        let mut child = program.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let process = Process(child);
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        let channel = Channel::from_shared(url.clone()).unwrap().connect().await.unwrap();
        let mut configuration = String::new();
        let ops = loop {
            let line = log.next().unwrap().unwrap();
            if line.contains("settings") {
                configuration = line;
            } else if line.contains("probes listen") {
                break probes(&line);
            }
        };
        Self { _process: process, _data: data, channel, url, ops, configuration, log }
    }

    /// The next line that holds all of these texts.
    fn line(&mut self, texts: &[&str]) -> String {
        let lines = self.log.by_ref().map(Result::unwrap);
        let mut found = lines.filter(|line| texts.iter().all(|text| line.contains(text)));
        found.next().expect("the log ends")
    }

    async fn quantize(&self) {
        let mut request = Request::new(QuantizeRequest {
            checkpoint: "digits-vit".to_owned(),
            method: "minmax".to_owned(),
            weight_bits: 8,
            activation_bits: 8,
            calibration: Some(Calibration::Dataset(CalibrationDataset {
                name: "digits/calib".to_owned(),
                count: 4,
                files: Vec::new(),
            })),
            model_id: "traced".to_owned(),
            ..QuantizeRequest::default()
        });
        in_trace(&mut request);
        let mut client = QuantizationServiceClient::new(self.channel.clone());
        let mut events = client.quantize(request).await.unwrap().into_inner();
        while events.message().await.unwrap().is_some() {}
    }
}

fn in_trace<T>(request: &mut Request<T>) {
    let parent = format!("00-{TRACE}-{PARENT}-01").parse().unwrap();
    request.metadata_mut().insert("traceparent", parent);
    request.metadata_mut().insert("x-request-id", "order-7".parse().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_call_carry_its_trace_and_those_of_its_job_lead_back() {
    let mut server = Logged::start(&["--log", "vitq=debug", "--log-format", "json"], &[]).await;
    server.quantize().await;
    let ended = server.line(&["call ended"]);
    // The job's lines come first or later, in a trace of their own.
    let line: Value = serde_json::from_str(&ended).unwrap();
    assert_eq!(line["trace_id"], TRACE, "{ended}");
    assert_eq!(line["request_id"], "order-7");
    let span = line["span_id"].as_str().unwrap();
    assert!(span.len() == 16 && span != PARENT, "{span}");
    assert_eq!(line["fields"]["status"], "OK");
    assert_eq!(line["span"]["rpc.method"], "vitq.v1.QuantizationService/Quantize");

    let mut request = Request::new(GetModelRequest { model: "nobody".to_owned() });
    request.metadata_mut().insert("x-request-id", "order-8".parse().unwrap());
    ModelServiceClient::new(server.channel.clone()).get_model(request).await.unwrap_err();
    let line: Value = serde_json::from_str(&server.line(&["call ended", "NOT_FOUND"])).unwrap();
    assert_eq!(
        (&line["request_id"], line["trace_id"].as_str().unwrap().len()),
        (&"order-8".into(), 32)
    );
    assert_ne!(line["trace_id"], TRACE);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_log_in_text_with_the_trace_that_asked_for_them() {
    let mut server = Logged::start(&[], &[("VITQ_QUEUE_IMAGES", "9")]).await;
    let line = &server.configuration;
    assert!(line.contains("queue-images=9 [env]") && line.contains("workers=1,"), "{line}");
    server.quantize().await;
    let line = server.line(&["job succeeded", &format!("cause_trace_id=\"{TRACE}\"")]);
    let (_, own) = line.split_once(" trace_id=\"").unwrap();
    assert!(!own.starts_with(TRACE), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_counted_by_method_and_status_with_the_bytes_of_their_messages() {
    let server = Logged::start(&[], &[]).await;
    let name = "a-name-of-some-length".to_owned();
    let bytes = name.len() as u64 + 2; // its tag and its length before it
    let mut models = ModelServiceClient::new(server.channel.clone());
    for _ in 0..3 {
        let request = GetModelRequest { model: name.clone() };
        assert_eq!(models.get_model(request).await.unwrap_err().code(), Code::NotFound);
    }
    models.list_models(ListModelsRequest::default()).await.unwrap();
    let method = |name: &str| format!("grpc_method=\"vitq.v1.ModelService/{name}\"");
    let ended = |name: &str, status: &str| format!("{{{},grpc_status=\"{status}\"}}", method(name));
    let expected = [
        format!("grpc_server_call_started_total{{{}}} 3\n", method("GetModel")),
        format!(
            "grpc_server_call_rcvd_total_compressed_message_size_bytes_sum{} {}\n",
            ended("GetModel", "NOT_FOUND"),
            3 * bytes
        ),
        format!(
            "grpc_server_call_sent_total_compressed_message_size_bytes_sum{} 0\n",
            ended("GetModel", "NOT_FOUND")
        ),
        format!("grpc_server_call_duration_seconds_count{} 1\n", ended("ListModels", "OK")),
    ];
    // A call ends when its answer has left the server, which may be after it has come here.
    while !expected.iter().all(|line| scrape(&server.ops).contains(line)) {
        tokio::task::yield_now().await;
    }
}

/// The metrics of an operators' port.
fn scrape(ops: &str) -> String {
    let mut stream = TcpStream::connect(ops.strip_prefix("http://").unwrap()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn healthcheck_asks_either_port() {
    let server = Logged::start(&[], &[]).await;
    for url in [&server.url, &server.ops] {
        for service in ["", "liveness", "vitq.v1.InferenceService"] {
            let output = vitq(&["healthcheck", "--server", url, "--service", service], &[]);
            assert!(output.status.success(), "{url} {service}: {}", stderr(&output));
            assert_eq!(String::from_utf8_lossy(&output.stdout), "SERVING\n");
        }
        let output = vitq(&["healthcheck", "--server", url, "--service", "model/nobody"], &[]);
        assert_eq!(output.status.code(), FAILED, "{}", stderr(&output));
    }
    // A port that accepts and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let output = vitq(&["healthcheck", "--server", &url, "--timeout", "0.2"], &[]);
    assert_eq!(output.status.code(), FAILED);
    assert!(stderr(&output).contains("no answer within 0.2 s"), "{}", stderr(&output));
}

#[test]
fn a_server_without_its_database_lives_not_ready_and_tries_again_until_it_is_stopped() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().to_str().unwrap();
    let database = format!("postgres://nobody@{closed}/none");
    let flags = ["--data-dir", folder, "--database", &database].map(str::to_owned).to_vec();
    let mut program = Stores { flags, variables: Vec::new() }.program("serve");
    program.args(["--listen", "127.0.0.1:0"]).stderr(Stdio::piped());
    let mut process = Process(program.spawn().unwrap());
    let mut log = BufReader::new(process.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let ops = probes(&log.find(|line| line.contains("probes listen")).unwrap());
    for _ in 0..2 {
        log.find(|line| line.contains("the database cannot be reached, trying again")).unwrap();
    }
    let health =
        |service: &str| vitq(&["healthcheck", "--server", &ops, "--service", service], &[]);
    assert!(health("liveness").status.success());
    assert_eq!(health("").status.code(), FAILED, "not ready");
    process.signal("TERM");
    assert!(process.0.wait().unwrap().success());
    let mut said = String::new();
    process.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "", "it never said that it listens");
}

/// Where the probes listen, by a line of the log.
fn probes(line: &str) -> String {
    let (_, rest) = line.split_once("127.0.0.1:").unwrap();
    let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
    format!("http://127.0.0.1:{port}")
}

#[cfg(feature = "otel")]
mod export {
    //! Traces to a collector.

    use std::path::Path;

    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
        TraceService, TraceServiceServer,
    };
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
    };
    use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
    use opentelemetry_proto::tonic::trace::v1::Span;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Response, Status};
    use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
    use vitq::grpc::proto::{ClassifyRequest, Image};

    use super::*;

    struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            self.0.send(request.into_inner()).unwrap();
            Ok(Response::new(Default::default()))
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn attribute(span: &Span, key: &str) -> Option<String> {
        let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
        let value = found.value.clone()?.value?;
        if let Attribute::StringValue(text) = value {
            return Some(text);
        }
        Some(format!("{value:?}"))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn spans_of_calls_batches_and_jobs_reach_a_collector_before_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (sender, mut exported) = mpsc::unbounded_channel();
        let service = TraceServiceServer::new(Collector(sender));
        let incoming = TcpIncoming::from(listener);
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        // Whatever is sent is sent at the end: the pause between batches is longer than the test.
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
            ("OTEL_SERVICE_NAME", "vitq-under-test"),
        ];
        let server = Logged::start(&[], &variables).await;
        server.quantize().await;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/datasets/digits/val/0");
        let image = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
        let mut request = Request::new(ClassifyRequest {
            model: "traced".to_owned(),
            images: vec![Image { content: std::fs::read(image).unwrap().into() }],
            ..ClassifyRequest::default()
        });
        in_trace(&mut request);
        InferenceServiceClient::new(server.channel.clone()).classify(request).await.unwrap();
        let Logged { _process: mut process, channel, .. } = server;
        drop(channel);
        let id = process.0.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
        assert_eq!(tokio::task::block_in_place(|| process.0.wait().unwrap().code()), Some(0));

        let mut spans = Vec::new();
        let mut names = Vec::new();
        while let Ok(request) = exported.try_recv() {
            for resource in request.resource_spans {
                names.extend(resource.resource.unwrap().attributes);
                spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
            }
        }
        let named = |attribute: &opentelemetry_proto::tonic::common::v1::KeyValue| {
            attribute.key == "service.name"
                && attribute.value.clone().unwrap().value
                    == Some(Attribute::StringValue("vitq-under-test".to_owned()))
        };
        assert!(names.iter().any(named), "{names:?}");
        let find = |name: &str| {
            spans.iter().find(|span| span.name == name).unwrap_or_else(|| {
                panic!("{name} is not in {:?}", spans.iter().map(|s| &s.name).collect::<Vec<_>>())
            })
        };
        for name in ["vitq.v1.QuantizationService/Quantize", "vitq.v1.InferenceService/Classify"] {
            let call = find(name);
            assert_eq!(
                (hex(&call.trace_id), hex(&call.parent_span_id)),
                (TRACE.into(), PARENT.into())
            );
            assert_eq!(attribute(call, "rpc.method").as_deref(), Some(name));
            assert_eq!(attribute(call, "rpc.system.name").as_deref(), Some("grpc"));
            assert_eq!(attribute(call, "rpc.status_code").as_deref(), Some("OK"));
        }
        let classify = find("vitq.v1.InferenceService/Classify");
        let batch = find("batch");
        assert!(batch.links.iter().any(|link| link.span_id == classify.span_id), "{batch:?}");
        let (job, quantize) = (find("quantize"), find("vitq.v1.QuantizationService/Quantize"));
        assert!(job.links.iter().any(|link| link.span_id == quantize.span_id), "{job:?}");
        assert_ne!(job.trace_id, quantize.trace_id);
    }
}
