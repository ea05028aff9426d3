//! A yes or no that many look at.

use std::sync::Arc;

use tokio::sync::watch;

/// A yes or no that its clones share; no at first.
#[derive(Clone, Debug, Default)]
pub struct Flag(Arc<watch::Sender<bool>>);

impl Flag {
    /// Whether it is yes.
    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Makes it yes or no.
    pub fn set(&self, value: bool) {
        self.0.send_if_modified(|now| std::mem::replace(now, value) != value);
    }

    /// Tells of changes from now on.
    pub(super) fn changes(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }
}
