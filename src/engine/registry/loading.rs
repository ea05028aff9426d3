//! The way of a model to a device, and back.

use std::sync::Arc;

use tokio::sync::watch;

use super::{ModelRegistry, ModelView, Names, Placement, Slot, SlotState, blocking, not_found};
use crate::artifact::store::ModelRecord;
use crate::engine::device::LoadKey;
use crate::engine::names::ModelId;
use crate::error::Result;

/// What is to be done before a model is unloaded.
enum Unload {
    After(watch::Receiver<()>),
    From(Placement, ModelView),
}

impl ModelRegistry {
    /// Where a model, or the model of an alias, answers, and what it is; loads it first if need be.
    /// Callers that ask at the same time share one load, which goes on when they leave.
    ///
    /// # Errors
    /// `NotFound`; whatever the load reports.
    pub async fn ensure_loaded(
        self: &Arc<Self>,
        name: &ModelId,
    ) -> Result<(Arc<ModelRecord>, Placement)> {
        if self.get(name).is_err() {
            self.refresh().await?; // it may be new elsewhere
        }
        let mut waited = false;
        loop {
            let mut done = {
                let Names { models, aliases } = &mut *self.lock();
                let id = aliases.get(name).unwrap_or(name);
                let slot = models.get_mut(id).ok_or_else(|| not_found(name))?;
                match &slot.state {
                    SlotState::Ready(placement) => {
                        return Ok((Arc::clone(&slot.record), placement.clone()));
                    }
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
                let Names { models, aliases } = &mut *self.lock();
                let slot = models.get_mut(id).ok_or_else(|| not_found(id))?;
                match std::mem::replace(&mut slot.state, SlotState::Stored) {
                    SlotState::Loading(key, done) => {
                        slot.state = SlotState::Loading(key, done.clone());
                        Unload::After(done)
                    }
                    SlotState::Ready(placement) => {
                        Unload::From(placement, self.view(slot, aliases))
                    }
                    SlotState::Stored | SlotState::Failed(_) => return Ok(self.view(slot, aliases)),
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
            let mut names = self.lock();
            let slot = names.models.get_mut(id).filter(
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
}
