//! Classification of single images: decode, queue, rank.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;
use tracing::Span;

use crate::artifact::store::ModelRecord;
use crate::data::{DecodeLimits, decode, preprocess};
use crate::engine::batcher::{Admission, Answer, ClientLimit, Entry, Payload, Permit, Priority};
use crate::engine::device::panic_text;
use crate::engine::evaluator::top_k;
use crate::engine::names::ModelId;
use crate::engine::registry::{ModelRegistry, Placement};
use crate::engine::response_cache::{Key, ResponseCache};
use crate::error::{Error, Result};
use crate::model::ModelSpec;
use crate::telemetry::metrics::{Classification, ModelLabels};

use entry::{Entered, Seat};

mod entry;

/// Images to classify.
#[derive(Debug)]
pub struct ClassifyCall {
    /// Who asks: what the bound of one client is counted by.
    pub client: Arc<str>,
    /// The model, by its id or an alias.
    pub model: ModelId,
    /// The images, at least one.
    pub images: Vec<ImageInput>,
    /// What the request calls an image, by its number: the field of its errors.
    pub field: fn(usize) -> String,
    /// Who goes first.
    pub priority: Priority,
    /// When the caller gives up.
    pub deadline: Option<Instant>,
}

/// An image as it comes in.
#[derive(Clone, Debug)]
pub enum ImageInput {
    /// A JPEG, PNG or WebP file.
    Encoded(Bytes),
    /// Normalised pixels [3, size, size].
    Pixels(Vec<f32>),
}

impl ImageInput {
    fn bytes(&self) -> usize {
        match self {
            Self::Encoded(content) => content.len(),
            Self::Pixels(values) => size_of_val(values.as_slice()),
        }
    }
}

/// What became of a [`ClassifyCall`].
#[derive(Debug)]
pub struct ClassifyReply {
    /// Logits or an error per image, in order.
    pub items: Vec<Result<Vec<f32>>>,
    /// Per image, whether its logits were known from an earlier call.
    pub cached: Vec<bool>,
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
    /// The model that answered.
    pub model: Arc<ModelRecord>,
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
    clients: ClientLimit,
    cache: ResponseCache,
    decoders: ThreadPool,
    limits: DecodeLimits,
}

/// What it takes to make a [`Classifier`].
#[derive(Debug)]
pub struct ClassifierParts {
    /// Where models are.
    pub registry: Arc<ModelRegistry>,
    /// Who comes in.
    pub admission: Admission,
    /// How much of it one client may have.
    pub clients: ClientLimit,
    /// What is known already.
    pub cache: ResponseCache,
    /// Threads that decode images.
    pub decode_threads: usize,
    /// What is accepted as an image.
    pub limits: DecodeLimits,
}

/// What the images of a call have in common.
#[derive(Debug)]
struct Common {
    record: Arc<ModelRecord>,
    placement: Placement,
    field: fn(usize) -> String,
    priority: Priority,
    deadline: Option<Instant>,
}

/// The answer for one image.
enum Pending {
    Known(Vec<f32>),
    Coming(Waiting, Option<Key>),
}

impl Classifier {
    /// A classifier that decodes images on threads of its own.
    ///
    /// # Errors
    /// `Io` when the operating system has no threads left.
    pub fn new(parts: ClassifierParts) -> Result<Self> {
        let ClassifierParts { registry, admission, clients, cache, decode_threads, limits } = parts;
        let decoders = ThreadPoolBuilder::new()
            .num_threads(decode_threads)
            .thread_name(|number| format!("decode-{number}"))
            .build()
            .map_err(|error| Error::io("decoder threads", std::io::Error::other(error)))?;
        Ok(Self { registry, admission, clients, cache, decoders, limits })
    }

    /// What is let in, and how much of it is there.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Answers that are known already.
    pub fn cache(&self) -> &ResponseCache {
        &self.cache
    }

    /// Classifies; each image succeeds or fails by itself. Dropping the future gives up what has
    /// not started.
    ///
    /// # Errors
    /// `InvalidArgument` for too many images; `NotFound` for the model; `Overloaded`;
    /// `QuotaExceeded`; `DeadlineTooShort`; whatever the model's load reports.
    pub async fn classify(&self, call: ClassifyCall) -> Result<ClassifyReply> {
        let mut noted = Classification::start(call.images.len(), call.deadline);
        match self.answer(call, &mut noted).await {
            Ok(reply) => {
                noted.end();
                Ok(reply)
            }
            Err(error) => {
                noted.refused(&error);
                Err(error)
            }
        }
    }

    async fn answer(
        &self,
        call: ClassifyCall,
        noted: &mut Classification,
    ) -> Result<ClassifyReply> {
        let started = Instant::now();
        let ClassifyCall { client, model, images, field, priority, deadline } = call;
        let sizes: Vec<usize> = images.iter().map(ImageInput::bytes).collect();
        self.admission.check(&sizes)?;
        let id = self.registry.answering(&model).await?;
        noted.by(ModelLabels::of(id.as_str(), ""));
        let note = self.registry.statistics(&id).call(started);
        let Entered { record, placement, seats } = self.enter(&client, &model, &images).await?;
        noted.by(ModelLabels::of(&record.id, &record.digest));
        let mut reply = ClassifyReply::empty(Arc::clone(&record));
        let waiting = match placement {
            Some(placement) => {
                let common = Common { record, placement, field, priority, deadline };
                self.start_all(images, seats, Arc::new(common))?
            }
            None => seats.into_iter().filter_map(Seat::known).map(Pending::Known).collect(),
        };
        for image in waiting {
            self.receive(image, &mut reply, noted).await;
        }
        reply.total = started.elapsed();
        note.answered(&reply);
        Ok(reply)
    }

