//! The models of this server by id: what is stored, what is loaded where, and the way between.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};

use crate::artifact::Artifact;
use crate::artifact::store::{ArtifactStore, ModelCatalog, ModelRecord, RecordOrigin};
use crate::engine::QuantizedModel;
use crate::engine::device::{BuildNetwork, DeviceHandle, LoadKey};
use crate::engine::names::ModelId;
use crate::error::{Error, Result};
use crate::exec::Backend;

/// Turns stored bytes into what builds the model on a device thread. Blocking, on the blocking pool.
type ReadArtifact = fn(&str, &[u8], Backend) -> Result<BuildNetwork>;

/// All stored models, and which of them are loaded.
#[derive(Debug)]
pub struct ModelRegistry {
    store: Arc<dyn ArtifactStore>,
    catalog: ModelCatalog,
    devices: Vec<DeviceHandle>,
    backend: Backend,
    read: ReadArtifact,
    models: Mutex<BTreeMap<ModelId, Slot>>,
    next_key: AtomicU64,
    /// One publish or delete at a time: whether an artifact has other users is asked and acted upon
    /// in one piece.
    writes: Semaphore,
}

/// A model and whether it can answer at once.
#[derive(Clone, Debug)]
pub struct ModelView {
    /// What is stored.
    pub record: Arc<ModelRecord>,
    /// Whether it can answer.
    pub state: ModelState,
    /// The arithmetic that serves it.
    pub backend: Backend,
}

/// Whether a model can answer at once.
#[derive(Clone, Debug)]
pub enum ModelState {
    /// The first call loads it.
    Stored,
    /// On its way to a device.
    Loading,
    /// Answers.
    Ready(Placement),
    /// The last load failed; the next call tries again.
    Failed(Arc<Error>),
}

/// Where a loaded model lives.
#[derive(Clone, Debug)]
pub struct Placement {
    /// The device.
    pub device: DeviceHandle,
    /// The model on it.
    pub key: LoadKey,
    /// Its size there in bytes.
    pub resident_bytes: u64,
}

#[derive(Debug)]
struct Slot {
    record: Arc<ModelRecord>,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    Stored,
    /// The receiver wakes when the load is over, however it ends.
    Loading(LoadKey, watch::Receiver<()>),
    Ready(Placement),
    Failed(Arc<Error>),
}

/// What is to be done before a model is unloaded.
enum Unload {
    After(watch::Receiver<()>),
    From(Placement, ModelView),
}

/// What it takes to open a [`ModelRegistry`].
#[derive(Debug)]
pub struct RegistryParts {
    /// Where artifacts live.
    pub store: Arc<dyn ArtifactStore>,
    /// Where names live.
    pub catalog: ModelCatalog,
    /// Where models run; at least one.
    pub devices: Vec<DeviceHandle>,
    /// The arithmetic of all models.
    pub backend: Backend,
}

impl ModelRegistry {
    /// Reads the catalogue; everything in it can be served at once. Blocking.
    ///
    /// # Errors
    /// `Io` when the catalogue cannot be read.
    pub fn open(parts: RegistryParts) -> Result<Arc<Self>> {
        Self::with_reader(parts, read_artifact)
    }

    fn with_reader(parts: RegistryParts, read: ReadArtifact) -> Result<Arc<Self>> {
        let RegistryParts { store, catalog, devices, backend } = parts;
        let mut models = BTreeMap::new();
        for record in catalog.list()? {
            match ModelId::parse(&record.id, "id") {
                Ok(id) => {
                    let slot = Slot { record: Arc::new(record), state: SlotState::Stored };
                    models.insert(id, slot);
                }
                Err(error) => tracing::error!(%error, "a model record is left out"),
            }
        }
        Ok(Arc::new(Self {
            store,
            catalog,
            devices,
            backend,
            read,
            models: Mutex::new(models),
            next_key: AtomicU64::new(1),
            writes: Semaphore::new(1),
        }))
    }

    /// At most `count` models whose id follows `after`, by id.
    pub fn list(&self, after: Option<&str>, count: usize) -> Vec<ModelView> {
        let models = self.lock();
        let follows = |id: &ModelId| after.is_none_or(|after| id.as_str() > after);
        let selected = models.iter().filter(|(id, _)| follows(id)).take(count);
        selected.map(|(_, slot)| self.view(slot)).collect()
    }

