//! `EvaluationService`.

use std::fs;
use std::path::Path;

use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use vitq::grpc::proto::dataset_service_client::DatasetServiceClient;
use vitq::grpc::proto::evaluate_event::Event;
use vitq::grpc::proto::longrunning::{GetOperationRequest, ListOperationsRequest};
use vitq::grpc::proto::{
    DeleteModelRequest, EvaluateEvent, EvaluateRequest, EvaluateResult, EvaluationMetrics,
    GetDatasetRequest, JobMetadata, QuantizeRequest, SetAliasRequest, UnloadModelRequest,
};

use crate::server::{Setup, TestServer, demo, digit, drawn, quick, refusal};

/// Everything that an evaluation tells, to its end.
pub(crate) async fn evaluate(
    server: &TestServer,
    request: EvaluateRequest,
) -> Result<Vec<EvaluateEvent>, Status> {
    let stream = server.evaluation().evaluate(request).await?.into_inner();
    stream.collect::<Result<Vec<_>, _>>().await
}

fn request(limit: u32) -> EvaluateRequest {
    EvaluateRequest {
        model: "m".to_owned(),
        dataset: "digits/val".to_owned(),
        limit,
        ..EvaluateRequest::default()
    }
}

fn result(events: Vec<EvaluateEvent>) -> EvaluateResult {
    match events.into_iter().last().and_then(|event| event.event) {
        Some(Event::Result(result)) => result,
        other => panic!("the last event is {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn measures_accuracy_and_agreement_with_the_float_model() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let model = server.make("m").await.model.unwrap();
    let events = evaluate(&server, request(100)).await.unwrap();
    let progress: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::Progress(progress)) => Some(progress.clone()),
            _ => None,
        })
        .collect();
    // Figures come with the first batch: there is no accuracy of no images.
    let mut told = progress.iter().filter_map(|event| event.metrics.as_ref());
    assert!(told.all(|metrics| metrics.images > 0), "{progress:?}");
    let last = progress.last().unwrap();
    assert_eq!(last.metrics.as_ref().unwrap().images, 100);
    let steps = last.progress.as_ref().unwrap();
    assert_eq!((steps.unit, steps.units, steps.images), (4, 4, 100));

    let EvaluateResult { model: id, model_version, dataset, metrics, warnings } = result(events);
    assert_eq!((id.as_str(), dataset.as_str()), ("m", "digits/val"));
    assert_eq!((model_version, warnings), (model.digest, vec![]));
    let metrics = metrics.unwrap();
    assert_eq!(metrics.images, 100);
    // 8-bit min-max of a model that is right on nearly all digits.
    assert!(metrics.top1_percent > 90.0 && metrics.top5_percent >= metrics.top1_percent);
    assert!(metrics.agreement_percent.unwrap() > 95.0);
    assert!((15.0..80.0).contains(&metrics.sqnr_db.unwrap()), "{metrics:?}");
    assert!(metrics.images_per_second > 0.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_checkpoint_there_is_accuracy_and_a_warning() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    server.stop().await;
    let setup = Setup { checkpoints: None, ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    let events = evaluate(&server, request(10)).await.unwrap();
    let told = events.iter().rev().find_map(|event| match &event.event {
        Some(Event::Progress(event)) => event.progress.as_ref(),
        _ => None,
    });
    let warning = &told.unwrap().warnings[0];
    assert_eq!(warning.code, i32::from(Code::NotFound), "{warning:?}");
    let name = events[0].operation.clone();
    let EvaluateResult { metrics, warnings, .. } = result(events);
    let metrics = metrics.unwrap();
    assert_eq!((metrics.agreement_percent, metrics.sqnr_db), (None, None));
    assert!(metrics.top1_percent > 0.0);
    assert!(warnings[0].contains("digits-vit"), "{warnings:?}");
    let get = GetOperationRequest { name };
    let operation = server.operations().get_operation(get).await.unwrap().into_inner();
    let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
    assert!(metadata.update_time.is_some() && metadata.update_time == metadata.end_time);
    assert_eq!(metadata.progress.unwrap().warnings.len(), 1);
    server.stop().await;
}

/// A folder with some class folders of the validation set, under other names.
fn some_classes(root: &Path, name: &str, classes: &[(usize, &str)]) {
    for (class, folder) in classes {
        let to = root.join(name).join(folder);
        fs::create_dir_all(&to).unwrap();
        for number in 0..10 {
            fs::write(to.join(format!("{number}.png")), digit(*class, number)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_are_the_classes_that_they_are_named_by_and_a_guess_is_told() {
    let (data, datasets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    some_classes(datasets.path(), "named", &[(3, "3"), (7, "7")]);
    some_classes(datasets.path(), "guessed", &[(3, "three"), (7, "seven")]);
    some_classes(datasets.path(), "listed", &[(0, "zero"), (1, "one")]);
    fs::write(datasets.path().join("listed/classes.txt"), "zero\none\n").unwrap();
    some_classes(datasets.path(), "calib", &[(1, "1"), (2, "2")]);
    let setup = Setup { datasets: Some(datasets.path().to_owned()), ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    let quick = QuantizeRequest { calibration: drawn("calib", 8), ..quick("m") };
    server.quantize(quick).await.unwrap();
    for (dataset, is_right, is_told) in
        [("named", true, false), ("guessed", false, true), ("listed", true, false)]
    {
        let request = EvaluateRequest { dataset: dataset.to_owned(), ..request(0) };
        let events = evaluate(&server, request).await.unwrap();
        let EvaluateResult { metrics, warnings, .. } = result(events);
        let top1 = metrics.unwrap().top1_percent;
        assert_eq!(top1 > 80.0, is_right, "{dataset}: {top1} %");
        let told = warnings.iter().any(|text| {
            text.contains("dataset: holds 2 of the model's 10 classes")
                && text.contains("`seven` as class 0")
                && text.contains("classes.txt")
        });
        assert_eq!((told, warnings.len()), (is_told, usize::from(is_told)), "{warnings:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unusable_requests_are_refused_at_once() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let with = |change: fn(&mut EvaluateRequest)| {
        let mut changed = request(10);
        change(&mut changed);
        changed
    };
    for (bad, field, reason) in [
        (with(|r| r.model = "absent".into()), "", "MODEL_NOT_FOUND"),
        (with(|r| r.dataset = "digits/absent".into()), "", "DATASET_NOT_FOUND"),
        (with(|r| r.dataset = "../../etc".into()), "dataset", "INVALID_ARGUMENT"),
        (with(|r| r.limit = 451), "limit", "INVALID_ARGUMENT"),
        (with(|r| r.request_id = "x".repeat(37)), "request_id", "INVALID_ARGUMENT"),
    ] {
        let (_, found_field, found_reason) =
            refusal(&evaluate(&server, bad.clone()).await.unwrap_err());
        assert_eq!((found_field.as_str(), found_reason.as_str()), (field, reason), "{bad:?}");
    }
    // A folder above data sets is there, and none.
    let above = EvaluateRequest { dataset: "digits".to_owned(), ..request(10) };
    let refused = evaluate(&server, above).await.unwrap_err();
    let mut datasets = DatasetServiceClient::new(server.channel.clone());
    let get = GetDatasetRequest { name: "digits".to_owned() };
    let (get, words) = (datasets.get_dataset(get).await.unwrap_err(), "`digits`: holds no images");
    for (status, field) in [(refused, "dataset"), (get, "name")] {
        assert_eq!((refusal(&status).0, &*refusal(&status).1), (Code::InvalidArgument, field));
        assert!(status.message().contains(words), "{status}");
    }
    let check = EvaluateRequest { validate_only: true, ..request(10) };
    let events = evaluate(&server, check).await.unwrap();
    assert!(matches!(events[0].event, Some(Event::Validated(_))));
    server.stop().await;
}

/// The images of an event that tells of some.
fn counted(event: &EvaluateEvent) -> Option<u64> {
    match &event.event {
        Some(Event::Progress(progress)) => progress.metrics.as_ref().map(|found| found.images),
        _ => None,
    }
}

async fn unload(server: &TestServer) {
    let request = UnloadModelRequest { model: "m".to_owned() };
    server.models().unload_model(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn unloading_the_model_changes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let undisturbed = result(evaluate(&server, request(0)).await.unwrap()).metrics.unwrap();
    let mut events = server.evaluation().evaluate(request(0)).await.unwrap().into_inner();
    let (mut all, mut unloaded) = (Vec::new(), 0);
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        if counted(&event).is_some() && unloaded < 2 {
            unload(&server).await;
            unloaded += 1;
        }
        all.push(event);
    }
    assert!(unloaded > 0);
    let metrics = result(all).metrics.unwrap();
    let images_per_second = undisturbed.images_per_second;
    assert_eq!(EvaluationMetrics { images_per_second, ..metrics }, undisturbed);
    server.stop().await;
}

/// The digits of that name, each so many times.
fn repeat(name: &str, folder: &Path, times: usize) {
    for class in fs::read_dir(demo("datasets/digits").join(name)).unwrap() {
        let class = class.unwrap();
        let copies = folder.join(class.file_name());
        fs::create_dir_all(&copies).unwrap();
        for file in fs::read_dir(class.path()).unwrap() {
            let file = file.unwrap();
            for copy in 0..times {
                let name = format!("{copy}-{}", file.file_name().into_string().unwrap());
                fs::copy(file.path(), copies.join(name)).unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_the_model_ends_its_evaluation() {
    let data = tempfile::tempdir().unwrap();
    let datasets = tempfile::tempdir().unwrap();
    repeat("calib", &datasets.path().join("digits/calib"), 1);
    // An evaluation that takes a while.
    repeat("val", &datasets.path().join("val"), 20);
    let setup = Setup { datasets: Some(datasets.path().to_owned()), ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    server.make("m").await;
    let long = EvaluateRequest { dataset: "val".to_owned(), ..request(0) };
    let mut events = server.evaluation().evaluate(long).await.unwrap().into_inner();
    let (mut before, mut seen) = (None, Vec::new());
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        match (counted(&event), before) {
            (Some(images), None) => {
                unload(&server).await;
                before = Some(images);
            }
            // It goes on with the model, which is back.
            (Some(images), Some(earlier)) if images > earlier + 64 => {
                let request = DeleteModelRequest { model: "m".to_owned() };
                server.models().delete_model(request).await.ok();
            }
            _ => {}
        }
        seen.push(event);
    }
    let Some(Event::Error(error)) = seen.pop().and_then(|event| event.event) else {
        panic!("it did not fail");
    };
    assert_eq!(error.code, i32::from(Code::FailedPrecondition), "{error:?}");
    assert_eq!(error.message, "model `m` was deleted while it was evaluated");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_is_the_model_that_it_stood_for() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let point = async |model: &str| {
        let request = SetAliasRequest { alias: "live".to_owned(), model: model.to_owned() };
        server.models().set_alias(request).await.unwrap();
    };
    for model in ["first", "second"] {
        server.make(model).await;
    }
    point("first").await;
    let named =
        EvaluateRequest { model: "live".to_owned(), request_id: "once".to_owned(), ..request(10) };
    let events = evaluate(&server, named.clone()).await.unwrap();
    let operation = events[0].operation.clone();
    assert_eq!(result(events).model, "first");
    let filter = "metadata.model=first AND metadata.kind=evaluate".to_owned();
    let list = ListOperationsRequest { filter, ..Default::default() };
    let listed = server.operations().list_operations(list).await.unwrap().into_inner().operations;
    let metadata: JobMetadata = listed[0].metadata.as_ref().unwrap().to_msg().unwrap();
    assert_eq!((listed[0].name.as_str(), metadata.model.as_str()), (&*operation, "first"));

    // A repeated call finds its job wherever the alias leads by now; another one goes there.
    point("second").await;
    let events = evaluate(&server, named.clone()).await.unwrap();
    assert_eq!(
        (&events[0].operation, result(events.clone()).model.as_str()),
        (&operation, "first")
    );
    let anew = EvaluateRequest { request_id: String::new(), ..named };
    assert_eq!(result(evaluate(&server, anew).await.unwrap()).model, "second");
    server.stop().await;
}
