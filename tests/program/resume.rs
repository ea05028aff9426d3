//! Calibrations that were interrupted and go on: the same artifact, without computing again what is
//! finished.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tch::{Device, Tensor};
use tokio_stream::StreamExt as _;
use vitq::Error;
use vitq::calib::kept::{Tensors, from_bytes, to_bytes};
use vitq::calib::{Progress, ProgressUpdate, QuantizeSpec, RoleBits, StemHeadPolicy};
use vitq::engine::pipeline::{CalibrationImages, quantize};
use vitq::grpc::proto::longrunning::WaitOperationRequest;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::{GetModelRequest, JobMetadata, JobState};
use vitq::model::Checkpoint;
use vitq::quant::BitWidth;

use crate::program::{Program, Stores};
use crate::reference::{calibration, root};
use crate::requests;

/// Keeps units as bytes, as a store does, and can stop after some of them.
#[derive(Default)]
struct Attempt {
    kept: Mutex<BTreeMap<String, Vec<u8>>>,
    computed: AtomicUsize,
    stop_after: Option<usize>,
}

impl Attempt {
    fn with(kept: BTreeMap<String, Vec<u8>>, stop_after: Option<usize>) -> Self {
        Self { kept: Mutex::new(kept), computed: AtomicUsize::new(0), stop_after }
    }

    fn computed(&self) -> usize {
        self.computed.load(Ordering::Relaxed)
    }
}

impl Progress for Attempt {
    fn report(&self, _update: ProgressUpdate) {}

    fn restore(&self, unit: &str) -> Option<Tensors> {
        self.kept.lock().unwrap().get(unit).map(|bytes| from_bytes(bytes).unwrap())
    }

    fn keep(&self, unit: &str, result: &[(String, Tensor)]) {
        let bytes = to_bytes(result).unwrap();
        self.kept.lock().unwrap().insert(unit.to_owned(), bytes);
        self.computed.fetch_add(1, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.stop_after.is_some_and(|most| self.computed() >= most)
    }
}

struct Job {
    checkpoint: Checkpoint,
    images: CalibrationImages,
    request: QuantizeSpec,
}

impl Job {
    fn new(checkpoint: &str, method: &str) -> Self {
        let checkpoint = Checkpoint::open(&root("demo/checkpoints").join(checkpoint)).unwrap();
        let all = calibration(&checkpoint, "digits-vit/n32/seed0");
        let images = CalibrationImages { images: all.images.narrow(0, 0, 4), ..all };
        let bits = BitWidth::new(4, "bits").unwrap();
        let options: &[(&str, &str)] = match method {
            "ptq4vit" => &[("candidates", "8"), ("rounds", "1")],
            "igq" => &[],
            _ => &[("iterations", "2"), ("batch", "2")],
        };
        let request = QuantizeSpec {
            method: method.to_owned(),
            options: options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            weight_bits: bits.into(),
            activation_bits: bits.into(),
            stem_head: StemHeadPolicy::Float,
            seed: 0,
            role_bits: RoleBits::default(),
        };
        Self { checkpoint, images, request }
    }

