//! Uploads on the local disk: copied from the artifact store when they are needed, dropped again when
//! the space is needed for others.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::runtime::Handle;

use super::GoingOn;
use super::table::Part;
use crate::artifact::store::ArtifactStore;
use crate::digest::hex;
use crate::error::{Error, Result};

/// Prefix of folders into which something is copied; a crash may leave one.
const COPYING: &str = ".copying-";
/// Age from which such a folder is nobody's.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Copies of uploads, each under the upload's id. Several processes may share the folder.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    /// Bytes that the copies may take, those in progress included; one that is larger alone is kept
    /// until others need the space.
    limit: u64,
    /// Copies in use in this process.
    pins: Mutex<HashMap<String, Weak<()>>>,
    /// Makes those who want the same copy wait for the first.
    copying: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

/// A copy, which stays as long as this is held.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    /// The folder that holds the upload's files.
    pub(super) folder: PathBuf,
    _pin: Arc<()>,
}

/// A copy that nobody sees yet; gone when dropped.
#[derive(Debug)]
pub(super) struct Draft {
    folder: TempDir,
    /// sha256 (hex) of the content.
    pub(super) sha256: String,
}

impl Draft {
    /// The folder that holds the upload's files.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// What is copied into one file.
pub(super) struct Blueprint<'a> {
    /// The parts, in order.
    pub(super) parts: &'a [Part],
    /// Name of the file.
    pub(super) file: &'a str,
    /// Further small files.
    pub(super) beside: &'a [(&'a str, &'a str)],
}

impl Cache {
    /// Over a folder that is made when it is needed. Blocking.
    pub(super) fn new(folder: PathBuf, limit: u64) -> Self {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let is_draft = entry.file_name().to_string_lossy().starts_with(COPYING);
            let is_old = modified(&entry.path()).elapsed().is_ok_and(|age| age > ABANDONED);
            if is_draft && is_old {
                remove(&entry.path());
            }
        }
        Self { folder, limit, pins: Mutex::default(), copying: Mutex::default() }
    }

    /// The copy of an upload, if there is one.
    pub(super) fn find(&self, id: &str) -> Option<Copy> {
        let pin = self.pin(id);
        let folder = self.folder.join(id);
        // The time of its last use decides who goes first when space is needed.
        let touched = File::open(&folder).and_then(|f| f.set_modified(SystemTime::now()));
        folder.is_dir().then(|| {
            if let Err(error) = touched {
                tracing::debug!(%error, id, "the time of use was not noted");
            }
            Copy { folder, _pin: pin }
        })
    }

    /// Copies the parts from the store, verified one by one, after copies that were not used for
    /// longest have made room. Blocking; not for async threads.
    ///
    /// # Errors
    /// `CorruptArtifact` or `NotFound` for a damaged or missing part; `Unavailable`; `Io`; what
    /// `going_on` gives.
    pub(super) fn draft(
        &self,
        blueprint: &Blueprint<'_>,
        store: &dyn ArtifactStore,
        runtime: &Handle,
        going_on: GoingOn<'_>,
    ) -> Result<Draft> {
        let bytes = blueprint.parts.iter().map(|part| part.bytes).sum::<u64>();
        let beside = blueprint.beside.iter().map(|(_, text)| text.len() as u64).sum::<u64>();
        self.make_room(bytes + beside);
        let folder = fs::create_dir_all(&self.folder)
            .and_then(|()| tempfile::Builder::new().prefix(COPYING).tempdir_in(&self.folder))
            .map_err(|error| Error::io(&self.folder, error))?;
        for (name, text) in blueprint.beside {
            let path = folder.path().join(name);
            fs::write(&path, text).map_err(|error| Error::io(&path, error))?;
        }
        let path = folder.path().join(blueprint.file);
        let failed = |error| Error::io(&path, error);
        let mut file = File::create(&path).map_err(failed)?;
        // Of its full size at once, so that others that make room count all of it.
        file.set_len(bytes).map_err(failed)?;
        let mut hash = Sha256::new();
        for part in blueprint.parts {
            going_on()?;
            let bytes = runtime.block_on(store.get(&part.digest))?;
            hash.update(&bytes);
            file.write_all(&bytes).map_err(failed)?;
        }
        Ok(Draft { folder, sha256: hex(&hash.finalize()) })
    }

    /// Keeps a draft as the copy of an upload. Blocking.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn keep(&self, id: &str, draft: Draft) -> Result<Copy> {
        let pin = self.pin(id);
        let folder = self.folder.join(id);
        let path = draft.folder.keep();
        if let Err(error) = fs::rename(&path, &folder) {
            let _ = fs::remove_dir_all(&path); // the rename's error matters more
            // Another process was faster with the same content.
            if !folder.is_dir() {
                return Err(Error::io(folder, error));
            }
        }
        Ok(Copy { folder, _pin: pin })
    }

    /// Drops a copy. Blocking.
    pub(super) fn forget(&self, id: &str) {
        remove(&self.folder.join(id));
    }

    /// Runs `work` while nobody else in this process runs it for the same upload. Blocking.
    pub(super) fn one_at_a_time<T>(&self, id: &str, work: impl FnOnce() -> T) -> T {
        let turn = Arc::clone(lock(&self.copying).entry(id.to_owned()).or_default());
        let result = {
            let _turn = lock(&turn);
            work()
        };
        let mut copying = lock(&self.copying);
        // Two: this one's and the map's; nobody waits.
        if Arc::strong_count(&turn) == 2 {
            copying.remove(id);
        }
        result
    }

    fn pin(&self, id: &str) -> Arc<()> {
        let mut pins = lock(&self.pins);
        pins.retain(|_, pin| pin.strong_count() > 0);
        if let Some(pin) = pins.get(id).and_then(Weak::upgrade) {
            return pin;
        }
        let pin = Arc::new(());
        pins.insert(id.to_owned(), Arc::downgrade(&pin));
        pin
    }

    /// Drops the copies that were not used for longest until `coming` bytes more are within the limit.
    /// What is in use or being copied stays, and counts. A failure costs disk space, nothing else.
    fn make_room(&self, coming: u64) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut copies: Vec<(SystemTime, u64, String)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                // Such as the hub's folder, which has a bound of its own.
                let is_copy = name.starts_with(COPYING) || !name.starts_with('.');
                is_copy.then(|| (modified(&entry.path()), size(&entry.path()), name))
            })
            .collect();
        copies.sort();
        let mut used = coming + copies.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        for (_, bytes, id) in copies {
            if used <= self.limit {
                return;
            }
            let in_use = lock(&self.pins).get(&id).is_some_and(|pin| pin.strong_count() > 0);
            if !id.starts_with(COPYING) && !in_use {
                tracing::info!(id, bytes, "dropped the local copy of an upload");
                self.forget(&id);
                used -= bytes;
            }
        }
        if used > self.limit {
            let limit = self.limit;
            tracing::warn!(used, limit, "copies of uploads take more than the cache's limit");
        }
    }
}

