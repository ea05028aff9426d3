//! Classification of single images: decode, queue, rank.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::data::{DecodeLimits, decode, preprocess};
use crate::engine::batcher::{Admission, Answer, Entry};
use crate::engine::device::panic_text;
use crate::engine::evaluator::top_k;
use crate::engine::names::ModelId;
use crate::engine::registry::{ModelRegistry, Placement};
use crate::error::{Error, Result};
use crate::model::ModelSpec;

/// Images to classify.
#[derive(Debug)]
pub struct ClassifyCall {
    /// The model, by its id or an alias.
    pub model: ModelId,
    /// Encoded images, at least one.
    pub images: Vec<Bytes>,
    /// Classes to return per image, at least one.
    pub top_k: usize,
}

/// What became of a [`ClassifyCall`].
#[derive(Debug)]
pub struct ClassifyReply {
    /// One per image, in order.
    pub items: Vec<Result<Vec<RankedClass>>>,
    /// Longest wait for the device.
    pub queue: Duration,
    /// Longest decoding and resizing.
    pub decode: Duration,
    /// Longest forward pass.
    pub compute: Duration,
    /// From the call to its answer.
    pub total: Duration,
    /// Largest batch that held one of the images.
    pub batch_size: usize,
    /// Digest of the artifact that answered.
    pub model_version: String,
    /// Id of the model that answered.
    pub model: String,
}

/// A class and its score.
#[derive(Clone, Debug, PartialEq)]
pub struct RankedClass {
    /// Class index.
    pub index: usize,
    /// Class name.
    pub label: String,
    /// Softmax probability.
    pub probability: f32,
    /// Raw model output.
    pub logit: f32,
}

/// Takes images to the devices and their logits back.
#[derive(Debug)]
pub struct Classifier {
    registry: Arc<ModelRegistry>,
    admission: Admission,
    limits: DecodeLimits,
}

impl Classifier {
    /// A classifier with room for `queue_images` images at once.
    pub fn new(registry: Arc<ModelRegistry>, queue_images: usize, limits: DecodeLimits) -> Self {
        Self { registry, admission: Admission::new(queue_images), limits }
    }

    /// Classifies; each image succeeds or fails by itself. Dropping the future gives up what has
    /// not started.
    ///
    /// # Errors
    /// `InvalidArgument` for too many images; `NotFound` for the model; `Overloaded`; whatever the
    /// model's load reports.
    pub async fn classify(&self, call: ClassifyCall) -> Result<ClassifyReply> {
        let started = Instant::now();
        let ClassifyCall { model, images, top_k } = call;
        let permits = self.admission.admit(images.len())?;
        let (record, placement) = self.registry.ensure_loaded(&model).await?;
        let spec = Arc::new(record.model.clone());
        let mut decoding = Vec::with_capacity(images.len());
        for (index, (content, permit)) in images.into_iter().zip(permits).enumerate() {
            let field = format!("images[{index}].content");
            let spec = Arc::clone(&spec);
            decoding.push((self.start_decode(content, field, spec), permit));
        }
        let mut waiting = Vec::with_capacity(decoding.len());
        for (pixels, permit) in decoding {
            let decoded = pixels.await.map_err(|_| Error::internal("a decoder is gone"));
            waiting.push(
                decoded
                    .and_then(|result| result)
                    .and_then(|(pixels, time)| Ok((queue(&placement, pixels, permit)?, time))),
            );
        }
        let mut reply = ClassifyReply {
            items: Vec::with_capacity(waiting.len()),
            queue: Duration::ZERO,
            decode: Duration::ZERO,
            compute: Duration::ZERO,
            total: Duration::ZERO,
            batch_size: 0,
            model_version: record.digest.clone(),
            model: record.id.clone(),
        };
        for image in waiting {
            let item = reply.receive(image).await;
            reply.items.push(item.map(|logits| rank(&logits, top_k, &record.model)));
        }
        reply.total = started.elapsed();
        Ok(reply)
    }

    /// Decodes and preprocesses on the pool of CPU threads.
    fn start_decode(&self, content: Bytes, field: String, spec: Arc<ModelSpec>) -> Decoding {
        let (sender, receiver) = oneshot::channel();
        let limits = self.limits.clone();
        rayon::spawn(move || {
            if sender.is_closed() {
                return;
            }
            let started = Instant::now();
            let decoded = catch_unwind(AssertUnwindSafe(|| {
                preprocess(&decode(&content, &limits, &field)?, &spec.preprocessing)
            }))
            .unwrap_or_else(|panic| {
                tracing::error!(panic = panic_text(panic.as_ref()), "an image decoder panicked");
                Err(Error::invalid(field.as_str(), "the image cannot be decoded"))
            });
            let _ = sender.send(decoded.map(|pixels| (pixels, started.elapsed()))); // caller left
        });
        receiver
    }
}

/// Pixels of one image and the time they took.
type Decoding = oneshot::Receiver<Result<(Vec<f32>, Duration)>>;

/// The answer for one image and the time of its decoding.
type Waiting = (oneshot::Receiver<Result<Answer>>, Duration);

fn queue(
    placement: &Placement,
    pixels: Vec<f32>,
    permit: OwnedSemaphorePermit,
) -> Result<oneshot::Receiver<Result<Answer>>> {
    let (reply, answer) = oneshot::channel();
    let entry = Entry { model: placement.key, pixels, queued: Instant::now(), permit, reply };
    placement.device.classify(entry)?;
    Ok(answer)
}

impl ClassifyReply {
    /// Waits for one image; notes its times.
    async fn receive(&mut self, image: Result<Waiting>) -> Result<Vec<f32>> {
        let (answer, decode) = image?;
        self.decode = self.decode.max(decode);
        let answer = answer.await.map_err(|_| Error::internal("the device thread is gone"))??;
        let Answer { logits, queue, compute, batch_size } = answer;
        self.queue = self.queue.max(queue);
        self.compute = self.compute.max(compute);
        self.batch_size = self.batch_size.max(batch_size);
        Ok(logits)
    }
}

fn rank(logits: &[f32], count: usize, spec: &ModelSpec) -> Vec<RankedClass> {
    let probabilities = softmax(logits);
    top_k(logits, count)
        .into_iter()
        .map(|index| RankedClass {
            index,
            label: spec.label(index),
            probability: probabilities[index],
            logit: logits[index],
        })
        .collect()
}

/// exp(x − max) / Σ exp(x − max), in float64.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = logits.iter().map(|x| f64::from(x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|x| (x / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::store::example_record;

    #[test]
    fn ranks_by_logit_with_names_and_probabilities() {
        let spec = example_record("a", "d").model;
        let ranked = rank(&[1.0, 1.0 + 3f32.ln()], 5, &spec);
        let seen: Vec<_> = ranked.iter().map(|r| (r.index, r.label.as_str())).collect();
        assert_eq!(seen, [(1, "yes"), (0, "no")]);
        assert!((ranked[0].probability - 0.75).abs() < 1e-6);
        assert!((ranked[1].probability - 0.25).abs() < 1e-6);
        assert_eq!(rank(&[1.0, 2.0], 1, &spec).len(), 1);
    }

    #[test]
    fn softmax_survives_large_logits() {
        assert_eq!(softmax(&[1e30, 1e30]), [0.5, 0.5]);
    }
}
