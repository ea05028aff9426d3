//! The services: thin methods that validate, convert, call the engine, and convert back.

pub mod auth;
mod caller;
mod catalog;
mod check;
mod classify;
mod classify_stream;
mod connections;
pub(crate) mod deadline;
mod drain;
mod evaluate;
mod events;
mod explain;
mod fields;
mod flag;
mod health;
mod intake;
mod measure;
mod models;
pub mod oip;
mod operations;
pub mod ops;
pub(crate) mod page;
pub mod proto;
mod quantize;
mod reload;
mod resources;
pub mod security;
mod status;
mod tls;
mod trace;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding::{Gzip, Zstd};
use tonic::transport::Server;
use tonic_health::pb::health_server::HealthServer;

use crate::engine::Engine;
use crate::engine::device::DeviceHandle;
use crate::engine::names::ModelId;
use crate::error::{Error, Result};
use crate::random;

use check::Checks;
pub use connections::ConnectionLimits;
use health::HealthChecks;
use ops::Probes;
use proto::catalog_service_server::CatalogServiceServer;
use proto::checkpoint_service_server::CheckpointServiceServer;
use proto::dataset_service_server::DatasetServiceServer;
use proto::evaluation_service_server::EvaluationServiceServer;
use proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use proto::inference_service_server::InferenceServiceServer;
use proto::longrunning::operations_server::OperationsServer;
use proto::model_service_server::ModelServiceServer;
use proto::quantization_service_server::QuantizationServiceServer;
use proto::upload_service_server::UploadServiceServer;
use security::Security;

/// Largest request of calls without images, in bytes.
const SMALL_MESSAGE: usize = 4 << 20;
/// How many messages of the largest size may be coming in at once, in the whole server.
const LARGE_MESSAGES: usize = 8;
/// Streams of one connection at once.
const MAX_STREAMS: u32 = 256;
/// Bytes in flight per connection: with less, one slow upload holds up every stream of its client.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Silence after which a connection is pinged, and how long the answer may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));
/// How far the ages of connections differ, so that those of servers that were started together do not
/// all end together.
const AGE_SPREAD: f64 = 0.1;
/// Request headers, in bytes.
const MAX_HEADERS: u32 = 16 << 10;
/// Streams that a client may reset before they are served: a defence against rapid reset.
const MAX_RESETS: usize = 20;
/// How often devices are looked at.
const WATCH: Duration = Duration::from_secs(1);
/// When a model that has to be there is tried again.
const RETRY_PRELOAD: Duration = Duration::from_secs(5);

pub use flag::Flag;
pub(crate) use status::MESSAGE_TOO_LARGE;
pub use status::code_name;

/// Limits of the services.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Largest request with images, in bytes.
    pub max_message_bytes: usize,
    /// Models, by id or alias, that are loaded before the server says that it is ready.
    pub preload: Vec<ModelId>,
    /// Time for which a server that was asked to stop goes on taking calls, so that balancers learn
    /// that it is not ready.
    pub drain_delay: Duration,
    /// Time for calls in progress after that.
    pub drain_timeout: Duration,
    /// For how long a batch may run before its device counts as one that does not answer.
    pub stuck_after: Duration,
    /// Bounds of connections.
    pub connections: ConnectionLimits,
    /// Who may connect, and who may do what.
    pub security: Security,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_message_bytes: 32 << 20,
            preload: Vec::new(),
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(60),
            stuck_after: Duration::from_secs(60),
            connections: ConnectionLimits::default(),
            security: Security::default(),
        }
    }
}

