//! What the threads do, and what must hold whoever runs when.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use shuttle::future::block_on;
use shuttle::sync::Arc;
use shuttle::thread;
use tch::{Device, TchError};
use tokio::sync::oneshot;

use crate::data::Pixels;
use crate::engine::batcher::{Admission, Answer, Entry, Payload, Priority, QueueLimits};
use crate::engine::device::{Batching, DeviceHandle, Network};
use crate::error::{Error, Result};

/// All scenarios by name.
pub(crate) const ALL: [(&str, fn()); 4] = [
    ("permits are bounded and come back", permits),
    ("every image is answered once", answers),
    ("unloading answers what is queued", unloading),
    ("halved batches lose nobody", halving),
];

/// Places of every scenario.
const PLACES: usize = 4;
const MODEL: u64 = 7;

fn admission() -> Admission {
    Admission::new(QueueLimits { images: PLACES, bytes: 1 << 20 }, Arc::default())
}

fn permits() {
    let admission = admission();
    let live = Arc::new(AtomicUsize::new(0));
    let caller = |model: &'static str, images: usize| {
        let (admission, live) = (admission.clone(), Arc::clone(&live));
        thread::spawn(move || {
            for _ in 0..3 {
                let Ok(held) = admission.admit(model, &vec![1; images]) else { continue };
                // What is counted here is never more than what is taken there.
                let now = live.fetch_add(held.len(), Ordering::SeqCst) + held.len();
                assert!(now <= PLACES, "{now} permits of {PLACES}");
                assert!((1..=PLACES).contains(&admission.images()));
                // Images of a call end one by one, on threads of their own.
                let mut held = held.into_iter();
                let first = held.next();
                let elsewhere = Arc::clone(&live);
                let other = thread::spawn(move || {
                    elsewhere.fetch_sub(1, Ordering::SeqCst);
                    drop(first);
                });
                live.fetch_sub(held.len(), Ordering::SeqCst);
                drop(held);
                other.join().unwrap();
            }
        })
    };
    let callers = [caller("a", 3), caller("a", 1), caller("b", 2)];
    for caller in callers {
        caller.join().unwrap();
    }
    assert_eq!(admission.images(), 0, "a permit was lost");
    assert_eq!(admission.admit("c", &[1; PLACES]).unwrap().len(), PLACES);
}

/// Answers with the first value of each image; has memory for batches up to a size.
struct Echo {
    room: usize,
}

impl Network for Echo {
    fn forward(&self, images: &Pixels) -> Result<Vec<f32>> {
        // Others may run while it computes.
        thread::yield_now();
        if images.count > self.room {
            let source = TchError::Torch("out of memory".to_owned());
            return Err(Error::Device { source });
        }
        let size = images.data.len() / images.count;
        Ok(images.data.chunks(size).map(|image| image[0]).collect())
    }

    fn resident_bytes(&self) -> u64 {
        1
    }
}

fn device(room: usize) -> DeviceHandle {
    let batching = Batching { max_batch: 3, delay: Duration::ZERO };
    let device = DeviceHandle::start(Device::Cpu, batching, Arc::default()).unwrap();
    let placed = device.place(MODEL, Box::new(Echo { room }), Arc::default()).unwrap();
    block_on(placed).unwrap().unwrap();
    device
}

/// Queues an image if there is a place for it.
fn classify(
    device: &DeviceHandle,
    admission: &Admission,
    pixel: u8,
) -> Option<(oneshot::Receiver<Result<Answer>>, Payload)> {
    let payload = Payload::new(admission.admit("m", &[1]).ok()?.pop()?);
    payload.fill(vec![f32::from(pixel); 3]);
    let (reply, answer) = oneshot::channel();
    let entry = Entry {
        model: MODEL,
        priority: if pixel.is_multiple_of(2) { Priority::Interactive } else { Priority::Bulk },
        decode: Duration::ZERO,
        queued: Instant::now(),
        deadline: None,
        span: tracing::Span::none(),
        payload: payload.clone(),
        reply,
    };
    device.classify(entry).unwrap();
    Some((answer, payload))
}

/// Callers of a device; every third leaves without its answer.
fn callers(device: &DeviceHandle, admission: &Admission) -> Vec<thread::JoinHandle<usize>> {
    let caller = |number: u8| {
        let (device, admission) = (device.clone(), admission.clone());
        thread::spawn(move || {
            let mut answered = 0;
            for pixel in [number, number + 10, number + 20] {
                let Some((answer, payload)) = classify(&device, &admission, pixel) else {
                    continue;
                };
                if pixel % 3 == 0 {
                    payload.release();
                    drop(answer);
                    continue;
                }
                match block_on(answer).expect("an image was lost") {
                    Ok(answer) => {
                        assert_eq!(answer.logits, [f32::from(pixel)], "somebody else's answer");
                        assert!((1..=3).contains(&answer.batch_size));
                        answered += 1;
                    }
                    Err(Error::Unloaded) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            answered
        })
    };
    (0..3).map(caller).collect()
}

/// What was queued before an unloading is over after it.
fn all_places_are_free(device: &DeviceHandle, admission: &Admission) {
    block_on(device.unload(MODEL)).unwrap();
    assert_eq!(admission.images(), 0, "a permit was lost");
    assert_eq!(device.resident_bytes(), 0);
}

fn answers() {
    let (admission, device) = (admission(), device(usize::MAX));
    let callers = callers(&device, &admission);
    let answered: usize = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
    assert!(answered > 0, "the first one to come is always admitted and answered");
    all_places_are_free(&device, &admission);
}

fn unloading() {
    let (admission, device) = (admission(), device(usize::MAX));
    let callers = callers(&device, &admission);
    let other = device.clone();
    let unloader = thread::spawn(move || block_on(other.unload(MODEL)).unwrap());
    for caller in callers {
        caller.join().unwrap();
    }
    unloader.join().unwrap();
    all_places_are_free(&device, &admission);
}

fn halving() {
    let (admission, device) = (admission(), device(2));
    let callers = callers(&device, &admission);
    for caller in callers {
        caller.join().unwrap();
    }
    all_places_are_free(&device, &admission);
}
