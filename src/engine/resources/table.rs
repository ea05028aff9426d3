//! Uploads in the database: what is announced, what has come, which parts it lies in.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::any::AnyRow;
use sqlx::{Any, AssertSqlSafe, Transaction};
use ulid::Ulid;

use super::{Page, ResourceKind};
use crate::database::{Database, broken, column, failed, milliseconds, number, time};
use crate::engine::garbage::spare;
use crate::error::{Error, Result};

/// Columns of an [`Upload`], in the order of [`upload`].
const UPLOAD: &str = "id, kind, name, sha256, config, bytes, images, received_bytes, \
                      received_images, created_ms, touched_ms, summary";

/// What a client announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Checkpoint or data set.
    pub kind: ResourceKind,
    /// Its name in requests.
    pub name: String,
    /// The text of a checkpoint's `config.json`; empty for a data set.
    pub config: String,
    /// What will come.
    pub content: Content,
}

/// What will come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file: `model.safetensors` of a checkpoint, a tar file of a data set.
    File {
        /// Its size.
        bytes: u64,
        /// Its sha256 in hexadecimal digits.
        sha256: String,
    },
    /// So many images of a data set, one by one.
    Images(u64),
}

/// An upload on its way, or whole.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Identifies it for ever: a name may stand for something else later.
    pub id: String,
    /// What was announced.
    pub announced: Announced,
    /// Bytes that are stored: of the file, or of the tar file that the images are put into.
    pub received_bytes: u64,
    /// Images that are stored, of those that come one by one.
    pub received_images: u64,
    /// When it began.
    pub created: Timestamp,
    /// When something last came.
    pub touched: Timestamp,
    /// What it turned out to be, once it is whole and checked: from then on it is visible.
    pub summary: Option<Summary>,
}

/// What an upload turned out to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Summary {
    /// A float checkpoint.
    Checkpoint {
        /// timm's architecture name.
        architecture: String,
        /// sha256 over `config.json` and `model.safetensors`.
        digest: String,
    },
    /// A labelled data set.
    Dataset {
        /// sha256 of its tar file.
        digest: String,
        /// Number of images.
        images: u64,
        /// Class names in class order.
        classes: Vec<String>,
    },
}

/// The right to add to an upload; a later one takes it away.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) id: String,
    writer: String,
}

/// A piece of an upload's content.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) bytes: u64,
    pub(super) digest: String,
}

/// Uploads, shared by all servers on one database.
#[derive(Clone, Debug)]
pub(super) struct UploadTable {
    database: Database,
    /// Most bytes of all uploads together, as announced.
    quota: u64,
}

impl UploadTable {
    pub(super) fn new(database: Database, quota: u64) -> Self {
        Self { database, quota }
    }

    /// Begins an upload, or goes on with the same one. A whole one is returned as it is.
    ///
    /// # Errors
    /// `AlreadyExists` when something else has this name; `FailedPrecondition` while an unfinished
    /// upload of something else has it; `QuotaExceeded`; `Unavailable`.
    pub(super) async fn begin(&self, announced: &Announced) -> Result<(Upload, Claim)> {
        let mut tx = self.database.write().await?;
        self.gate(&mut tx).await?;
        let now = self.database.clock(&mut tx).await?;
        let writer = Ulid::generate().to_string();
        let Announced { kind, name, config, content } = announced;
        if let Some(found) = self.select(&mut tx, *kind, name).await? {
            if found.announced != *announced {
                return Err(taken(&found));
            }
            let sql = "UPDATE uploads SET writer = $1, touched_ms = $2 WHERE id = $3";
            let query = sqlx::query(sql).bind(&writer).bind(now).bind(&found.id);
            query.execute(&mut *tx).await.map_err(failed)?;
            tx.commit().await.map_err(failed)?;
            let claim = Claim { id: found.id.clone(), writer };
            return Ok((found, claim));
        }
        let (bytes, images, sha256) = match content {
            Content::File { bytes, sha256 } => (*bytes, 0, sha256.as_str()),
            Content::Images(images) => (0, *images, ""),
        };
        self.check_quota(&mut tx, bytes).await?;
        let id = Ulid::generate().to_string();
        let sql = "INSERT INTO uploads (id, kind, name, sha256, config, bytes, images, \
                   received_bytes, received_images, writer, created_ms, touched_ms) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, 0, 0, $8, $9, $9)";
        sqlx::query(sql)
            .bind(&id)
            .bind(kind.name())
            .bind(name)
            .bind(sha256)
            .bind(config)
            .bind(signed(bytes)?)
            .bind(signed(images)?)
            .bind(&writer)
            .bind(now)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        let upload = self.select(&mut tx, *kind, name).await?.ok_or_else(broken)?;
        tx.commit().await.map_err(failed)?;
        Ok((upload, Claim { id, writer }))
    }

