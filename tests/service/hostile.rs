//! Hostile clients of the real program: it goes on serving others, its memory stays bounded, and every
//! place in its queue comes back.

use std::io::Write as _;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::{ClassifyRequest, Image};

use crate::memory::allocated;
use crate::raw::{CLASSIFY, Raw, classification, framed, host};
use crate::server::{digit, quick};
use crate::shutdown::Program;

/// Places in the server's queue.
const PLACES: usize = 8;
/// Bytes that an attack may make the server hold, for a while, beyond what it held before.
const BOUND: u64 = 192 << 20;
/// Time within which a call of somebody else is answered.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server under attack.
struct Victim {
    program: Program,
    /// A connection from before the attack.
    channel: Channel,
    before: u64,
}

impl Victim {
    async fn start() -> (tempfile::TempDir, Self) {
        let data = tempfile::tempdir().unwrap();
        let settings = format!("export VITQ_QUEUE_IMAGES={PLACES} VITQ_MAX_BATCH=4;");
        let program = Program::start(data.path(), &settings);
        let channel = program.channel().await;
        let mut client = QuantizationServiceClient::new(channel.clone());
        let mut events = client.quantize(quick("m")).await.unwrap().into_inner();
        while events.message().await.unwrap().is_some() {}
        classify(&channel, PLACES).await.unwrap();
        let before = allocated(&program);
        (data, Self { program, channel, before })
    }

    fn address(&self) -> &str {
        &self.program.address
    }

    /// Others are served, over old connections and new ones, while the attack goes on.
    async fn serves(&self) {
        self.serves_within(BOUND).await;
    }

    async fn serves_within(&self, bound: u64) {
        for channel in [self.channel.clone(), self.program.channel().await] {
            timeout(PATIENCE, classify_in_turn(&channel, 1)).await.expect("an answer").unwrap();
        }
        let held = allocated(&self.program).saturating_sub(self.before);
        assert!(held < bound, "the attack makes the server hold {held} bytes");
    }

    /// The attack is over: the whole queue is free again.
    async fn has_recovered(&self) {
        let whole = classify_in_turn(&self.channel, PLACES);
        timeout(PATIENCE, whole).await.expect("the places come back").unwrap();
        self.serves().await;
    }
}

async fn classify(channel: &Channel, images: usize) -> Result<(), Status> {
    let images = (0..images).map(|n| Image { content: digit(n, 0).into() }).collect();
    let request = ClassifyRequest { model: "m".to_owned(), images, ..Default::default() };
    let answer = InferenceServiceClient::new(channel.clone()).classify(request).await?;
    assert!(answer.into_inner().items.iter().all(|item| item.outcome.is_some()));
    Ok(())
}

