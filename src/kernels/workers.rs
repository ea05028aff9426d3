//! Threads for products and passes, apart from libtorch's.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::kernels::cpu::Scratch;

/// A fixed number of threads that share the work of a kernel. The caller's thread is one of them,
/// so a kernel never waits for a thread that is busy elsewhere before it begins.
#[derive(Debug)]
pub struct Workers {
    /// The others; none if there is one thread.
    pool: Option<ThreadPool>,
    threads: usize,
    spare: Mutex<Vec<Scratch>>,
}

/// The threads of all kernels, once they are known.
static SHARED: OnceLock<Workers> = OnceLock::new();

/// Work that threads take a piece of whenever they are done with one.
pub(super) struct Tasks<T>(Mutex<Vec<T>>);

impl<T> Tasks<T> {
    pub(super) fn new(tasks: Vec<T>) -> Self {
        Self(Mutex::new(tasks))
    }

    /// Works on what nobody else has taken, until nothing is left.
    pub(super) fn drain(&self, mut work: impl FnMut(T)) {
        let next = || self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        while let Some(task) = next() {
            work(task);
        }
    }
}

impl Workers {
    /// `threads` threads, at least one. Fewer if the system refuses to start them.
    pub fn new(threads: usize) -> Self {
        let others = threads.saturating_sub(1);
        let name = |index| format!("kernel-{index}");
        let pool = (others > 0)
            .then(|| ThreadPoolBuilder::new().num_threads(others).thread_name(name).build().ok())
            .flatten();
        let threads = if pool.is_some() { threads } else { 1 };
        Self { pool, threads, spare: Mutex::default() }
    }

    /// The process's own: as many threads as processors, unless [`Workers::share`] came first.
    pub fn shared() -> &'static Self {
        SHARED.get_or_init(|| Self::new(thread::available_parallelism().map_or(1, usize::from)))
    }

    /// Sets the number of threads of [`Workers::shared`]; `false` if they were started already.
    pub fn share(threads: usize) -> bool {
        SHARED.set(Self::new(threads)).is_ok()
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Works on all of `tasks`, in any order, on all threads.
    pub(super) fn run<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T, &mut Scratch) + Sync) {
        let others = self.threads.min(tasks.len()).saturating_sub(1);
        let Some(pool) = self.pool.as_ref().filter(|_| others > 0) else {
            return self.run_here(tasks, work);
        };
        let tasks = Tasks::new(tasks);
        let drain = || {
            let mut scratch = self.spare().pop().unwrap_or_default();
            tasks.drain(|task| work(task, &mut scratch));
            self.spare().push(scratch);
        };
        pool.in_place_scope(|scope| {
            for _ in 0..others {
                scope.spawn(|_| drain());
            }
            drain();
        });
    }

    /// Works on all of `tasks` on the caller's thread.
    pub(super) fn run_here<T>(&self, tasks: Vec<T>, work: impl Fn(T, &mut Scratch)) {
        let mut scratch = self.spare().pop().unwrap_or_default();
        for task in tasks {
            work(task, &mut scratch);
        }
        self.spare().push(scratch);
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Scratch>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
