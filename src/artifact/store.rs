//! Where artifacts live: content-addressed, create-only.

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::Result;

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
