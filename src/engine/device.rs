//! One OS thread per device owns the models on it. Handles send commands and get a oneshot back.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tokio::sync::oneshot;

use crate::data::Pixels;
use crate::engine::batcher::{Answer, BatchQueue, Entry, Image, Next, Pace};
use crate::engine::pipeline::image_batch;
use crate::engine::statistics::Meter;
use crate::engine::{FloatModel, QuantizedModel};
use crate::error::{Error, Result};
use crate::exec::SiteCounts;
use crate::sync::mpsc::{self, RecvTimeoutError};
use crate::sync::{Arc, thread};
use crate::telemetry::metrics;

/// What a device thread needs of a model. It is built elsewhere, lives and dies on that thread.
pub trait Network: Send {
    /// Logits [n, classes], flat, of a batch of images.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>>;

    /// Bytes of parameters on the device.
    fn resident_bytes(&self) -> u64;

    /// How many of its products are computed in which arithmetic.
    fn site_counts(&self) -> SiteCounts {
        SiteCounts::default()
    }

    /// Side of the images to warm up with; `None` for a model that is not to be warmed up.
    fn warm_up_side(&self) -> Option<i64> {
        None
    }
}

/// Builds a model on a device.
pub type BuildNetwork = Box<dyn FnOnce(Device) -> Result<Box<dyn Network>> + Send>;

impl Network for QuantizedModel {
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
        flat_logits(&QuantizedModel::forward(self, &image_batch(images)?)?)
    }

    fn resident_bytes(&self) -> u64 {
        QuantizedModel::resident_bytes(self)
    }

    fn site_counts(&self) -> SiteCounts {
        QuantizedModel::site_counts(self)
    }

    fn warm_up_side(&self) -> Option<i64> {
        Some(self.spec().preprocessing.image_size)
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
    Load { key: LoadKey, network: Box<dyn Network>, meter: Arc<Meter>, reply: LoadReply },
    Unload { key: LoadKey, reply: oneshot::Sender<()> },
    Classify(Entry),
    Forward(Bulk),
}

type LoadReply = oneshot::Sender<Result<()>>;

/// A batch that its caller formed: evaluation.
struct Bulk {
    key: LoadKey,
    images: Pixels,
    reply: oneshot::Sender<Result<Vec<f32>>>,
}

/// What a loaded model is on its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residence {
    /// Bytes of its parameters.
    pub bytes: u64,
    /// How many of its products are computed in which arithmetic.
    pub sites: SiteCounts,
}

/// How a device forms batches.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// Largest batch, in images.
    pub max_batch: usize,
    /// How long an idle device holds a small batch back.
    pub delay: Duration,
}

/// What others see of a device thread.
#[derive(Debug, Default)]
struct Vitals {
    resident: AtomicU64,
    /// When the batch that runs began, in milliseconds since the first look at a clock; 0: idle.
    busy_since: AtomicU64,
    is_lost: AtomicBool,
}

impl Vitals {
    /// Whether an error on the device says that it has failed for good, which is kept.
    fn note(&self, error: &Error) -> bool {
        let sticky = is_sticky(error);
        if sticky && !self.is_lost.swap(true, Ordering::AcqRel) {
            tracing::error!(%error, "the device has failed for good");
        }
        sticky
    }
}

/// The way to a device thread. The thread ends, its models with it, after the last handle is gone.
#[derive(Clone, Debug)]
pub struct DeviceHandle {
    name: Arc<str>,
    device: Device,
    // Unbounded, but never long: images hold a permit, everything else waits for its reply.
    commands: mpsc::Sender<Command>,
    vitals: Arc<Vitals>,
    pace: Arc<Pace>,
}

impl DeviceHandle {
    /// Starts the thread of a device; the `pace` of all its models together is noted there.
    ///
    /// # Errors
    /// `Io` when the operating system has no thread left.
    pub fn start(device: Device, batching: Batching, pace: Arc<Pace>) -> Result<Self> {
        let name: Arc<str> = crate::device::name(device).into();
        let (commands, receiver) = mpsc::channel();
        let vitals = Arc::<Vitals>::default();
        let worker = DeviceThread::new(device, batching, Arc::clone(&vitals), Arc::clone(&pace));
        thread::Builder::new()
            .name(format!("device-{name}"))
            .spawn(move || worker.run(&receiver))
            .map_err(|error| Error::io(format!("thread of {name}"), error))?;
        Ok(Self { name, device, commands, vitals, pace })
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
        self.vitals.resident.load(Ordering::Relaxed)
    }

