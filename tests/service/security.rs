//! Who gets in, and how far: TLS, client certificates, tokens, scopes, quotas, connections.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_types::StatusExt as _;
use vitq::engine::jobs::JobLimits;
use vitq::grpc::auth::{NewToken, Scopes, new_token};
use vitq::grpc::proto::longrunning::CancelOperationRequest;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::{
    ClassifyRequest, EvaluateRequest, Image, ListModelsRequest, UnloadModelRequest,
};
use vitq::grpc::security::{Security, SecurityConfig};
use vitq::grpc::{ConnectionLimits, ServerConfig};

use crate::server::{Setup, TestServer, digit, quick, slow};

/// A certificate authority.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.as_ref().pem()
    }

    /// Certificate and key of somebody with this name.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// How a client that trusts this CA alone connects.
    fn trusted(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.pem()))
            .domain_name("localhost")
    }
}

/// Files of a server's security.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The flags of a server with a certificate of this CA.
    fn tls(&self, ca: &Ca) -> SecurityConfig {
        let (certificate, key) = ca.issue("localhost");
        SecurityConfig {
            tls_cert: Some(self.write("cert.pem", &certificate)),
            tls_key: Some(self.write("key.pem", &key)),
            ..flags()
        }
    }
}

fn flags() -> SecurityConfig {
    SecurityConfig {
        tls_cert: None,
        tls_key: None,
        tls_client_ca: None,
        client_cert_scopes: Scopes::parse("infer").unwrap(),
        tokens: None,
        jwt_issuer: None,
        jwt_audience: None,
        jwt_key: None,
        reflection: false,
        insecure: false,
    }
}

fn open(flags: &SecurityConfig) -> Security {
    flags.open("127.0.0.1:0".parse().unwrap()).unwrap()
}

fn with(security: Security) -> Setup {
    let server = ServerConfig { security, ..ServerConfig::default() };
    Setup { server, ..Setup::default() }
}

async fn connect(
    server: &TestServer,
    tls: ClientTlsConfig,
) -> Result<Channel, tonic::transport::Error> {
    let url = format!("https://{}", server.address);
    Channel::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await
}

async fn list(channel: &Channel) -> Result<(), Status> {
    ModelServiceClient::new(channel.clone())
        .list_models(ListModelsRequest::default())
        .await
        .map(drop)
}

