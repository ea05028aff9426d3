//! Permits and the way of an image through a device thread, under many interleavings of the threads.
//!
//! The very files of the library, compiled with shuttle's locks, channels and threads (`sync`) in place
//! of the standard library's. A program and not a test: a test would also compile, and run outside of
//! shuttle, the tests inside of those files. `scripts/test.sh` runs it; `SCHEDULES` says how many
//! interleavings of each scenario are tried (1000 unless given). A failure prints the schedule to
//! replay.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "only a part of each file is used here"
)]
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a test")]

/// What the files below take for the library's `sync`.
mod sync {
    pub(crate) use shuttle::sync::{Arc, Mutex, MutexGuard, PoisonError};
    pub(crate) use shuttle::thread;

    pub(crate) mod mpsc {
        use std::fmt;

        use shuttle::sync::mpsc;
        pub(crate) use shuttle::sync::mpsc::{Receiver, RecvTimeoutError, SendError};

        /// Shuttle's can be shown only if what is sent can be.
        pub(crate) struct Sender<T>(mpsc::Sender<T>);

        pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
            let (sender, receiver) = mpsc::channel();
            (Sender(sender), receiver)
        }

        impl<T> Sender<T> {
            pub(crate) fn send(&self, value: T) -> Result<(), SendError<T>> {
                self.0.send(value)
            }
        }

        impl<T> Clone for Sender<T> {
            fn clone(&self) -> Self {
                Self(self.0.clone())
            }
        }

        impl<T> fmt::Debug for Sender<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("Sender")
            }
        }
    }
}

mod error {
    pub(crate) use vitq::error::{Error, Result};
}

mod data {
    pub(crate) use vitq::data::Pixels;
}

mod device {
    pub(crate) use vitq::device::name;
}

mod exec {
    pub(crate) use vitq::exec::SiteCounts;
}

/// Counts nothing here.
mod telemetry {
    pub(crate) mod metrics {
        use std::time::Duration;

        pub(crate) fn batch(_model: &str, _images: usize, _time: Duration) {}
    }
}

#[path = "../../src/random.rs"]
mod random;

mod engine;
mod scenarios;

use std::time::Instant;

/// Stack of a thread: what libtorch's and tracing's calls need.
const STACK: usize = 1 << 20;

fn main() {
    let schedules = std::env::var("SCHEDULES").map_or(1_000, |text| text.parse().unwrap());
    for (name, scenario) in scenarios::ALL {
        let started = Instant::now();
        let mut config = shuttle::Config::new();
        config.stack_size = STACK;
        let scheduler = shuttle::scheduler::RandomScheduler::new(schedules);
        shuttle::Runner::new(scheduler, config.clone()).run(scenario);
        let scheduler = shuttle::scheduler::PctScheduler::new(3, schedules);
        shuttle::Runner::new(scheduler, config).run(scenario);
        println!("{name}: 2 x {schedules} schedules in {:.1?}", started.elapsed());
    }
}