    /// How fast the device answers.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// For how long the batch that runs has been running.
    pub fn busy_for(&self) -> Duration {
        match self.vitals.busy_since.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            since => Duration::from_millis(clock().saturating_sub(since)),
        }
    }

    /// Whether the device has failed for good: nothing but another process can use it again.
    pub fn is_lost(&self) -> bool {
        self.vitals.is_lost.load(Ordering::Acquire)
    }

    /// Notes an error on the device of somebody else's, which may be the first sign that it is lost.
    pub(super) fn note(&self, error: &Error) {
        self.vitals.note(error);
    }

    /// Moves a model that was built on the device to its thread and warms it up there, between the
    /// batches of others.
    ///
    /// # Errors
    /// Whatever a forward reports; `Internal` when it panics.
    pub async fn load(
        &self,
        key: LoadKey,
        network: Box<dyn Network>,
        meter: Arc<Meter>,
    ) -> Result<Residence> {
        let residence = Residence { bytes: network.resident_bytes(), sites: network.site_counts() };
        self.place(key, network, meter)?.await.map_err(|_| gone(&self.name))??;
        Ok(residence)
    }

    /// Moves a model that is built to the thread; the receiver learns when it is warm.
    ///
    /// # Errors
    /// `Internal` when the thread is gone.
    pub(crate) fn place(
        &self,
        key: LoadKey,
        network: Box<dyn Network>,
        meter: Arc<Meter>,
    ) -> Result<oneshot::Receiver<Result<()>>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Load { key, network, meter, reply })?;
        Ok(answer)
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
        entry.payload.wait(entry.priority, entry.queued);
        self.send(Command::Classify(entry))
    }

    /// Runs a whole batch between the batches of queued images; the receiver gets its logits, or
    /// `Unloaded` when the model left first.
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

/// Milliseconds since the first call, from 1.
fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}

struct Loaded {
    network: Box<dyn Network>,
    meter: Arc<Meter>,
}

/// A model on its way: the batch sizes that it has not run yet.
struct WarmUp {
    key: LoadKey,
    sizes: Vec<usize>,
    reply: LoadReply,
}

struct DeviceThread {
    device: Device,
    batching: Batching,
    models: BTreeMap<LoadKey, Loaded>,
    queue: BatchQueue,
    bulk: VecDeque<Bulk>,
    warming: VecDeque<WarmUp>,
    vitals: Arc<Vitals>,
    pace: Arc<Pace>,
}

