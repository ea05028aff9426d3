//! A result that threads write in parts which do not lie together.

#![allow(unsafe_code, reason = "the compiler cannot see that parts are apart")]

use std::marker::PhantomData;

/// A slice of which every part is written by one thread.
pub(super) struct Scatter<'a, T> {
    start: *mut T,
    len: usize,
    whole: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for an exclusive borrow, whose parts threads have to themselves (`Scatter::part`).
unsafe impl<T: Send> Sync for Scatter<'_, T> {}

impl<'a, T> Scatter<'a, T> {
    /// The whole of `target`.
    pub(super) fn new(target: &'a mut [T]) -> Self {
        Self { start: target.as_mut_ptr(), len: target.len(), whole: PhantomData }
    }

    /// Elements `first..first + len`.
    ///
    /// # Safety
    /// No other part that holds one of them may be in use.
    ///
    /// # Panics
    /// When there are not so many.
    #[allow(clippy::mut_from_ref, reason = "parts are apart, as the caller says")]
    pub(super) unsafe fn part(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first <= self.len && len <= self.len - first, "a part beyond the whole");
        // SAFETY: the elements are within the exclusive borrow, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_within_the_whole() {
        let mut whole = [0; 5];
        let target = Scatter::new(&mut whole);
        // SAFETY: these parts are apart.
        unsafe {
            target.part(0, 2).fill(1);
            target.part(3, 2).fill(2);
            assert!(target.part(5, 0).is_empty());
        }
        for (first, len) in [(4, 2), (6, 0), (1, usize::MAX)] {
            let part = std::panic::AssertUnwindSafe(|| {
                // SAFETY: there is no such part.
                unsafe { target.part(first, len) }.len()
            });
            assert!(std::panic::catch_unwind(part).is_err());
        }
        assert_eq!(whole, [1, 1, 0, 2, 2]);
    }
}
