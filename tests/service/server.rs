//! A server on a free port, and the calls that most tests need.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use vitq::engine::batcher::QueueLimits;
use vitq::engine::jobs::JobLimits;
use vitq::engine::response_cache::CacheLimits;
use vitq::engine::{Engine, EngineConfig};
use vitq::grpc::ops::Probes;
use vitq::grpc::proto::catalog_service_client::CatalogServiceClient;
use vitq::grpc::proto::evaluation_service_client::EvaluationServiceClient;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{
    CalibrationDataset, ClassifyRequest, ClassifyResponse, Image, QuantizeEvent, QuantizeRequest,
    QuantizeResult,
};
use vitq::grpc::{self, Running, ServerConfig};

/// A running server. Stopped, at the latest, when it is dropped.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) channel: Channel,
    pub(crate) engine: Arc<Engine>,
    pub(crate) probes: Probes,
    pub(crate) stop: CancellationToken,
    served: JoinHandle<vitq::Result<()>>,
    _stops_when_dropped: DropGuard,
}

/// What differs between servers.
pub(crate) struct Setup {
    pub(crate) checkpoints: Option<PathBuf>,
    pub(crate) datasets: Option<PathBuf>,
    pub(crate) queue_images: usize,
    pub(crate) upload_quota: u64,
    pub(crate) jobs: JobLimits,
    /// Images of one client at once; 0 for no limit.
    pub(crate) images_per_client: usize,
    pub(crate) server: ServerConfig,
    pub(crate) response_cache: CacheLimits,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            checkpoints: Some(demo("checkpoints")),
            datasets: Some(demo("datasets")),
            queue_images: 64,
            upload_quota: 1 << 30,
            jobs: JobLimits::default(),
            images_per_client: 0,
            server: ServerConfig::default(),
            response_cache: CacheLimits::default(),
        }
    }
}

/// A folder of the demo.
pub(crate) fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}

/// The bytes of validation image `number` of a class.
pub(crate) fn digit(class: usize, number: usize) -> Vec<u8> {
    let folder = demo("datasets/digits/val").join(class.to_string());
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    fs::read(&files[number]).unwrap()
}

impl TestServer {
    /// On a data folder that outlives it.
    pub(crate) async fn start(data: &TempDir) -> Self {
        Self::with(data, Setup::default()).await
    }

    pub(crate) async fn with(data: &TempDir, setup: Setup) -> Self {
        let Setup {
            checkpoints,
            datasets,
            queue_images,
            upload_quota,
            jobs,
            images_per_client,
            response_cache,
            server: config,
        } = setup;
        let is_encrypted = config.security.is_encrypted();
        let engine_config = EngineConfig {
            checkpoints,
            datasets,
            upload_quota,
            queue: QueueLimits { images: queue_images, bytes: 256 << 20 },
            jobs,
            images_per_client,
            response_cache,
            ..EngineConfig::local(data.path(), tch::Device::Cpu)
        };
        let engine: Arc<Engine> = Engine::start(engine_config).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (probes, stop) = (Probes::default(), CancellationToken::new());
        let running = Running { config, probes: probes.clone(), stop: stop.clone() };
        let served = tokio::spawn(grpc::run(listener, Arc::clone(&engine), running));
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        // Where TLS is spoken, the tests bring channels of their own.
        let channel =
            if is_encrypted { endpoint.connect_lazy() } else { endpoint.connect().await.unwrap() };
        let _stops_when_dropped = stop.clone().drop_guard();
        Self { address, channel, engine, probes, stop, served, _stops_when_dropped }
    }

    /// Its address for a client.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Drains and ends it.
    pub(crate) async fn stop(self) {
        let Self { channel, engine, stop, served, .. } = self;
        drop((channel, engine));
        stop.cancel();
        served.await.unwrap().unwrap();
    }

    pub(crate) fn quantization(&self) -> QuantizationServiceClient<Channel> {
        QuantizationServiceClient::new(self.channel.clone())
    }

