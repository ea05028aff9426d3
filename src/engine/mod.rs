//! Quantized models on devices, batching, jobs, evaluation.
//!
//! An [`Engine`] is everything behind the services: it speaks plain Rust types, never protos.

pub mod batcher;
pub mod catalog;
pub mod classify;
pub mod device;
pub mod evaluator;
pub mod exact_sum;
pub mod garbage;
pub mod jobs;
mod loader;
pub mod names;
pub mod pipeline;
pub mod quantized_model;
pub mod registry;
pub mod resources;
pub mod response_cache;
mod sampled;
pub mod statistics;
mod upkeep;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tch::Device;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::artifact::store::{self, ArtifactStore, MeasuredStore};
use crate::data::DecodeLimits;
use crate::database::{self, Database, Dialect};
use crate::engine::batcher::{Admission, ClientLimit, Pace, QueueLimits};
use crate::engine::catalog::ModelCatalog;
use crate::engine::classify::{Classifier, ClassifierParts};
use crate::engine::device::{Batching, DeviceHandle};
use crate::engine::garbage::Garbage;
use crate::engine::jobs::{JobLimits, JobRunner, JobStore, RunnerParts};
use crate::engine::registry::{ModelRegistry, RegistryParts, blocking};
use crate::engine::resources::{HubOwners, ResourceKind, ResourceParts, Resources};
use crate::engine::response_cache::{CacheLimits, ResponseCache};
use crate::error::{Error, Result};
use crate::exec::Backend;

pub use quantized_model::{FloatModel, QuantizedModel};

/// The database's name in the data folder.
const DATABASE_FILE: &str = "vitq.sqlite";

/// When a store that did not answer is asked again.
const RETRY_STORE: Duration = Duration::from_secs(5);

/// The name of the folder of local copies in the data folder.
const CACHE_FOLDER: &str = "cache";

/// What an [`Engine`] is made of.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Folder of jobs, models and artifacts; created if missing.
    pub data_dir: PathBuf,
    /// URL of the database; without one, a file in the data folder.
    pub database: Option<String>,
    /// Connections to that URL at most.
    pub database_connections: u32,
    /// URL of the artifact store; without one, the data folder.
    pub store: Option<String>,
    /// Folder of checkpoints.
    pub checkpoints: Option<PathBuf>,
    /// Folder of data sets.
    pub datasets: Option<PathBuf>,
    /// Folder of local copies; without one, a folder in the data folder.
    pub cache: Option<PathBuf>,
    /// Bytes that local copies may take.
    pub cache_bytes: u64,
    /// Bytes that all uploads together may have.
    pub upload_quota: u64,
    /// Whose checkpoints of the hub may be used; without, nobody's.
    pub hub: Option<HubOwners>,
    /// Devices that serve; the first also calibrates.
    pub devices: Vec<Device>,
    /// The arithmetic of all models.
    pub backend: Backend,
    /// How devices form batches.
    pub batching: Batching,
    /// What may be in the server at once.
    pub queue: QueueLimits,
    /// Images of one client that may be in the server at once; 0 for no limit of its own.
    pub images_per_client: usize,
    /// Threads that decode images.
    pub decode_threads: usize,
    /// What is kept of answers.
    pub response_cache: CacheLimits,
    /// Bytes of models that each device may hold.
    pub memory_budget: Option<u64>,
    /// Jobs that run at the same time.
    pub workers: usize,
    /// Images of an evaluation that a worker takes at a time; larger ones are shared by processes.
    pub shard_images: usize,
    /// Bounds of the job store.
    pub jobs: JobLimits,
    /// What is accepted as an image.
    pub limits: DecodeLimits,
}

impl EngineConfig {
    /// A small local engine: everything in one folder, one job at a time.
    pub fn local(data_dir: impl Into<PathBuf>, device: Device) -> Self {
        Self {
            data_dir: data_dir.into(),
            database: None,
            database_connections: database::CONNECTIONS,
            store: None,
            checkpoints: None,
            datasets: None,
            cache: None,
            cache_bytes: 1 << 30,
            upload_quota: 1 << 30,
            hub: None,
            devices: vec![device],
            backend: Backend::Integer,
            batching: Batching { max_batch: 8, delay: Duration::ZERO },
            queue: QueueLimits { images: 64, bytes: 256 << 20 },
            images_per_client: 0,
            decode_threads: 1,
            response_cache: CacheLimits::default(),
            memory_budget: None,
            workers: 1,
            shard_images: 1024,
            jobs: JobLimits::default(),
            limits: DecodeLimits::default(),
        }
    }
}

/// Everything behind the services.
#[derive(Debug)]
pub struct Engine {
    /// Models by id.
    pub registry: Arc<ModelRegistry>,
    /// Quantization and evaluation.
    pub jobs: Arc<JobRunner>,
    /// Classification.
    pub classifier: Classifier,
    /// Checkpoints and data sets.
    pub resources: Arc<Resources>,
    artifacts: Arc<dyn ArtifactStore>,
    _upkeep: DropGuard,
}