/// Comes back, as told, as long as the queue is full.
async fn classify_in_turn(channel: &Channel, images: usize) -> Result<(), Status> {
    loop {
        match classify(channel, images).await {
            Err(status) if status.code() == Code::ResourceExhausted => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => return other,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_http2_is_hung_up_on() {
    let (_data, victim) = Victim::start().await;
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"; // of TLS
    for talk in
        [&hello[..], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", &[0xff; 4096], b"PRI * HTTP/2.0\r\nX"]
    {
        for _ in 0..50 {
            let mut socket = TcpStream::connect(host(victim.address())).await.unwrap();
            let _ = socket.write_all(talk).await; // it may have hung up
            let _ = socket.shutdown().await;
            let mut rest = Vec::new();
            let over = timeout(PATIENCE, socket.read_to_end(&mut rest)).await;
            assert!(over.is_ok(), "the connection stays open after {talk:?}");
        }
    }
    victim.has_recovered().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_and_streams_keep_nobody_out() {
    let (_data, victim) = Victim::start().await;
    let mut held = Vec::new();
    for number in 0..1_000 {
        let mut socket = TcpStream::connect(host(victim.address())).await.unwrap();
        if number % 2 == 0 {
            socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0").await.unwrap();
        }
        held.push(socket);
    }
    victim.serves().await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let raw = Raw::connect(victim.address()).await;
        for _ in 0..250 {
            let (answer, mut body) = raw.begin(CLASSIFY, &[]).await.unwrap();
            body.send_data(Bytes::from_static(b"\0\0\x10\0\0half"), false).unwrap();
            streams.push((answer, body));
        }
    }
    victim.serves().await;
    drop((held, streams));
    victim.has_recovered().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_are_cut_off_and_leave_nothing() {
    let (_data, victim) = Victim::start().await;
    let body = classification(&[&digit(0, 0)]);
    let mut cut_off = 0;
    for _ in 0..20 {
        let raw = Raw::connect(victim.address()).await;
        for _ in 0..500 {
            if raw.reset(CLASSIFY, body.clone()).await.is_err() {
                cut_off += 1;
                break;
            }
        }
    }
    println!("{cut_off} of 20 connections were cut off");
    victim.serves().await;
    victim.has_recovered().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_never_reads_its_answers_takes_no_place() {
    let (_data, victim) = Victim::start().await;
    let body = classification(&[&digit(0, 0)]);
    let mut unread = Vec::new();
    let mut settings = h2::client::Builder::new();
    settings.initial_window_size(0);
    for _ in 0..4 {
        let raw = Raw::with(victim.address(), &settings).await;
        for _ in 0..200 {
            let (answer, mut stream) = raw.begin(CLASSIFY, &[]).await.unwrap();
            stream.send_data(body.clone(), true).unwrap();
            unread.push((answer, stream));
        }
    }
    victim.has_recovered().await;
    drop(unread);
    victim.has_recovered().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_never_end_are_bounded_together() {
    let (_data, victim) = Victim::start().await;
    let largest = 32 << 20;
    let piece = Bytes::from(vec![0; largest - 1]);
    let mut unfinished = Vec::new();
    for _ in 0..32 {
        let raw = Raw::connect(victim.address()).await;
        let (answer, mut body) = raw.begin(CLASSIFY, &[]).await.unwrap();
        let prefix = Bytes::from_static(&[0, 2, 0, 0, 0]);
        body.send_data(prefix, false).unwrap();
        body.send_data(piece.clone(), false).unwrap();
        unfinished.push(body);
        let answered = timeout(Duration::from_millis(300), answer).await;
        if answered.is_ok() {
            break; // refused: enough is coming in
        }
    }
    let count = unfinished.len();
    assert!((2..32).contains(&count), "{count} messages of 32 MiB");
    victim.serves_within(640 << 20).await;
    drop(unfinished);
    victim.has_recovered().await;
}

/// So many zeros, compressed.
fn bomb(bytes: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let zeros = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        encoder.write_all(&zeros).unwrap();
    }
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_inflate_are_stopped_at_the_limit() {
    let (_data, victim) = Victim::start().await;
    let gzip = framed(1, &bomb(512 << 20));
    let zeros = std::io::Cursor::new(vec![0; 512 << 20]);
    let zstd = framed(1, &zstd::encode_all(zeros, 1).unwrap());
    for (name, body) in [("gzip", gzip), ("zstd", zstd)] {
        assert!(body.len() < 4 << 20, "{name}: {} bytes", body.len());
        let raw = Raw::connect(victim.address()).await;
        let headers = [("grpc-encoding", name)];
        let call = || raw.call(CLASSIFY, &headers, body.clone());
        let answers = tokio::join!(call(), call(), call());
        for answer in [answers.0, answers.1, answers.2] {
            assert_eq!(answer.unwrap().code, Some(Code::ResourceExhausted), "{name}");
        }
        victim.serves().await;
    }
    victim.has_recovered().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_messages_get_their_status_and_the_connection_goes_on() {
    let (_data, victim) = Victim::start().await;
    let raw = Raw::connect(victim.address()).await;
    let good = classification(&[&digit(0, 0)]);
    let huge = "x".repeat(40 << 10);
    let request = |model: &str, count: usize| {
        let images = vec![Image { content: Bytes::from_static(b"x") }; count];
        let request = ClassifyRequest { model: model.to_owned(), images, ..Default::default() };
        framed(0, &request.encode_to_vec())
    };
    let timeout = |value: &'static str| vec![("grpc-timeout", value)];
    let cases: Vec<(&str, Vec<(&str, &str)>, Bytes, Code)> = vec![
        ("invalid UTF-8", vec![], framed(0, b"\x0a\x02\xff\xfe"), Code::Internal),
        ("not a message", vec![], framed(0, &[0xff; 64]), Code::Internal),
        ("a field of the wrong type", vec![], framed(0, b"\x08\x01"), Code::Internal),
        ("a length beyond the end", vec![], framed(0, b"\x12\xff\xff\xff\xff\x0f"), Code::Internal),
        ("an unknown flag", vec![], framed(7, b""), Code::Internal),
        ("compressed by nobody's word", vec![], framed(1, b"x"), Code::Internal),
        (
            "an unknown encoding",
            vec![("grpc-encoding", "br")],
            framed(1, b"x"),
            Code::Unimplemented,
        ),
        ("too long", vec![], Bytes::from_static(b"\0\xff\xff\xff\xff"), Code::ResourceExhausted),
        ("no message", vec![], Bytes::new(), Code::Internal),
        ("no images", vec![], request("m", 0), Code::InvalidArgument),
        ("10,000 images", vec![], request("m", 10_000), Code::InvalidArgument),
        ("no name", vec![], request("", 1), Code::InvalidArgument),
        ("a path", vec![], request("../../etc/passwd", 1), Code::InvalidArgument),
        ("somebody's model", vec![], request("other", 1), Code::NotFound),
        ("no time", timeout("0n"), good.clone(), Code::DeadlineExceeded),
        ("much time", timeout("99999999H"), good.clone(), Code::Ok),
        ("a time that is none", timeout("soon"), good.clone(), Code::Ok),
        ("a negative time", timeout("-1S"), good.clone(), Code::Ok),
        ("too many digits", timeout("999999999S"), good.clone(), Code::Ok),
        ("binary metadata", vec![("x-bin", "!!!")], good.clone(), Code::Ok),
    ];
    for (name, headers, body, expected) in cases {
        let answer = raw.call(CLASSIFY, &headers, body).await;
        let answer = answer.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((answer.http, answer.code), (200, Some(expected)), "{name}");
        assert_eq!(answer.has_reason, expected != Code::Ok, "{name}");
    }
    let unknown = raw.call("/vitq.v1.InferenceService/Nothing", &[], good.clone()).await.unwrap();
    assert_eq!((unknown.code, unknown.has_reason), (Some(Code::Unimplemented), true));
    let refused = raw.call(CLASSIFY, &[("x-huge", &huge)], good.clone()).await;
    assert!(refused.is_ok_and(|answer| answer.http == 431), "metadata of 40 KiB");
    assert_eq!(raw.call(CLASSIFY, &[], good).await.unwrap().code, Some(Code::Ok));
    victim.has_recovered().await;
}
