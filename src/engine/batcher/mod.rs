//! Admission and batching: how many images may be in the server, and which of them run together.

mod admission;
mod clients;
mod pace;
mod queue;
#[cfg(test)]
mod queue_laws;

pub use admission::{Admission, Permit, QueueLimits, WaitingLine};
pub use clients::{ClientLimit, ClientShare};
pub use pace::Pace;
pub use queue::{Answer, BatchQueue, Entry, Image, Next, Payload, Priority};
