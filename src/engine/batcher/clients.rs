//! What one client may have in the server at once, beside what all may have together.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Limits the images of each client.
#[derive(Clone, Debug)]
pub struct ClientLimit {
    /// Images of one client; 0 for as many as there is room for.
    most: usize,
    held: Arc<Held>,
}

/// Images by client; clients without any are not there.
#[derive(Debug, Default)]
struct Held(Mutex<BTreeMap<Arc<str>, usize>>);

/// A client's images that are in the server; its share is given back when this is dropped.
#[derive(Debug)]
pub struct ClientShare {
    client: Arc<str>,
    images: usize,
    held: Arc<Held>,
}

impl ClientLimit {
    /// At most so many images of each client; 0 for no limit.
    pub fn new(most: usize) -> Self {
        Self { most, held: Arc::default() }
    }

    /// A share for so many images of a client; `None` where there is no limit.
    ///
    /// # Errors
    /// `QuotaExceeded`, on the client.
    pub fn admit(&self, client: &Arc<str>, images: usize) -> Result<Option<ClientShare>> {
        if self.most == 0 {
            return Ok(None);
        }
        let mut held = self.held.lock();
        let before = held.get(client).copied().unwrap_or(0);
        if images > self.most - before.min(self.most) {
            let most = self.most;
            let reason = format!(
                "{client} has {before} images in the server and sends {images}, at most {most} are \
                 allowed"
            );
            return Err(Error::QuotaExceeded { subject: client.to_string(), reason });
        }
        held.insert(Arc::clone(client), before + images);
        let (client, held) = (Arc::clone(client), Arc::clone(&self.held));
        Ok(Some(ClientShare { client, images, held }))
    }
}

impl Held {
    /// Nothing panics while it holds the lock, so the counts are whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ClientShare {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        if let Some(count) = held.get_mut(&self.client) {
            *count -= self.images;
            if *count == 0 {
                held.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_have_limits_of_their_own() {
        let (a, b): (Arc<str>, Arc<str>) = ("token:a".into(), "token:b".into());
        let limit = ClientLimit::new(4);
        let held = limit.admit(&a, 3).unwrap();
        let error = limit.admit(&a, 2).unwrap_err();
        assert!(matches!(&error, Error::QuotaExceeded { subject, .. } if subject == "token:a"));
        let more = limit.admit(&a, 1).unwrap();
        let other = limit.admit(&b, 4).unwrap();
        assert!(limit.admit(&b, 1).is_err() && limit.admit(&a, 5).is_err());
        drop(held);
        assert!(limit.admit(&a, 3).unwrap().is_some());
        drop((more, other));
        assert!(limit.held.lock().is_empty(), "names are forgotten");
    }

    #[test]
    fn without_a_limit_nothing_is_counted() {
        let limit = ClientLimit::new(0);
        assert!(limit.admit(&"a".into(), usize::MAX).unwrap().is_none());
    }
}
