//! Where artifacts live: content-addressed, create-only. And the catalogue that gives them names.

mod atomic;
mod catalog;
mod local;

use async_trait::async_trait;
use bytes::Bytes;

use crate::artifact::format::hex;
use crate::error::Result;

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

/// Lower-case hex sha256 of some bytes: the name of an artifact.
pub fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    hex(&Sha256::digest(bytes))
}
