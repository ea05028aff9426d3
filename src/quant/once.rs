//! What is made at first use and kept, if it can be made at all.

use std::sync::OnceLock;

use crate::error::Result;

/// A value of a quantizer, or of all of its kind, that is derived when it is first needed.
#[derive(Debug)]
pub(crate) struct Once<T>(OnceLock<Option<T>>);

impl<T> Once<T> {
    /// Not made yet.
    pub(crate) const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The value, made at the first call; `None` where there is none.
    pub(crate) fn get(&self, make: impl FnOnce() -> Result<Option<T>>) -> Option<&T> {
        // A failure is no result either: the tensor code reports it.
        self.0.get_or_init(|| make().ok().flatten()).as_ref()
    }
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self::new()
    }
}
