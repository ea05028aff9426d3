//! A store whose operations are counted.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::ArtifactStore;
use crate::error::Result;
use crate::telemetry::metrics::store_operation;

/// Counts the operations on another store.
#[derive(Debug)]
pub struct MeasuredStore(Arc<dyn ArtifactStore>);

impl MeasuredStore {
    /// Around `store`.
    pub fn new(store: Arc<dyn ArtifactStore>) -> Self {
        Self(store)
    }
}

#[async_trait]
impl ArtifactStore for MeasuredStore {
    async fn reach(&self) -> Result<()> {
        self.0.reach().await
    }

    async fn put(&self, bytes: Bytes) -> Result<String> {
        let result = self.0.put(bytes).await;
        store_operation("put", &result);
        result
    }

    async fn get(&self, digest: &str) -> Result<Bytes> {
        let result = self.0.get(digest).await;
        store_operation("get", &result);
        result
    }

    async fn contains(&self, digest: &str) -> Result<bool> {
        let result = self.0.contains(digest).await;
        store_operation("contains", &result);
        result
    }

    async fn older_than(&self, age: Duration) -> Result<Vec<String>> {
        let result = self.0.older_than(age).await;
        store_operation("list", &result);
        result
    }

    async fn owner(&self) -> Result<Option<String>> {
        let result = self.0.owner().await;
        store_operation("get", &result);
        result
    }

    async fn give_to(&self, installation: &str) -> Result<()> {
        let result = self.0.give_to(installation).await;
        store_operation("put", &result);
        result
    }

    async fn delete(&self, digest: &str) -> Result<()> {
        let result = self.0.delete(digest).await;
        store_operation("delete", &result);
        result
    }
}
