//! Quantized models on devices, batching, jobs, evaluation.
//!
//! An [`Engine`] is everything behind the services: it speaks plain Rust types, never protos.

pub mod batcher;
pub mod classify;
pub mod device;
pub mod evaluator;
pub mod jobs;
pub mod names;
pub mod pipeline;
pub mod quantized_model;
pub mod registry;
pub mod resources;

use std::path::PathBuf;
use std::sync::Arc;

use tch::Device;
use tokio::runtime::Handle;

use crate::artifact::store::{LocalArtifactStore, ModelCatalog};
use crate::data::DecodeLimits;
use crate::database::Database;
use crate::engine::classify::Classifier;
use crate::engine::device::DeviceHandle;
use crate::engine::jobs::{JobLimits, JobRunner, JobStore, RunnerParts};
use crate::engine::names::NamedFolder;
use crate::engine::registry::{ModelRegistry, RegistryParts, blocking};
use crate::engine::resources::Resources;
use crate::error::{Error, Result};
use crate::exec::Backend;

pub use quantized_model::{FloatModel, QuantizedModel};

/// What an [`Engine`] is made of.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Folder of jobs, models and artifacts; created if missing.
    pub data_dir: PathBuf,
    /// Folder of checkpoints.
    pub checkpoints: Option<PathBuf>,
    /// Folder of data sets.
    pub datasets: Option<PathBuf>,
    /// Devices that serve; the first also calibrates.
    pub devices: Vec<Device>,
    /// The arithmetic of all models.
    pub backend: Backend,
    /// Largest batch, in images.
    pub max_batch: usize,
    /// Images in the server at once.
    pub queue_images: usize,
    /// Jobs that run at the same time.
    pub workers: usize,
    /// Bounds of the job store.
    pub jobs: JobLimits,
    /// What is accepted as an image.
    pub limits: DecodeLimits,
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
    pub resources: Resources,
}

impl Engine {
    /// Opens the stores and starts the threads.
    ///
    /// # Errors
    /// `Io` for unusable folders; `Unavailable` for an unusable database; `InvalidArgument` on
    /// `device` for an empty list.
    pub async fn start(config: EngineConfig) -> Result<Arc<Self>> {
        let data_dir = config.data_dir.clone();
        blocking(move || std::fs::create_dir_all(&data_dir).map_err(|e| Error::io(data_dir, e)))
            .await?;
        let database = Database::file(&config.data_dir.join("vitq.sqlite")).await?;
        let store = Arc::new(JobStore::new(database, config.jobs.clone()));
        // The folder is this process's alone: whoever held a lease is gone.
        store.forget_leases().await?;
        let runtime = Handle::current();
        blocking(move || Self::assemble(config, store, runtime)).await
    }

    /// What blocks.
    fn assemble(config: EngineConfig, store: Arc<JobStore>, runtime: Handle) -> Result<Arc<Self>> {
        let EngineConfig {
            data_dir,
            checkpoints,
            datasets,
            devices,
            backend,
            max_batch,
            queue_images,
            workers,
            jobs: _,
            limits,
        } = config;
        let first = *devices.first().ok_or_else(|| Error::invalid("device", "names no device"))?;
        let handles = devices
            .iter()
            .map(|device| DeviceHandle::start(*device, max_batch))
            .collect::<Result<Vec<_>>>()?;
        let registry = ModelRegistry::open(RegistryParts {
            store: Arc::new(LocalArtifactStore::open(&data_dir)?),
            catalog: ModelCatalog::open(&data_dir)?,
            devices: handles,
            backend,
        })?;
        let checkpoints = NamedFolder::open(checkpoints.as_deref(), "checkpoint")?;
        let datasets = NamedFolder::open(datasets.as_deref(), "dataset")?;
        let parts = RunnerParts {
            store,
            registry: Arc::clone(&registry),
            checkpoints: checkpoints.clone(),
            datasets: datasets.clone(),
            device: first,
            limits: limits.clone(),
            workers,
        };
        Ok(Arc::new(Self {
            classifier: Classifier::new(Arc::clone(&registry), queue_images, limits),
            jobs: JobRunner::start(parts, runtime)?,
            registry,
            resources: Resources::new(checkpoints, datasets),
        }))
    }
}
