//! Stored objects that nothing names any more, and their removal.
//!
//! Objects are stored before they are named, and two names may stand for the same bytes. So nobody
//! deletes an object because of what he knows: he condemns its digest, and the collector deletes
//! what is condemned and still named by nothing, holding the digest's row. Whoever names an object
//! spares it in the same transaction, which waits for the collector and keeps others from condemning
//! it, and looks afterwards whether the object is still there ([`put_named`]).
//!
//! [`put_named`]: crate::artifact::store::put_named

use std::sync::Arc;
use std::time::Duration;

use sqlx::{Any, AssertSqlSafe, Transaction};

use crate::artifact::store::ArtifactStore;
use crate::database::{Database, failed};
use crate::error::Result;

/// Digests of all objects that something names.
const NAMED: &str = "SELECT digest FROM models UNION SELECT digest FROM job_units \
                     UNION SELECT digest FROM upload_parts";

/// Deletes stored objects that nothing names.
#[derive(Clone, Debug)]
pub struct Garbage {
    database: Database,
    store: Arc<dyn ArtifactStore>,
}

impl Garbage {
    /// What the database names counts; the rest of the store is garbage.
    pub fn new(database: Database, store: Arc<dyn ArtifactStore>) -> Self {
        Self { database, store }
    }

    /// Deletes what is condemned. A failure costs disk space, nothing else.
    pub async fn collect(&self) {
        match self.try_collect().await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "deleted objects that nothing names"),
            Err(error) => tracing::warn!(%error, "unused objects stay in the store"),
        }
    }

    /// Deletes those of the objects that nothing names. A failure costs disk space, nothing else.
    pub async fn forget_unused(&self, digests: &[String]) {
        if let Err(error) = self.condemn_unnamed(digests).await {
            tracing::warn!(%error, "unused objects stay in the store");
        }
        self.collect().await;
    }

    /// Deletes what nothing names and was stored longer ago than anything that could still be named.
    /// A failure costs disk space, nothing else.
    pub async fn collect_orphans(&self, age: Duration) {
        match self.store.older_than(age).await {
            Ok(stored) => self.forget_unused(&stored).await,
            Err(error) => tracing::warn!(%error, "stored objects could not be listed"),
        }
    }

    async fn condemn_unnamed(&self, digests: &[String]) -> Result<()> {
        let query = sqlx::query_scalar::<_, String>(NAMED);
        let named = query.fetch_all(self.database.pool()).await.map_err(failed)?;
        let named: std::collections::HashSet<String> = named.into_iter().collect();
        for digest in digests.iter().filter(|digest| !named.contains(*digest)) {
            let mut tx = self.database.write().await?;
            condemn(&mut tx, digest).await?;
            tx.commit().await.map_err(failed)?;
        }
        Ok(())
    }

    async fn try_collect(&self) -> Result<usize> {
        let sql = "SELECT digest FROM condemned ORDER BY digest";
        let query = sqlx::query_scalar(sql);
        let digests: Vec<String> = query.fetch_all(self.database.pool()).await.map_err(failed)?;
        let mut count = 0;
        for digest in digests {
            // The row is held while the object is deleted: whoever is about to name it waits, and
            // stores it again.
            let mut tx = self.database.write().await?;
            let sql = AssertSqlSafe(format!(
                "SELECT digest FROM condemned WHERE digest = $1{}",
                self.database.skip_locked()
            ));
            let query = sqlx::query(sql).bind(&digest);
            if query.fetch_optional(&mut *tx).await.map_err(failed)?.is_none() {
                continue;
            }
            let sql =
                AssertSqlSafe(format!("SELECT digest FROM ({NAMED}) AS named WHERE digest = $1"));
            let query = sqlx::query(sql).bind(&digest);
            if query.fetch_optional(&mut *tx).await.map_err(failed)?.is_none() {
                self.store.delete(&digest).await?;
                count += 1;
            }
            let query = sqlx::query("DELETE FROM condemned WHERE digest = $1").bind(&digest);
            query.execute(&mut *tx).await.map_err(failed)?;
            tx.commit().await.map_err(failed)?;
        }
        Ok(count)
    }
}

/// Condemns an object: it is deleted unless something names it by then.
///
/// # Errors
/// `Unavailable`.
pub(super) async fn condemn(tx: &mut Transaction<'static, Any>, digest: &str) -> Result<()> {
    let sql = "INSERT INTO condemned (digest) VALUES ($1) ON CONFLICT (digest) DO NOTHING";
    sqlx::query(sql).bind(digest).execute(&mut **tx).await.map_err(failed).map(drop)
}

/// Spares an object that the transaction names: waits for whoever is deleting it, and keeps others
/// from condemning it until the name is there.
///
/// # Errors
/// `Unavailable`.
pub(super) async fn spare(tx: &mut Transaction<'static, Any>, digest: &str) -> Result<()> {
    for sql in [
        "INSERT INTO condemned (digest) VALUES ($1) \
         ON CONFLICT (digest) DO UPDATE SET digest = excluded.digest",
        "DELETE FROM condemned WHERE digest = $1",
    ] {
        sqlx::query(sql).bind(digest).execute(&mut **tx).await.map_err(failed)?;
    }
    Ok(())
}
