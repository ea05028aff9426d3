//! What happens to a call before any of its images is decoded: the cache, admission, the model.

use std::sync::Arc;

use super::{Classifier, ImageInput};
use crate::artifact::store::ModelRecord;
use crate::engine::batcher::Permit;
use crate::engine::names::ModelId;
use crate::engine::registry::Placement;
use crate::engine::response_cache::Key;
use crate::error::Result;

/// A call that was let in.
pub(super) struct Entered {
    pub(super) record: Arc<ModelRecord>,
    /// Where it is computed; `None` when everything is known.
    pub(super) placement: Option<Placement>,
    /// One per image.
    pub(super) seats: Vec<Seat>,
}

/// How an image is answered.
pub(super) enum Seat {
    /// With these logits.
    Known(Vec<f32>),
    /// By the device; the cache wants the logits under the key.
    Taken(Permit, Option<Key>),
}

/// What the cache says of an image.
enum Recall {
    Known(Vec<f32>),
    Unknown(Option<Key>),
}

impl Classifier {
    /// Recalls what is known, lets the other images in, and finds the model.
    pub(super) async fn enter(
        &self,
        client: &Arc<str>,
        model: &ModelId,
        images: &[ImageInput],
    ) -> Result<Entered> {
        loop {
            let id = self.registry.answering(model).await?;
            let (expected, recalled) = self.recall(&id, images).await?;
            let unknown = recalled.iter().zip(images).filter(|(recall, _)| recall.is_unknown());
            let sizes: Vec<usize> = unknown.map(|(_, image)| image.bytes()).collect();
            if let (Some(record), []) = (&expected, sizes.as_slice()) {
                let seats = recalled.into_iter().filter_map(|recall| recall.seat(None)).collect();
                return Ok(Entered { record: Arc::clone(record), placement: None, seats });
            }
            let share = self.clients.admit(client, sizes.len())?.map(Arc::new);
            let permits = self.admission.admit(id.as_str(), &sizes)?.into_iter();
            let mut permits = permits.map(|permit| permit.within(share.clone()));
            let (record, placement) = self.registry.ensure_loaded(model).await?;
            // If the alias has moved since, what was recalled is another model's.
            if expected.is_none_or(|expected| expected.digest == record.digest) {
                let seat = |recall: Recall| {
                    let permit = recall.is_unknown().then(|| permits.next()).flatten();
                    recall.seat(permit)
                };
                let seats = recalled.into_iter().filter_map(seat).collect();
                return Ok(Entered { record, placement: Some(placement), seats });
            }
        }
    }

    /// What the cache has for each image, and the model that this is the answer of; no model while
    /// the cache is off.
    async fn recall(
        &self,
        id: &ModelId,
        images: &[ImageInput],
    ) -> Result<(Option<Arc<ModelRecord>>, Vec<Recall>)> {
        if !self.cache.is_on() {
            return Ok((None, images.iter().map(|_| Recall::Unknown(None)).collect()));
        }
        let view = self.registry.get(id)?;
        let mut recalled = Vec::with_capacity(images.len());
        for image in images {
            recalled.push(match image {
                ImageInput::Encoded(content) => {
                    let key = Key::of(&view.record, view.backend, content).await;
                    self.cache.find(&key).map_or(Recall::Unknown(Some(key)), Recall::Known)
                }
                // Their sender has done the work that a hit would save.
                ImageInput::Pixels(_) => Recall::Unknown(None),
            });
        }
        Ok((Some(view.record), recalled))
    }
}

impl Recall {
    fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown(_))
    }

    /// What becomes of it; nothing for an image that needs a permit and has none.
    fn seat(self, permit: Option<Permit>) -> Option<Seat> {
        match self {
            Self::Known(logits) => Some(Seat::Known(logits)),
            Self::Unknown(key) => permit.map(|permit| Seat::Taken(permit, key)),
        }
    }
}

impl Seat {
    /// The logits of a known one.
    pub(super) fn known(self) -> Option<Vec<f32>> {
        match self {
            Self::Known(logits) => Some(logits),
            Self::Taken(..) => None,
        }
    }
}