    /// One model.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &ModelId) -> Result<ModelView> {
        self.lock().get(id).map(|slot| self.view(slot)).ok_or_else(|| not_found(id))
    }

    /// A stored model with the state it is in by now; as merely stored when it was deleted since.
    pub fn view_of(&self, record: &Arc<ModelRecord>) -> ModelView {
        let models = self.lock();
        let current = models.values().find(|slot| slot.record == *record);
        current.map(|slot| self.view(slot)).unwrap_or_else(|| ModelView {
            record: Arc::clone(record),
            state: ModelState::Stored,
            backend: self.backend,
        })
    }

    /// A key for something to be loaded on a device.
    pub fn new_key(&self) -> LoadKey {
        self.next_key.fetch_add(1, Ordering::Relaxed)
    }

    /// The device with the least on it.
    ///
    /// # Errors
    /// `Internal` when the server has no device.
    pub fn emptiest_device(&self) -> Result<&DeviceHandle> {
        self.devices
            .iter()
            .min_by_key(|device| device.resident_bytes())
            .ok_or_else(|| Error::internal("the server has no device"))
    }

    /// Where a model answers; loads it first if need be. Callers that ask at the same time share
    /// one load, which goes on when they leave.
    ///
    /// # Errors
    /// `NotFound`; whatever the load reports.
    pub async fn ensure_loaded(self: &Arc<Self>, id: &ModelId) -> Result<Placement> {
        let mut waited = false;
        loop {
            let mut done = {
                let mut models = self.lock();
                let slot = models.get_mut(id).ok_or_else(|| not_found(id))?;
                match &slot.state {
                    SlotState::Ready(placement) => return Ok(placement.clone()),
                    SlotState::Failed(error) if waited => return Err(error.replica()),
                    SlotState::Loading(_, done) => done.clone(),
                    SlotState::Stored | SlotState::Failed(_) => self.start_load(id, slot),
                }
            };
            // An error means that the load is over, too: its sender is gone.
            let _ = done.changed().await;
            waited = true;
        }
    }

    /// Frees a model's memory after what is queued for it; waits for a load in progress first.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn unload(&self, id: &ModelId) -> Result<ModelView> {
        loop {
            let step = {
                let mut models = self.lock();
                let slot = models.get_mut(id).ok_or_else(|| not_found(id))?;
                match std::mem::replace(&mut slot.state, SlotState::Stored) {
                    SlotState::Loading(key, done) => {
                        slot.state = SlotState::Loading(key, done.clone());
                        Unload::After(done)
                    }
                    SlotState::Ready(placement) => Unload::From(placement, self.view(slot)),
                    SlotState::Stored | SlotState::Failed(_) => return Ok(self.view(slot)),
                }
            };
            match step {
                // An error means that the load is over, too: its sender is gone.
                Unload::After(mut done) => {
                    let _ = done.changed().await;
                }
                Unload::From(placement, view) => {
                    placement.device.unload(placement.key).await?;
                    return Ok(view);
                }
            }
        }
    }

    /// Stores an artifact and gives it a name. Publishing the same artifact under the same name
    /// again gives what is there: a job that died behind this step comes back to it.
    ///
    /// # Errors
    /// `AlreadyExists` when the id is another artifact's; `Io`, and then nothing is listed.
    pub async fn publish(&self, origin: RecordOrigin, artifact: Artifact) -> Result<ModelView> {
        let id = ModelId::parse(&origin.id, "model_id")?;
        let (header, bytes) = blocking(move || {
            let bytes = Bytes::from(artifact.to_bytes()?);
            Ok((artifact.header, bytes))
        })
        .await?;
        let _one_at_a_time = self.writes.acquire().await.map_err(|_| Error::Draining)?;
        let size = bytes.len() as u64;
        let digest = self.store.put(bytes).await?;
        if let Some(slot) = self.lock().get(&id)
            && slot.record.digest == digest
        {
            return Ok(self.view(slot));
        }
        let record = Arc::new(ModelRecord::new(origin, header, (digest.clone(), size)));
        let (catalog, entry) = (self.catalog.clone(), Arc::clone(&record));
        if let Err(error) = blocking(move || catalog.create(&entry)).await {
            self.forget_unused(&digest).await;
            return Err(error);
        }
        let mut models = self.lock();
        match models.entry(id) {
            MapEntry::Occupied(taken) => {
                Err(Error::AlreadyExists { kind: "model", name: taken.key().to_string() })
            }
            MapEntry::Vacant(free) => {
                Ok(self.view(free.insert(Slot { record, state: SlotState::Stored })))
            }
        }
    }

    /// Removes a model, and its artifact unless another model has the same.
    ///
    /// # Errors
    /// `NotFound`; `Io` when the store refuses, and then the model is still listed.
    pub async fn delete(&self, id: &ModelId) -> Result<()> {
        let _one_at_a_time = self.writes.acquire().await.map_err(|_| Error::Draining)?;
        let view = self.unload(id).await?;
        let (catalog, name) = (self.catalog.clone(), id.to_string());
        blocking(move || catalog.remove(&name)).await?;
        let slot = self.lock().remove(id);
        // A call may have loaded it again in between.
        if let Some(SlotState::Ready(placement)) = slot.map(|slot| slot.state) {
            placement.device.unload(placement.key).await?;
        }
        self.forget_unused(&view.record.digest).await;
        Ok(())
    }

    /// Deletes an artifact that no model names. A failure costs disk space, nothing else.
    async fn forget_unused(&self, digest: &str) {
        if self.lock().values().any(|slot| slot.record.digest == digest) {
            return;
        }
        if let Err(error) = self.store.delete(digest).await {
            tracing::warn!(%error, digest, "an unused artifact stays in the store");
        }
    }

    /// Starts the load of a slot, which is locked by the caller.
    fn start_load(self: &Arc<Self>, id: &ModelId, slot: &mut Slot) -> watch::Receiver<()> {
        let (over, done) = watch::channel(());
        let key = self.new_key();
        slot.state = SlotState::Loading(key, done.clone());
        let (registry, id, record) = (Arc::clone(self), id.clone(), Arc::clone(&slot.record));
        tokio::spawn(async move {
            let loaded = registry.load(key, &record).await;
            registry.finish_load(&id, key, loaded).await;
            drop(over);
        });
        done
    }

    async fn load(&self, key: LoadKey, record: &ModelRecord) -> Result<Placement> {
        let started = std::time::Instant::now();
        let bytes = self.store.get(&record.digest).await?;
        let (read, digest, backend) = (self.read, record.digest.clone(), self.backend);
        let build = blocking(move || read(&digest, &bytes, backend)).await?;
        let device = self.emptiest_device()?.clone();
        let resident_bytes = device.load(key, build).await?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(model = record.id, device = device.name(), seconds, "model loaded");
        Ok(Placement { device, key, resident_bytes })
    }

    async fn finish_load(&self, id: &ModelId, key: LoadKey, loaded: Result<Placement>) {
        let orphan = {
            let mut models = self.lock();
            let slot = models.get_mut(id).filter(
                |slot| matches!(&slot.state, SlotState::Loading(current, _) if *current == key),
            );
            match (slot, loaded) {
                (Some(slot), Ok(placement)) => {
                    slot.state = SlotState::Ready(placement);
                    None
                }
                (Some(slot), Err(error)) => {
                    tracing::error!(%error, model = %id, "a model could not be loaded");
                    slot.state = SlotState::Failed(Arc::new(error));
                    None
                }
                // Deleted meanwhile.
                (None, loaded) => loaded.ok(),
            }
        };
        if let Some(placement) = orphan
            && let Err(error) = placement.device.unload(placement.key).await
        {
            tracing::error!(%error, model = %id, "a deleted model could not be unloaded");
        }
    }

    fn view(&self, slot: &Slot) -> ModelView {
        let state = match &slot.state {
            SlotState::Stored => ModelState::Stored,
            SlotState::Loading(..) => ModelState::Loading,
            SlotState::Ready(placement) => ModelState::Ready(placement.clone()),
            SlotState::Failed(error) => ModelState::Failed(Arc::clone(error)),
        };
        ModelView { record: Arc::clone(&slot.record), state, backend: self.backend }
    }

    /// No code panics while it holds the lock, so a poisoned map is still whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ModelId, Slot>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_artifact(digest: &str, bytes: &[u8], backend: Backend) -> Result<BuildNetwork> {
    let artifact = Artifact::from_bytes(digest, bytes)?;
    Ok(Box::new(move |device| Ok(Box::new(QuantizedModel::load(&artifact, device, backend)?))))
}

fn not_found(id: &ModelId) -> Error {
    Error::NotFound { kind: "model", name: id.to_string() }
}

/// Runs file work on the blocking pool.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal(format!("blocking task: {error}")))?
}

#[cfg(test)]
mod tests;
