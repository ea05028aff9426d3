//! What threads share and talk through, where every interleaving of them is explored: the standard
//! library's. `tests/schedules` compiles the same files with shuttle's in its place.

pub(crate) use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
pub(crate) use std::thread;
