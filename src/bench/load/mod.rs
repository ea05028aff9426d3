//! Load on a server, and what it makes of it. The transport is the caller's: see [`Target`].
//!
//! Open loop: requests start at the times of a Poisson process, whether or not earlier ones have been
//! answered, and their latency counts from the time they were meant to start. A server that stalls
//! cannot hide it by holding up its clients (what Gil Tene calls coordinated omission). Closed loop: a
//! fixed number of clients, each of which waits for its answer: the throughput at saturation.
//!
//! - [`schedule`]: when requests start, and which; [`record`]: latencies and counts
//! - [`run()`]: one load; [`search`]: the largest load that a server bears

pub mod record;
pub mod run;
pub mod schedule;
pub mod search;

use std::future::Future;
use std::time::Duration;

pub use record::{Measured, Record};
pub use run::{Load, Plan, run};
pub use schedule::{Choice, Mix};

/// Where requests go.
pub trait Target: Send + Sync + 'static {
    /// Sends a request, and waits for its answer.
    fn send(&self, choice: Choice) -> impl Future<Output = Outcome> + Send;
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Answered.
    Answered(ServerSide),
    /// Refused as a whole, or failed.
    Failed(Refusal),
}

/// What the server says of a request that it answered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ServerSide {
    /// Waiting for the device.
    pub queue: Duration,
    /// Decoding and resizing.
    pub decode: Duration,
    /// The forward pass.
    pub compute: Duration,
    /// From arrival to answer.
    pub total: Duration,
    /// Images in the batch.
    pub batch_size: u32,
    /// Images with an error of their own.
    pub failed_images: usize,
    /// Images whose answer was known.
    pub cached_images: usize,
}

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// gRPC's name of the status code.
    pub code: &'static str,
    /// What it says.
    pub message: String,
    /// When to come back, if the server says so.
    pub retry_after: Option<Duration>,
}
