//! Keeps libtorch to one thread while threads of ours do the work.

use std::marker::PhantomData;
use std::os::raw::c_int;

#[allow(unsafe_code, reason = "tch sets the number of threads of the whole process only")]
// SAFETY: OpenMP's interface. It takes any number and changes a variable of the calling thread: how
// many threads the parallel regions have that it begins from now on. libtorch links the same library.
unsafe extern "C" {
    safe fn omp_set_num_threads(threads: c_int);
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
    use std::panic::catch_unwind;
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
                std::panic::resume_unwind(Box::new("a failed forward"));
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
