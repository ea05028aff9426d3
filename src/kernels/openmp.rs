//! libtorch's threads, which are OpenMP's: keeping them away, and using them.

#![allow(unsafe_code, reason = "OpenMP's interface")]

use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

// SAFETY: OpenMP's interface, of the library that libtorch links. The first two read and change a
// variable of the calling thread: how many threads the parallel regions have that it begins.
unsafe extern "C" {
    safe fn omp_get_max_threads() -> c_int;
    safe fn omp_set_num_threads(threads: c_int);
    /// What compilers make of `#pragma omp parallel`: `work(data)` on every thread of a team, the
    /// caller's among them; returns when all are done. 0 threads are as many as there may be.
    fn GOMP_parallel(
        work: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
        threads: c_uint,
        flags: c_uint,
    );
}

/// Whether libtorch shares the work of the calling thread's operations among several threads.
pub(super) fn has_team() -> bool {
    omp_get_max_threads() > 1
}

/// What a team works on.
struct Team<'a, F> {
    work: &'a F,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls `work` on every thread that an operation of libtorch on this thread would use.
///
/// These threads spin for a while after each operation: they begin at once, while others would have
/// to share the processors with them.
///
/// # Panics
/// When `work` does, after all threads are done.
pub(super) fn on_team<F: Fn() + Sync>(work: &F) {
    unsafe extern "C" fn member<F: Fn() + Sync>(team: *mut c_void) {
        // SAFETY: `on_team` gives its own `Team`, which outlives the region, and is shared only.
        let team = unsafe { &*team.cast::<Team<'_, F>>() };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(team.work)) {
            *team.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
    let team = Team { work, panic: Mutex::new(None) };
    // SAFETY: `member` takes what is given here and lets no panic out; all threads are done with it
    // when this returns.
    unsafe { GOMP_parallel(member::<F>, (&raw const team).cast_mut().cast(), 0, 0) };
    if let Some(panic) = team.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

/// While it lives, libtorch computes on the calling thread alone what that thread asks for.
///
/// libtorch's threads are those of OpenMP. GNU's wait for their next operation by spinning, for
/// milliseconds after each one, on the processors that [`Workers`](crate::kernels::Workers) need.
///
/// `at::set_num_threads`, which tch has, does too much: besides the calling thread's numbers (of
/// OpenMP and MKL), it sets one for the process, which every other thread takes over for good at
/// its first operation. A calibration that begins during a forward would never get its threads.
/// OpenMP's number belongs to the thread that sets it, and both ATen and MKL ask for it at every
/// operation.
#[derive(Debug)]
pub struct SingleThreaded {
    before: i32,
    /// What a thread has set, that thread has to restore.
    _not_send: PhantomData<*const ()>,
}

impl SingleThreaded {
    /// One thread from now on, until this is dropped.
    #[must_use]
    pub fn begin() -> Self {
        // Asking also makes libtorch set the number for a thread that is new to it; later, it would
        // overwrite ours.
        let before = tch::get_num_threads();
        omp_set_num_threads(1);
        Self { before, _not_send: PhantomData }
    }
}

impl Drop for SingleThreaded {
    fn drop(&mut self) {
        omp_set_num_threads(self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::thread;

    use super::*;

    /// `test` on a thread of its own, for which libtorch has three threads.
    fn with_three_threads(test: impl FnOnce() + Send + 'static) {
        let thread = thread::spawn(|| {
            let _begin = tch::get_num_threads();
            omp_set_num_threads(3);
            test();
        });
        assert!(thread.join().is_ok());
    }

    #[test]
    fn all_of_a_team_work() {
        with_three_threads(|| {
            assert!(has_team());
            let threads = Mutex::new(HashSet::new());
            on_team(&|| assert!(threads.lock().unwrap().insert(thread::current().id())));
            let threads = threads.into_inner().unwrap();
            assert_eq!(threads.len(), 3);
            assert!(threads.contains(&thread::current().id()));
            let _alone = SingleThreaded::begin();
            assert!(!has_team());
        });
    }

    #[test]
    fn a_panic_of_a_team_is_the_callers() {
        with_three_threads(|| {
            let result = catch_unwind(|| on_team(&|| resume_unwind(Box::new("lost"))));
            assert_eq!(result.unwrap_err().downcast_ref(), Some(&"lost"));
            on_team(&|| {}); // and the team is still there
        });
    }

    #[test]
    fn the_number_comes_back() {
        with_three_threads(|| {
            let guard = SingleThreaded::begin();
            assert_eq!(tch::get_num_threads(), 1);
            let inner = SingleThreaded::begin();
            drop(inner);
            assert_eq!(tch::get_num_threads(), 1);
            drop(guard);
            assert_eq!(tch::get_num_threads(), 3);
        });
    }

    #[test]
    fn it_comes_back_after_a_panic() {
        with_three_threads(|| {
            let result = catch_unwind(|| {
                let _guard = SingleThreaded::begin();
                resume_unwind(Box::new("a failed forward"));
            });
            assert!(result.is_err());
            assert_eq!(tch::get_num_threads(), 3);
        });
    }

    #[test]
    fn threads_that_begin_meanwhile_are_not_touched() {
        let usual = thread::spawn(tch::get_num_threads).join().unwrap();
        with_three_threads(move || {
            let _guard = SingleThreaded::begin();
            assert_eq!(thread::spawn(tch::get_num_threads).join().unwrap(), usual);
        });
    }
}