    /// Notes a stored part that follows the `received` bytes so far.
    ///
    /// # Errors
    /// `FailedPrecondition` when another stream has taken over, or the upload is gone;
    /// `QuotaExceeded`, for images that come one by one; `Unavailable`.
    pub(super) async fn append(
        &self,
        claim: &Claim,
        received: u64,
        part: &Part,
        images: u64,
    ) -> Result<()> {
        let mut tx = self.database.write().await?;
        if images > 0 {
            self.gate(&mut tx).await?;
            self.check_quota(&mut tx, part.bytes).await?;
        }
        let now = self.database.clock(&mut tx).await?;
        let sql = "UPDATE uploads SET received_bytes = received_bytes + $1, \
                   received_images = received_images + $2, touched_ms = $3 \
                   WHERE id = $4 AND writer = $5 AND received_bytes = $6 AND summary IS NULL";
        let query = sqlx::query(sql).bind(signed(part.bytes)?).bind(signed(images)?).bind(now);
        let query = query.bind(&claim.id).bind(&claim.writer).bind(signed(received)?);
        if query.execute(&mut *tx).await.map_err(failed)?.rows_affected() == 0 {
            return Err(superseded());
        }
        spare(&mut tx, &part.digest).await?;
        let sql = "INSERT INTO upload_parts (upload_id, position, bytes, digest) \
                   VALUES ($1, $2, $3, $4)";
        let query = sqlx::query(sql).bind(&claim.id).bind(signed(received)?);
        let query = query.bind(signed(part.bytes)?).bind(&part.digest);
        query.execute(&mut *tx).await.map_err(failed)?;
        tx.commit().await.map_err(failed)
    }

    /// Makes an upload visible.
    ///
    /// # Errors
    /// As [`UploadTable::append`].
    pub(super) async fn complete(&self, claim: &Claim, summary: &Summary) -> Result<()> {
        let json = serde_json::to_string(summary)
            .map_err(|error| Error::internal(format!("summary of an upload: {error}")))?;
        let sql = "UPDATE uploads SET summary = $1 WHERE id = $2 AND writer = $3";
        let query = sqlx::query(sql).bind(json).bind(&claim.id).bind(&claim.writer);
        match query.execute(self.database.pool()).await.map_err(failed)?.rows_affected() {
            0 => Err(superseded()),
            _ => Ok(()),
        }
    }

