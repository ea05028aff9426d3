//! One OS thread per device owns the models on it. Handles send commands and get a oneshot back.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tokio::sync::{mpsc, oneshot};

use crate::data::Pixels;
use crate::engine::batcher::{Answer, BatchQueue, Entry};
use crate::engine::pipeline::image_batch;
use crate::engine::{FloatModel, QuantizedModel};
use crate::error::{Error, Result};

/// What a device thread needs of a model. It lives and dies on that thread.
pub trait Network {
    /// Logits [n, classes], flat, of a batch of images.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>>;

    /// Bytes of parameters on the device.
    fn resident_bytes(&self) -> u64;
}

/// Builds a model on the device's own thread.
pub type BuildNetwork = Box<dyn FnOnce(Device) -> Result<Box<dyn Network>> + Send>;

impl Network for QuantizedModel {
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
        flat_logits(&QuantizedModel::forward(self, &image_batch(images)?)?)
    }

    fn resident_bytes(&self) -> u64 {
        QuantizedModel::resident_bytes(self)
    }
}

impl Network for FloatModel {
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
        flat_logits(&FloatModel::forward(self, &image_batch(images)?)?)
    }

    /// Not counted: a float reference is loaded for the length of one evaluation.
    fn resident_bytes(&self) -> u64 {
        0
    }
}

fn flat_logits(logits: &Tensor) -> Result<Vec<f32>> {
    let flat = logits.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_reshape([-1])?;
    Ok(Vec::<f32>::try_from(flat)?)
}

/// A model on a device thread: unique for the life of the process, never reused.
pub type LoadKey = u64;

enum Command {
    Load { key: LoadKey, build: BuildNetwork, reply: oneshot::Sender<Result<u64>> },
    Unload { key: LoadKey, reply: oneshot::Sender<()> },
    Classify(Entry),
    Forward(Bulk),
}

/// A batch that its caller formed: evaluation.
struct Bulk {
    key: LoadKey,
    images: Pixels,
    reply: oneshot::Sender<Result<Vec<f32>>>,
}

/// The way to a device thread. The thread ends, its models with it, after the last handle is gone.
#[derive(Clone, Debug)]
pub struct DeviceHandle {
    name: Arc<str>,
    device: Device,
    // Unbounded, but never long: images hold a permit, everything else waits for its reply.
    commands: mpsc::UnboundedSender<Command>,
    resident: Arc<AtomicU64>,
}

impl DeviceHandle {
    /// Starts the thread of a device; batches have at most `max_batch` images.
    ///
    /// # Errors
    /// `Io` when the operating system has no thread left.
    pub fn start(device: Device, max_batch: usize) -> Result<Self> {
        let name: Arc<str> = crate::device::name(device).into();
        let (commands, receiver) = mpsc::unbounded_channel();
        let resident = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&resident);
        thread::Builder::new()
            .name(format!("device-{name}"))
            .spawn(move || DeviceThread::new(device, max_batch, counter).run(receiver))
            .map_err(|error| Error::io(format!("thread of {name}"), error))?;
        Ok(Self { name, device, commands, resident })
    }

    /// `cpu`, `cuda:0`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device itself.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Bytes of all models on the device.
    pub fn resident_bytes(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Builds a model on the thread; returns its size in bytes.
    ///
    /// # Errors
    /// Whatever `build` reports; `Internal` when it panics.
    pub async fn load(&self, key: LoadKey, build: BuildNetwork) -> Result<u64> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Load { key, build, reply })?;
        answer.await.map_err(|_| gone(&self.name))?
    }

    /// Answers what is queued for a model, then drops it. Unloading an unknown one is fine.
    ///
    /// # Errors
    /// `Internal` when the thread is gone.
    pub async fn unload(&self, key: LoadKey) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Unload { key, reply })?;
        answer.await.map_err(|_| gone(&self.name))
    }

    /// Queues an image; its answer comes through the entry.
    ///
    /// # Errors
    /// `Internal` when the thread is gone.
    pub fn classify(&self, entry: Entry) -> Result<()> {
        self.send(Command::Classify(entry))
    }

    /// Runs a whole batch between the batches of queued images; the receiver gets its logits.
    ///
    /// # Errors
    /// `Internal` when the thread is gone.
    pub fn forward(
        &self,
        key: LoadKey,
        images: Pixels,
    ) -> Result<oneshot::Receiver<Result<Vec<f32>>>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Forward(Bulk { key, images, reply }))?;
        Ok(answer)
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| gone(&self.name))
    }
}

