//! A server with two models, and the same model without a server.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use vitq::artifact::Artifact;
use vitq::data::{DecodeLimits, decode, preprocess};
use vitq::engine::batcher::QueueLimits;
use vitq::engine::device::Batching;
use vitq::engine::{Engine, EngineConfig, QuantizedModel};
use vitq::grpc::ops::Probes;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{CalibrationDataset, QuantizeRequest, QuantizeResult};
use vitq::grpc::{self, Running, ServerConfig};
use vitq::model::generated::{GeneratedOptions, generate};

use crate::Args;
use crate::parts::median;

/// The model that is measured.
pub(crate) const MODEL: &str = "subject";
/// Another one of the same kind.
pub(crate) const OTHER: &str = "other";

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum SubjectKind {
    /// The demo ViT, minmax, 8 bits; PNG files of 32 × 32 pixels.
    DigitsVitMinmax,
    /// The demo ViT, ubb, 4 bits.
    DigitsVitUbb,
    /// DeiT-S with generated weights, minmax, 8 bits; JPEG files of 500 × 375 pixels.
    DeitSmallMinmax,
}

impl SubjectKind {
    fn checkpoint(self) -> &'static str {
        match self {
            Self::DigitsVitMinmax | Self::DigitsVitUbb => "digits-vit",
            Self::DeitSmallMinmax => "deit-small",
        }
    }

    fn method(self) -> (&'static str, u32) {
        match self {
            Self::DigitsVitMinmax | Self::DeitSmallMinmax => ("minmax", 8),
            Self::DigitsVitUbb => ("ubb", 4),
        }
    }
}

/// A running server.
pub(crate) struct Subject {
    pub(crate) url: String,
    /// Folder of images to send.
    pub(crate) images: PathBuf,
    /// The served model, in this thread's hands.
    pub(crate) bare: QuantizedModel,
    channel: Channel,
    stop: CancellationToken,
    served: JoinHandle<vitq::Result<()>>,
    _folder: TempDir,
}