impl DeviceThread {
    fn new(device: Device, batching: Batching, vitals: Arc<Vitals>, pace: Arc<Pace>) -> Self {
        Self {
            device,
            batching,
            models: BTreeMap::new(),
            queue: BatchQueue::new(batching.max_batch, batching.delay),
            bulk: VecDeque::new(),
            warming: VecDeque::new(),
            vitals,
            pace,
        }
    }

    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        let _no_grad = tch::no_grad_guard();
        loop {
            while let Ok(command) = commands.try_recv() {
                self.take(command);
            }
            // Queued images, formed batches and models that warm up take turns: none starves.
            let next = self.queue.next(Instant::now());
            let (bulk, warming) = (self.bulk.pop_front(), self.warming.pop_front());
            let is_idle = bulk.is_none() && warming.is_none();
            match next {
                Next::Batch(batch) => self.answer(batch),
                Next::Later(at) if is_idle => {
                    let patience = at.saturating_duration_since(Instant::now());
                    match commands.recv_timeout(patience) {
                        Ok(command) => self.take(command),
                        Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
                Next::Nothing if is_idle => match commands.recv() {
                    Ok(command) => self.take(command),
                    Err(_) => return,
                },
                Next::Later(_) | Next::Nothing => {}
            }
            if let Some(bulk) = bulk {
                self.answer_bulk(bulk);
            }
            if let Some(warming) = warming {
                self.warm_up(warming);
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Classify(entry) if self.models.contains_key(&entry.model) => {
                self.queue.push(entry);
            }
            Command::Classify(entry) => {
                let _ = entry.reply.send(Err(Error::Unloaded)); // the caller may have left
            }
            Command::Forward(bulk) => self.bulk.push_back(bulk),
            Command::Load { key, network, meter, reply } => self.load(key, network, meter, reply),
            Command::Unload { key, reply } => {
                self.unload(key);
                let _ = reply.send(()); // as above
            }
        }
    }

    fn load(
        &mut self,
        key: LoadKey,
        network: Box<dyn Network>,
        meter: Arc<Meter>,
        reply: LoadReply,
    ) {
        self.vitals.resident.fetch_add(network.resident_bytes(), Ordering::Relaxed);
        let sizes = match network.warm_up_side() {
            Some(_) => batch_sizes(self.batching.max_batch),
            None => Vec::new(),
        };
        self.models.insert(key, Loaded { network, meter });
        self.warming.push_back(WarmUp { key, sizes, reply });
    }

    /// Runs one more batch size; the first forward of each costs more than those that follow.
    fn warm_up(&mut self, mut warming: WarmUp) {
        let Some(size) = warming.sizes.pop() else {
            // A caller that has left does not matter: the registry waits for every load.
            let _ = warming.reply.send(Ok(()));
            return;
        };
        let side = self.models.get(&warming.key).and_then(|model| model.network.warm_up_side());
        let Some(side) = side else { return }; // unloaded meanwhile
        let values = usize::try_from(3 * side * side).unwrap_or(0) * size;
        let images = Pixels { count: size, image_size: side, data: vec![0.0; values] };
        let started = Instant::now();
        match self.forward(warming.key, &images) {
            Ok(_) => {
                // Only a first idea: what a model costs is learned from its batches.
                if warming.sizes.is_empty()
                    && let Some(model) = self.models.get(&warming.key)
                {
                    model.meter.pace.note(size, started.elapsed());
                }
                self.warming.push_back(warming);
            }
            Err(error) => {
                self.unload(warming.key);
                let _ = warming.reply.send(Err(error)); // as above
            }
        }
    }

    fn unload(&mut self, key: LoadKey) {
        loop {
            let batch = self.queue.take(key, Instant::now());
            if batch.is_empty() && self.queue.waiting(key) == 0 {
                break;
            }
            self.answer(batch);
        }
        self.queue.forget(key);
        if let Some(Loaded { network, .. }) = self.models.remove(&key) {
            self.vitals.resident.fetch_sub(network.resident_bytes(), Ordering::Relaxed);
        }
    }

    fn answer(&mut self, batch: Vec<Image>) {
        let Some(model) = batch.first().map(|entry| entry.model) else { return };
        let started = Instant::now();
        let images = batch.len();
        let failed = self.answer_once(batch);
        // Two halves may fit where the whole did not. What one image alone needs is not there.
        if let Some((mut first, error)) = failed {
            tracing::warn!(%error, images, "out of memory: the batch is halved");
            let second = first.split_off(first.len() / 2);
            for half in [first, second] {
                if let Some((entries, error)) = self.answer_once(half) {
                    refuse(entries, &error);
                }
            }
        }
        self.queue.charge(model, started.elapsed());
    }

    /// Answers a batch; gives it back if it was more than the memory holds.
    fn answer_once(&self, batch: Vec<Image>) -> Option<(Vec<Image>, Error)> {
        let now = Instant::now();
        let batch: Vec<Image> = batch.into_iter().filter_map(|e| e.still_wanted(now)).collect();
        let first = batch.first()?;
        let (model, count, values) = (first.model, batch.len(), first.pixels.len());
        let run = padded(count, self.batching.max_batch, self.device);
        let mut images = Pixels { count: run, image_size: side(values), data: Vec::new() };
        images.data.reserve(values * run);
        for entry in &batch {
            images.data.extend_from_slice(&entry.pixels);
        }
        images.data.resize(values * run, 0.0);
        let span = tracing::info_span!("batch", model, count);
        for entry in &batch {
            span.follows_from(&entry.span);
        }
        let logits = span.in_scope(|| self.forward(model, &images));
        let compute = now.elapsed();
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) if is_out_of_memory(&error) && count > 1 => {
                return Some((batch, memory_error(error)));
            }
            Err(error) => {
                refuse(batch, &memory_error(error));
                return None;
            }
        };
        metrics::batch(first.model_name(), count, compute);
        self.pace.note(count, compute);
        if let Some(model) = self.models.get(&model) {
            model.meter.pace.note(count, compute);
            model.meter.statistics.note_batch(count, compute);
        }
        let classes = (logits.len() / run).max(1);
        for (entry, logits) in batch.into_iter().zip(logits.chunks_exact(classes)) {
            let (decode, queue) = (entry.decode, now.duration_since(entry.queued));
            let logits = logits.to_vec();
            let answer = Answer { logits, decode, queue, compute, batch_size: count };
            let _ = entry.reply.send(Ok(answer)); // the caller may have left
        }
        None
    }