impl Engine {
    /// Opens the stores and starts the threads.
    ///
    /// # Errors
    /// `Io` for unusable folders; `Unavailable` for an unusable database; `InvalidArgument` on
    /// `database`, `store`, `hub`, or on `device` for an empty list.
    pub async fn start(config: EngineConfig) -> Result<Arc<Self>> {
        let EngineConfig {
            data_dir,
            database,
            database_connections,
            store,
            checkpoints,
            datasets,
            cache,
            cache_bytes,
            upload_quota,
            hub,
            devices,
            backend,
            batching,
            queue,
            images_per_client,
            decode_threads,
            response_cache,
            memory_budget,
            workers,
            shard_images,
            jobs,
            limits,
        } = config;
        let first = *devices.first().ok_or_else(|| Error::invalid("device", "names no device"))?;
        let folder = data_dir.clone();
        let pace = Arc::<Pace>::default();
        let noted = Arc::clone(&pace);
        let (needs_folder, is_local) = (database.is_none(), store.is_none());
        let (store, handles) = blocking(move || {
            if needs_folder {
                std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
            }
            let start =
                |device: &Device| DeviceHandle::start(*device, batching, Arc::clone(&noted));
            let handles = devices.iter().map(start).collect::<Result<Vec<_>>>()?;
            let store = store::open(store.as_deref(), &folder)?;
            let store: Arc<dyn ArtifactStore> = Arc::new(MeasuredStore::new(store));
            Ok((store, handles))
        })
        .await?;
        if database.is_some() && is_local {
            tracing::warn!(
                "artifacts are in the data folder: other servers on this database cannot load them"
            );
        }
        let database = match database {
            Some(url) => Database::wait_for(&url, database_connections).await?,
            None => Database::file(&data_dir.join(DATABASE_FILE)).await?,
        };
        let job_store = Arc::new(JobStore::new(database.clone(), jobs));
        if database.dialect() == Dialect::Sqlite {
            // The file is this process's alone: whoever held a lease is gone.
            job_store.forget_leases().await?;
        }
        let catalog = ModelCatalog::new(database.clone());
        let garbage = Garbage::new(database.clone(), Arc::clone(&store));
        let artifacts = Arc::clone(&store);
        let parts = RegistryParts {
            store,
            catalog,
            garbage: garbage.clone(),
            devices: handles,
            backend,
            memory_budget,
        };
        let registry = ModelRegistry::open(parts).await?;
        let parts = ResourceParts {
            checkpoints,
            datasets,
            database,
            artifacts: Arc::clone(&artifacts),
            garbage: garbage.clone(),
            cache: cache.unwrap_or_else(|| data_dir.join(CACHE_FOLDER)),
            cache_bytes,
            upload_quota,
            hub,
            limits: limits.clone(),
        };
        let runtime = Handle::current();
        let resources = Arc::new(blocking(move || Resources::open(parts, runtime)).await?);
        let parts = RunnerParts {
            store: Arc::clone(&job_store),
            artifacts: Arc::clone(&artifacts),
            garbage: garbage.clone(),
            registry: Arc::clone(&registry),
            resources: Arc::clone(&resources),
            device: first,
            limits: limits.clone(),
            workers,
            shard_images,
        };
        let stop = CancellationToken::new();
        tokio::spawn(upkeep::run(
            Arc::clone(&registry),
            Arc::clone(&resources),
            job_store,
            garbage,
            stop.clone(),
        ));
        Ok(Arc::new(Self {
            classifier: Classifier::new(ClassifierParts {
                registry: Arc::clone(&registry),
                admission: Admission::new(queue, pace),
                clients: ClientLimit::new(images_per_client),
                cache: ResponseCache::new(response_cache),
                decode_threads,
                limits,
            })?,
            jobs: JobRunner::start(parts, Handle::current())?,
            registry,
            resources,
            artifacts,
            _upkeep: stop.drop_guard(),
        }))
    }

    /// Returns once the artifact store has answered, however long that takes. The database has, or
    /// there would be no engine.
    pub async fn wait_for_store(&self) {
        while let Err(error) = self.artifacts.reach().await {
            tracing::error!(%error, "not ready: the artifact store does not answer, trying again");
            tokio::time::sleep(RETRY_STORE).await;
        }
    }

    /// Deletes a checkpoint or a data set that a client brought.
    ///
    /// # Errors
    /// As [`Resources::delete`]; `FailedPrecondition` while a job needs it.
    pub async fn delete_resource(&self, kind: ResourceKind, name: &str) -> Result<()> {
        if let Some(job) = self.jobs.store().active_with(kind, name).await? {
            let (kind, operation) = (kind.name(), job.operation());
            let reason = format!("{kind} `{name}` is in use by `{operation}`: cancel it first");
            return Err(Error::FailedPrecondition { reason });
        }
        self.resources.delete(kind, name).await
    }
}