    /// The parts of an upload, in order.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) async fn parts(&self, id: &str) -> Result<Vec<Part>> {
        let sql = "SELECT bytes, digest FROM upload_parts WHERE upload_id = $1 ORDER BY position";
        let rows = sqlx::query(sql).bind(id).fetch_all(self.database.pool()).await;
        let part = |row: &AnyRow| Ok(Part { bytes: number(row, 0)?, digest: column(row, 1)? });
        rows.map_err(failed)?.iter().map(part).collect()
    }

    /// The upload of that name, on its way or whole.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub(super) async fn find(&self, kind: ResourceKind, name: &str) -> Result<Upload> {
        let sql =
            AssertSqlSafe(format!("SELECT {UPLOAD} FROM uploads WHERE kind = $1 AND name = $2"));
        let query = sqlx::query(sql).bind(kind.name()).bind(name);
        let row = query.fetch_optional(self.database.pool()).await.map_err(failed)?;
        let not_found = || Error::NotFound { kind: kind.name(), name: name.to_owned() };
        upload(&row.ok_or_else(not_found)?)
    }

    /// Uploads of a kind by name; only the whole ones, or all.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) async fn list(
        &self,
        kind: ResourceKind,
        whole_only: bool,
        page: &Page,
    ) -> Result<Vec<Upload>> {
        let sql = AssertSqlSafe(format!(
            "SELECT {UPLOAD} FROM uploads WHERE kind = $1 AND name > $2 \
             AND ($3 = 0 OR summary IS NOT NULL) ORDER BY name LIMIT $4"
        ));
        let rows = sqlx::query(sql)
            .bind(kind.name())
            .bind(page.after.clone().unwrap_or_default())
            .bind(i64::from(whole_only))
            .bind(i64::try_from(page.count).unwrap_or(i64::MAX))
            .fetch_all(self.database.pool())
            .await
            .map_err(failed)?;
        rows.iter().map(upload).collect()
    }

    /// Forgets an upload; its parts are condemned.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub(super) async fn remove(&self, kind: ResourceKind, name: &str) -> Result<()> {
        let mut tx = self.database.write().await?;
        let found = self.select(&mut tx, kind, name).await?;
        let not_found = || Error::NotFound { kind: kind.name(), name: name.to_owned() };
        remove(&mut tx, &found.ok_or_else(not_found)?.id).await?;
        tx.commit().await.map_err(failed)
    }

    /// Forgets an upload that turned out to be unusable, unless another stream has taken over.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) async fn discard(&self, claim: &Claim) -> Result<()> {
        let mut tx = self.database.write().await?;
        let sql = AssertSqlSafe(format!(
            "SELECT id FROM uploads WHERE id = $1 AND writer = $2 AND summary IS NULL{}",
            self.database.for_update()
        ));
        let query = sqlx::query(sql).bind(&claim.id).bind(&claim.writer);
        if query.fetch_optional(&mut *tx).await.map_err(failed)?.is_some() {
            remove(&mut tx, &claim.id).await?;
        }
        tx.commit().await.map_err(failed)
    }

    /// Forgets unfinished uploads to which nothing was added for so long; how many.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) async fn expire(&self, idle: Duration) -> Result<usize> {
        let mut tx = self.database.write().await?;
        let limit = self.database.clock(&mut tx).await? - milliseconds(idle);
        let sql = AssertSqlSafe(format!(
            "SELECT id FROM uploads WHERE summary IS NULL AND touched_ms < $1{}",
            self.database.for_update()
        ));
        let query = sqlx::query_scalar(sql).bind(limit);
        let ids: Vec<String> = query.fetch_all(&mut *tx).await.map_err(failed)?;
        for id in &ids {
            remove(&mut tx, id).await?;
        }
        tx.commit().await.map_err(failed)?;
        Ok(ids.len())
    }

    async fn select(
        &self,
        tx: &mut Transaction<'static, Any>,
        kind: ResourceKind,
        name: &str,
    ) -> Result<Option<Upload>> {
        let sql = AssertSqlSafe(format!(
            "SELECT {UPLOAD} FROM uploads WHERE kind = $1 AND name = $2{}",
            self.database.for_update()
        ));
        let query = sqlx::query(sql).bind(kind.name()).bind(name);
        query.fetch_optional(&mut **tx).await.map_err(failed)?.as_ref().map(upload).transpose()
    }

    /// Lets one at a time take space.
    async fn gate(&self, tx: &mut Transaction<'static, Any>) -> Result<()> {
        let sql =
            AssertSqlSafe(format!("SELECT id FROM upload_gate{}", self.database.for_update()));
        sqlx::query(sql).fetch_one(&mut **tx).await.map_err(failed).map(drop)
    }

    async fn check_quota(&self, tx: &mut Transaction<'static, Any>, wanted: u64) -> Result<()> {
        let sql = "SELECT CAST(COALESCE(SUM(CASE WHEN bytes > received_bytes THEN bytes \
                   ELSE received_bytes END), 0) AS BIGINT) FROM uploads";
        let used: i64 = sqlx::query_scalar(sql).fetch_one(&mut **tx).await.map_err(failed)?;
        let used = u64::try_from(used).unwrap_or_default();
        if used.checked_add(wanted).is_some_and(|sum| sum <= self.quota) {
            return Ok(());
        }
        let reason = format!(
            "{wanted} bytes do not fit: uploads take {used} of the {} bytes that are allowed",
            self.quota
        );
        Err(Error::QuotaExceeded { subject: "uploads".to_owned(), reason })
    }
}

async fn remove(tx: &mut Transaction<'static, Any>, id: &str) -> Result<()> {
    for sql in [
        "INSERT INTO condemned (digest) SELECT DISTINCT digest FROM upload_parts \
         WHERE upload_id = $1 ON CONFLICT (digest) DO NOTHING",
        "DELETE FROM upload_parts WHERE upload_id = $1",
        "DELETE FROM uploads WHERE id = $1",
    ] {
        sqlx::query(sql).bind(id).execute(&mut **tx).await.map_err(failed)?;
    }
    Ok(())
}

fn upload(row: &AnyRow) -> Result<Upload> {
    let (sha256, bytes): (String, _) = (column(row, 3)?, number(row, 5)?);
    let content = match number(row, 6)? {
        0 => Content::File { bytes, sha256 },
        images => Content::Images(images),
    };
    let summary = column::<Option<String>>(row, 11)?;
    let summary = summary.map(|json| serde_json::from_str(&json).map_err(|_| broken()));
    Ok(Upload {
        id: column(row, 0)?,
        announced: Announced {
            kind: ResourceKind::parse(&column::<String>(row, 1)?).ok_or_else(broken)?,
            name: column(row, 2)?,
            config: column(row, 4)?,
            content,
        },
        received_bytes: number(row, 7)?,
        received_images: number(row, 8)?,
        created: time(row, 9)?,
        touched: time(row, 10)?,
        summary: summary.transpose()?,
    })
}

fn signed(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::invalid("header", "announces an impossible size"))
}

fn taken(found: &Upload) -> Error {
    let Announced { kind, name, .. } = &found.announced;
    if found.summary.is_some() {
        return Error::AlreadyExists { kind: kind.name(), name: name.clone() };
    }
    let reason = format!(
        "an unfinished upload of something else has the name `{name}`: finish it, or delete the {}",
        kind.name()
    );
    Error::FailedPrecondition { reason }
}

fn superseded() -> Error {
    let reason = "another stream goes on with this upload, or it was deleted".to_owned();
    Error::FailedPrecondition { reason }
}