    fn answer_bulk(&self, bulk: Bulk) {
        let Bulk { key, images, reply } = bulk;
        if !reply.is_closed() {
            let _ = reply.send(self.forward(key, &images)); // the caller may have left since
        }
    }

    fn forward(&self, key: LoadKey, images: &Pixels) -> Result<Vec<f32>> {
        if self.vitals.is_lost.load(Ordering::Acquire) {
            return Err(Error::DeviceLost);
        }
        let model = self.models.get(&key).ok_or(Error::Unloaded)?;
        self.vitals.busy_since.store(clock(), Ordering::Release);
        let result = guarded(|| model.network.forward(images));
        self.vitals.busy_since.store(0, Ordering::Release);
        if let Err(error) = &result
            && self.vitals.note(error)
        {
            return Err(Error::DeviceLost);
        }
        result
    }
}

fn refuse(batch: Vec<Image>, error: &Error) {
    for entry in batch {
        let _ = entry.reply.send(Err(error.replica())); // the caller may have left
    }
}

/// Batch sizes that a device runs: the powers of two below the largest, and the largest; falling.
fn batch_sizes(max: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(1_usize), |size| size.checked_mul(2));
    let mut sizes: Vec<usize> = powers.take_while(|size| *size < max).collect();
    sizes.push(max.max(1));
    sizes.reverse();
    sizes
}

/// The size at which so many images run. A GPU runs few sizes well; on the CPU an image more is
/// an image's work more.
fn padded(images: usize, max: usize, device: Device) -> usize {
    match device {
        Device::Cuda(_) => images.next_power_of_two().min(max.max(images)),
        Device::Cpu | Device::Mps | Device::Vulkan => images,
    }
}

/// Whether libtorch had too little memory, on a GPU or on the machine.
fn is_out_of_memory(error: &Error) -> bool {
    let Error::Device { source } = error else { return false };
    let text = source.to_string();
    ["out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"]
        .iter()
        .any(|sign| text.contains(sign))
}

/// The same error, as one of memory if that is its cause.
pub(super) fn memory_error(error: Error) -> Error {
    if is_out_of_memory(&error) {
        return Error::DeviceMemory { reason: "the device's memory is full".to_owned() };
    }
    error
}

/// Whether the GPU refuses everything from now on.
fn is_sticky(error: &Error) -> bool {
    let Error::Device { source } = error else { return false };
    let text = source.to_string();
    [
        "illegal memory access",
        "device-side assert",
        "unspecified launch failure",
        "uncorrectable ECC error",
        "misaligned address",
        "hardware stack error",
    ]
    .iter()
    .any(|sign| text.contains(sign))
}

/// Side length of square [3, side, side] images with that many values.
fn side(values: usize) -> i64 {
    i64::try_from((values / 3).isqrt()).unwrap_or(0)
}