    fn run(&self, attempt: &Attempt) -> vitq::Result<Vec<u8>> {
        let Self { checkpoint, images, request } = self;
        quantize(checkpoint, images, request, Device::Cpu, attempt)?.artifact.to_bytes()
    }
}

#[test]
fn a_resumed_calibration_gives_the_same_artifact() {
    for (checkpoint, method) in [
        ("digits-vit", "ptq4vit"),
        ("digits-vit", "igq"),
        ("digits-vit", "ias"),
        ("digits-vit", "dopq"),
        ("digits-swin", "ptq4vit"),
        ("digits-swin", "ias"),
        ("digits-swin", "dopq"),
    ] {
        let job = Job::new(checkpoint, method);
        let whole = Attempt::default();
        let expected = job.run(&whole).unwrap();
        let units = whole.computed();
        assert!(units > 5, "{checkpoint} {method} keeps {units} units");
        let all = whole.kept.into_inner().unwrap();
        for stop_after in [1, units / 2] {
            let first = Attempt::with(BTreeMap::new(), Some(stop_after));
            assert!(matches!(job.run(&first), Err(Error::Cancelled)));
            assert_eq!(first.computed(), stop_after);
            let second = Attempt::with(first.kept.into_inner().unwrap(), None);
            assert!(job.run(&second).unwrap() == expected, "{checkpoint} {method} {stop_after}");
            assert_eq!(second.computed(), units - stop_after);
        }
        let restored = Attempt::with(all, None);
        assert!(job.run(&restored).unwrap() == expected);
        assert_eq!(restored.computed(), 0);
    }
}

#[test]
fn what_does_not_fit_is_computed_again() {
    let job = Job::new("digits-vit", "ias");
    let whole = Attempt::default();
    let expected = job.run(&whole).unwrap();
    let units = whole.computed();
    let mut damaged = whole.kept.into_inner().unwrap();
    let mut keys = damaged.clone().into_keys();
    let mut next = || keys.next().unwrap();
    let flag = || ("outcome".to_owned(), Tensor::from_slice(&[0_i64, 1]));
    let wrong =
        |name: &str, tensor: Tensor| to_bytes(&[(name.to_owned(), tensor), flag()]).unwrap();
    damaged.insert(next(), to_bytes(&[]).unwrap());
    damaged.insert(next(), wrong("no.such.parameter", Tensor::from_slice(&[1_f32])));
    damaged.insert(next(), wrong("blocks.1.attn.qkv.weight", Tensor::from_slice(&[1_f32])));
    // One that lost a parameter.
    let short = next();
    let mut rest = from_bytes(&damaged[&short]).unwrap();
    let lost = rest.iter().position(|(name, _)| name.ends_with(".weight")).unwrap();
    drop(rest.remove(lost));
    damaged.insert(short, to_bytes(&rest).unwrap());
    let attempt = Attempt::with(damaged, None);
    assert!(job.run(&attempt).unwrap() == expected);
    assert_eq!(attempt.computed(), 4, "of {units}");
}

async fn digest(program: &Program, operation: String, model: &str) -> (JobMetadata, String) {
    let wait = WaitOperationRequest { name: operation, timeout: None };
    let mut operations = OperationsClient::new(program.channel.clone());
    let operation = operations.wait_operation(wait).await.unwrap().into_inner();
    let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
    assert_eq!(metadata.state(), JobState::Succeeded, "{:?}", operation.result);
    let get = GetModelRequest { model: model.to_owned() };
    let model = ModelServiceClient::new(program.channel.clone()).get_model(get).await.unwrap();
    (metadata, model.into_inner().model.unwrap().digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_goes_on_behind_the_last_finished_unit() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().to_str().unwrap().to_owned();
    let stores = Stores { flags: vec!["--data-dir".to_owned(), folder], variables: vec![] };
    let objects = |data: &Path| std::fs::read_dir(data.join("objects/sha256")).unwrap().count();
    let program = Program::start(&stores).await;
    let mut client = QuantizationServiceClient::new(program.channel.clone());
    let mut events = client.quantize(requests::of_many_units("m")).await.unwrap().into_inner();
    let operation = loop {
        let event = events.next().await.unwrap().unwrap();
        let learns = |stage: &str| stage.starts_with("reconstruct");
        if matches!(&event.event, Some(Event::Progress(p)) if learns(&p.stage) && p.unit >= 4) {
            break event.operation;
        }
    };
    drop(program);
    let kept = objects(data.path());
    assert!(kept >= 2, "{kept} units are kept");

    let program = Program::start(&stores).await;
    let (metadata, resumed) = digest(&program, operation, "m").await;
    assert_eq!(metadata.attempt, 2);
    // The artifact stays, and no unit: they go when the job has ended.
    let cleared = async {
        while objects(data.path()) > 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), cleared).await.unwrap();
    let mut client = QuantizationServiceClient::new(program.channel.clone());
    let mut events = client.quantize(requests::of_many_units("n")).await.unwrap().into_inner();
    let operation = events.next().await.unwrap().unwrap().operation;
    let (_, undisturbed) = digest(&program, operation, "n").await;
    assert_eq!(resumed, undisturbed);
}