/// Whether a client that connects like this gets an answer.
async fn answers(server: &TestServer, tls: ClientTlsConfig) -> bool {
    match connect(server, tls).await {
        // With TLS 1.3 a server's refusal may come after the client's handshake.
        Ok(channel) => list(&channel).await.is_ok(),
        Err(_) => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_for_those_who_trust_the_ca_and_nothing_else_is_spoken() {
    let (data, files, ca) = (tempfile::tempdir().unwrap(), Files::new(), Ca::new());
    let server = TestServer::with(&data, with(open(&files.tls(&ca)))).await;
    assert!(answers(&server, ca.trusted()).await);
    assert!(!answers(&server, Ca::new().trusted()).await, "another CA");
    assert!(!answers(&server, ca.trusted().domain_name("example.org")).await, "another name");
    assert!(list(&server.channel).await.is_err(), "plain HTTP/2");
    assert!(answers(&server, ca.trusted()).await, "the server has survived them");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_are_needed_and_name_the_principal() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let (ca, clients) = (Ca::new(), Ca::new());
    let flags = SecurityConfig {
        tls_client_ca: Some(files.write("clients.pem", &clients.pem())),
        tokens: Some(files.write("tokens", "boss.example certificate admin\n")),
        ..files.tls(&ca)
    };
    let server = TestServer::with(&data, with(open(&flags))).await;
    let identity = |ca: &Ca, name: &str| {
        let (certificate, key) = ca.issue(name);
        Identity::from_pem(certificate, key)
    };
    assert!(!answers(&server, ca.trusted()).await, "no certificate");
    let stranger = ca.trusted().identity(identity(&Ca::new(), "boss.example"));
    assert!(!answers(&server, stranger).await, "a certificate of another CA");

    let as_named = async |name: &str| {
        let tls = ca.trusted().identity(identity(&clients, name));
        ModelServiceClient::new(connect(&server, tls).await.unwrap())
    };
    let request = || UnloadModelRequest { model: "none".to_owned() };
    let unload = as_named("boss.example").await.unload_model(request()).await.unwrap_err();
    assert_eq!(unload.code(), Code::NotFound);
    let mut worker = as_named("worker.example").await;
    assert!(worker.list_models(ListModelsRequest::default()).await.is_ok());
    let unload = worker.unload_model(request()).await.unwrap_err();
    assert_eq!(unload.code(), Code::PermissionDenied);
    let info = unload.get_details_error_info().unwrap();
    assert_eq!(info.metadata["principal"], "certificate:worker.example");
    assert_eq!(info.metadata["needs"], "scope admin");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_counts_for_new_connections_only() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let (old, new) = (Ca::new(), Ca::new());
    let security = open(&files.tls(&old));
    let server = TestServer::with(&data, with(security.clone())).await;
    let before = connect(&server, old.trusted()).await.unwrap();
    list(&before).await.unwrap();

    let (certificate, key) = new.issue("localhost");
    files.write("cert.pem", &certificate);
    security.reload(); // the key is still the old one: nothing changes
    assert!(answers(&server, old.trusted()).await);
    files.write("key.pem", &key);
    security.reload();
    assert!(answers(&server, new.trusted()).await);
    assert!(!answers(&server, old.trusted()).await);
    list(&before).await.unwrap(); // it could not have connected anew

    files.write("cert.pem", "broken");
    security.reload();
    assert!(answers(&server, new.trusted()).await);
    server.stop().await;
}

/// What a call's refusal says: its code and reason.
fn refusal(status: &Status) -> (Code, String) {
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    (status.code(), reason)
}

fn authorized<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    let header: MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", header);
    request
}

fn classify_request(model: &str, images: usize) -> ClassifyRequest {
    let image = |_| Image { content: digit(0, 0).into() };
    let images = (0..images).map(image).collect();
    ClassifyRequest { model: model.to_owned(), images, ..ClassifyRequest::default() }
}

/// One call of each scope, with names that do not exist, and its refusal.
async fn probe(server: &TestServer, token: &str) -> [(&'static str, Status); 4] {
    let infer = server.inference().classify(authorized(classify_request("none", 1), token)).await;
    let request = EvaluateRequest {
        model: "none".to_owned(),
        dataset: "none".to_owned(),
        ..EvaluateRequest::default()
    };
    let evaluate = server.evaluation().evaluate(authorized(request, token)).await;
    let request =
        vitq::grpc::proto::QuantizeRequest { checkpoint: "none".to_owned(), ..quick("made") };
    let quantize = server.quantization().quantize(authorized(request, token)).await;
    let request = UnloadModelRequest { model: "none".to_owned() };
    let admin = server.models().unload_model(authorized(request, token)).await;
    [
        ("infer", infer.map(drop).unwrap_err()),
        ("evaluate", evaluate.map(drop).unwrap_err()),
        ("quantize", quantize.map(drop).unwrap_err()),
        ("admin", admin.map(drop).unwrap_err()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn scopes_open_their_own_calls_and_denial_comes_before_anything_else() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let names = ["infer", "evaluate", "quantize", "admin"];
    let made = names.map(|name| new_token(name, Scopes::parse(name).unwrap()).unwrap());
    let lines: Vec<&str> = made.iter().map(|new| new.line.as_str()).collect();
    let tokens = files.write("tokens", &lines.join("\n"));
    let security = open(&SecurityConfig { tokens: Some(tokens), ..flags() });
    let server = TestServer::with(&data, with(security.clone())).await;
    for (scope, NewToken { token, .. }) in names.iter().zip(&made) {
        for (needed, status) in probe(&server, token).await {
            if needed == *scope {
                assert_eq!(status.code(), Code::NotFound, "{scope}: {status:?}");
            } else {
                let expected = (Code::PermissionDenied, "PERMISSION_DENIED".to_owned());
                assert_eq!(refusal(&status), expected, "{scope} calls {needed}");
            }
        }
    }
    for (needed, status) in probe(&server, "vitq_wrong").await {
        let expected = (Code::Unauthenticated, "INVALID_TOKEN".to_owned());
        assert_eq!(refusal(&status), expected, "{needed}");
    }
    let missing = (Code::Unauthenticated, "MISSING_TOKEN".to_owned());
    assert_eq!(refusal(&list(&server.channel).await.unwrap_err()), missing);
    let mut health = HealthClient::new(server.channel.clone());
    assert!(health.check(HealthCheckRequest::default()).await.is_ok());
    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    let ask = tokio_stream::once(ServerReflectionRequest::default());
    assert_eq!(refusal(&reflection.server_reflection_info(ask).await.unwrap_err()), missing);

    files.write("tokens", &made[3].line);
    security.reload();
    let status = &probe(&server, &made[0].token).await[0].1;
    assert_eq!(refusal(status).1, "INVALID_TOKEN", "a token that was removed");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuers_tokens_are_taken_until_they_expire() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let key = KeyPair::generate().unwrap();
    let signing = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).unwrap();
    let security = open(&SecurityConfig {
        jwt_issuer: Some("issuer".to_owned()),
        jwt_audience: Some("vitq".to_owned()),
        jwt_key: Some(files.write("key.pem", &key.public_key_pem())),
        ..flags()
    });
    let server = TestServer::with(&data, with(security)).await;
    let now = get_current_timestamp();
    let token = |audience: &str, expires: u64| {
        let claims = json!({
            "iss": "issuer", "aud": audience, "sub": "alice", "scope": "infer", "exp": expires,
        });
        encode(&Header::new(Algorithm::ES256), &claims, &signing).unwrap()
    };
    let [infer, evaluate, ..] = probe(&server, &token("vitq", now + 600)).await;
    assert_eq!((infer.1.code(), evaluate.1.code()), (Code::NotFound, Code::PermissionDenied));
    for (token, reason) in
        [(token("vitq", now - 600), "EXPIRED_TOKEN"), (token("other", now + 600), "INVALID_TOKEN")]
    {
        let [infer, ..] = probe(&server, &token).await;
        assert_eq!(refusal(&infer.1), (Code::Unauthenticated, reason.to_owned()));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_are_counted_by_principal() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let all = Scopes::all();
    let (a, b) = (new_token("a", all).unwrap(), new_token("b", all).unwrap());
    let tokens = files.write("tokens", &format!("{}\n{}", a.line, b.line));
    let setup = Setup {
        images_per_client: 2,
        jobs: JobLimits { per_principal: 1, ..JobLimits::default() },
        ..with(open(&SecurityConfig { tokens: Some(tokens), ..flags() }))
    };
    let server = TestServer::with(&data, setup).await;
    let subject = |status: &Status| {
        assert_eq!(refusal(status), (Code::ResourceExhausted, "QUOTA_EXCEEDED".to_owned()));
        status.get_details_quota_failure().unwrap().violations[0].subject.clone()
    };
    let mut quantization = server.quantization();
    let made = quantization.quantize(authorized(quick("made"), &a.token)).await.unwrap();
    let mut events = made.into_inner();
    while events.message().await.unwrap().is_some() {}
    let mut inference = server.inference();
    let two = authorized(classify_request("made", 2), &a.token);
    assert!(inference.classify(two).await.is_ok());
    let three = authorized(classify_request("made", 3), &a.token);
    assert_eq!(subject(&inference.classify(three).await.unwrap_err()), "token:a");

    let first = quantization.quantize(authorized(slow("first"), &a.token)).await.unwrap();
    let operation = first.into_inner().message().await.unwrap().unwrap().operation;
    let second = quantization.quantize(authorized(slow("second"), &a.token)).await;
    assert_eq!(subject(&second.map(drop).unwrap_err()), "token:a");
    assert!(quantization.quantize(authorized(slow("third"), &b.token)).await.is_ok());
    let cancel = CancelOperationRequest { name: operation };
    server.operations().cancel_operation(authorized(cancel, &b.token)).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_ended_by_those_who_may_start_its_kind() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let made = ["quantize", "evaluate", "admin"]
        .map(|name| new_token(name, Scopes::parse(name).unwrap()).unwrap());
    let lines: Vec<&str> = made.iter().map(|new| new.line.as_str()).collect();
    let tokens = files.write("tokens", &lines.join("\n"));
    let security = open(&SecurityConfig { tokens: Some(tokens), ..flags() });
    let server = TestServer::with(&data, with(security)).await;
    let mut quantization = server.quantization();
    let [quantize, evaluate, admin] = made.map(|new| new.token);
    let started = quantization.quantize(authorized(slow("job"), &quantize)).await.unwrap();
    let name = started.into_inner().message().await.unwrap().unwrap().operation;
    let cancel = async |token: &str| {
        let request = CancelOperationRequest { name: name.clone() };
        server.operations().cancel_operation(authorized(request, token)).await
    };
    assert_eq!(cancel(&evaluate).await.unwrap_err().code(), Code::PermissionDenied);
    assert!(cancel(&admin).await.is_ok() && cancel(&quantize).await.is_ok());
    server.stop().await;
}

/// The type of a frame that announces the end of a connection (RFC 9113, section 6.8).
const GOAWAY: u8 = 7;

/// The type of the next HTTP/2 frame, whose payload is skipped; nothing at the connection's end.
async fn frame(stream: &mut TcpStream) -> Option<u8> {
    // Frame header: length, type, flags, stream (RFC 9113, section 4.1).
    let mut header = [0; 9];
    stream.read_exact(&mut header).await.ok()?;
    let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some(header[3])
}

#[tokio::test(flavor = "multi_thread")]
async fn old_connections_are_asked_to_end_and_then_cut_off() {
    let data = tempfile::tempdir().unwrap();
    let (age, grace) = (Duration::from_millis(100), Duration::from_millis(300));
    let connections = ConnectionLimits { age: Some(age), grace, ..ConnectionLimits::default() };
    let server = ServerConfig { connections, ..ServerConfig::default() };
    let server = TestServer::with(&data, Setup { server, ..Setup::default() }).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap(); // SETTINGS without any
    let mut frames = Vec::new();
    while let Some(kind) = frame(&mut stream).await {
        frames.push(kind);
    }
    // It never answers the ping that follows, and is cut off.
    assert!(frames.contains(&GOAWAY), "{frames:?}");
    list(&server.channel).await.unwrap(); // a client of that age connects anew
    server.stop().await;
}

fn vitq(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitq"));
    command.args(arguments).env("OMP_NUM_THREADS", "1");
    command
}

fn serve(data: &TempDir) -> Command {
    let mut command = vitq(&["serve", "--ops-listen", "127.0.0.1:0", "--device", "cpu"]);
    command.arg("--data-dir").arg(data.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A server process; killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts it and waits until it says where it listens.
    fn start(mut command: Command) -> (Self, String) {
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let process = Self(child);
        (process, line.trim().strip_prefix("listening on ").unwrap().to_owned())
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_program_refuses_to_be_open_to_a_network_by_accident() {
    let (data, files) = (tempfile::tempdir().unwrap(), Files::new());
    let NewToken { line, .. } = new_token("a", Scopes::all()).unwrap();
    let tokens = files.write("tokens", &line);
    for (with_tokens, why) in [(false, "anybody who reaches it"), (true, "in the clear")] {
        let mut command = serve(&data);
        command.args(["--listen", "0.0.0.0:0"]);
        if with_tokens {
            command.arg("--tokens").arg(&tokens);
        }
        let refused = command.output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        let text = stderr(&refused);
        assert!(text.contains(why) && text.contains("--insecure"), "{text}");
    }
    let mut broken = serve(&data);
    broken.arg("--tokens").arg(files.write("broken", "a secret infer"));
    let refused = broken.output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("tokens: line 1"), "{}", stderr(&refused));
    let mut command = serve(&data);
    command.args(["--listen", "0.0.0.0:0", "--insecure"]);
    let (_process, url) = Process::start(command);
    assert!(url.starts_with("http://0.0.0.0:"), "{url}");
}

#[test]
fn the_program_serves_its_own_client_over_tls_and_follows_a_hangup() {
    let (data, files, ca) = (tempfile::tempdir().unwrap(), Files::new(), Ca::new());
    let made = vitq(&["token", "alice", "--scopes", "infer,admin", "--json"]).output().unwrap();
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let (token, line) = (made["token"].as_str().unwrap(), made["line"].as_str().unwrap());
    let tokens = files.write("tokens", line);
    let SecurityConfig { tls_cert, tls_key, .. } = files.tls(&ca);
    let mut command = serve(&data);
    command.args(["--listen", "127.0.0.1:0"]).arg("--tokens").arg(&tokens);
    command.arg("--tls-cert").arg(tls_cert.unwrap()).arg("--tls-key").arg(tls_key.unwrap());
    let (process, url) = Process::start(command);
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let authority = files.write("ca.pem", &ca.pem());
    let list = || {
        let mut command = vitq(&["models", "list", "--server", &url, "--tls-ca"]);
        command.arg(&authority).args(["--tls-server-name", "localhost"]);
        command
    };
    let listed = list().env("VITQ_TOKEN", token).output().unwrap();
    assert!(listed.status.success(), "{}", stderr(&listed));
    let refused = list().output().unwrap();
    assert!(stderr(&refused).contains("MISSING_TOKEN"), "{}", stderr(&refused));
    let system = vitq(&["models", "list", "--server", &url]).output().unwrap();
    assert!(!system.status.success(), "the system does not know this CA");

    files.write("tokens", "");
    let id = process.0.id().to_string();
    assert!(Command::new("kill").args(["-HUP", &id]).status().unwrap().success());
    let refused = (0..100).any(|_| {
        let listed = list().env("VITQ_TOKEN", token).output().unwrap();
        stderr(&listed).contains("INVALID_TOKEN")
    });
    assert!(refused, "the token still opens the server");
}