/// Turns a panic into an error: it fails its batch, not the thread.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::engine::batcher::{Admission, Payload, Priority, QueueLimits};

    /// Answers with the sum of each image; panics on a negative first pixel.
    struct Sums;

    impl Network for Sums {
        fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
            assert!(images.data[0] >= 0.0, "negative pixel");
            let size = images.data.len() / images.count;
            Ok(images.data.chunks(size).map(|image| image.iter().sum()).collect())
        }

        fn resident_bytes(&self) -> u64 {
            100
        }
    }

    async fn with_sums(key: LoadKey) -> DeviceHandle {
        let batching = Batching { max_batch: 4, delay: Duration::ZERO };
        let device = DeviceHandle::start(Device::Cpu, batching, Arc::default()).unwrap();
        device.load(key, Box::new(Sums), Arc::default()).await.unwrap();
        device
    }

    fn classify(
        device: &DeviceHandle,
        model: LoadKey,
        pixel: f32,
    ) -> oneshot::Receiver<Result<Answer>> {
        let (reply, answer) = oneshot::channel();
        let limits = QueueLimits { images: 1, bytes: 1 };
        let permit = Admission::new(limits, Arc::default()).admit("m", &[1]).unwrap().remove(0);
        let payload = Payload::new(permit);
        payload.fill(vec![pixel; 12]); // [3, 2, 2]
        let entry = Entry {
            model,
            priority: Priority::Interactive,
            decode: Duration::ZERO,
            queued: Instant::now(),
            deadline: None,
            span: tracing::Span::none(),
            payload,
            reply,
        };
        device.classify(entry).unwrap();
        answer
    }

    #[tokio::test]
    async fn images_get_their_own_answers() {
        let device = with_sums(1).await;
        let answers: Vec<_> = (0..10_u8).map(|p| classify(&device, 1, p.into())).collect();
        for (pixel, answer) in (0..10_u8).zip(answers) {
            let answer = answer.await.unwrap().unwrap();
            assert_eq!(answer.logits, [12.0 * f32::from(pixel)]);
            assert!((1..=4).contains(&answer.batch_size));
        }
        let images = Pixels { count: 2, image_size: 1, data: vec![1.0, 1.0, 1.0, 2.0, 2.0, 2.0] };
        let logits = device.forward(1, images).unwrap().await.unwrap().unwrap();
        assert_eq!(logits, [3.0, 6.0]);
    }

    #[tokio::test]
    async fn a_panic_fails_its_batch_and_not_the_thread() {
        let device = with_sums(1).await;
        let error = classify(&device, 1, -1.0).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("negative pixel"));
        assert!(classify(&device, 1, 1.0).await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn unloading_answers_what_is_queued_and_frees_the_bytes() {
        let device = with_sums(1).await;
        assert_eq!(device.resident_bytes(), 100);
        let queued: Vec<_> = (0..9_u8).map(|p| classify(&device, 1, p.into())).collect();
        device.unload(1).await.unwrap();
        for answer in queued {
            assert!(answer.await.unwrap().is_ok());
        }
        assert_eq!(device.resident_bytes(), 0);
        let late = classify(&device, 1, 1.0).await.unwrap().unwrap_err();
        assert!(matches!(late, Error::Unloaded));
    }

    /// Does what its function does, and notes the batches that it gets.
    struct Scripted {
        batches: Arc<Mutex<Vec<usize>>>,
        warms_up: bool,
        answer: fn(&Pixels) -> Result<Vec<f32>>,
    }

    impl Network for Scripted {
        fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
            self.batches.lock().unwrap().push(images.count);
            (self.answer)(images)
        }

        fn resident_bytes(&self) -> u64 {
            100
        }

        fn warm_up_side(&self) -> Option<i64> {
            self.warms_up.then_some(2)
        }
    }

    /// A device with a model 1 of that kind, and the sizes of the batches that it ran.
    async fn scripted(
        max_batch: usize,
        warms_up: bool,
        answer: fn(&Pixels) -> Result<Vec<f32>>,
    ) -> (Result<DeviceHandle>, Arc<Mutex<Vec<usize>>>) {
        let batching = Batching { max_batch, delay: Duration::ZERO };
        let device = DeviceHandle::start(Device::Cpu, batching, Arc::default()).unwrap();
        let batches = Arc::<Mutex<Vec<usize>>>::default();
        let network = Scripted { batches: Arc::clone(&batches), warms_up, answer };
        let loaded = device.load(1, Box::new(network), Arc::default()).await;
        (loaded.map(|_| device), batches)
    }

    fn first_pixels(images: &Pixels) -> Vec<f32> {
        images.data.chunks(12).map(|image| image[0]).collect()
    }

    fn out_of_memory() -> Error {
        let text = "CUDA out of memory. Tried to allocate 2.00 GiB".to_owned();
        Error::Device { source: tch::TchError::Torch(text) }
    }

    #[tokio::test]
    async fn every_batch_size_is_warmed_up_before_a_model_answers() {
        let (device, batches) = scripted(6, true, |images| Ok(first_pixels(images))).await;
        assert_eq!(*batches.lock().unwrap(), [1, 2, 4, 6]);
        assert_eq!(device.unwrap().resident_bytes(), 100);
        let (device, _) = scripted(4, true, |images| match images.count {
            1 | 2 => Ok(first_pixels(images)),
            _ => Err(out_of_memory()),
        })
        .await;
        assert!(is_out_of_memory(&device.unwrap_err()));
    }

    #[tokio::test]
    async fn a_batch_that_is_too_large_is_halved_once() {
        let (device, batches) = scripted(8, false, |images| match images.count {
            1..=4 => Ok(first_pixels(images)),
            _ => Err(out_of_memory()),
        })
        .await;
        let device = device.unwrap();
        let answers = together(&device, 8).await;
        for (pixel, answer) in (0_u8..).zip(answers) {
            let answer = answer.unwrap();
            assert_eq!((answer.logits, answer.batch_size), (vec![f32::from(pixel)], 4));
        }
        assert_eq!(*batches.lock().unwrap(), [8, 4, 4]);
        let (device, batches) = scripted(8, false, |_| Err(out_of_memory())).await;
        for answer in together(&device.unwrap(), 4).await {
            assert!(matches!(answer.unwrap_err(), Error::DeviceMemory { .. }));
        }
        assert_eq!(*batches.lock().unwrap(), [4, 2, 2]);
    }

    #[tokio::test]
    async fn a_lost_device_says_so_and_computes_no_more() {
        let (device, batches) = scripted(1, false, |_| {
            let text = "CUDA error: an illegal memory access was encountered".to_owned();
            Err(Error::Device { source: tch::TchError::Torch(text) })
        })
        .await;
        let device = device.unwrap();
        for _ in 0..2 {
            let error = classify(&device, 1, 1.0).await.unwrap().unwrap_err();
            assert!(matches!(error, Error::DeviceLost), "{error}");
        }
        assert!(device.is_lost() && batches.lock().unwrap().len() == 1);
    }

    #[tokio::test]
    async fn errors_of_a_job_on_the_device_tell_that_it_is_lost() {
        let device = with_sums(1).await;
        let failed = |text: &str| Error::Device { source: tch::TchError::Torch(text.to_owned()) };
        for harmless in [Error::Cancelled, failed("shapes do not match")] {
            device.note(&harmless);
            assert!(!device.is_lost(), "{harmless}");
        }
        device.note(&failed("CUDA error: unspecified launch failure"));
        assert!(device.is_lost());
        device.note(&Error::Cancelled);
        assert!(device.is_lost(), "for good");
        let answer = classify(&device, 1, 1.0).await.unwrap();
        assert!(matches!(answer, Err(Error::DeviceLost)));
    }

    /// Holds the device until so many images wait for it, pixel values 0, 1, ...
    async fn together(device: &DeviceHandle, images: u8) -> Vec<Result<Answer>> {
        let (held, closed) = hold(device).await;
        let answers: Vec<_> = (0..images).map(|p| classify(device, 1, p.into())).collect();
        drop(held);
        let _ = closed.await.unwrap();
        let mut all = Vec::new();
        for answer in answers {
            all.push(answer.await.unwrap());
        }
        all
    }

    /// Keeps the device busy until the sender is dropped; whatever is sent meanwhile has to wait.
    async fn hold(
        device: &DeviceHandle,
    ) -> (std::sync::mpsc::Sender<()>, oneshot::Receiver<Result<Vec<f32>>>) {
        let (held, gate) = std::sync::mpsc::channel();
        device.load(9, Box::new(Gate(Mutex::new(gate))), Arc::default()).await.unwrap();
        let pixels = Pixels { count: 1, image_size: 1, data: vec![0.0; 3] };
        let closed = device.forward(9, pixels).unwrap();
        while device.busy_for() == Duration::ZERO {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (held, closed)
    }

    /// Keeps the device busy until its sender is gone.
    struct Gate(Mutex<mpsc::Receiver<()>>);

    impl Network for Gate {
        fn forward(&self, _images: &Pixels) -> Result<Vec<f32>> {
            let _ = self.0.lock().unwrap().recv(); // the sender is gone
            Ok(Vec::new())
        }

        fn resident_bytes(&self) -> u64 {
            0
        }
    }

    #[tokio::test]
    async fn a_busy_device_tells_for_how_long() {
        let device = with_sums(1).await;
        assert_eq!(device.busy_for(), Duration::ZERO);
        let (held, closed) = hold(&device).await;
        drop(held);
        closed.await.unwrap().unwrap();
        assert_eq!(device.busy_for(), Duration::ZERO);
    }
}