/// A failure costs disk space, nothing else.
fn remove(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(%error, folder = %folder.display(), "a copy stays"),
    }
}

fn modified(path: &Path) -> SystemTime {
    path.metadata().and_then(|about| about.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Bytes of the files in a folder.
fn size(folder: &Path) -> u64 {
    let files = folder.read_dir().into_iter().flatten().flatten();
    files.filter_map(|entry| entry.metadata().ok()).map(|about| about.len()).sum()
}

/// No code panics while it holds a lock.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::artifact::store::LocalArtifactStore;

    struct Fixture {
        folder: TempDir,
        store: LocalArtifactStore,
        runtime: tokio::runtime::Runtime,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = LocalArtifactStore::open(folder.path()).unwrap();
            Self { folder, store, runtime: tokio::runtime::Runtime::new().unwrap() }
        }

        fn cache(&self, limit: u64) -> Cache {
            Cache::new(self.folder.path().join("cache"), limit)
        }

        fn parts(&self, contents: &[&'static str]) -> Vec<Part> {
            let part = |content: &&'static str| {
                let digest = self.runtime.block_on(self.store.put(Bytes::from(*content))).unwrap();
                Part { bytes: content.len() as u64, digest }
            };
            contents.iter().map(part).collect()
        }

        fn draft(&self, cache: &Cache, parts: &[Part]) -> Result<Draft> {
            let blueprint = Blueprint { parts, file: "content", beside: &[("note", "text")] };
            cache.draft(&blueprint, &self.store, self.runtime.handle(), &|| Ok(()))
        }
    }

    #[test]
    fn parts_become_one_file() {
        let fixture = Fixture::new();
        let cache = fixture.cache(1000);
        assert!(cache.find("a").is_none());
        let draft = fixture.draft(&cache, &fixture.parts(&["ab", "c"])).unwrap();
        // FIPS 180-2, appendix B.1
        assert!(draft.sha256.starts_with("ba7816bf8f01cfea"));
        let copy = cache.keep("a", draft).unwrap();
        assert_eq!(fs::read_to_string(copy.folder.join("content")).unwrap(), "abc");
        assert_eq!(fs::read_to_string(copy.folder.join("note")).unwrap(), "text");
        assert_eq!(fixture.cache(1000).find("a").unwrap().folder, copy.folder);
        // Somebody else's copy is as good.
        let again = fixture.draft(&cache, &fixture.parts(&["abc"])).unwrap();
        assert_eq!(cache.keep("a", again).unwrap().folder, copy.folder);
        cache.forget("a");
        assert!(cache.find("a").is_none());
    }

    #[test]
    fn a_damaged_part_leaves_nothing() {
        let fixture = Fixture::new();
        let cache = fixture.cache(1000);
        let parts = fixture.parts(&["ab", "c"]);
        let objects = fixture.folder.path().join("objects/sha256");
        for entry in fs::read_dir(objects).unwrap() {
            fs::write(entry.unwrap().path(), "x").unwrap();
        }
        let error = fixture.draft(&cache, &parts).unwrap_err();
        assert!(matches!(error, Error::CorruptArtifact { .. }), "{error}");
        assert_eq!(fs::read_dir(fixture.folder.path().join("cache")).unwrap().count(), 0);
    }

    #[test]
    fn the_copy_unused_for_longest_makes_room() {
        let fixture = Fixture::new();
        let cache = fixture.cache(20); // each copy has 8 + 4 bytes
        let parts = fixture.parts(&["12345678"]);
        let copy = |id: &str| cache.keep(id, fixture.draft(&cache, &parts).unwrap()).unwrap();
        let age = |id: &str, seconds: u64| {
            let time = SystemTime::now() - Duration::from_secs(seconds);
            let folder = File::open(fixture.folder.path().join("cache").join(id)).unwrap();
            folder.set_modified(time).unwrap();
        };
        drop(copy("a"));
        age("a", 30);
        let in_use = copy("b"); // a goes
        assert!(cache.find("a").is_none());
        age("b", 20);
        drop(copy("c")); // b is in use
        assert!(in_use.folder.is_dir() && cache.find("c").is_some());
        drop(in_use);
        age("c", 10);
        age("b", 20);
        drop(copy("d")); // both are older
        assert!(cache.find("b").is_none() && cache.find("c").is_none());
        assert!(cache.find("d").is_some());
    }

    #[test]
    fn room_is_made_before_a_copy_and_one_in_progress_counts() {
        let fixture = Fixture::new();
        let cache = fixture.cache(30); // each copy has 8 + 4 bytes
        let parts = fixture.parts(&["1234", "5678"]);
        let keep = |id: &str| drop(cache.keep(id, fixture.draft(&cache, &parts).unwrap()).unwrap());
        keep("a");
        let seen = std::cell::Cell::new(Vec::new());
        let look = || {
            let entries = fs::read_dir(fixture.folder.path().join("cache")).unwrap().flatten();
            let sizes = entries.map(|entry| size(&entry.path()));
            let sizes: Vec<u64> = sizes.filter(|bytes| *bytes > 0).collect();
            seen.set([seen.take(), vec![sizes]].concat());
            Ok(())
        };
        let blueprint = Blueprint { parts: &parts, file: "content", beside: &[("note", "text")] };
        let (store, runtime) = (&fixture.store, fixture.runtime.handle());
        let draft = cache.draft(&blueprint, store, runtime, &look).unwrap();
        assert_eq!(seen.take(), vec![vec![12, 12]; 2], "of full size from the start");
        // This draft and the next one leave no room for `a`.
        let next = cache.draft(&blueprint, store, runtime, &look).unwrap();
        assert!(cache.find("a").is_none());
        assert_eq!(seen.take()[0], [12, 12], "gone before the first part has come");
        cache.keep("b", draft).unwrap();
        cache.keep("c", next).unwrap();
        assert!(cache.find("b").is_some() && cache.find("c").is_some());
    }
}
