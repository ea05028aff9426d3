//! The models of this server by id: what is stored, what is loaded where, and the way between.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::watch;

use crate::artifact::store::{ArtifactStore, ModelRecord, RecordOrigin, put_named};
use crate::artifact::{Artifact, Header};
use crate::engine::QuantizedModel;
use crate::engine::catalog::{CatalogContent, ModelCatalog};
use crate::engine::device::{BuildNetwork, DeviceHandle, LoadKey, Residence};
use crate::engine::garbage::Garbage;
use crate::engine::jobs::Lease;
use crate::engine::loader::Loader;
use crate::engine::names::ModelId;
use crate::engine::statistics::{Meter, ModelStatistics};
use crate::error::{Error, Result};
use crate::exec::Backend;

mod loading;

/// Turns stored bytes into what builds the model on a device. Both are blocking, on the loader's thread.
type ReadArtifact = fn(&str, &[u8], Backend) -> Result<BuildNetwork>;

/// All stored models, and which of them are loaded.
#[derive(Debug)]
pub struct ModelRegistry {
    store: Arc<dyn ArtifactStore>,
    catalog: ModelCatalog,
    garbage: Garbage,
    devices: Vec<DeviceHandle>,
    backend: Backend,
    loader: Loader,
    read: ReadArtifact,
    names: Mutex<Names>,
    next_key: AtomicU64,
    /// Bytes of models that each device may hold.
    memory_budget: Option<u64>,
    /// One model at a time comes to a device: what is free is counted before and after.
    arriving: tokio::sync::Mutex<()>,
    /// The catalogue's version that the names are of; whoever holds it brings them up to date.
    seen: tokio::sync::Mutex<Option<i64>>,
}

#[derive(Debug, Default)]
struct Names {
    models: BTreeMap<ModelId, Slot>,
    aliases: BTreeMap<ModelId, ModelId>,
    /// Where aliases still lead that have moved to a model which is on its way to a device.
    held: BTreeMap<ModelId, ModelId>,
}

impl Names {
    /// The model that a name stands for.
    fn target<'a>(&'a self, name: &'a ModelId) -> &'a ModelId {
        self.aliases.get(name).unwrap_or(name)
    }

    /// The model that answers under a name now.
    fn answering<'a>(&'a self, name: &'a ModelId) -> &'a ModelId {
        let held = self.held.get(name).filter(|model| self.models.contains_key(model));
        held.unwrap_or_else(|| self.target(name))
    }

    /// Whether there is a model of this id.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for an alias.
    fn check(&self, id: &ModelId) -> Result<()> {
        match self.aliases.get(id) {
            _ if self.models.contains_key(id) => Ok(()),
            Some(model) => {
                let reason = format!("`{id}` is an alias of model `{model}`: name the model");
                Err(Error::FailedPrecondition { reason })
            }
            None => Err(not_found(id)),
        }
    }

    fn is_ready(&self, id: &ModelId) -> bool {
        self.models.get(id).is_some_and(|slot| matches!(slot.state, SlotState::Ready(_)))
    }
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
    /// What it is there.
    pub residence: Residence,
    /// How fast it answers.
    pub meter: Arc<Meter>,
    /// Held by everybody who is about to use it: a model in use is not unloaded to make room.
    users: Arc<()>,
}

impl Placement {
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.users) > 1
    }
}

#[derive(Debug)]
struct Slot {
    record: Arc<ModelRecord>,
    state: SlotState,
    last_used: Instant,
    /// Its size on a device, once it was there.
    measured: Option<u64>,
    statistics: Arc<ModelStatistics>,
}

impl Slot {
    fn new(record: Arc<ModelRecord>) -> Self {
        Self {
            record,
            state: SlotState::Stored,
            last_used: Instant::now(),
            measured: None,
            statistics: Arc::default(),
        }
    }
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
    /// Bytes of models that each device may hold; those not used for longest make room.
    pub memory_budget: Option<u64>,
}

impl ModelRegistry {
    /// Reads the catalogue; everything in it can be served at once.
    ///
    /// # Errors
    /// `Unavailable` when the catalogue cannot be read; `Io` without threads.
    pub async fn open(parts: RegistryParts) -> Result<Arc<Self>> {
        Self::with_reader(parts, read_artifact).await
    }