impl Subject {
    pub(crate) async fn start(kind: SubjectKind, args: &Args) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = folder.path().join("checkpoints");
        copy(&demo("checkpoints/digits-vit"), &checkpoints.join("digits-vit"));
        let images = match kind {
            SubjectKind::DigitsVitMinmax | SubjectKind::DigitsVitUbb => demo("datasets/digits/val"),
            SubjectKind::DeitSmallMinmax => {
                let deit = generate("deit_small", GeneratedOptions::default()).unwrap();
                deit.save(&checkpoints.join(kind.checkpoint())).unwrap();
                photographs(&folder.path().join("images"))
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let data = folder.path().join("data");
        let config = EngineConfig {
            checkpoints: Some(checkpoints),
            datasets: Some(demo("datasets")),
            queue: QueueLimits { images: args.queue_images, bytes: 512 << 20 },
            backend: args.executor,
            batching: Batching { max_batch: args.max_batch, delay: Duration::ZERO },
            decode_threads: cores,
            ..EngineConfig::local(&data, tch::Device::Cpu)
        };
        let engine = Engine::start(config).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let running = Running {
            config: ServerConfig::default(),
            probes: Probes::default(),
            stop: stop.clone(),
        };
        let served = tokio::spawn(grpc::run(listener, Arc::clone(&engine), running));
        let channel = Channel::from_shared(url.clone()).unwrap().connect().await.unwrap();
        let made = quantize(channel.clone(), request(kind, MODEL)).await;
        quantize(channel.clone(), QuantizeRequest { seed: 1, ..request(kind, OTHER) }).await;
        let digest = made.model.unwrap().digest;
        let file = data.join("objects/sha256").join(format!("{digest}.safetensors"));
        let artifact = Artifact::from_bytes(MODEL, &fs::read(file).unwrap()).unwrap();
        let bare = QuantizedModel::load(&artifact, tch::Device::Cpu, args.executor).unwrap();
        Self { url, images, bare, channel, stop, served, _folder: folder }
    }

    pub(crate) async fn stop(self) {
        drop(self.channel);
        self.stop.cancel();
        self.served.await.unwrap().unwrap();
    }

    /// One of the images to send.
    pub(crate) fn image(&self) -> PathBuf {
        files(&self.images).remove(0)
    }

    /// A file as the model sees it: what the server does before it queues an image.
    pub(crate) fn pixels(&self, file: &[u8]) -> Vec<f32> {
        let image = decode(file, &DecodeLimits::default(), "image").unwrap();
        preprocess(&image, &self.bare.spec().preprocessing).unwrap()
    }

    /// Median seconds of a call that does nothing, one after another for a time.
    pub(crate) async fn empty_call(&self, time: Duration) -> f64 {
        let mut client = HealthClient::new(self.channel.clone());
        let start = Instant::now();
        let mut times = Vec::new();
        while start.elapsed() < time {
            let before = Instant::now();
            client.check(HealthCheckRequest::default()).await.unwrap();
            times.push(before.elapsed().as_secs_f64());
        }
        median(&mut times)
    }

    /// Calibrates the demo ViT with ubb on all images; the time it took. Another seed is another job.
    pub(crate) async fn calibrate(&self, seed: u64) -> Duration {
        let model_id = format!("calibrated-{seed}");
        let request = QuantizeRequest {
            seed,
            calibration: calibration(256),
            ..request(SubjectKind::DigitsVitUbb, &model_id)
        };
        let result = quantize(self.channel.clone(), request).await;
        result.calibration_time.unwrap().try_into().unwrap()
    }
}

async fn quantize(channel: Channel, request: QuantizeRequest) -> QuantizeResult {
    let mut client = QuantizationServiceClient::new(channel);
    let events = client.quantize(request).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    match events.into_iter().last().and_then(|event| event.event) {
        Some(Event::Result(result)) => result,
        other => panic!("the last event is {other:?}"),
    }
}

fn request(kind: SubjectKind, model_id: &str) -> QuantizeRequest {
    let (method, bits) = kind.method();
    QuantizeRequest {
        checkpoint: kind.checkpoint().to_owned(),
        method: method.to_owned(),
        weight_bits: bits,
        activation_bits: bits,
        calibration: calibration(8),
        model_id: model_id.to_owned(),
        ..QuantizeRequest::default()
    }
}

fn calibration(count: u32) -> Option<Calibration> {
    let name = "digits/calib".to_owned();
    Some(Calibration::Dataset(CalibrationDataset { name, count, files: vec![] }))
}

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// Files of a folder and its folders, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "png" || e == "jpg") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// JPEG files of a usual size and weight: waves with a little noise.
fn photographs(folder: &Path) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    for number in 0..16_u32 {
        let pixel = |x: u32, y: u32| {
            let noise =
                (x.wrapping_mul(7919) ^ y.wrapping_mul(104_729)).wrapping_mul(number + 1) % 31;
            let wave = |scale: f32| {
                let phase = (x as f32 + 2.0 * y as f32) / scale + number as f32;
                (100.0 + 90.0 * phase.sin()) as u8 + noise as u8
            };
            [wave(17.0), wave(29.0), wave(53.0)]
        };
        let pixels: Vec<u8> =
            (0..375).flat_map(|y| (0..500).flat_map(move |x| pixel(x, y))).collect();
        let image = turbojpeg::Image {
            pixels: pixels.as_slice(),
            width: 500,
            pitch: 1500,
            height: 375,
            format: turbojpeg::PixelFormat::RGB,
        };
        let jpeg = turbojpeg::compress(image, 75, turbojpeg::Subsamp::None).unwrap();
        fs::write(folder.join(format!("{number}.jpg")), jpeg).unwrap();
    }
    folder.to_path_buf()
}
