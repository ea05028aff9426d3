//! The models of this server by id: what is stored, what is loaded where, and the way between.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use crate::artifact::store::{ArtifactStore, ModelRecord, RecordOrigin, put_named};
use crate::artifact::{Artifact, Header};
use crate::engine::QuantizedModel;
use crate::engine::catalog::{CatalogContent, ModelCatalog};
use crate::engine::device::{BuildNetwork, DeviceHandle, LoadKey};
use crate::engine::garbage::Garbage;
use crate::engine::jobs::Lease;
use crate::engine::names::ModelId;
use crate::error::{Error, Result};
use crate::exec::Backend;

mod loading;

/// Turns stored bytes into what builds the model on a device thread. Blocking, on the blocking pool.
type ReadArtifact = fn(&str, &[u8], Backend) -> Result<BuildNetwork>;

/// All stored models, and which of them are loaded.
#[derive(Debug)]
pub struct ModelRegistry {
    store: Arc<dyn ArtifactStore>,
    catalog: ModelCatalog,
    garbage: Garbage,
    devices: Vec<DeviceHandle>,
    backend: Backend,
    read: ReadArtifact,
    names: Mutex<Names>,
    next_key: AtomicU64,
    /// The catalogue's version that the names are of; whoever holds it brings them up to date.
    seen: tokio::sync::Mutex<Option<i64>>,
}

#[derive(Debug, Default)]
struct Names {
    models: BTreeMap<ModelId, Slot>,
    aliases: BTreeMap<ModelId, ModelId>,
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
    /// Its other names, in order.
    pub aliases: Vec<String>,
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

/// What it takes to open a [`ModelRegistry`].
#[derive(Debug)]
pub struct RegistryParts {
    /// Where artifacts live.
    pub store: Arc<dyn ArtifactStore>,
    /// Where names live.
    pub catalog: ModelCatalog,
    /// Removes artifacts that are not needed any more.
    pub garbage: Garbage,
    /// Where models run; at least one.
    pub devices: Vec<DeviceHandle>,
    /// The arithmetic of all models.
    pub backend: Backend,
}

impl ModelRegistry {
    /// Reads the catalogue; everything in it can be served at once.
    ///
    /// # Errors
    /// `Unavailable` when the catalogue cannot be read.
    pub async fn open(parts: RegistryParts) -> Result<Arc<Self>> {
        Self::with_reader(parts, read_artifact).await
    }

    async fn with_reader(parts: RegistryParts, read: ReadArtifact) -> Result<Arc<Self>> {
        let RegistryParts { store, catalog, garbage, devices, backend } = parts;
        let registry = Self {
            store,
            catalog,
            garbage,
            devices,
            backend,
            read,
            names: Mutex::default(),
            next_key: AtomicU64::new(1),
            seen: tokio::sync::Mutex::new(None),
        };
        registry.refresh().await?;
        Ok(Arc::new(registry))
    }

    /// Takes over what changed in the catalogue, here or elsewhere: new models can be served, models
    /// that were deleted are unloaded. Cheap when nothing changed.
    ///
    /// # Errors
    /// `Unavailable` when the catalogue cannot be read: then everything stays as it was.
    pub async fn refresh(&self) -> Result<()> {
        let mut seen = self.seen.lock().await;
        // Asked before the content is read: what changes in between is read again next time.
        let version = self.catalog.version().await?;
        if *seen == Some(version) {
            return Ok(());
        }
        let CatalogContent { models, aliases } = self.catalog.read().await?;
        for placement in self.take_over(models, aliases) {
            if let Err(error) = placement.device.unload(placement.key).await {
                tracing::error!(%error, "a deleted model could not be unloaded");
            }
        }
        *seen = Some(version);
        Ok(())
    }

    /// What is to be unloaded.
    fn take_over(
        &self,
        records: Vec<ModelRecord>,
        aliases: Vec<(String, String)>,
    ) -> Vec<Placement> {
        let id_of = |text: &str| {
            ModelId::parse(text, "id")
                .inspect_err(|error| tracing::error!(%error, "a name is left out"))
                .ok()
        };
        let mut names = self.lock();
        let mut before = std::mem::take(&mut names.models);
        for record in records {
            let Some(id) = id_of(&record.id) else { continue };
            let slot = match before.remove(&id) {
                Some(slot) if *slot.record == record => slot,
                other => {
                    before.extend(other.map(|slot| (id.clone(), slot)));
                    Slot { record: Arc::new(record), state: SlotState::Stored }
                }
            };
            names.models.insert(id, slot);
        }
        names.aliases = aliases
            .iter()
            .filter_map(|(alias, model)| Some((id_of(alias)?, id_of(model)?)))
            .collect();
        let gone = before.into_values().filter_map(|slot| match slot.state {
            SlotState::Ready(placement) => Some(placement),
            // A load in progress finds its slot gone.
            SlotState::Stored | SlotState::Loading(..) | SlotState::Failed(_) => None,
        });
        gone.collect()
    }