    /// Sends every image that is not known on its way.
    fn start_all(
        &self,
        images: Vec<ImageInput>,
        seats: Vec<Seat>,
        call: Arc<Common>,
    ) -> Result<Vec<Pending>> {
        if let Some(deadline) = call.deadline {
            let unknown = seats.iter().filter(|seat| matches!(seat, Seat::Taken(..))).count();
            let needed = call.placement.meter.pace.for_images(unknown);
            if deadline.saturating_duration_since(Instant::now()) < needed {
                return Err(Error::DeadlineTooShort { needed });
            }
        }
        let start = |(index, (image, seat))| match seat {
            Seat::Known(logits) => Pending::Known(logits),
            Seat::Taken(permit, key) => {
                Pending::Coming(self.start(image, index, permit, Arc::clone(&call)), key)
            }
        };
        Ok(images.into_iter().zip(seats).enumerate().map(start).collect())
    }

    /// Waits for one image and adds it to the reply.
    async fn receive(&self, image: Pending, reply: &mut ClassifyReply, noted: &mut Classification) {
        let (answer, key) = match image {
            Pending::Known(logits) => {
                reply.items.push(Ok(logits));
                reply.cached.push(true);
                noted.recalled();
                return;
            }
            Pending::Coming(mut waiting, key) => ((&mut waiting.answer).await, key),
        };
        let answer = answer.unwrap_or_else(|_| Err(Error::internal("an image was lost")));
        match &answer {
            Ok(answer) => noted.answered(answer.decode, answer.queue),
            Err(error) => noted.failed(error),
        }
        if let (Ok(answer), Some(key)) = (&answer, key) {
            self.cache.keep(key, &answer.logits);
        }
        let item = answer.map(|answer| reply.note(answer));
        reply.items.push(item);
        reply.cached.push(false);
    }

    /// Decodes and preprocesses an image on the pool of decoders, which queue it for the device.
    fn start(&self, image: ImageInput, index: usize, permit: Permit, call: Arc<Common>) -> Waiting {
        let (reply, answer) = oneshot::channel();
        let payload = Payload::new(permit);
        let waiting = Waiting { answer, payload: payload.clone() };
        let limits = self.limits.clone();
        let span = Span::current();
        self.decoders.spawn(move || {
            let _entered = span.enter();
            if reply.is_closed() {
                return;
            }
            let started = Instant::now();
            let pixels = if call.deadline.is_some_and(|deadline| deadline <= started) {
                Err(Error::Deadline)
            } else {
                pixels_of(image, &(call.field)(index), &call.record.model, &limits)
            };
            match pixels {
                Ok(pixels) => payload.fill(pixels),
                Err(error) => {
                    let _ = reply.send(Err(error)); // the caller may have left
                    return;
                }
            }
            let Common { placement, priority, deadline, .. } = &*call;
            let queued = Instant::now();
            let entry = Entry {
                model: placement.key,
                priority: *priority,
                decode: queued.duration_since(started),
                queued,
                deadline: *deadline,
                span: span.clone(),
                payload,
                reply,
            };
            if let Err(error) = placement.device.classify(entry) {
                // The entry is gone, and its caller told by that.
                tracing::error!(%error, "an image could not be queued");
            }
        });
        waiting
    }
}

/// What a model sees of an image.
fn pixels_of(
    image: ImageInput,
    field: &str,
    spec: &ModelSpec,
    limits: &DecodeLimits,
) -> Result<Vec<f32>> {
    match image {
        ImageInput::Pixels(values) => {
            let side = usize::try_from(spec.preprocessing.image_size).unwrap_or(0);
            if values.len() == 3 * side * side {
                return Ok(values);
            }
            let reason = format!("{} values, the model takes 3 x {side} x {side}", values.len());
            Err(Error::invalid(field, reason))
        }
        ImageInput::Encoded(content) => catch_unwind(AssertUnwindSafe(|| {
            preprocess(&decode(&content, limits, field)?, &spec.preprocessing)
        }))
        .unwrap_or_else(|panic| {
            tracing::error!(panic = panic_text(panic.as_ref()), "an image decoder panicked");
            Err(Error::invalid(field, "the image cannot be decoded"))
        }),
    }
}

/// The device's answer for one image; dropped, it gives up the image's place.
struct Waiting {
    answer: oneshot::Receiver<Result<Answer>>,
    payload: Payload,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.payload.release();
    }
}

impl ClassifyReply {
    /// The most probable classes of one image's logits.
    pub fn rank(&self, logits: &[f32], count: usize) -> Vec<RankedClass> {
        rank(logits, count, &self.model.model)
    }

    fn empty(model: Arc<ModelRecord>) -> Self {
        Self {
            items: Vec::new(),
            cached: Vec::new(),
            queue: Duration::ZERO,
            decode: Duration::ZERO,
            compute: Duration::ZERO,
            total: Duration::ZERO,
            batch_size: 0,
            model,
        }
    }

    /// Takes note of an image's times; its logits.
    fn note(&mut self, answer: Answer) -> Vec<f32> {
        let Answer { logits, decode, queue, compute, batch_size } = answer;
        self.decode = self.decode.max(decode);
        self.queue = self.queue.max(queue);
        self.compute = self.compute.max(compute);
        self.batch_size = self.batch_size.max(batch_size);
        logits
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
pub fn softmax(logits: &[f32]) -> Vec<f32> {
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