fn gone(name: &str) -> Error {
    Error::internal(format!("the thread of device {name} is gone"))
}

struct DeviceThread {
    device: Device,
    max_batch: usize,
    models: BTreeMap<LoadKey, Box<dyn Network>>,
    queue: BatchQueue,
    bulk: VecDeque<Bulk>,
    resident: Arc<AtomicU64>,
}

impl DeviceThread {
    fn new(device: Device, max_batch: usize, resident: Arc<AtomicU64>) -> Self {
        let (models, queue, bulk) = Default::default();
        Self { device, max_batch, models, queue, bulk, resident }
    }

    fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let _no_grad = tch::no_grad_guard();
        loop {
            while let Ok(command) = commands.try_recv() {
                self.take(command);
            }
            // Queued images and formed batches take turns, so neither starves the other.
            let batch = self.queue.next_batch(self.max_batch);
            let bulk = self.bulk.pop_front();
            if batch.is_empty() && bulk.is_none() {
                match commands.blocking_recv() {
                    Some(command) => self.take(command),
                    None => return,
                }
                continue;
            }
            self.answer(batch);
            if let Some(bulk) = bulk {
                self.answer_bulk(bulk);
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Classify(entry) => self.queue.push(entry),
            Command::Forward(bulk) => self.bulk.push_back(bulk),
            Command::Load { key, build, reply } => {
                // A caller that has left does not matter: the registry waits for every load.
                let _ = reply.send(self.load(key, build));
            }
            Command::Unload { key, reply } => {
                self.unload(key);
                let _ = reply.send(());
            }
        }
    }

    fn load(&mut self, key: LoadKey, build: BuildNetwork) -> Result<u64> {
        let device = self.device;
        let network = guarded(|| build(device))?;
        let bytes = network.resident_bytes();
        self.models.insert(key, network);
        self.resident.fetch_add(bytes, Ordering::Relaxed);
        Ok(bytes)
    }

    fn unload(&mut self, key: LoadKey) {
        loop {
            let batch = self.queue.take(key, self.max_batch);
            if batch.is_empty() {
                break;
            }
            self.answer(batch);
        }
        if let Some(network) = self.models.remove(&key) {
            self.resident.fetch_sub(network.resident_bytes(), Ordering::Relaxed);
        }
    }

    fn answer(&self, batch: Vec<Entry>) {
        let Some(model) = batch.first().map(|entry| entry.model) else { return };
        let started = Instant::now();
        let batch_size = batch.len();
        let mut images = Pixels { count: batch_size, image_size: 0, data: Vec::new() };
        images.image_size = side(batch.first().map_or(0, |entry| entry.pixels.len()));
        for entry in &batch {
            images.data.extend_from_slice(&entry.pixels);
        }
        let span = tracing::debug_span!("batch", model, batch_size);
        let logits = span.in_scope(|| self.forward(model, &images));
        let compute = started.elapsed();
        match logits {
            Ok(logits) => {
                let classes = logits.len() / batch_size;
                for (entry, logits) in batch.into_iter().zip(logits.chunks_exact(classes.max(1))) {
                    let answer = Answer {
                        logits: logits.to_vec(),
                        queue: started.duration_since(entry.queued),
                        compute,
                        batch_size,
                    };
                    let _ = entry.reply.send(Ok(answer)); // the caller may have left
                }
            }
            Err(error) => {
                for entry in batch {
                    let _ = entry.reply.send(Err(error.replica())); // as above
                }
            }
        }
    }

    fn answer_bulk(&self, bulk: Bulk) {
        let Bulk { key, images, reply } = bulk;
        if !reply.is_closed() {
            let _ = reply.send(self.forward(key, &images)); // the caller may have left since
        }
    }

    fn forward(&self, key: LoadKey, images: &Pixels) -> Result<Vec<f32>> {
        let network = self.models.get(&key).ok_or_else(|| Error::FailedPrecondition {
            reason: "the model was unloaded while the call was on its way".to_owned(),
        })?;
        guarded(|| network.forward(images))
    }
}

/// Side length of square [3, side, side] images with that many values.
fn side(values: usize) -> i64 {
    i64::try_from((values / 3).isqrt()).unwrap_or(0)
}

/// Turns a panic into an error: it fails its batch, not the thread.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Error::internal(format!("panic: {}", panic_text(panic.as_ref()))))
    })
}

/// The message of a caught panic.
pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}
