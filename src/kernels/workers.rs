//! Threads for products and passes, apart from libtorch's.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::kernels::SingleThreaded;
use crate::kernels::cpu::Scratch;
use crate::kernels::team::Team;

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

thread_local! {
    /// How many threads may share the work that this thread begins.
    static SHARE: Cell<usize> = const { Cell::new(usize::MAX) };
    /// Those that stay awake for it.
    static TEAM: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// A smaller [`SHARE`] for the calling thread, while it lives, and no team but one of its own.
struct Share {
    threads: usize,
    team: Option<Arc<Team>>,
}

impl Share {
    fn of(threads: usize) -> Self {
        Self { threads: SHARE.replace(threads), team: TEAM.take() }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        SHARE.set(self.threads);
        TEAM.set(self.team.take());
    }
}

/// A team on its way; dismissed when this is dropped.
struct Gathered(Arc<Team>);

impl Drop for Gathered {
    fn drop(&mut self) {
        self.0.dismiss();
    }
}

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

    /// The process's own: as many threads as processors, or as [`Workers::share_among`] said.
    pub fn shared() -> &'static Self {
        SHARED.get_or_init(|| Self::new(thread::available_parallelism().map_or(1, usize::from)))
    }

    /// Says how many threads [`Workers::shared`] has. Too late once it was asked for.
    pub fn share_among(threads: usize) {
        SHARED.get_or_init(|| Self::new(threads));
    }

    /// Number of threads that work for the calling one, itself included.
    pub fn threads(&self) -> usize {
        self.threads.min(SHARE.get())
    }

    /// What `work` makes of each of `parts`, several at a time. The kernels that it calls have their
    /// share of the threads, which stay awake for them meanwhile, and libtorch has one. Parts that are at
    /// least as many as threads never wait for one another.
    pub fn divide<T: Send, R: Send>(&self, parts: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
        let share = (self.threads() / parts.len().max(1)).max(1);
        let mut results: Vec<Option<R>> = Vec::new();
        results.resize_with(parts.len(), || None);
        // The last task is taken first.
        let tasks: Vec<_> = parts.into_iter().zip(&mut results).rev().collect();
        self.run(tasks, |(part, result), _| {
            let (_share, _libtorch) = (Share::of(share), SingleThreaded::begin());
            let team = self.gather(share - 1);
            TEAM.set(team.as_ref().map(|team| Arc::clone(&team.0)));
            *result = Some(work(part));
        });
        results.into_iter().flatten().collect()
    }

    /// A team of that many others, as soon as they are free.
    fn gather(&self, others: usize) -> Option<Gathered> {
        let pool = self.pool.as_ref().filter(|_| others > 0)?;
        let team = Arc::new(Team::default());
        for _ in 0..others {
            let team = Arc::clone(&team);
            pool.spawn(move || team.help());
        }
        Some(Gathered(team))
    }

    /// Works on all of `tasks`, in any order, on all threads.
    pub(super) fn run<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T, &mut Scratch) + Sync) {
        let others = self.threads().min(tasks.len()).saturating_sub(1);
        if others == 0 || self.pool.is_none() {
            return self.run_here(tasks, work);
        }
        let tasks = Tasks::new(tasks);
        let region = || {
            let mut scratch = self.spare().pop().unwrap_or_default();
            tasks.drain(|task| work(task, &mut scratch));
            self.spare().push(scratch);
        };
        match TEAM.with_borrow(Option::clone) {
            Some(team) => team.region(&region),
            None => match self.gather(others) {
                Some(team) => team.0.region(&region),
                None => region(),
            },
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_order_and_share_the_threads() {
        let workers = Workers::new(4);
        for (parts, share) in [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)] {
            let found = workers.divide((0..parts).collect(), |part: usize| {
                // What a part begins has its share of the threads, and is done by them.
                let counted = Mutex::new(0);
                workers.run(vec![1; 50], |one, _| {
                    *counted.lock().unwrap() += one;
                });
                (part, workers.threads(), counted.into_inner().unwrap())
            });
            let expected: Vec<_> = (0..parts).map(|part| (part, share, 50)).collect();
            assert_eq!(found, expected);
            assert_eq!(workers.threads(), 4, "for the caller, all are back");
        }
        assert!(workers.divide(Vec::<usize>::new(), |part| part).is_empty());
    }

    #[test]
    fn libtorch_has_one_thread_within_a_part() {
        let found = Workers::new(2).divide(vec![(); 3], |()| tch::get_num_threads());
        assert_eq!(found, [1, 1, 1]);
    }

    #[test]
    fn a_panic_in_a_part_is_the_callers() {
        let workers = Workers::new(2);
        let divided = std::panic::AssertUnwindSafe(|| {
            workers.divide(vec![0, 1, 2], |part| assert!(part < 2, "lost"))
        });
        assert!(std::panic::catch_unwind(divided).is_err());
        assert_eq!(workers.divide(vec![1, 2], |part| part), [1, 2]);
    }
}