/// How a server runs and ends.
#[derive(Debug)]
pub struct Running {
    /// Its limits.
    pub config: ServerConfig,
    /// Where it says whether it takes calls, and whether it can still answer at all.
    pub probes: Probes,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

/// Serves until asked to stop, then drains: health says so; for a while everything goes on; new calls
/// are refused; running jobs are given back and calls in progress get their time.
///
/// # Errors
/// `Internal` when the transport fails.
pub async fn run(listener: TcpListener, engine: Arc<Engine>, running: Running) -> Result<()> {
    let Running { config, probes, stop } = running;
    probes.attach(&engine);
    // Calls are taken a little earlier and longer than the server calls itself ready.
    let taking = Flag::default();
    taking.set(true);
    look(engine.registry.devices(), config.stuck_after, &probes.alive);
    let watch = watchdog(Arc::clone(&engine), config.stuck_after, probes.alive.clone());
    let watched = tokio::spawn(watch);
    let _watched = AbortOnDrop(watched);
    let Security { tls, gate, .. } = config.security.clone();
    let _followed = AbortOnDrop(tokio::spawn(config.security.clone().follow()));

    let images = config.max_message_bytes;
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let broken = |error| Error::internal(format!("reflection: {error}"));
    // One macro instead of nine times the same four lines: the generated types share no trait.
    macro_rules! service {
        ($server:ident, $methods:expr, $limit:expr) => {
            $server::new($methods)
                .max_decoding_message_size($limit)
                .accept_compressed(Gzip)
                .accept_compressed(Zstd)
        };
    }
    let quantize = quantize::Quantization::new(Arc::clone(&engine));
    let goodbye = CancellationToken::new();
    let classify = classify::Inference::new(Arc::clone(&engine), goodbye.clone());
    let open_inference = oip::OpenInference::new(Arc::clone(&engine), probes.clone());
    let evaluate = evaluate::Evaluation::new(Arc::clone(&engine));
    let models = models::Models::new(Arc::clone(&engine));
    let resources = resources::ResourceLists::new(Arc::clone(&engine));
    let uploads = uploads::Uploads::new(Arc::clone(&engine));
    let operations = operations::Jobs::new(Arc::clone(&engine));
    let mut server = Server::builder();
    let age = config.connections.age.map(|age| age.mul_f64(random::around_one(AGE_SPREAD)));
    if let Some(age) = age {
        server = server.max_connection_age(age);
    }
    let router = server
        .max_concurrent_streams(MAX_STREAMS)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
        .layer(trace::Traces)
        .layer(measure::Measures::default())
        .layer(explain::Explanations)
        .layer(deadline::Deadlines)
        .layer(intake::Intake::new(LARGE_MESSAGES.saturating_mul(images)))
        .layer(Checks(drain::RefuseWhileDraining::new(taking.clone())))
        .layer(Checks(gate))
        .add_service(service!(QuantizationServiceServer, quantize, images))
        .add_service(service!(InferenceServiceServer, classify, images))
        .add_service(service!(GrpcInferenceServiceServer, open_inference, images))
        .add_service(service!(EvaluationServiceServer, evaluate, SMALL_MESSAGE))
        .add_service(service!(ModelServiceServer, models, SMALL_MESSAGE))
        .add_service(service!(CatalogServiceServer, catalog::Catalog, SMALL_MESSAGE))
        .add_service(service!(CheckpointServiceServer, resources.clone(), SMALL_MESSAGE))
        .add_service(service!(DatasetServiceServer, resources, SMALL_MESSAGE))
        .add_service(service!(UploadServiceServer, uploads, images))
        .add_service(service!(OperationsServer, operations, SMALL_MESSAGE))
        .add_service(HealthServer::new(HealthChecks::new(probes.clone())))
        .add_service(descriptors().build_v1().map_err(broken)?)
        .add_service(descriptors().build_v1alpha().map_err(broken)?);

    let incoming =
        connections::incoming(listener, ConnectionLimits { age, ..config.connections }, tls);
    let serving = router.serve_with_incoming_shutdown(incoming, goodbye.clone().cancelled_owned());
    tokio::pin!(serving);
    let ready = async {
        engine.wait_for_store().await;
        let absent = preload(&engine, &config.preload).await;
        probes.readiness.set(true);
        preload_later(&engine, absent).await;
        std::future::pending().await
    };
    tokio::select! {
        ended = &mut serving => return ended.map_err(|e| transport(&e)),
        () = ready => {}
        () = stop.cancelled() => {}
    }

    tracing::info!(delay = config.drain_delay.as_secs_f64(), "draining");
    probes.readiness.set(false);
    tokio::select! {
        ended = &mut serving => return ended.map_err(|e| transport(&e)),
        () = tokio::time::sleep(config.drain_delay) => {}
    }
    taking.set(false);
    goodbye.cancel();
    let drained = async {
        engine.jobs.stop();
        let (served, stopped) = tokio::join!(&mut serving, engine.jobs.stopped());
        served.map_err(|error| transport(&error)).and(stopped)
    };
    match tokio::time::timeout(config.drain_timeout, drained).await {
        Ok(result) => result,
        Err(_) => {
            tracing::warn!("the drain timeout is over, what is left is dropped");
            Ok(())
        }
    }
}

/// Says whether every device still answers, as long as it is polled: a batch may run for `limit`.
pub(crate) async fn watchdog(engine: Arc<Engine>, limit: Duration, alive: Flag) {
    let devices = engine.registry.devices();
    loop {
        look(devices, limit, &alive);
        tokio::time::sleep(WATCH).await;
    }
}

/// Loads what has to be there, however long that takes. The names that no model has are given back:
/// a server that waited for them would refuse the calls that could make them.
async fn preload(engine: &Engine, models: &[ModelId]) -> Vec<ModelId> {
    let mut absent = Vec::new();
    for model in models {
        while let Err(error) = engine.registry.ensure_loaded(model).await {
            if is_absent(&error) {
                tracing::error!(%model, "ready without this model: nobody has made it yet");
                absent.push(model.clone());
                break;
            }
            tracing::error!(%error, %model, "not ready: the model cannot be loaded, trying again");
            tokio::time::sleep(RETRY_PRELOAD).await;
        }
    }
    absent
}

/// Loads models that did not exist as soon as they do.
async fn preload_later(engine: &Engine, mut absent: Vec<ModelId>) {
    while !absent.is_empty() {
        tokio::time::sleep(RETRY_PRELOAD).await;
        let mut left = Vec::new();
        for model in absent {
            if let Err(error) = engine.registry.ensure_loaded(&model).await {
                if !is_absent(&error) {
                    tracing::error!(%error, %model, "the model cannot be loaded, trying again");
                }
                left.push(model);
            }
        }
        absent = left;
    }
}

/// Whether there is no model of a name; an artifact that is missing is another matter.
fn is_absent(error: &Error) -> bool {
    matches!(error, Error::NotFound { kind: "model", .. })
}

/// A device that is lost, or whose batch runs for longer than `limit`, does not answer.
fn look(devices: &[DeviceHandle], limit: Duration, alive: &Flag) {
    let stuck = devices.iter().find(|device| device.is_lost() || device.busy_for() > limit);
    if let Some(device) = stuck
        && alive.is_set()
    {
        let busy = device.busy_for().as_secs_f64();
        tracing::error!(device = device.name(), busy, "a device does not answer");
    }
    alive.set(stuck.is_none());
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn transport(error: &tonic::transport::Error) -> Error {
    Error::internal(format!("transport: {error:?}"))
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use tch::{Device, TchError};

    use super::*;
    use crate::data::Pixels;
    use crate::engine::device::{Batching, Network};

    /// Answers when it is told with what.
    struct Puppet(Mutex<mpsc::Receiver<Result<Vec<f32>>>>);

    impl Network for Puppet {
        fn forward(&self, _: &Pixels) -> Result<Vec<f32>> {
            self.0.lock().unwrap().recv().unwrap()
        }

        fn resident_bytes(&self) -> u64 {
            0
        }
    }

    #[tokio::test]
    async fn a_batch_that_hangs_and_a_lost_device_are_noticed() {
        let batching = Batching { max_batch: 1, delay: Duration::ZERO };
        let device = DeviceHandle::start(Device::Cpu, batching, Arc::default()).unwrap();
        let (strings, puppet) = mpsc::channel();
        device.load(1, Box::new(Puppet(Mutex::new(puppet))), Arc::default()).await.unwrap();
        let images = || Pixels { count: 1, image_size: 1, data: vec![0.0; 3] };
        let (devices, alive) = ([device.clone()], Flag::default());
        let limit = Duration::from_millis(20);
        look(&devices, limit, &alive);
        assert!(alive.is_set(), "an idle device answers");

        let answer = device.forward(1, images()).unwrap();
        let mut changes = alive.changes();
        while alive.is_set() {
            look(&devices, limit, &alive);
            tokio::task::yield_now().await;
        }
        assert!(device.busy_for() > limit && changes.has_changed().unwrap());
        let minute = Duration::from_secs(60);
        look(&devices, minute, &alive);
        assert!(alive.is_set(), "a minute has not passed");
        strings.send(Ok(vec![0.0])).unwrap();
        answer.await.unwrap().unwrap();
        changes.mark_unchanged();
        look(&devices, limit, &alive);
        assert!(alive.is_set() && !changes.has_changed().unwrap());

        let broken = TchError::Torch("CUDA error: device-side assert triggered".to_owned());
        strings.send(Err(broken.into())).unwrap();
        device.forward(1, images()).unwrap().await.unwrap().unwrap_err();
        look(&devices, minute, &alive);
        assert!(!alive.is_set(), "a lost device never answers again");
    }
}
