//! Where artifacts live: content-addressed, create-only; in a folder or in an object store.

mod atomic;
mod local;
mod measured;
mod record;
mod remote;

use std::fs::{self, File, TryLockError};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::digest::sha256_hex;
use crate::error::{Error, Result};

pub use local::LocalArtifactStore;
pub use measured::MeasuredStore;
#[cfg(test)]
pub(crate) use record::example_record;
pub use record::{ModelRecord, RecordOrigin};
pub use remote::RemoteArtifactStore;

/// Stores immutable artifacts under the sha256 of their bytes.
#[async_trait]
pub trait ArtifactStore: Send + Sync + std::fmt::Debug {
    /// Asks whether the store answers. A folder was opened already, and has nothing to ask.
    ///
    /// # Errors
    /// `Unavailable`.
    async fn reach(&self) -> Result<()> {
        Ok(())
    }

    /// Stores the bytes under their digest, which is returned. Storing equal bytes again is fine.
    ///
    /// # Errors
    /// `Io` or `Unavailable` when they cannot be stored; then nothing is visible under the digest.
    async fn put(&self, bytes: Bytes) -> Result<String>;

    /// The bytes of that digest, verified.
    ///
    /// # Errors
    /// `NotFound`; `CorruptArtifact` when the content no longer has that digest; `Io`;
    /// `Unavailable`.
    async fn get(&self, digest: &str) -> Result<Bytes>;

    /// Whether an artifact of that digest is there; its content is not looked at.
    ///
    /// # Errors
    /// `Io` or `Unavailable` when the store cannot be asked.
    async fn contains(&self, digest: &str) -> Result<bool>;

    /// Digests of the artifacts that were stored longer than `age` ago.
    ///
    /// # Errors
    /// `Io` or `Unavailable` when the store cannot be asked.
    async fn older_than(&self, age: Duration) -> Result<Vec<String>>;

    /// The id of the installation that may clean up here; `None` before [`ArtifactStore::give_to`].
    ///
    /// # Errors
    /// `Io` or `Unavailable` when the store cannot be asked.
    async fn owner(&self) -> Result<Option<String>>;

    /// Gives the store to an installation, unless it belongs to one.
    ///
    /// # Errors
    /// `Io` or `Unavailable` when the store refuses.
    async fn give_to(&self, installation: &str) -> Result<()>;

    /// Forgets an artifact. Forgetting an unknown one is fine.
    ///
    /// # Errors
    /// `Io` or `Unavailable` when the store refuses.
    async fn delete(&self, digest: &str) -> Result<()>;
}

/// The store that a URL names: `s3://`, `gs://`, `az://` or `file:///…`; without one, the folder
/// `data_dir`. Blocking.
///
/// # Errors
/// `InvalidArgument` on `store`; `Io` when a folder cannot be used.
pub fn open(url: Option<&str>, data_dir: &Path) -> Result<Arc<dyn ArtifactStore>> {
    match url {
        None => Ok(Arc::new(LocalArtifactStore::open(data_dir)?)),
        Some(url) => match folder_of(url)? {
            Some(folder) => Ok(Arc::new(LocalArtifactStore::shared(folder)?)),
            None => Ok(Arc::new(RemoteArtifactStore::open(url)?)),
        },
    }
}

/// Whether [`open`] would understand a URL and the settings that belong to it; nothing is asked of the
/// store.
///
/// # Errors
/// `InvalidArgument` on `store`.
pub fn check_url(url: &str) -> Result<()> {
    match folder_of(url)? {
        Some(_) => Ok(()),
        None => RemoteArtifactStore::open(url).map(drop),
    }
}

/// The folder of a `file:///…` URL.
fn folder_of(url: &str) -> Result<Option<&Path>> {
    match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => Ok(Some(Path::new(path))),
        Some(_) => Err(Error::invalid("store", "a file URL has three slashes and a full path")),
        None => Ok(None),
    }
}

/// Stores bytes and has their digest named, in an order that no cleaning can come between: what is
/// stored and not named yet may be deleted as nobody's.
///
/// # Errors
/// Of the store, and those of `name`; then nothing is named, or it may be tried again.
pub async fn put_named<T, F: Future<Output = Result<T>>>(
    store: &dyn ArtifactStore,
    bytes: Bytes,
    name: impl FnOnce(String) -> F,
) -> Result<T> {
    let digest = store.put(bytes.clone()).await?;
    let named = name(digest.clone()).await?;
    if !store.contains(&digest).await? {
        store.put(bytes).await?;
    }
    Ok(named)
}

/// Whether a name is a sha256 in hexadecimal digits: anything else names no artifact.
fn is_digest(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The object beside the artifacts that names their installation.
const OWNER: &str = "installation";

/// The id in that object; whatever else is there is nobody's.
fn owner_in(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

fn not_found(name: &str) -> Error {
    Error::NotFound { kind: "artifact", name: name.to_owned() }
}

/// Checks what was read under a digest.
fn verified(name: &str, bytes: Bytes) -> Result<Bytes> {
    if sha256_hex(&bytes) == name {
        return Ok(bytes);
    }
    Err(Error::corrupt(name, "the stored bytes do not have this digest"))
}

/// Claims a data folder for this process, until the returned file is dropped. Blocking.
///
/// # Errors
/// `FailedPrecondition` while another process has it; `Io` when the folder cannot be used.
pub fn claim_folder(data_dir: &Path) -> Result<File> {
    fs::create_dir_all(data_dir).map_err(|error| Error::io(data_dir, error))?;
    let path = data_dir.join("lock");
    let file = File::create(&path).map_err(|error| Error::io(&path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::FailedPrecondition {
            reason: format!("{} is in use by another server", data_dir.display()),
        }),
        Err(TryLockError::Error(error)) => Err(Error::io(path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_folder_has_one_server_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let claim = claim_folder(folder.path()).unwrap();
        let error = claim_folder(folder.path()).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }));
        drop(claim);
        claim_folder(folder.path()).unwrap();
    }
}
