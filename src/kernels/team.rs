//! Threads that stay awake between the parallel regions of a forward.
//!
//! A forward of one image has some hundred regions of a few hundred microseconds. Waking a thread for
//! each takes tens of microseconds, on a virtual machine most of a hundred.

#![allow(
    unsafe_code,
    reason = "a region borrows what outlives it, which a thread's closure cannot"
)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{hint, thread};

/// Looks for a region before a waiting thread lets others have its processor: about 50 µs.
const SPINS: u32 = 1000;

/// One caller and the threads that help with its regions.
#[derive(Default)]
pub(super) struct Team {
    /// What helpers may join.
    region: Mutex<Region>,
    /// Regions so far.
    regions: AtomicUsize,
    /// Helpers that are inside a region.
    inside: AtomicUsize,
    /// There will be no more regions.
    over: AtomicBool,
}

#[derive(Default)]
struct Region {
    work: Option<Work>,
    panic: Option<Box<dyn Any + Send>>,
}

/// The work of a region, whose borrows end with it: only threads counted as `inside` may call it.
#[derive(Clone, Copy)]
struct Work(*const (dyn Fn() + Sync));

// SAFETY: what it points to can be called from any thread.
unsafe impl Send for Work {}

impl Team {
    /// Calls `work` here and on every helper that is free, and returns when all are done. One region at a
    /// time: a team belongs to one thread.
    ///
    /// # Panics
    /// When `work` does, after all are done.
    pub(super) fn region(&self, work: &(dyn Fn() + Sync)) {
        // Closes the region, also when `work` panics here.
        struct Close<'a>(&'a Team);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                self.0.lock().work = None;
                // Nobody can enter any more.
                wait(|| self.0.inside.load(Ordering::Acquire) == 0);
            }
        }
        // SAFETY: only the lifetime changes. Helpers enter while the work is there to be found, and
        // `close` takes it away and waits for them before `work` can end.
        let erased: *const (dyn Fn() + Sync + 'static) =
            unsafe { std::mem::transmute(std::ptr::from_ref(work)) };
        *self.lock() = Region { work: Some(Work(erased)), panic: None };
        let close = Close(self);
        self.regions.fetch_add(1, Ordering::Release);
        work();
        drop(close);
        if let Some(panic) = self.lock().panic.take() {
            resume_unwind(panic);
        }
    }

    /// Helps with one region after the other until the team is dismissed.
    pub(super) fn help(&self) {
        let mut seen = 0;
        loop {
            wait(|| {
                self.over.load(Ordering::Acquire) || self.regions.load(Ordering::Acquire) != seen
            });
            if self.over.load(Ordering::Acquire) {
                return;
            }
            seen = self.regions.load(Ordering::Acquire);
            let work = {
                let region = self.lock();
                if region.work.is_some() {
                    self.inside.fetch_add(1, Ordering::Relaxed);
                }
                region.work
            };
            if let Some(work) = work {
                // SAFETY: it was there, so the caller waits until this thread is no longer inside.
                let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*work.0)() }));
                if let Err(panic) = result {
                    self.lock().panic = Some(panic);
                }
                self.inside.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Lets the helpers go.
    pub(super) fn dismiss(&self) {
        self.over.store(true, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Region> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until `done`, awake.
fn wait(done: impl Fn() -> bool) {
    let mut spins = 0;
    while !done() {
        if spins < SPINS {
            spins += 1;
            hint::spin_loop();
        } else {
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// `test` with a team of some helpers, which are gone in the end.
    fn with_helpers(helpers: usize, test: impl FnOnce(&Team)) {
        let team = Arc::new(Team::default());
        let threads: Vec<_> = (0..helpers)
            .map(|_| {
                let team = Arc::clone(&team);
                thread::spawn(move || team.help())
            })
            .collect();
        let result = catch_unwind(AssertUnwindSafe(|| test(&team)));
        team.dismiss();
        for thread in threads {
            thread.join().unwrap();
        }
        if let Err(panic) = result {
            resume_unwind(panic);
        }
    }

    #[test]
    fn nothing_is_lost_and_nothing_done_twice() {
        with_helpers(3, |team| {
            for count in 0..2000u64 {
                let (next, sum) = (AtomicU64::new(0), AtomicU64::new(0));
                team.region(&|| {
                    loop {
                        let item = next.fetch_add(1, Ordering::Relaxed);
                        if item >= count {
                            break;
                        }
                        sum.fetch_add(item, Ordering::Relaxed);
                    }
                });
                assert_eq!(sum.load(Ordering::Relaxed), (0..count).sum::<u64>());
            }
        });
    }

    #[test]
    fn helpers_do_help() {
        with_helpers(2, |team| {
            let inside = AtomicUsize::new(0);
            // Ends only if all three are in it at once.
            team.region(&|| {
                inside.fetch_add(1, Ordering::Relaxed);
                wait(|| inside.load(Ordering::Relaxed) == 3);
            });
        });
    }

    #[test]
    fn a_caller_without_helpers_works_alone() {
        let (team, calls) = (Team::default(), AtomicUsize::new(0));
        team.region(&|| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 1);
        team.dismiss();
        team.help();
    }

    #[test]
    fn a_panic_is_the_callers_wherever_it_happens() {
        with_helpers(2, |team| {
            let caller = thread::current().id();
            for in_caller in [true, false] {
                let inside = AtomicUsize::new(0);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    team.region(&|| {
                        inside.fetch_add(1, Ordering::Relaxed);
                        wait(|| inside.load(Ordering::Relaxed) == 3);
                        if in_caller == (thread::current().id() == caller) {
                            resume_unwind(Box::new("lost"));
                        }
                    });
                }));
                assert_eq!(result.unwrap_err().downcast_ref(), Some(&"lost"));
            }
            team.region(&|| {}); // and the team goes on
        });
    }
}
