//! `QuantizationService`: events, returning clients, repeated and conflicting requests.

use std::time::Duration;

use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic_types::StatusExt as _;
use vitq::data::Dataset;
use vitq::engine::jobs::JobLimits;
use vitq::grpc::proto::longrunning::{
    DeleteOperationRequest, GetOperationRequest, ListOperationsRequest, WaitOperationRequest,
};
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{
    CalibrationDataset, CalibrationImages, Image, JobHeartbeat, JobMetadata, JobState,
    QuantizeRequest, QuantizeResult, RoleBits, WatchRequest,
};

use crate::server::{Setup, TestServer, demo, digit, drawn, quick, refusal, result, slow};

#[tokio::test(flavor = "multi_thread")]
async fn events_are_numbered_and_end_with_the_model_and_its_report() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let request = QuantizeRequest {
        method: "ubb".to_owned(),
        weight_bits: 4,
        activation_bits: 4,
        labels: [("purpose".to_owned(), "test".to_owned())].into(),
        load_after: true,
        ..quick("m")
    };
    let events = server.quantize(request).await.unwrap();
    let sequences: Vec<u64> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=events.len() as u64).collect::<Vec<_>>());
    assert!(matches!(events[0].event, Some(Event::Accepted(_))));
    let progress: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::Progress(progress)) => Some(progress.clone()),
            _ => None,
        })
        .collect();
    let stages: Vec<&str> = progress.iter().map(|p| p.stage.as_str()).collect();
    for stage in ["load", "images", "store", "serve"] {
        assert!(stages.contains(&stage), "{stage} is missing in {stages:?}");
    }
    let seen: usize = progress.iter().map(|p| p.sites.len()).sum();
    let QuantizeResult { model, report, calibration_time } = result(events);
    let (model, report) = (model.unwrap(), report.unwrap());
    assert_eq!(seen, report.sites.len(), "every site is reported once on the way");
    assert!(report.sites.iter().all(|site| site.sqnr_db.is_finite() && !site.role.is_empty()));
    assert!(calibration_time.is_some());
    assert_eq!((model.id.as_str(), model.method.as_str()), ("m", "ubb"));
    assert_eq!((model.weight_bits, model.activation_bits), (4, 4));
    assert_eq!(model.labels["purpose"], "test");
    assert_eq!(model.state(), vitq::grpc::proto::model::State::Ready);
    assert!(model.resident_bytes > 0 && model.device == "cpu");
    assert!(model.artifact_bytes < model.source_bytes / 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_images_give_the_same_artifact_however_they_come() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let folder = demo("datasets/digits/calib");
    let samples = Dataset::open(&folder, "dataset").unwrap().subset(8, 0, "count").unwrap();
    let files = samples.iter().map(|sample| sample.name.clone()).collect();
    let images = samples
        .iter()
        .map(|sample| Image { content: sample.read(u64::MAX).unwrap().into() })
        .collect();
    let listed = CalibrationDataset { name: "digits/calib".to_owned(), count: 0, files };
    let mut digests = Vec::new();
    for (id, calibration) in [
        ("drawn", drawn("digits/calib", 8)),
        ("listed", Some(Calibration::Dataset(listed))),
        ("inline", Some(Calibration::Images(CalibrationImages { images }))),
    ] {
        let request = QuantizeRequest { calibration, ..quick(id) };
        let model = result(server.quantize(request).await.unwrap()).model.unwrap();
        assert_eq!(model.calibration_images, 8);
        digests.push(model.digest);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_alone_and_single_roles_can_have_bits_of_their_own() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let entry = |role: &str, weight_bits, activation_bits| RoleBits {
        role: role.to_owned(),
        weight_bits,
        activation_bits,
    };
    let request = QuantizeRequest {
        weight_bits: 4,
        activation_bits: 32,
        role_bits: vec![entry("fc2", 8, 6), entry("query_key", 0, 7), entry("proj", 32, 32)],
        request_id: "mixed".to_owned(),
        ..quick("m")
    };
    let QuantizeResult { model, report, .. } =
        result(server.quantize(request.clone()).await.unwrap());
    let model = model.unwrap();
    assert_eq!((model.weight_bits, model.activation_bits), (4, 32));
    let in_order = vec![entry("query_key", 0, 7), entry("proj", 32, 32), entry("fc2", 8, 6)];
    assert_eq!(model.role_bits, in_order);
    let sites = report.unwrap().sites;
    let mut found: Vec<_> = sites
        .iter()
        .filter(|site| site.path.starts_with("blocks.0."))
        .map(|site| (site.role.as_str(), site.operand.as_str(), site.bits))
        .collect();
    found.sort_unstable();
    let expected = [
        ("fc1", "weight", 4),
        ("fc2", "input", 6),
        ("fc2", "weight", 8),
        ("qkv", "weight", 4),
        ("query_key", "lhs", 7),
        ("query_key", "rhs", 7),
    ];
    assert_eq!(found, expected);

    let mut again = server.quantization().quantize(request.clone()).await.unwrap().into_inner();
    let replayed = again.next().await.unwrap().unwrap();
    assert!(matches!(replayed.event, Some(Event::Accepted(accepted)) if accepted.replayed));
    let other = QuantizeRequest { role_bits: vec![entry("fc2", 8, 8)], ..request.clone() };
    let status = server.quantize(other).await.unwrap_err();
    assert_eq!(refusal(&status).1, "request_id", "exceptions are part of the request");
    let same = QuantizeRequest {
        model_id: "same".to_owned(),
        request_id: String::new(),
        role_bits: in_order,
        ..request
    };
    let same = result(server.quantize(same).await.unwrap()).model.unwrap();
    assert_eq!(same.digest, model.digest, "the order of exceptions means nothing");
    let answer = server.classify("m", vec![digit(3, 0)]).await.unwrap();
    assert_eq!(answer.model_version, model.digest);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_can_come_back() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let mut stream = server.quantization().quantize(quick("m")).await.unwrap().into_inner();
    let first = stream.next().await.unwrap().unwrap();
    drop(stream);

    let name = first.operation;
    let wait = WaitOperationRequest { name: name.clone(), timeout: None };
    let operation = server.operations().wait_operation(wait).await.unwrap().into_inner();
    assert!(operation.done);
    let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
    assert_eq!((metadata.state(), metadata.model.as_str()), (JobState::Succeeded, "m"));

    let watch = WatchRequest { name: name.clone(), after_sequence: first.sequence };
    let rest = server.quantization().watch(watch).await.unwrap().into_inner();
    let rest: Vec<_> = rest.collect::<Result<_, _>>().await.unwrap();
    assert_eq!(rest[0].sequence, first.sequence + 1);
    assert_eq!(rest.last().unwrap().sequence, metadata.last_sequence);
    assert_eq!(result(rest).model.unwrap().id, "m");

    let nothing = WatchRequest { name: name.clone(), after_sequence: metadata.last_sequence };
    let mut rest = server.quantization().watch(nothing).await.unwrap().into_inner();
    assert!(rest.next().await.is_none());

    let wrong = WatchRequest { name: name.clone(), after_sequence: 0 };
    let status = server.evaluation().watch(wrong).await.unwrap_err();
    assert_eq!(refusal(&status).1, "name");

    let mut operations = server.operations();
    operations.delete_operation(DeleteOperationRequest { name: name.clone() }).await.unwrap();
    let status = operations.get_operation(GetOperationRequest { name }).await.unwrap_err();
    assert_eq!(refusal(&status).2, "OPERATION_NOT_FOUND");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_shows_that_it_is_alive() {
    let data = tempfile::tempdir().unwrap();
    let jobs = JobLimits { heartbeat: Duration::from_millis(50), ..JobLimits::default() };
    let server = TestServer::with(&data, Setup { jobs, ..Setup::default() }).await;
    let _running = server.quantization().quantize(slow("m")).await.unwrap().into_inner();
    let mut waiting = server.quantization().quantize(quick("n")).await.unwrap().into_inner();
    assert!(matches!(waiting.next().await.unwrap().unwrap().event, Some(Event::Accepted(_))));
    for _ in 0..3 {
        let event = waiting.next().await.unwrap().unwrap();
        assert_eq!((event.sequence, event.event), (1, Some(Event::Heartbeat(JobHeartbeat {}))));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_requests_find_their_job_and_others_conflict() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let request = QuantizeRequest { request_id: "r-1".to_owned(), ..slow("m") };
    let mut running = server.quantization().quantize(request.clone()).await.unwrap().into_inner();
    let accepted = running.next().await.unwrap().unwrap();

    let mut again = server.quantization().quantize(request.clone()).await.unwrap().into_inner();
    let replayed = again.next().await.unwrap().unwrap();
    assert_eq!(replayed.operation, accepted.operation);
    assert!(matches!(replayed.event, Some(Event::Accepted(accepted)) if accepted.replayed));

    let other = QuantizeRequest { seed: 1, ..request };
    let status = server.quantize(other).await.unwrap_err();
    assert_eq!(refusal(&status).1, "request_id");

    // Without an id, the same work is found by what it is; other work on the model has to wait.
    let same = QuantizeRequest { request_id: String::new(), ..slow("m") };
    let mut same = server.quantization().quantize(same).await.unwrap().into_inner();
    assert_eq!(same.next().await.unwrap().unwrap().operation, accepted.operation);
    let status = server.quantize(quick("m")).await.unwrap_err();
    let info = status.get_error_details().error_info().unwrap().clone();
    assert_eq!((status.code(), info.reason.as_str()), (Code::Aborted, "MODEL_BUSY"));
    assert_eq!(info.metadata["operation"], accepted.operation);
    for priority in [-101, 101] {
        let request = QuantizeRequest { priority, ..quick("n") };
        let status = server.quantize(request).await.unwrap_err();
        assert_eq!(refusal(&status).1, "priority");
    }

    let page = ListOperationsRequest { filter: "done=false".to_owned(), ..Default::default() };
    let listed = server.operations().list_operations(page).await.unwrap().into_inner();
    assert_eq!(listed.operations.len(), 1);
    for (filter, count) in [
        ("metadata.state=running AND metadata.model=m AND metadata.kind=quantize", 1),
        ("metadata.state=FAILED", 0),
        ("metadata.kind=evaluate", 0),
    ] {
        let page = ListOperationsRequest { filter: filter.to_owned(), ..Default::default() };
        let listed = server.operations().list_operations(page).await.unwrap().into_inner();
        assert_eq!(listed.operations.len(), count, "{filter}");
    }
    for filter in ["metadata.kind=bogus", "metadata.state=bogus", "bogus=1", "done=perhaps"] {
        let page = ListOperationsRequest { filter: filter.to_owned(), ..Default::default() };
        let status = server.operations().list_operations(page).await.unwrap_err();
        let (code, field, _) = refusal(&status);
        assert_eq!((code, &*field), (Code::InvalidArgument, "filter"), "{filter}");
    }
    let wait = WaitOperationRequest {
        name: accepted.operation,
        timeout: Some(Duration::from_millis(1).try_into().unwrap()),
    };
    assert!(!server.operations().wait_operation(wait).await.unwrap().into_inner().done);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_its_share_of_jobs_has_to_wait() {
    let data = tempfile::tempdir().unwrap();
    let jobs = JobLimits { per_principal: 1, ..JobLimits::default() };
    let server = TestServer::with(&data, Setup { jobs, ..Setup::default() }).await;
    let _running = server.quantization().quantize(slow("m")).await.unwrap().into_inner();
    let status = server.quantize(quick("n")).await.unwrap_err();
    let details = status.get_error_details();
    let info = details.error_info().unwrap();
    assert_eq!((status.code(), info.reason.as_str()), (Code::ResourceExhausted, "QUOTA_EXCEEDED"));
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "client:127.0.0.1");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_id_is_refused_and_a_check_starts_nothing() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let check = QuantizeRequest { validate_only: true, ..quick("m") };
    let events = server.quantize(check.clone()).await.unwrap();
    assert!(matches!(events[..], [ref only] if matches!(only.event, Some(Event::Validated(_)))));
    let all = ListOperationsRequest::default();
    let listed = server.operations().list_operations(all).await.unwrap().into_inner();
    assert!(listed.operations.is_empty());

    server.make("m").await;
    for request in [check, quick("m")] {
        let status = server.quantize(request).await.unwrap_err();
        assert_eq!(refusal(&status).2, "MODEL_ALREADY_EXISTS");
    }
    server.stop().await;
}
