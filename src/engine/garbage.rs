//! Stored objects that nothing names any more, and their removal.
//!
//! Objects are stored before they are named, and two names may stand for the same bytes. So nobody
//! deletes an object because of what he knows: he condemns its digest, and the collector deletes
//! what is condemned and still named by nothing, holding the digest's row. Whoever names an object
//! spares it in the same transaction, which waits for the collector and keeps others from condemning
//! it, and looks afterwards whether the object is still there ([`put_named`]).
//!
//! A store belongs to the database that first named something in it, or found it empty. With another
//! database, such as a new one after the old one was lost, nothing of it is garbage.
//!
//! [`put_named`]: crate::artifact::store::put_named

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::{Any, AssertSqlSafe, Transaction};

use crate::artifact::store::ArtifactStore;
use crate::database::{Database, failed};
use crate::error::Result;

/// Digests of all objects that something names.
const NAMED: &str = "SELECT digest FROM models UNION SELECT digest FROM job_units \
                     UNION SELECT digest FROM upload_parts";

/// Digests of the objects that are to be deleted.
const CONDEMNED: &str = "SELECT digest FROM condemned";

/// Deletes stored objects that nothing names.
#[derive(Clone, Debug)]
pub struct Garbage {
    database: Database,
    store: Arc<dyn ArtifactStore>,
    /// Set once the store is known to be this database's.
    ours: Arc<OnceLock<()>>,
}

impl Garbage {
    /// What the database names counts; the rest of the store is garbage.
    pub fn new(database: Database, store: Arc<dyn ArtifactStore>) -> Self {
        Self { database, store, ours: Arc::default() }
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
        match self.try_collect_orphans(age).await {
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "unused objects stay in the store"),
        }
    }

    async fn try_collect_orphans(&self, age: Duration) -> Result<()> {
        if self.is_ours().await? {
            let stored = self.store.older_than(age).await?;
            self.forget_unused(&stored).await;
        }
        Ok(())
    }

    /// Whether this database may clean up the store, which becomes its own where it is nobody's and
    /// empty, or holds something that the database knows. Says why not in the log.
    async fn is_ours(&self) -> Result<bool> {
        if self.ours.get().is_some() {
            return Ok(true);
        }
        let id = self.database.installation().await?;
        let mut owner = self.store.owner().await?;
        if owner.is_none() {
            let stored = self.store.older_than(Duration::ZERO).await?;
            // What is condemned was named until now.
            let mut known = self.digests(NAMED).await?;
            known.extend(self.digests(CONDEMNED).await?);
            if stored.is_empty() || stored.iter().any(|digest| known.contains(digest)) {
                self.store.give_to(&id).await?;
                owner = self.store.owner().await?;
            }
        }
        let ours = owner.as_deref() == Some(&id);
        if ours {
            self.ours.get_or_init(|| ());
        } else {
            let owner = owner.unwrap_or_default();
            tracing::warn!(
                %owner,
                installation = id,
                "the store holds another database's objects: nothing is deleted from it"
            );
        }
        Ok(ours)
    }

    /// In the order of the digests, which all who collect go by.
    async fn digests(&self, query: &'static str) -> Result<BTreeSet<String>> {
        let query = sqlx::query_scalar::<_, String>(query);
        let digests = query.fetch_all(self.database.pool()).await.map_err(failed)?;
        Ok(digests.into_iter().collect())
    }

    async fn condemn_unnamed(&self, digests: &[String]) -> Result<()> {
        let named = self.digests(NAMED).await?;
        for digest in digests.iter().filter(|digest| !named.contains(*digest)) {
            let mut tx = self.database.write().await?;
            condemn(&mut tx, digest).await?;
            tx.commit().await.map_err(failed)?;
        }
        Ok(())
    }

    async fn try_collect(&self) -> Result<usize> {
        let digests = self.digests(CONDEMNED).await?;
        if digests.is_empty() || !self.is_ours().await? {
            return Ok(0);
        }
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

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::artifact::store::{LocalArtifactStore, example_record};
    use crate::engine::catalog::ModelCatalog;

    const ANY_AGE: Duration = Duration::ZERO;

    /// A database with nothing in it, a catalogue of it, and its view of a store.
    async fn installation(folder: &TempDir, store: &LocalArtifactStore) -> (ModelCatalog, Garbage) {
        let database = Database::file(&folder.path().join("db")).await.unwrap();
        let garbage = Garbage::new(database.clone(), Arc::new(store.clone()));
        (ModelCatalog::new(database), garbage)
    }

    #[tokio::test]
    async fn a_new_database_deletes_nothing_that_another_one_stored() {
        let [old, new, data] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let store = LocalArtifactStore::open(data.path()).unwrap();
        let (catalog, garbage) = installation(&old, &store).await;
        let named = store.put("named".into()).await.unwrap();
        catalog.create(&example_record("m", &named)).await.unwrap();
        let (_, of_new) = installation(&new, &store).await;
        // Neither before the store is the old one's nor afterwards.
        for garbage in [&of_new, &garbage, &of_new] {
            garbage.collect_orphans(ANY_AGE).await;
            assert!(store.contains(&named).await.unwrap());
        }

        let orphan = store.put("orphan".into()).await.unwrap();
        of_new.collect_orphans(ANY_AGE).await;
        assert!(store.contains(&orphan).await.unwrap());
        // A copy of the database is the same installation.
        let copy = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(old.path()).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
        }
        let (_, of_copy) = installation(&copy, &store).await;
        of_copy.collect_orphans(ANY_AGE).await;
        assert!(!store.contains(&orphan).await.unwrap() && store.contains(&named).await.unwrap());
    }

    #[tokio::test]
    async fn an_empty_store_is_the_first_ones() {
        let [first, second, data] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let store = LocalArtifactStore::open(data.path()).unwrap();
        let (_, garbage) = installation(&first, &store).await;
        garbage.collect_orphans(ANY_AGE).await;
        let orphan = store.put("orphan".into()).await.unwrap();
        let (_, of_second) = installation(&second, &store).await;
        of_second.collect_orphans(ANY_AGE).await;
        assert!(store.contains(&orphan).await.unwrap());
        garbage.collect_orphans(ANY_AGE).await;
        assert!(!store.contains(&orphan).await.unwrap());
    }
}
