//! Names of models in the database: which artifact a model id or an alias stands for.

use sqlx::{Any, Row as _, Transaction};

use crate::artifact::store::ModelRecord;
use crate::database::{Database, failed, is_duplicate};
use crate::engine::garbage::{condemn, spare};
use crate::engine::jobs::{Lease, Standing, standing_of};
use crate::engine::names::ModelId;
use crate::error::{Error, Result};

/// Names of models, shared by all servers on one database.
#[derive(Clone, Debug)]
pub struct ModelCatalog {
    database: Database,
}

/// All names, as they were at one moment.
#[derive(Clone, Debug, Default)]
pub struct CatalogContent {
    /// The models, by id.
    pub models: Vec<ModelRecord>,
    /// Aliases and the ids of their models.
    pub aliases: Vec<(String, String)>,
}

impl ModelCatalog {
    /// The catalogue in this database.
    pub fn new(database: Database) -> Self {
        Self { database }
    }

    /// A number that grows with every change.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn version(&self) -> Result<i64> {
        let query = sqlx::query_scalar("SELECT version FROM catalog");
        query.fetch_one(self.database.pool()).await.map_err(failed)
    }

    /// Everything. A record that cannot be read is logged and left out.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn read(&self) -> Result<CatalogContent> {
        let sql = "SELECT id, record FROM models ORDER BY id";
        let rows = sqlx::query(sql).fetch_all(self.database.pool()).await.map_err(failed)?;
        let mut content = CatalogContent::default();
        for row in &rows {
            let id: String = row.try_get(0).map_err(failed)?;
            let record: String = row.try_get(1).map_err(failed)?;
            match serde_json::from_str::<ModelRecord>(&record) {
                Ok(record) if record.id == id => content.models.push(record),
                Ok(record) => tracing::error!(id, found = record.id, "a record of another model"),
                Err(error) => tracing::error!(%error, id, "a model record cannot be read"),
            }
        }
        let sql = "SELECT alias, model FROM aliases ORDER BY alias";
        for row in &sqlx::query(sql).fetch_all(self.database.pool()).await.map_err(failed)? {
            let pair = (row.try_get(0).map_err(failed)?, row.try_get(1).map_err(failed)?);
            content.aliases.push(pair);
        }
        Ok(content)
    }

    /// Names a stored artifact, on behalf of the job that made it. Naming the same artifact again
    /// is fine: a job that died behind this step comes back to it.
    ///
    /// # Errors
    /// `AlreadyExists` when the id is another artifact's, or an alias; `Cancelled` when the job's
    /// lease is lost; `Unavailable`. Then nothing is listed.
    pub async fn publish(&self, record: &ModelRecord, lease: &Lease) -> Result<()> {
        let mut tx = self.change().await?;
        if standing_of(&self.database, &mut tx, lease).await? == Standing::Lost {
            return Err(Error::Cancelled);
        }
        Self::name(&mut tx, record).await?;
        tx.commit().await.map_err(failed)
    }

    /// Names a stored artifact.
    ///
    /// # Errors
    /// As [`ModelCatalog::publish`].
    #[cfg(test)]
    pub(crate) async fn create(&self, record: &ModelRecord) -> Result<()> {
        let mut tx = self.change().await?;
        Self::name(&mut tx, record).await?;
        tx.commit().await.map_err(failed)
    }

    async fn name(tx: &mut Transaction<'static, Any>, record: &ModelRecord) -> Result<()> {
        let taken = || Error::AlreadyExists { kind: "model", name: record.id.clone() };
        spare(tx, &record.digest).await?;
        let query = sqlx::query("SELECT model FROM aliases WHERE alias = $1").bind(&record.id);
        if query.fetch_optional(&mut **tx).await.map_err(failed)?.is_some() {
            return Err(taken());
        }
        let sql = "SELECT digest FROM models WHERE id = $1";
        let query = sqlx::query_scalar::<_, String>(sql).bind(&record.id);
        match query.fetch_optional(&mut **tx).await.map_err(failed)? {
            Some(digest) if digest == record.digest => return Ok(()),
            Some(_) => return Err(taken()),
            None => {}
        }
        let json = serde_json::to_string(record)
            .map_err(|error| Error::internal(format!("record of {}: {error}", record.id)))?;
        let sql = "INSERT INTO models (id, digest, record) VALUES ($1, $2, $3)";
        let query = sqlx::query(sql).bind(&record.id).bind(&record.digest).bind(json);
        match query.execute(&mut **tx).await {
            Ok(_) => Ok(()),
            Err(error) if is_duplicate(&error) => Err(taken()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Removes a model; removing an unknown one is fine. Its artifact is condemned.
    ///
    /// # Errors
    /// `FailedPrecondition` while an alias names it; `Unavailable`.
    pub async fn remove(&self, id: &ModelId) -> Result<()> {
        let mut tx = self.change().await?;
        let sql = "SELECT alias FROM aliases WHERE model = $1 ORDER BY alias LIMIT 1";
        let alias: Option<String> = sqlx::query_scalar(sql)
            .bind(id.as_str())
            .fetch_optional(&mut *tx)
            .await
            .map_err(failed)?;
        if let Some(alias) = alias {
            let reason = format!("alias `{alias}` names model `{id}`: move or remove it first");
            return Err(Error::FailedPrecondition { reason });
        }
        let sql = "DELETE FROM models WHERE id = $1 RETURNING digest";
        let digest: Option<String> = sqlx::query_scalar(sql)
            .bind(id.as_str())
            .fetch_optional(&mut *tx)
            .await
            .map_err(failed)?;
        let Some(digest) = digest else { return Ok(()) };
        condemn(&mut tx, &digest).await?;
        tx.commit().await.map_err(failed)
    }

    /// Points an alias, old or new, to a model.
    ///
    /// # Errors
    /// `NotFound` for the model; `AlreadyExists` when a model has that id; `Unavailable`.
    pub async fn set_alias(&self, alias: &ModelId, model: &ModelId) -> Result<()> {
        let mut tx = self.change().await?;
        if has_model(&mut tx, alias).await? {
            return Err(Error::AlreadyExists { kind: "model", name: alias.to_string() });
        }
        if !has_model(&mut tx, model).await? {
            return Err(Error::NotFound { kind: "model", name: model.to_string() });
        }
        let sql = "INSERT INTO aliases (alias, model) VALUES ($1, $2) \
                   ON CONFLICT (alias) DO UPDATE SET model = excluded.model";
        let query = sqlx::query(sql).bind(alias.as_str()).bind(model.as_str());
        query.execute(&mut *tx).await.map_err(failed)?;
        tx.commit().await.map_err(failed)
    }

    /// Forgets an alias; its model stays.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn remove_alias(&self, alias: &ModelId) -> Result<()> {
        let mut tx = self.change().await?;
        let query = sqlx::query("DELETE FROM aliases WHERE alias = $1").bind(alias.as_str());
        if query.execute(&mut *tx).await.map_err(failed)?.rows_affected() == 0 {
            return Err(Error::NotFound { kind: "alias", name: alias.to_string() });
        }
        tx.commit().await.map_err(failed)
    }

    /// Begins a change of names. The counter's row makes writers wait for each other: a model and
    /// an alias of the same name cannot appear at once.
    async fn change(&self) -> Result<Transaction<'static, Any>> {
        let mut tx = self.database.write().await?;
        let query = sqlx::query("UPDATE catalog SET version = version + 1");
        query.execute(&mut *tx).await.map_err(failed)?;
        Ok(tx)
    }
}

async fn has_model(tx: &mut Transaction<'static, Any>, id: &ModelId) -> Result<bool> {
    let query = sqlx::query("SELECT id FROM models WHERE id = $1").bind(id.as_str());
    Ok(query.fetch_optional(&mut **tx).await.map_err(failed)?.is_some())
}