    async fn with_reader(parts: RegistryParts, read: ReadArtifact) -> Result<Arc<Self>> {
        let RegistryParts { store, catalog, garbage, devices, backend, memory_budget } = parts;
        let registry = Arc::new(Self {
            store,
            catalog,
            garbage,
            devices,
            backend,
            loader: Loader::start()?,
            read,
            names: Mutex::default(),
            next_key: AtomicU64::new(1),
            memory_budget,
            arriving: tokio::sync::Mutex::default(),
            seen: tokio::sync::Mutex::new(None),
        });
        registry.refresh().await?;
        Ok(registry)
    }

    /// The devices.
    pub fn devices(&self) -> &[DeviceHandle] {
        &self.devices
    }

    /// Takes over what changed in the catalogue, here or elsewhere: new models can be served, models
    /// that were deleted are unloaded. Cheap when nothing changed.
    ///
    /// # Errors
    /// `Unavailable` when the catalogue cannot be read: then everything stays as it was.
    pub async fn refresh(self: &Arc<Self>) -> Result<()> {
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
        self: &Arc<Self>,
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
                    Slot::new(Arc::new(record))
                }
            };
            names.models.insert(id, slot);
        }
        let aliases = aliases.iter().filter_map(|(a, model)| Some((id_of(a)?, id_of(model)?)));
        self.move_aliases(&mut names, aliases.collect());
        let gone = before.into_values().filter_map(|slot| match slot.state {
            SlotState::Ready(placement) => Some(placement),
            // A load in progress finds its slot gone.
            SlotState::Stored | SlotState::Loading(..) | SlotState::Failed(_) => None,
        });
        gone.collect()
    }

    /// Traffic moves when the new model can take it: until then it goes where it went.
    fn move_aliases(self: &Arc<Self>, names: &mut Names, aliases: BTreeMap<ModelId, ModelId>) {
        let mut held = BTreeMap::new();
        for (alias, model) in &aliases {
            let before = names.answering(alias).clone();
            if before != *model && names.is_ready(&before) && !names.is_ready(model) {
                held.insert(alias.clone(), before);
            }
        }
        names.aliases = aliases;
        let coming: Vec<ModelId> = held.keys().map(|alias| names.target(alias).clone()).collect();
        names.held = held;
        for model in coming {
            if let Some(slot) = names.models.get_mut(&model)
                && !matches!(slot.state, SlotState::Loading(..))
            {
                let _nobody_waits = self.start_load(&model, slot);
            }
        }
    }

    /// At most `count` models whose id follows `after`, by id.
    pub fn list(&self, after: Option<&str>, count: usize) -> Vec<ModelView> {
        let Names { models, aliases, held: _ } = &*self.lock();
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
        names
            .models
            .get(names.target(name))
            .map(|slot| self.view(slot, &names.aliases))
            .ok_or_else(|| not_found(name))
    }

    /// What a model, by its id, has done here; nothing if it is not known.
    pub fn statistics(&self, id: &ModelId) -> Arc<ModelStatistics> {
        let names = self.lock();
        names.models.get(id).map(|slot| Arc::clone(&slot.statistics)).unwrap_or_default()
    }

    /// Points an alias to a model; calls that come from now on go there. If the alias has been
    /// answering, the model is brought to a device first; other servers go on answering with the old
    /// one until they have the new one.
    ///
    /// # Errors
    /// As [`ModelCatalog::set_alias`] and [`ModelRegistry::ensure_loaded`].
    pub async fn set_alias(self: &Arc<Self>, alias: &ModelId, model: &ModelId) -> Result<()> {
        let is_answering = {
            let names = self.lock();
            names.aliases.contains_key(alias) && names.is_ready(names.answering(alias))
        };
        if is_answering {
            self.ensure_loaded(model).await?;
        }
        self.catalog.set_alias(alias, model).await?;
        self.refresh().await
    }

    /// Forgets an alias.
    ///
    /// # Errors
    /// As [`ModelCatalog::remove_alias`].
    pub async fn remove_alias(self: &Arc<Self>, alias: &ModelId) -> Result<()> {
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
        self: &Arc<Self>,
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
    /// `NotFound`; `FailedPrecondition` for an alias, and while one names it; `Io` or `Unavailable` when the
    /// catalogue refuses, and then the model is still listed.
    pub async fn delete(self: &Arc<Self>, id: &ModelId) -> Result<()> {
        self.refresh().await?;
        self.lock().check(id)?;
        self.catalog.remove(id).await?;
        match self.unload(id).await {
            // Somebody else was faster, or has taken the name for an alias.
            Ok(_) | Err(Error::NotFound { .. } | Error::FailedPrecondition { .. }) => {}
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
