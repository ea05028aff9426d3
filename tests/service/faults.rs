//! A network that delays, cuts, resets and swallows: calls end in time and with a clear status, places
//! come back, and streams of jobs are resumed without a gap.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::{ClassifyRequest, Image, QuantizeEvent, WatchRequest};

use crate::raw::host;
use crate::server::{Setup, TestServer, digit, medium, result};

/// What a client allows a call.
const DEADLINE: Duration = Duration::from_secs(3);
/// How much later than that it may end: what a busy machine takes.
const SLACK: Duration = Duration::from_secs(3);

/// What happens to a direction of a connection after so many bytes.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Both directions end in order.
    Close,
    /// Both directions end with a reset.
    Reset,
    /// Nothing comes through any more, and nobody is told.
    Swallow,
    /// Every further piece takes a while.
    Delay,
}

/// Which direction a fault is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToServer,
    ToClient,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    fault: Fault,
    way: Way,
    after: usize,
}

/// The address of a way to the server, on whose connections the plan is carried out.
async fn bad_network(server: &str, plan: Plan) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = format!("http://{}", listener.local_addr().unwrap());
    let server = host(server).to_owned();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let server = TcpStream::connect(&server).await.unwrap();
            tokio::spawn(carry(client, server, plan));
        }
    });
    here
}

async fn carry(client: TcpStream, server: TcpStream, plan: Plan) {
    if matches!(plan.fault, Fault::Reset) {
        // What is not read yet is thrown away, and the peer told so.
        for socket in [&client, &server] {
            socket.set_zero_linger().unwrap();
        }
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let fault = |way| (plan.way == way).then_some(plan);
    tokio::select! { // whichever direction ends first ends the other
        () = pump(from_client, to_server, fault(Way::ToServer)) => {}
        () = pump(from_server, to_client, fault(Way::ToClient)) => {}
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, plan: Option<Plan>) {
    let (mut carried, mut buffer) = (0, vec![0; 4096]);
    loop {
        let room = match plan {
            Some(plan) if carried < plan.after => buffer.len().min(plan.after - carried),
            Some(Plan { fault: Fault::Close | Fault::Reset, .. }) => return,
            Some(Plan { fault: Fault::Swallow, .. }) => std::future::pending().await,
            Some(Plan { fault: Fault::Delay, .. }) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                buffer.len()
            }
            None => buffer.len(),
        };
        let count = from.read(&mut buffer[..room]).await.unwrap_or(0);
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        carried += count;
    }
}

async fn connect(address: &str) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(address.to_owned()).unwrap();
    let connected = tokio::time::timeout(DEADLINE, endpoint.connect()).await;
    connected
        .map_err(|_| Status::deadline_exceeded("no connection"))?
        .map_err(|error| Status::unavailable(error.to_string()))
}

/// Images of 20 KB together, so that cuts fall within the message.
async fn classify(address: &str) -> Result<(), Status> {
    let images = (0..10).map(|class| Image { content: digit(class, 0).into() }).collect();
    let message = ClassifyRequest { model: "m".to_owned(), images, ..Default::default() };
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    let channel = connect(address).await?;
    let mut client = InferenceServiceClient::new(channel);
    // tonic's client bounds the wait for an answer's head alone, not for its body.
    let answer = tokio::time::timeout(DEADLINE, client.classify(request))
        .await
        .map_err(|_| Status::deadline_exceeded("no answer"))??;
    assert_eq!(answer.into_inner().items.len(), 10);
    Ok(())
}

/// Waits, for a while, until no image is in the server.
async fn all_places_are_free(server: &TestServer) {
    let free = async {
        while server.engine.classifier.admission().images() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SLACK, free).await.expect("a cut call keeps its places");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_across_a_bad_network_end_in_time_and_leave_nothing() {
    let data = tempfile::tempdir().unwrap();
    let setup = Setup { queue_images: 1_000, ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    server.make("m").await;
    server.classify("m", vec![digit(0, 0)]).await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for fault in [Fault::Close, Fault::Reset, Fault::Swallow, Fault::Delay] {
        for way in [Way::ToServer, Way::ToClient] {
            for after in [0, 30, 100, 200, 1_000, 2_500] {
                let plan = Plan { fault, way, after };
                let address = bad_network(&server.url(), plan).await;
                calls.spawn(async move {
                    let started = Instant::now();
                    (plan, classify(&address).await, started.elapsed())
                });
            }
        }
    }
    let mut failed = 0;
    for (plan, outcome, took) in calls.join_all().await {
        assert!(took < DEADLINE + SLACK, "{plan:?}: {took:?}");
        let Err(status) = outcome else { continue };
        failed += 1;
        let expected: &[Code] = match plan.fault {
            // What the client's transport makes of a broken connection.
            Fault::Close | Fault::Reset => {
                &[Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Internal]
            }
            // tonic's client calls its own deadline CANCELLED.
            Fault::Swallow | Fault::Delay => {
                &[Code::DeadlineExceeded, Code::Cancelled, Code::Unavailable]
            }
        };
        assert!(expected.contains(&status.code()), "{plan:?}: {status}");
    }
    assert!(failed >= 16, "the network was not that bad: {failed} calls failed");
    all_places_are_free(&server).await;
    server.classify("m", vec![digit(0, 0)]).await.unwrap();
}

/// The events of a stream until it ends or breaks.
async fn received(
    stream: Result<tonic::Response<tonic::Streaming<QuantizeEvent>>, Status>,
) -> Vec<QuantizeEvent> {
    let Ok(stream) = stream else { return Vec::new() };
    stream.into_inner().take_while(Result::is_ok).filter_map(Result::ok).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_followed_to_its_end_across_cuts_without_a_gap() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let started = server.quantization().quantize(medium("m")).await.unwrap().into_inner();
    let first = started.take(1).collect::<Result<Vec<_>, _>>().await.unwrap().remove(0);
    let name = first.operation.clone();
    let mut events = vec![first];
    // Each connection lives a little longer than the one before.
    for after in (1..).map(|round| 250 + 150 * round) {
        let plan = Plan { fault: Fault::Reset, way: Way::ToClient, after };
        let Ok(channel) = connect(&bad_network(&server.url(), plan).await).await else {
            continue;
        };
        let after_sequence = events.last().map_or(0, |event| event.sequence);
        let watch = WatchRequest { name: name.clone(), after_sequence };
        let more = received(QuantizationServiceClient::new(channel).watch(watch).await).await;
        // A heartbeat repeats the number of the event before it.
        events.extend(more.into_iter().filter(|event| event.sequence > after_sequence));
        let ended = events.last().and_then(|event| event.event.as_ref());
        if matches!(ended, Some(vitq::grpc::proto::quantize_event::Event::Result(_))) {
            break;
        }
    }
    let watch = WatchRequest { name, after_sequence: 0 };
    let whole = received(server.quantization().watch(watch).await).await;
    let numbers = |events: &[QuantizeEvent]| events.iter().map(|e| e.sequence).collect::<Vec<_>>();
    assert_eq!(numbers(&events), numbers(&whole));
    assert_eq!(numbers(&events), (1..=events.len() as u64).collect::<Vec<_>>());
    assert_eq!(result(events).model.unwrap().id, "m");
    server.stop().await;
}
