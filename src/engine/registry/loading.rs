//! The way of a model to a device, and back.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::{ModelRegistry, ModelView, Names, Placement, Slot, SlotState, not_found};
use crate::artifact::store::ModelRecord;
use crate::engine::device::{DeviceHandle, LoadKey, memory_error};
use crate::engine::names::ModelId;
use crate::engine::statistics::Meter;
use crate::error::{Error, Result};
use crate::telemetry::metrics;

/// What is to be done before a model is unloaded.
enum Unload {
    After(watch::Receiver<()>),
    From(Box<(Placement, ModelView)>),
}

impl ModelRegistry {
    /// The model that answers under a name now.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` when the name is new here and the catalogue cannot be read.
    pub async fn answering(self: &Arc<Self>, name: &ModelId) -> Result<ModelId> {
        let find = || {
            let names = self.lock();
            let id = names.answering(name);
            names.models.contains_key(id).then(|| id.clone())
        };
        match find() {
            Some(id) => Ok(id),
            None => {
                self.refresh().await?; // it may be new elsewhere
                find().ok_or_else(|| not_found(name))
            }
        }
    }

    /// Where a model, or the model of an alias, answers, and what it is; loads it first if need be.
    /// Callers that ask at the same time share one load, which goes on when they leave.
    ///
    /// # Errors
    /// `NotFound`; whatever the load reports.
    pub async fn ensure_loaded(
        self: &Arc<Self>,
        name: &ModelId,
    ) -> Result<(Arc<ModelRecord>, Placement)> {
        self.answering(name).await?;
        let mut waited = false;
        loop {
            let mut done = {
                let mut names = self.lock();
                let id = names.answering(name).clone();
                let slot = names.models.get_mut(&id).ok_or_else(|| not_found(name))?;
                slot.last_used = Instant::now();
                match &slot.state {
                    SlotState::Ready(placement) => {
                        return Ok((Arc::clone(&slot.record), placement.clone()));
                    }
                    SlotState::Failed(error) if waited => return Err(error.replica()),
                    SlotState::Loading(_, done) => done.clone(),
                    SlotState::Stored | SlotState::Failed(_) => self.start_load(&id, slot),
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
    /// `NotFound`; `FailedPrecondition` for an alias.
    pub async fn unload(&self, id: &ModelId) -> Result<ModelView> {
        loop {
            let step = {
                let names = &mut *self.lock();
                names.check(id)?;
                let Names { models, aliases, held: _ } = names;
                let slot = models.get_mut(id).ok_or_else(|| not_found(id))?;
                match std::mem::replace(&mut slot.state, SlotState::Stored) {
                    SlotState::Loading(key, done) => {
                        slot.state = SlotState::Loading(key, done.clone());
                        Unload::After(done)
                    }
                    SlotState::Ready(placement) => {
                        Unload::From(Box::new((placement, self.view(slot, aliases))))
                    }
                    SlotState::Stored | SlotState::Failed(_) => return Ok(self.view(slot, aliases)),
                }
            };
            match step {
                // An error means that the load is over, too: its sender is gone.
                Unload::After(mut done) => {
                    let _ = done.changed().await;
                }
                Unload::From(loaded) => {
                    let (placement, view) = *loaded;
                    placement.device.unload(placement.key).await?;
                    return Ok(view);
                }
            }
        }
    }

    /// Starts the load of a slot, which is locked by the caller.
    pub(super) fn start_load(
        self: &Arc<Self>,
        id: &ModelId,
        slot: &mut Slot,
    ) -> watch::Receiver<()> {
        let (over, done) = watch::channel(());
        let key = self.new_key();
        slot.state = SlotState::Loading(key, done.clone());
        let (registry, id, record) = (Arc::clone(self), id.clone(), Arc::clone(&slot.record));
        let expected = slot.measured.unwrap_or(record.source_bytes);
        let meter = Arc::new(Meter::new(Arc::clone(&slot.statistics)));
        tokio::spawn(async move {
            let started = Instant::now();
            metrics::model_loading(&record.id, &record.digest);
            let loaded = registry.load((key, meter), &record, expected).await;
            metrics::model_loaded(&loaded, started.elapsed());
            registry.finish_load(&id, key, loaded).await;
            drop(over);
        });
        done
    }

    async fn load(
        &self,
        (key, meter): (LoadKey, Arc<Meter>),
        record: &ModelRecord,
        expected: u64,
    ) -> Result<Placement> {
        let started = std::time::Instant::now();
        let bytes = self.store.get(&record.digest).await?;
        let (read, digest, backend) = (self.read, record.digest.clone(), self.backend);
        let build = self.loader.run(move || read(&digest, &bytes, backend)).await?;
        let _alone = self.arriving.lock().await;
        let device = self.emptiest_device()?.clone();
        let budget = self.memory_budget.unwrap_or(u64::MAX);
        // What is expected may be too much: what counts is measured behind the load.
        self.make_room(&device, expected.min(budget)).await?;
        let target = device.device();
        let built = self.loader.run(move || build(target)).await.map_err(memory_error)?;
        let loaded = device.load(key, built, Arc::clone(&meter)).await;
        let residence = loaded.map_err(memory_error)?;
        if let Err(error) = self.make_room(&device, 0).await {
            device.unload(key).await?;
            return Err(error);
        }
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(model = record.id, device = device.name(), seconds, "model loaded");
        Ok(Placement { device, key, residence, meter, users: Arc::default() })
    }

    /// Unloads models that nobody uses, those not used for longest first, until so many bytes are
    /// free.
    async fn make_room(&self, device: &DeviceHandle, bytes: u64) -> Result<()> {
        let Some(budget) = self.memory_budget else { return Ok(()) };
        while device.resident_bytes().saturating_add(bytes) > budget {
            let Some(placement) = self.take_idlest(device) else {
                let held = device.resident_bytes();
                let reason = format!(
                    "{} holds {held} of {budget} bytes, {bytes} more are needed, and all of it is \
                     in use",
                    device.name()
                );
                return Err(Error::DeviceMemory { reason });
            };
            device.unload(placement.key).await?;
        }
        Ok(())
    }

    fn take_idlest(&self, device: &DeviceHandle) -> Option<Placement> {
        let mut names = self.lock();
        let idle = names.models.values_mut().filter(|slot| match &slot.state {
            SlotState::Ready(placement) => {
                placement.device.name() == device.name() && !placement.is_in_use()
            }
            SlotState::Stored | SlotState::Loading(..) | SlotState::Failed(_) => false,
        });
        let slot = idle.min_by_key(|slot| slot.last_used)?;
        let model = &slot.record.id;
        tracing::info!(model, device = device.name(), "model unloaded to make room");
        match std::mem::replace(&mut slot.state, SlotState::Stored) {
            SlotState::Ready(placement) => Some(placement),
            SlotState::Stored | SlotState::Loading(..) | SlotState::Failed(_) => None,
        }
    }

    async fn finish_load(&self, id: &ModelId, key: LoadKey, loaded: Result<Placement>) {
        let orphan = {
            let mut names = self.lock();
            // Aliases that waited for it lead to it now, whatever became of it.
            let Names { aliases, held, .. } = &mut *names;
            held.retain(|alias, _| aliases.get(alias) != Some(id));
            let slot = names.models.get_mut(id).filter(
                |slot| matches!(&slot.state, SlotState::Loading(current, _) if *current == key),
            );
            match (slot, loaded) {
                (Some(slot), Ok(placement)) => {
                    slot.measured = Some(placement.residence.bytes);
                    slot.last_used = Instant::now();
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
}
