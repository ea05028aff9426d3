//! Where artifacts live: content-addressed, create-only. And the catalogue that gives them names.

mod atomic;
mod catalog;
mod local;

use std::fs::{self, File, TryLockError};
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{Error, Result};

#[cfg(test)]
pub(crate) use catalog::example_record;
pub use catalog::{ModelCatalog, ModelRecord, RecordOrigin};
pub use local::LocalArtifactStore;

/// Stores immutable artifacts under the sha256 of their bytes.
#[async_trait]
pub trait ArtifactStore: Send + Sync + std::fmt::Debug {
    /// Stores the bytes under their digest, which is returned. Storing equal bytes again is fine.
    ///
    /// # Errors
    /// `Io` when they cannot be stored; then nothing is visible under the digest.
    async fn put(&self, bytes: Bytes) -> Result<String>;

    /// The bytes of that digest, verified.
    ///
    /// # Errors
    /// `NotFound`; `CorruptArtifact` when the content no longer has that digest.
    async fn get(&self, digest: &str) -> Result<Bytes>;

    /// Forgets an artifact. Forgetting an unknown one is fine.
    ///
    /// # Errors
    /// `Io` when the store refuses.
    async fn delete(&self, digest: &str) -> Result<()>;
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