    pub(crate) fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone()).max_encoding_message_size(256 << 20)
    }

    pub(crate) fn evaluation(&self) -> EvaluationServiceClient<Channel> {
        EvaluationServiceClient::new(self.channel.clone())
    }

    pub(crate) fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone())
    }

    pub(crate) fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel.clone())
    }

    pub(crate) fn catalog(&self) -> CatalogServiceClient<Channel> {
        CatalogServiceClient::new(self.channel.clone())
    }

    /// Runs a quantization to its end.
    pub(crate) async fn quantize(
        &self,
        request: QuantizeRequest,
    ) -> Result<Vec<QuantizeEvent>, Status> {
        let stream = self.quantization().quantize(request).await?.into_inner();
        stream.collect::<Result<Vec<_>, _>>().await
    }

    /// A quick model of that id.
    pub(crate) async fn make(&self, model_id: &str) -> QuantizeResult {
        result(self.quantize(quick(model_id)).await.unwrap())
    }

    pub(crate) async fn classify(
        &self,
        model: &str,
        images: Vec<Vec<u8>>,
    ) -> Result<ClassifyResponse, Status> {
        let images = images.into_iter().map(|content| Image { content: content.into() }).collect();
        let model = model.to_owned();
        let request = ClassifyRequest { model, images, top_k: 10, ..Default::default() };
        Ok(self.inference().classify(request).await?.into_inner())
    }
}

/// A quantization that takes a moment.
pub(crate) fn quick(model_id: &str) -> QuantizeRequest {
    QuantizeRequest {
        checkpoint: "digits-vit".to_owned(),
        method: "minmax".to_owned(),
        weight_bits: 8,
        activation_bits: 8,
        calibration: drawn("digits/calib", 8),
        model_id: model_id.to_owned(),
        ..QuantizeRequest::default()
    }
}

/// A quantization that takes seconds.
pub(crate) fn slow(model_id: &str) -> QuantizeRequest {
    QuantizeRequest {
        checkpoint: "digits-swin".to_owned(),
        method: "ubb".to_owned(),
        weight_bits: 4,
        activation_bits: 4,
        calibration: drawn("digits/calib", 256),
        ..quick(model_id)
    }
}

/// A quantization that takes seconds: long enough to be interrupted, short enough to be repeated.
pub(crate) fn medium(model_id: &str) -> QuantizeRequest {
    QuantizeRequest {
        checkpoint: "digits-vit".to_owned(),
        calibration: drawn("digits/calib", 24),
        ..slow(model_id)
    }
}

/// So many images of a data set.
pub(crate) fn drawn(name: &str, count: u32) -> Option<Calibration> {
    let name = name.to_owned();
    Some(Calibration::Dataset(CalibrationDataset { name, count, files: vec![] }))
}

/// The result in the last event.
pub(crate) fn result(events: Vec<QuantizeEvent>) -> QuantizeResult {
    match events.into_iter().last().and_then(|event| event.event) {
        Some(Event::Result(result)) => result,
        other => panic!("the last event is {other:?}"),
    }
}

/// The error in the last event.
pub(crate) fn failure(events: Vec<QuantizeEvent>) -> tonic_types::Status {
    match events.into_iter().last().and_then(|event| event.event) {
        Some(Event::Error(error)) => error,
        other => panic!("the last event is {other:?}"),
    }
}

/// The details of an error within a message.
pub(crate) fn details(error: &tonic_types::Status) -> ErrorDetails {
    use prost::Message as _;
    let code = Code::from(error.code);
    let bytes = error.encode_to_vec().into();
    Status::with_details(code, error.message.clone(), bytes).get_error_details()
}

/// Code, field and reason of a refusal: what a program sees of it.
pub(crate) fn refusal(status: &Status) -> (Code, String, String) {
    let details = status.get_error_details();
    let field = details.bad_request().and_then(|b| b.field_violations.first());
    let field = field.map(|violation| violation.field.clone()).unwrap_or_default();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    (status.code(), field, reason)
}
