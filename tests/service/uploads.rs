//! Checkpoints and data sets that clients bring.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use vitq::data::{Dataset, Sample};
use vitq::digest::sha256_hex;
use vitq::grpc::proto::checkpoint_service_client::CheckpointServiceClient;
use vitq::grpc::proto::dataset_service_client::DatasetServiceClient;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::upload_request::Part;
use vitq::grpc::proto::upload_service_client::UploadServiceClient;
use vitq::grpc::proto::{
    CalibrationDataset, DeleteCheckpointRequest, DeleteDatasetRequest, EvaluateRequest,
    GetCheckpointRequest, GetDatasetRequest, GetUploadRequest, ListCheckpointsRequest,
    ListDatasetsRequest, ListUploadsRequest, QuantizeRequest, Upload, UploadHeader, UploadImage,
    UploadKind, UploadRequest, evaluate_event,
};

use crate::server::{Setup, TestServer, demo, drawn, quick, refusal, result};

/// Time that a server may take to notice something.
const SOON: Duration = Duration::from_secs(20);

fn uploads(server: &TestServer) -> UploadServiceClient<Channel> {
    UploadServiceClient::new(server.channel.clone())
}

fn datasets(server: &TestServer) -> DatasetServiceClient<Channel> {
    DatasetServiceClient::new(server.channel.clone())
}

fn checkpoints(server: &TestServer) -> CheckpointServiceClient<Channel> {
    CheckpointServiceClient::new(server.channel.clone())
}

/// Sends the parts, as one complete stream.
async fn send(server: &TestServer, parts: Vec<Part>) -> Result<Upload, Status> {
    let messages = parts.into_iter().map(|part| UploadRequest { part: Some(part) });
    let answer = uploads(server).upload(tokio_stream::iter(messages.collect::<Vec<_>>())).await?;
    Ok(answer.into_inner().upload.unwrap())
}

/// A header and the whole file, in chunks of an odd size.
async fn send_file(
    server: &TestServer,
    header: UploadHeader,
    file: &Bytes,
) -> Result<Upload, Status> {
    let sent = file.slice(header.offset as usize..);
    let chunks = sent.chunks(100_003).map(|chunk| Part::Chunk(Bytes::copy_from_slice(chunk)));
    send(server, std::iter::once(Part::Header(header)).chain(chunks).collect()).await
}

fn dataset_header(name: &str, file: &[u8]) -> UploadHeader {
    UploadHeader {
        kind: UploadKind::Dataset.into(),
        name: name.to_owned(),
        bytes: file.len() as u64,
        sha256: sha256_hex(file),
        ..UploadHeader::default()
    }
}

fn checkpoint_header(name: &str, file: &[u8]) -> UploadHeader {
    let config = fs::read_to_string(demo("checkpoints/digits-vit/config.json")).unwrap();
    let kind = UploadKind::Checkpoint.into();
    UploadHeader { kind, config, ..dataset_header(name, file) }
}

fn weights() -> Bytes {
    fs::read(demo("checkpoints/digits-vit/model.safetensors")).unwrap().into()
}

fn samples(name: &str) -> Vec<Sample> {
    Dataset::open(&demo("datasets").join(name), "dataset").unwrap().samples
}

/// A tar file as the program of that name makes it, with times and owners.
fn tar_of(folder: &Path) -> Bytes {
    let tar = std::process::Command::new("tar").arg("-cC").arg(folder).arg(".").output().unwrap();
    assert!(tar.status.success());
    tar.stdout.into()
}

/// Brings the digits for calibration, under another name.
pub(crate) async fn bring_digits(server: &TestServer, name: &str) {
    let file = tar_of(&demo("datasets/digits/calib"));
    assert!(send_file(server, dataset_header(name, &file), &file).await.unwrap().complete);
}

async fn upload_of(server: &TestServer, kind: UploadKind, name: &str) -> Result<Upload, Status> {
    let request = GetUploadRequest { kind: kind.into(), name: name.to_owned() };
    Ok(uploads(server).get_upload(request).await?.into_inner().upload.unwrap())
}

