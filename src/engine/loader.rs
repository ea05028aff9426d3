//! The one thread that reads and builds models.
//!
//! Always the same one: glibc's allocator gives each thread an arena, and hardly gives an arena's memory
//! back. Models that were built on any thread of a pool would leave their size behind in many of them.

use std::sync::mpsc;
use std::thread;

use tokio::sync::oneshot;

use super::device::guarded;
use crate::error::{Error, Result};

type Work = Box<dyn FnOnce() + Send>;

/// The way to the thread, which ends after the last of its work when this is dropped.
#[derive(Clone, Debug)]
pub(super) struct Loader {
    work: mpsc::Sender<Work>,
}

impl Loader {
    /// Starts the thread.
    ///
    /// # Errors
    /// `Io` when the operating system has no thread left.
    pub(super) fn start() -> Result<Self> {
        let (work, receiver) = mpsc::channel::<Work>();
        thread::Builder::new()
            .name("loader".to_owned())
            .spawn(move || receiver.into_iter().for_each(|work| work()))
            .map_err(|error| Error::io("loader thread", error))?;
        Ok(Self { work })
    }

    /// Does blocking work there, after what was asked for before.
    ///
    /// # Errors
    /// Whatever the work reports; `Internal` when it panics.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let gone = || Error::internal("the loader thread is gone");
        let (reply, answer) = oneshot::channel();
        let work = move || {
            let _ = reply.send(guarded(work)); // the caller may have left
        };
        self.work.send(Box::new(work)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_work_is_done_on_one_thread_which_outlives_a_panic() {
        let loader = Loader::start().unwrap();
        let name = || Ok((thread::current().id(), thread::current().name().map(str::to_owned)));
        let (first, named) = loader.run(name).await.unwrap();
        assert_eq!(named.as_deref(), Some("loader"));
        let panicked: Result<()> = loader.run(|| panic!("no memory")).await;
        assert!(panicked.unwrap_err().to_string().contains("no memory"));
        assert_eq!(loader.run(name).await.unwrap().0, first);
    }
}
