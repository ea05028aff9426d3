//! Artifacts in a local folder: `objects/sha256/<digest>.safetensors`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::atomic::{self, Place, WriteFn};
use super::{ArtifactStore, OWNER, is_digest, not_found, owner_in, verified};
use crate::digest::sha256_hex;
use crate::error::{Error, Result};

/// An [`ArtifactStore`] in a folder of this machine.
#[derive(Clone, Debug)]
pub struct LocalArtifactStore {
    folder: PathBuf,
    write: WriteFn,
}

impl LocalArtifactStore {
    /// Opens, or creates, the store below a folder that other processes may use, too. Blocking.
    ///
    /// # Errors
    /// `Io` when the folder cannot be used.
    pub fn shared(folder: &Path) -> Result<Self> {
        Self::with_writer(folder, atomic::write_all)
    }

    /// The same below the data folder of this process alone, without what a crash left there.
    ///
    /// # Errors
    /// `Io` when the folder cannot be used.
    pub fn open(data_dir: &Path) -> Result<Self> {
        let store = Self::shared(data_dir)?;
        atomic::clear_interrupted(&store.folder)?;
        Ok(store)
    }

    pub(super) fn with_writer(folder: &Path, write: WriteFn) -> Result<Self> {
        let folder = folder.join("objects").join("sha256");
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        Ok(Self { folder, write })
    }

    /// The only way from a digest to a path: anything but 64 hex digits names nothing.
    fn path(&self, name: &str) -> Result<PathBuf> {
        if !is_digest(name) {
            return Err(not_found(name));
        }
        Ok(self.folder.join(format!("{name}.safetensors")))
    }

    fn put_blocking(&self, bytes: &[u8]) -> Result<String> {
        let name = sha256_hex(bytes);
        let path = self.path(&name)?;
        if !atomic::put(&path, bytes, Place::Free, self.write)? {
            // The same artifact is stored already. Should that copy have rotted, this one heals it.
            let stored = fs::read(&path).map_err(|error| Error::io(&path, error))?;
            if sha256_hex(&stored) != name {
                atomic::put(&path, bytes, Place::Any, self.write)?;
            }
        }
        Ok(name)
    }

    fn get_blocking(&self, name: &str) -> Result<Bytes> {
        let path = self.path(name)?;
        let bytes = fs::read(&path).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            if missing { not_found(name) } else { Error::io(&path, error) }
        })?;
        verified(name, bytes.into())
    }

    fn older_than_blocking(&self, age: Duration) -> Result<Vec<String>> {
        let failed = |error| Error::io(&self.folder, error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let stored = entry.metadata().and_then(|metadata| metadata.modified());
            let path = entry.path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            // A file from the future is young; so is one that vanished meanwhile.
            let is_old = stored.ok().and_then(|time| time.elapsed().ok()).is_some_and(|t| t >= age);
            if is_old && is_digest(name) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Beside the folder of artifacts.
    fn owner_path(&self) -> PathBuf {
        self.folder.with_file_name(OWNER)
    }

    fn owner_blocking(&self) -> Result<Option<String>> {
        let path = self.owner_path();
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(owner_in(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path, error)),
        }
    }

    fn delete_blocking(&self, name: &str) -> Result<()> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => atomic::sync_folder(&self.folder),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io(path, error)),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .map_err(|error| Error::internal(format!("store task: {error}")))?
    }
}

#[async_trait]
impl ArtifactStore for LocalArtifactStore {
    async fn put(&self, bytes: Bytes) -> Result<String> {
        self.blocking(move |store| store.put_blocking(&bytes)).await
    }

    async fn get(&self, digest: &str) -> Result<Bytes> {
        let name = digest.to_owned();
        self.blocking(move |store| store.get_blocking(&name)).await
    }

    async fn contains(&self, digest: &str) -> Result<bool> {
        let name = digest.to_owned();
        self.blocking(move |store| Ok(store.path(&name)?.is_file())).await
    }

    async fn older_than(&self, age: Duration) -> Result<Vec<String>> {
        self.blocking(move |store| store.older_than_blocking(age)).await
    }

    async fn owner(&self) -> Result<Option<String>> {
        self.blocking(Self::owner_blocking).await
    }

    async fn give_to(&self, installation: &str) -> Result<()> {
        let id = installation.to_owned();
        self.blocking(move |store| {
            let path = store.owner_path();
            atomic::put(&path, id.as_bytes(), Place::Free, store.write).map(drop)
        })
        .await
    }

    async fn delete(&self, digest: &str) -> Result<()> {
        let name = digest.to_owned();
        self.blocking(move |store| store.delete_blocking(&name)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stores_verifies_and_forgets() {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalArtifactStore::open(folder.path()).unwrap();
        let name = store.put(Bytes::from_static(b"abc")).await.unwrap();
        // FIPS 180-2, appendix B.1
        assert_eq!(name, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(store.put(Bytes::from_static(b"abc")).await.unwrap(), name);
        assert_eq!(store.get(&name).await.unwrap(), "abc");
        store.delete(&name).await.unwrap();
        store.delete(&name).await.unwrap();
        assert!(matches!(store.get(&name).await.unwrap_err(), Error::NotFound { .. }));
    }

    #[tokio::test]
    async fn a_flipped_bit_is_found_and_healed_by_the_next_put() {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalArtifactStore::open(folder.path()).unwrap();
        let name = store.put(Bytes::from_static(b"abc")).await.unwrap();
        fs::write(store.path(&name).unwrap(), b"abb").unwrap();
        assert!(matches!(store.get(&name).await.unwrap_err(), Error::CorruptArtifact { .. }));
        store.put(Bytes::from_static(b"abc")).await.unwrap();
        assert_eq!(store.get(&name).await.unwrap(), "abc");
    }

    #[tokio::test]
    async fn names_that_are_no_digests_reach_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalArtifactStore::open(folder.path()).unwrap();
        for name in ["", "../../secret", &"A".repeat(64), &"a/".repeat(32)] {
            assert!(matches!(store.get(name).await.unwrap_err(), Error::NotFound { .. }));
        }
    }

    #[tokio::test]
    async fn a_full_disk_shows_no_artifact() {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalArtifactStore::with_writer(folder.path(), atomic::full_disk).unwrap();
        assert!(matches!(store.put("abcd".into()).await.unwrap_err(), Error::Io { .. }));
        assert!(matches!(
            store.get(&sha256_hex(b"abcd")).await.unwrap_err(),
            Error::NotFound { .. }
        ));
    }
}
