//! Answers by content: an image that a model has seen is not computed again.
//!
//! The same bytes, the same artifact and the same arithmetic give the same logits, bit for bit, so an
//! entry is never wrong; it is only forgotten. A model that takes over an alias, or an id, has another
//! digest and starts without entries.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use moka::sync::Cache;
use sha2::{Digest, Sha256};

use crate::artifact::store::ModelRecord;
use crate::exec::Backend;
use crate::telemetry::metrics;

/// Bytes that are hashed at a time: some tens of microseconds, then others have their turn.
const RUN: usize = 64 << 10;
/// Bytes of an entry besides its logits: key, pointers and the books of the cache, rounded up.
const OVERHEAD: usize = 256;

/// Bounds of a [`ResponseCache`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheLimits {
    /// Bytes of all entries; 0 keeps none.
    pub bytes: u64,
    /// For how long an entry is kept; without one, until others need the room.
    pub lifetime: Option<Duration>,
}

/// Which answer: the hash of the artifact's digest, the executor and the image's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

/// Logits by [`Key`]. What is used least, and least recently, makes room.
#[derive(Debug)]
pub struct ResponseCache {
    /// `None` when it is off.
    entries: Option<Cache<Key, Arc<[f32]>>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl ResponseCache {
    /// An empty cache.
    pub fn new(limits: CacheLimits) -> Self {
        let CacheLimits { bytes, lifetime } = limits;
        let build = || {
            let weigh = |_: &Key, logits: &Arc<[f32]>| {
                u32::try_from(size_of_val(&**logits) + OVERHEAD).unwrap_or(u32::MAX)
            };
            let builder = Cache::builder().max_capacity(bytes).weigher(weigh);
            match lifetime {
                Some(lifetime) => builder.time_to_live(lifetime).build(),
                None => builder.build(),
            }
        };
        let entries = (bytes > 0).then(build);
        Self { entries, hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// Whether it keeps anything.
    pub fn is_on(&self) -> bool {
        self.entries.is_some()
    }

    /// Images that were answered from here.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Images that were looked for and not found.
    pub fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    /// The logits under a key; found or not, it is counted.
    pub(super) fn find(&self, key: &Key) -> Option<Vec<f32>> {
        let found = self.entries.as_ref().and_then(|entries| entries.get(key));
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        let logits = found?;
        metrics::cache_hit("responses");
        Some(logits.to_vec())
    }

    /// Keeps logits.
    pub(super) fn keep(&self, key: Key, logits: &[f32]) {
        if let Some(entries) = &self.entries {
            entries.insert(key, logits.into());
        }
    }
}

impl Key {
    /// Hashes an image's bytes; a large one in several turns.
    pub(super) async fn of(model: &ModelRecord, backend: Backend, content: &[u8]) -> Self {
        let mut hash = Sha256::new();
        // Neither the digest nor the name holds the separator.
        hash.update(format!("{}\n{backend}\n", model.digest));
        for (number, run) in content.chunks(RUN).enumerate() {
            if number > 0 {
                tokio::task::yield_now().await;
            }
            hash.update(run);
        }
        Self(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::store::example_record;

    fn cache(bytes: u64) -> ResponseCache {
        ResponseCache::new(CacheLimits { bytes, lifetime: None })
    }

    #[tokio::test]
    async fn keys_tell_models_executors_and_images_apart() {
        let key = async |digest: &str, backend, content: &[u8]| {
            Key::of(&example_record("m", digest), backend, content).await
        };
        let base = key("d", Backend::Simulated, b"image").await;
        assert_eq!(base, key("d", Backend::Simulated, b"image").await);
        assert_ne!(base, key("e", Backend::Simulated, b"image").await);
        assert_ne!(base, key("d", Backend::Float, b"image").await);
        assert_ne!(base, key("d", Backend::Simulated, b"imagf").await);
        // Beyond the first run, too.
        let (mut long, backend) = (vec![0; RUN + 1], Backend::Simulated);
        let before = key("d", backend, &long).await;
        long[RUN] = 1;
        assert_ne!(before, key("d", backend, &long).await);
    }

    #[tokio::test]
    async fn what_is_kept_is_found_and_counted() {
        let cache = cache(1 << 20);
        let key = Key::of(&example_record("m", "d"), Backend::Simulated, b"image").await;
        assert_eq!(cache.find(&key), None);
        cache.keep(key, &[1.0, -2.5]);
        assert_eq!(cache.find(&key), Some(vec![1.0, -2.5]));
        assert_eq!((cache.hits(), cache.misses()), (1, 1));
    }

    #[tokio::test]
    async fn the_bytes_are_bounded() {
        let cache = cache(10 * (OVERHEAD as u64 + 400));
        let record = example_record("m", "d");
        for image in 0..100_u8 {
            let key = Key::of(&record, Backend::Simulated, &[image]).await;
            cache.keep(key, &[0.0; 100]);
        }
        let entries = cache.entries.as_ref().unwrap();
        entries.run_pending_tasks();
        assert!((1..=10).contains(&entries.entry_count()), "{}", entries.entry_count());
        assert!(entries.weighted_size() <= 10 * (OVERHEAD as u64 + 400));
    }

    #[tokio::test]
    async fn without_room_it_is_off() {
        let cache = cache(0);
        assert!(!cache.is_on());
        let key = Key::of(&example_record("m", "d"), Backend::Simulated, b"image").await;
        cache.keep(key, &[1.0]);
        assert_eq!(cache.find(&key), None);
    }
}