    /// At most `count` models whose id follows `after`, by id.
    pub fn list(&self, after: Option<&str>, count: usize) -> Vec<ModelView> {
        let Names { models, aliases } = &*self.lock();
        let follows = |id: &ModelId| after.is_none_or(|after| id.as_str() > after);
        let selected = models.iter().filter(|(id, _)| follows(id)).take(count);
        selected.map(|(_, slot)| self.view(slot, aliases)).collect()
    }

    /// One model, by its id or an alias.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, name: &ModelId) -> Result<ModelView> {
        let names = self.lock();
        let id = names.aliases.get(name).unwrap_or(name);
        names
            .models
            .get(id)
            .map(|slot| self.view(slot, &names.aliases))
            .ok_or_else(|| not_found(name))
    }

    /// Points an alias to a model; calls that come from now on go there.
    ///
    /// # Errors
    /// As [`ModelCatalog::set_alias`].
    pub async fn set_alias(&self, alias: &ModelId, model: &ModelId) -> Result<()> {
        self.catalog.set_alias(alias, model).await?;
        self.refresh().await
    }

    /// Forgets an alias.
    ///
    /// # Errors
    /// As [`ModelCatalog::remove_alias`].
    pub async fn remove_alias(&self, alias: &ModelId) -> Result<()> {
        self.catalog.remove_alias(alias).await?;
        self.refresh().await
    }

    /// A stored model with the state it is in by now; as merely stored when it was deleted since.
    pub fn view_of(&self, record: &Arc<ModelRecord>) -> ModelView {
        let names = self.lock();
        let current = names.models.values().find(|slot| slot.record == *record);
        current.map(|slot| self.view(slot, &names.aliases)).unwrap_or_else(|| ModelView {
            record: Arc::clone(record),
            state: ModelState::Stored,
            backend: self.backend,
            aliases: Vec::new(),
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

    /// Stores an artifact, with this header, and gives it a name, on behalf of the job that made it.
    /// May be tried again after any error.
    ///
    /// # Errors
    /// As [`ModelCatalog::publish`] and [`ArtifactStore::put`]; then nothing is listed.
    pub async fn publish(
        &self,
        origin: RecordOrigin,
        header: Header,
        bytes: Bytes,
        lease: &Lease,
    ) -> Result<ModelView> {
        let id = ModelId::parse(&origin.id, "model_id")?;
        let size = bytes.len() as u64;
        let name = async |digest: String| {
            let record = ModelRecord::new(origin, header, (digest.clone(), size));
            let published = self.catalog.publish(&record, lease).await;
            if let Err(error) = &published
                && !matches!(error, Error::Unavailable { .. })
            {
                self.garbage.forget_unused(&[digest]).await;
            }
            published
        };
        put_named(&*self.store, bytes, name).await?;
        self.refresh().await?;
        self.get(&id)
    }

    /// Removes a model, and its artifact unless another model has the same.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while an alias names it; `Io` or `Unavailable` when the
    /// catalogue refuses, and then the model is still listed.
    pub async fn delete(&self, id: &ModelId) -> Result<()> {
        self.refresh().await?;
        if !self.lock().models.contains_key(id) {
            return Err(not_found(id));
        }
        self.catalog.remove(id).await?;
        match self.unload(id).await {
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        self.refresh().await?;
        self.garbage.collect().await;
        Ok(())
    }

    fn view(&self, slot: &Slot, names: &BTreeMap<ModelId, ModelId>) -> ModelView {
        let state = match &slot.state {
            SlotState::Stored => ModelState::Stored,
            SlotState::Loading(..) => ModelState::Loading,
            SlotState::Ready(placement) => ModelState::Ready(placement.clone()),
            SlotState::Failed(error) => ModelState::Failed(Arc::clone(error)),
        };
        let of_model = names.iter().filter(|(_, model)| model.as_str() == slot.record.id);
        let aliases = of_model.map(|(alias, _)| alias.to_string()).collect();
        ModelView { record: Arc::clone(&slot.record), state, backend: self.backend, aliases }
    }

    /// No code panics while it holds the lock, so a poisoned map is still whole.
    fn lock(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
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