/// Files in the artifact store.
fn objects(data: &TempDir) -> usize {
    fs::read_dir(data.path().join("objects/sha256")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_brought_gives_the_same_model_as_the_servers_folders() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let (file, weights) = (tar_of(&demo("datasets/digits/calib")), weights());
    let upload = send_file(&server, dataset_header("my/digits", &file), &file).await.unwrap();
    assert!(upload.complete && upload.received_bytes == file.len() as u64, "{upload:?}");
    let upload = send_file(&server, checkpoint_header("mine", &weights), &weights).await.unwrap();
    assert!(upload.complete, "{upload:?}");

    let request = QuantizeRequest {
        checkpoint: "mine".to_owned(),
        calibration: drawn("my/digits", 8),
        ..quick("from-uploads")
    };
    let reference = QuantizeRequest { calibration: drawn("digits/calib", 8), ..quick("reference") };
    let made = result(server.quantize(request).await.unwrap()).model.unwrap();
    let reference = result(server.quantize(reference).await.unwrap()).model.unwrap();
    assert_eq!(made.digest, reference.digest);
    assert_eq!(made.source_digest, reference.source_digest);

    // Evaluated on the upload, against the uploaded float model, and after a restart.
    server.stop().await;
    fs::remove_dir_all(data.path().join("cache")).unwrap();
    let server = TestServer::start(&data).await;
    let evaluate = EvaluateRequest {
        model: "from-uploads".to_owned(),
        dataset: "my/digits".to_owned(),
        limit: 20,
        ..EvaluateRequest::default()
    };
    let mut events = server.evaluation().evaluate(evaluate).await.unwrap().into_inner();
    let metrics = loop {
        let event = events.message().await.unwrap().unwrap();
        if let Some(evaluate_event::Event::Result(result)) = event.event {
            break result.metrics.unwrap();
        }
    };
    assert_eq!(metrics.images, 20);
    assert!(metrics.agreement_percent.unwrap() > 50.0, "{metrics:?}");

    let listed = datasets(&server).list_datasets(ListDatasetsRequest::default()).await.unwrap();
    let listed = listed.into_inner().datasets;
    let names: Vec<&str> = listed.iter().map(|dataset| dataset.name.as_str()).collect();
    assert_eq!(names, ["digits/calib", "digits/val", "my/digits"]);
    let digits = |index: usize| (listed[index].images, listed[index].classes.clone());
    assert_eq!(digits(2), digits(0));
    assert_eq!((listed[2].uploaded, &listed[2].digest), (true, &sha256_hex(&file)));
    let listed = checkpoints(&server).list_checkpoints(ListCheckpointsRequest::default()).await;
    let listed = listed.unwrap().into_inner().checkpoints;
    let mine = listed.iter().find(|checkpoint| checkpoint.name == "mine").unwrap();
    assert_eq!((mine.bytes, &mine.digest), (weights.len() as u64, &made.source_digest));
    assert_eq!(mine.architecture, made.architecture);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_goes_on_where_it_broke_off() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let file = weights();
    let half = file.len() / 2;
    let header = checkpoint_header("mine", &file);
    let (sender, receiver) = mpsc::channel(2);
    let mut client = uploads(&server);
    let call = tokio::spawn(async move { client.upload(ReceiverStream::new(receiver)).await });
    for part in [Part::Header(header.clone()), Part::Chunk(file.slice(..half))] {
        sender.send(UploadRequest { part: Some(part) }).await.unwrap();
    }
    // The server has it all before the client goes away without a word.
    tokio::time::sleep(Duration::from_millis(500)).await;
    call.abort();
    let received = async {
        loop {
            match upload_of(&server, UploadKind::Checkpoint, "mine").await {
                Ok(upload) if upload.received_bytes > 0 => return upload,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let upload = tokio::time::timeout(SOON, received).await.unwrap();
    assert_eq!((upload.received_bytes, upload.complete), (half as u64, false));

    // Nobody sees it yet.
    let request = GetCheckpointRequest { name: "mine".to_owned() };
    let status = checkpoints(&server).get_checkpoint(request).await.unwrap_err();
    assert_eq!(refusal(&status), (Code::NotFound, String::new(), "CHECKPOINT_NOT_FOUND".into()));
    let request = QuantizeRequest { checkpoint: "mine".to_owned(), ..quick("m") };
    assert_eq!(server.quantize(request).await.unwrap_err().code(), Code::NotFound);
    let request = ListUploadsRequest { kind: UploadKind::Checkpoint.into(), ..Default::default() };
    let listed = uploads(&server).list_uploads(request).await.unwrap().into_inner().uploads;
    assert_eq!(listed, std::slice::from_ref(&upload));

    // A gap is refused, another content too, and a stream may end early on purpose.
    let gap = UploadHeader { offset: half as u64 + 1, ..header.clone() };
    let status = send_file(&server, gap, &file).await.unwrap_err();
    assert_eq!(refusal(&status).1, "header.offset");
    let other = UploadHeader { sha256: "0".repeat(64), ..header.clone() };
    let status = send_file(&server, other, &file).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let third = file.slice(..half + 1000);
    let more = UploadHeader { offset: half as u64 - 7, ..header.clone() };
    let upload = send_file(&server, more, &third).await.unwrap();
    assert_eq!((upload.received_bytes, upload.complete), (half as u64 + 1000, false));

    // Another server goes on, from the beginning: what it has is skipped.
    server.stop().await;
    let server = TestServer::start(&data).await;
    let upload = send_file(&server, header.clone(), &file).await.unwrap();
    assert!(upload.complete);
    // Once more is fine, and another content is not.
    assert!(send_file(&server, header, &file).await.unwrap().complete);
    let mut changed = file.to_vec();
    changed[file.len() - 1] ^= 1;
    let changed = Bytes::from(changed);
    let status = send_file(&server, checkpoint_header("mine", &changed), &changed).await;
    assert_eq!(status.unwrap_err().code(), Code::AlreadyExists);
    let request = QuantizeRequest { checkpoint: "mine".to_owned(), ..quick("m") };
    result(server.quantize(request).await.unwrap());
    server.stop().await;
}

/// A stream that is begun and not ended: its client waits for nothing but an answer.
async fn begin(server: &TestServer, parts: Vec<Part>) -> Status {
    let (sender, receiver) = mpsc::channel(parts.len());
    for part in parts {
        sender.send(UploadRequest { part: Some(part) }).await.unwrap();
    }
    let mut client = uploads(server);
    let answer = client.upload(ReceiverStream::new(receiver));
    let answer = tokio::time::timeout(SOON, answer).await.expect("an answer before the end");
    drop(sender);
    answer.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_does_not_fit_its_config_is_refused_before_it_has_come() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let file = weights();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let fitting = checkpoint_header("mine", &file);
    let changed = |from: &str, to: &str| {
        assert_eq!(fitting.config.matches(from).count(), 1, "{from}");
        UploadHeader { config: fitting.config.replace(from, to), ..fitting.clone() }
    };
    let wide = || changed("\"embed_dim\": 96", "\"embed_dim\": 192");
    let start = |header: &UploadHeader, ends: &[usize]| {
        let begins = std::iter::once(0).chain(ends.iter().copied());
        let chunks = begins.zip(ends).map(|(from, to)| Part::Chunk(file.slice(from..*to)));
        std::iter::once(Part::Header(header.clone())).chain(chunks).collect::<Vec<_>>()
    };
    let renamed = {
        let (from, to) = (b"\"norm.bias\"", b"\"norm.bios\"");
        let place = file.windows(from.len()).position(|bytes| bytes == from).unwrap();
        let mut file = file.to_vec();
        file[place..place + to.len()].copy_from_slice(to);
        Part::Chunk(Bytes::from(file).slice(..end))
    };
    for (parts, field, words) in [
        // The config speaks against itself.
        (start(&changed("\"depth\": 6", "\"depth\": \"six\""), &[]), "header.config", "depth"),
        (start(&changed("\"crop_pct\": 0.9", "\"crop_pct\": 9"), &[]), "header.config", "crop_pct"),
        (start(&changed("vit_tiny_patch16", "resnet_50"), &[]), "header.config", "resnet_50"),
        (
            start(&UploadHeader { bytes: 17 << 30, ..fitting.clone() }, &[]),
            "header.bytes",
            "18253611008",
        ),
        // The tensors speak against it.
        (start(&wide(), &[end]), "chunk", "embed_dim = 192"),
        (start(&wide(), &[3, 9, 500, end]), "chunk", "embed_dim = 192"),
        (start(&wide(), &[end + 7]), "chunk", "embed_dim = 192"),
        (start(&changed("\"depth\": 6", "\"depth\": 7"), &[end]), "chunk", "depth = 7"),
        (vec![Part::Header(fitting.clone()), renamed], "chunk", "norm.bias is missing"),
        (
            start(&UploadHeader { bytes: fitting.bytes + 4, ..fitting.clone() }, &[end]),
            "chunk",
            "truncated",
        ),
    ] {
        let status = begin(&server, parts).await;
        let (code, found, _) = refusal(&status);
        assert_eq!((code, found.as_str()), (Code::InvalidArgument, field), "{status}");
        assert!(status.message().contains(words), "{status}");
        let left = upload_of(&server, UploadKind::Checkpoint, "mine").await.unwrap_err();
        assert_eq!(left.code(), Code::NotFound, "{words}");
    }

    // A stream that broke off within the header: what it left counts.
    for left in [5, 1000] {
        let header = wide();
        let upload = send(&server, start(&header, &[left])).await.unwrap();
        assert_eq!((upload.received_bytes, upload.complete), (left as u64, false));
        let header = UploadHeader { offset: left as u64, ..header };
        let status =
            begin(&server, vec![Part::Header(header), Part::Chunk(file.slice(left..end))]).await;
        assert_eq!(refusal(&status).1, "chunk", "{status}");
        assert!(status.message().contains("embed_dim = 192"), "{status}");
    }
    assert_eq!(objects(&data), 0);
    // The name is free for what fits.
    assert!(send_file(&server, fitting, &file).await.unwrap().complete);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_may_come_one_by_one() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let samples = samples("digits/calib");
    let header = |offset: usize| {
        Part::Header(UploadHeader {
            kind: UploadKind::Dataset.into(),
            name: "digits-2".to_owned(),
            images: samples.len() as u64,
            offset: offset as u64,
            ..UploadHeader::default()
        })
    };
    let image = |sample: &Sample| {
        let content = Bytes::from(sample.read(u64::MAX).unwrap());
        let sha256 = if sample.class == 3 { sha256_hex(&content) } else { String::new() };
        Part::Image(UploadImage { name: sample.name.clone(), content, sha256 })
    };
    let parts = std::iter::once(header(0)).chain(samples[..100].iter().map(image)).collect();
    let upload = send(&server, parts).await.unwrap();
    assert_eq!((upload.received_images, upload.complete), (100, false));
    // Some are sent again.
    let parts = std::iter::once(header(90)).chain(samples[90..].iter().map(image)).collect();
    let upload = send(&server, parts).await.unwrap();
    assert_eq!((upload.received_images, upload.complete), (samples.len() as u64, true));

    let request = QuantizeRequest { calibration: drawn("digits-2", 8), ..quick("m") };
    let made = result(server.quantize(request).await.unwrap()).model.unwrap();
    let request = QuantizeRequest { calibration: drawn("digits/calib", 8), ..quick("reference") };
    let reference = result(server.quantize(request).await.unwrap()).model.unwrap();
    assert_eq!(made.digest, reference.digest);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unusable_streams_name_the_field_and_leave_nothing() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let file = tar_of(&demo("datasets/digits/calib"));
    let set = || dataset_header("set", &file);
    let chunk = |bytes: &[u8]| Part::Chunk(Bytes::copy_from_slice(bytes));
    let alone = |header: UploadHeader| vec![Part::Header(header)];
    let with = |header: UploadHeader, part: Part| vec![Part::Header(header), part];
    let of = |bytes: &[u8]| with(dataset_header("set", bytes), chunk(bytes));
    let model = |bytes: &[u8]| with(checkpoint_header("mine", bytes), chunk(bytes));
    let images = UploadHeader { bytes: 0, sha256: String::new(), images: 2, ..set() };
    let image = |name: &str, content: &[u8], sha256: &str| {
        let (content, sha256) = (Bytes::copy_from_slice(content), sha256.to_owned());
        Part::Image(UploadImage { name: name.to_owned(), content, sha256 })
    };
    let png = samples("digits/calib")[0].read(u64::MAX).unwrap();
    let mut twice = with(images.clone(), image("a/1.png", &png, ""));
    twice.push(image("a/1.png", &png, ""));
    let mut beyond = with(images.clone(), image("a/1.png", &png, ""));
    beyond.extend([image("a/2.png", &png, ""), image("a/3.png", &png, "")]);
    let link = {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::write(folder.path().join("a/1.png"), &png).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("a/2.png")).unwrap();
        tar_of(folder.path())
    };
    let mut pickle = weights().to_vec();
    pickle[..4].copy_from_slice(&[0x80, 2, b'}', b'q']);
    let mut zip = weights().to_vec();
    zip[..4].copy_from_slice(b"PK\x03\x04");
    let named = |name: &str| UploadHeader { name: name.to_owned(), ..set() };
    let configured =
        |config: &str| UploadHeader { config: config.to_owned(), ..checkpoint_header("m", b"x") };
    let bad = Code::InvalidArgument;
    for (parts, code, field) in [
        (vec![], bad, "header"),
        (vec![chunk(b"x")], bad, "header"),
        (with(set(), Part::Header(set())), bad, "header"),
        (alone(UploadHeader { kind: 0, ..set() }), bad, "header.kind"),
        (alone(UploadHeader { kind: 9, ..set() }), bad, "header.kind"),
        (alone(named("")), bad, "header.name"),
        (alone(named("../set")), bad, "header.name"),
        (alone(named("/etc")), bad, "header.name"),
        (alone(named("a/b/c/d")), bad, "header.name"),
        (alone(named("a b")), bad, "header.name"),
        (alone(named(".hidden")), bad, "header.name"),
        (alone(named(&"x".repeat(101))), bad, "header.name"),
        (alone(named("digits/calib")), Code::AlreadyExists, ""),
        (alone(UploadHeader { bytes: 0, ..set() }), bad, "header.bytes"),
        (alone(UploadHeader { sha256: "abc".to_owned(), ..set() }), bad, "header.sha256"),
        (alone(UploadHeader { images: 3, ..set() }), bad, "header.images"),
        (alone(UploadHeader { bytes: u64::MAX, ..set() }), Code::ResourceExhausted, ""),
        (alone(UploadHeader { config: "{}".to_owned(), ..set() }), bad, "header.config"),
        (alone(UploadHeader { offset: 1, ..set() }), bad, "header.offset"),
        (alone(configured("")), bad, "header.config"),
        (alone(configured("{\"architecture\": \"resnet50\"}")), bad, "header.config"),
        (alone(UploadHeader { images: 2, bytes: 0, ..configured("{}") }), bad, "header.images"),
        (with(dataset_header("set", b"ab"), chunk(b"abc")), bad, "chunk"),
        (with(set(), image("a/1.png", &png, "")), bad, "image"),
        (with(images.clone(), chunk(b"x")), bad, "chunk"),
        (with(images.clone(), image("1.png", &png, "")), bad, "image.name"),
        (with(images.clone(), image("../1.png", &png, "")), bad, "image.name"),
        (with(images.clone(), image("a/b/1.png", &png, "")), bad, "image.name"),
        (with(images.clone(), image("a/1.txt", &png, "")), bad, "image.name"),
        (with(images.clone(), image("a/1.png", b"<svg>", "")), bad, "image.content"),
        (with(images.clone(), image("a/1.png", &png, "00")), bad, "image.sha256"),
        (twice, bad, "image.name"),
        (beyond, bad, "image"),
        (of(b"\x1f\x8b\x08\x00 compressed"), bad, "chunk"),
        (of(&[b'x'; 4096]), bad, "chunk"),
        (of(&file[..file.len() / 2 + 100]), bad, "chunk"),
        (of(&link), bad, "chunk"),
        (
            with(UploadHeader { sha256: "0".repeat(64), ..set() }, chunk(&file)),
            bad,
            "header.sha256",
        ),
        (model(&pickle), bad, "chunk"),
        (model(&zip), bad, "chunk"),
        (model(b"short"), bad, "chunk"),
        (model(&weights()[..100_000]), bad, "chunk"),
    ] {
        let shown = format!("{:.300}", format!("{parts:?}"));
        let status = send(&server, parts).await.unwrap_err();
        let (found, found_field, _) = refusal(&status);
        assert_eq!((found, found_field.as_str()), (code, field), "{status}\n{shown}");
        for kind in [UploadKind::Dataset, UploadKind::Checkpoint] {
            let request = ListUploadsRequest { kind: kind.into(), ..Default::default() };
            let left = uploads(&server).list_uploads(request).await.unwrap().into_inner().uploads;
            assert!(left.is_empty(), "{left:?}\n{shown}");
        }
    }
    assert_eq!(objects(&data), 0);
    let upload = send_file(&server, set(), &file).await.unwrap();
    assert!(upload.complete);
    server.stop().await;
}

async fn delete(server: &TestServer, kind: UploadKind, name: &str) -> Result<(), Status> {
    let name = name.to_owned();
    match kind {
        UploadKind::Checkpoint => {
            checkpoints(server).delete_checkpoint(DeleteCheckpointRequest { name }).await?;
        }
        UploadKind::Unspecified | UploadKind::Dataset => {
            datasets(server).delete_dataset(DeleteDatasetRequest { name }).await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_frees_the_quota_and_the_store() {
    let data = tempfile::tempdir().unwrap();
    let file = tar_of(&demo("datasets/digits/calib"));
    let upload_quota = file.len() as u64 * 3 / 2;
    let server = TestServer::with(&data, Setup { upload_quota, ..Setup::default() }).await;
    assert!(send_file(&server, dataset_header("one", &file), &file).await.unwrap().complete);
    let status = send_file(&server, dataset_header("two", &file), &file).await.unwrap_err();
    let (code, _, reason) = refusal(&status);
    assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "QUOTA_EXCEEDED"));
    // Images that come one by one meet the quota when they are stored.
    let png = Bytes::from(samples("digits/calib")[0].read(u64::MAX).unwrap());
    let count = file.len() / 2 / 1024 + 1;
    let header = UploadHeader {
        kind: UploadKind::Dataset.into(),
        name: "many".to_owned(),
        images: count as u64,
        ..UploadHeader::default()
    };
    let image = |index: usize| {
        let (name, content) = (format!("a/{index}.png"), png.clone());
        Part::Image(UploadImage { name, content, sha256: String::new() })
    };
    let parts = std::iter::once(Part::Header(header)).chain((0..count).map(image)).collect();
    assert_eq!(refusal(&send(&server, parts).await.unwrap_err()).2, "QUOTA_EXCEEDED");
    delete(&server, UploadKind::Dataset, "many").await.unwrap();

    // What a job needs stays.
    let dataset = CalibrationDataset { name: "one".to_owned(), count: 256, files: vec![] };
    let slow = QuantizeRequest {
        checkpoint: "digits-swin".to_owned(),
        method: "ubb".to_owned(),
        calibration: Some(Calibration::Dataset(dataset)),
        ..quick("slow")
    };
    let mut events = server.quantization().quantize(slow).await.unwrap().into_inner();
    let operation = events.message().await.unwrap().unwrap().operation;
    let status = delete(&server, UploadKind::Dataset, "one").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(&operation), "{status}");
    let cancel = vitq::grpc::proto::longrunning::CancelOperationRequest { name: operation };
    server.operations().cancel_operation(cancel).await.unwrap();
    while events.message().await.unwrap().is_some() {}

    delete(&server, UploadKind::Dataset, "one").await.unwrap();
    assert_eq!(objects(&data), 0);
    assert_eq!(fs::read_dir(data.path().join("cache")).unwrap().count(), 0);
    let request = GetDatasetRequest { name: "one".to_owned() };
    let status = datasets(&server).get_dataset(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let status = delete(&server, UploadKind::Dataset, "one").await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let status = delete(&server, UploadKind::Dataset, "digits/calib").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(send_file(&server, dataset_header("two", &file), &file).await.unwrap().complete);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_of_two_streams_counts() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let file = weights();
    let header = checkpoint_header("mine", &file);
    let (sender, receiver) = mpsc::channel(2);
    let mut client = uploads(&server);
    let first = tokio::spawn(async move { client.upload(ReceiverStream::new(receiver)).await });
    for part in [Part::Header(header.clone()), Part::Chunk(file.slice(..1000))] {
        sender.send(UploadRequest { part: Some(part) }).await.unwrap();
    }
    tokio::time::timeout(SOON, async {
        while upload_of(&server, UploadKind::Checkpoint, "mine").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    assert!(send_file(&server, header, &file).await.unwrap().complete);
    let rest = UploadRequest { part: Some(Part::Chunk(file.slice(1000..))) };
    sender.send(rest).await.unwrap();
    drop(sender);
    let status = first.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let upload = upload_of(&server, UploadKind::Checkpoint, "mine").await.unwrap();
    assert_eq!((upload.complete, upload.received_bytes), (true, file.len() as u64));
    server.stop().await;
}
