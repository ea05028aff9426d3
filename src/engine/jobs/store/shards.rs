//! Shards of evaluations: parts that workers of several processes take, with a lease for each.
//!
//! The worker that holds the job plans them. It computes shards itself, while others help; it adds
//! up what all have found. A shard whose worker fell silent is left to the job's own worker: how
//! many workers may die over a job is counted there.

use std::ops::Range;

use sqlx::AssertSqlSafe;
use sqlx::any::AnyRow;

use super::rows::{RECORD, json, record};
use super::worker::{standing, standing_of};
use super::{JobStore, Lease, Standing, column, failed, milliseconds, number, records};
use crate::engine::evaluator::Metrics;
use crate::engine::jobs::{JobId, JobRecord};
use crate::error::Result;

/// A shard as the store knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// Its place among the shards of its job.
    pub position: u64,
    /// Whether its numbers are final.
    pub done: bool,
    /// Its numbers so far.
    pub metrics: Metrics,
}

/// The right to compute a shard, until its lease is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardLease {
    /// The job.
    pub job: JobId,
    /// The shard's place among those of the job.
    pub position: u64,
    /// How often the shard was claimed, this time included.
    pub attempt: u64,
    /// The images to count, of all that are evaluated.
    pub images: Range<usize>,
}

/// Who claims a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardWorker {
    /// The worker that holds the job: it also gets shards whose workers died.
    Holder,
    /// Another one.
    Helper,
}

impl JobStore {
    /// Splits a job into shards of these images, unless an earlier attempt has done so with the
    /// same inputs: what it has finished stays.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn plan_shards(
        &self,
        lease: &Lease,
        inputs: &str,
        shards: &[Range<usize>],
    ) -> Result<Standing> {
        let mut tx = self.database.write().await?;
        let standing = standing_of(&self.database, &mut tx, lease).await?;
        if standing == Standing::Lost {
            return Ok(standing);
        }
        let sql = "SELECT COUNT(*) FROM job_shards WHERE job_id = $1 AND inputs = $2";
        let query = sqlx::query_scalar(sql).bind(lease.id.as_str()).bind(inputs);
        let planned: i64 = query.fetch_one(&mut *tx).await.map_err(failed)?;
        if planned > 0 {
            return Ok(standing);
        }
        let query = sqlx::query("DELETE FROM job_shards WHERE job_id = $1").bind(lease.id.as_str());
        query.execute(&mut *tx).await.map_err(failed)?;
        for (position, images) in (0_i64..).zip(shards) {
            let sql = "INSERT INTO job_shards \
                       (job_id, position, inputs, first, images, attempt, done) \
                       VALUES ($1, $2, $3, $4, $5, 0, 0)";
            sqlx::query(sql)
                .bind(lease.id.as_str())
                .bind(position)
                .bind(inputs)
                .bind(i64::try_from(images.start).unwrap_or(i64::MAX))
                .bind(i64::try_from(images.len()).unwrap_or(i64::MAX))
                .execute(&mut *tx)
                .await
                .map_err(failed)?;
        }
        tx.commit().await.map_err(failed)?;
        Ok(standing)
    }

    /// Running evaluations of other processes that have shards which nobody has taken yet, most
    /// urgent first.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn to_help_with(&self, worker: &str) -> Result<Vec<JobRecord>> {
        let sql = AssertSqlSafe(format!(
            "SELECT {RECORD} FROM jobs WHERE active = 1 AND state = 'running' \
             AND kind = 'evaluate' AND lease_owner <> $1 AND EXISTS (SELECT 1 FROM job_shards \
             WHERE job_id = jobs.id AND done = 0 AND job_shards.lease_owner IS NULL) \
             ORDER BY priority DESC, id"
        ));
        let rows = sqlx::query(sql).bind(worker).fetch_all(self.database.pool()).await;
        rows.map_err(failed)?.iter().map(record).collect()
    }

    /// Takes the first free shard of a running job that was planned with these inputs.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn claim_shard(
        &self,
        job: &JobId,
        inputs: &str,
        (worker, name): (ShardWorker, &str),
    ) -> Result<Option<ShardLease>> {
        let mut tx = self.database.write().await?;
        let now = self.database.clock(&mut tx).await?;
        let or_expired = match worker {
            ShardWorker::Holder => now,
            ShardWorker::Helper => i64::MIN,
        };
        let sql = AssertSqlSafe(format!(
            "SELECT position, attempt, first, images FROM job_shards WHERE job_id = $1 \
             AND inputs = $2 AND done = 0 AND (lease_owner IS NULL OR lease_expires_ms < $3) \
             AND EXISTS (SELECT 1 FROM jobs WHERE id = $1 AND state = 'running') \
             ORDER BY position LIMIT 1{}",
            self.database.skip_locked()
        ));
        let query = sqlx::query(sql).bind(job.as_str()).bind(inputs).bind(or_expired);
        let row = query.fetch_optional(&mut *tx).await.map_err(failed)?;
        let Some(row) = row else { return Ok(None) };
        let (first, images) = (index(&row, 2)?, index(&row, 3)?);
        let lease = ShardLease {
            job: job.clone(),
            position: number(&row, 0)?,
            attempt: number(&row, 1)? + 1,
            images: first..first + images,
        };
        let sql = "UPDATE job_shards SET attempt = $1, lease_owner = $2, lease_expires_ms = $3, \
                   metrics = NULL WHERE job_id = $4 AND position = $5";
        sqlx::query(sql)
            .bind(signed(lease.attempt))
            .bind(name)
            .bind(now + milliseconds(self.limits.lease))
            .bind(job.as_str())
            .bind(signed(lease.position))
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        tx.commit().await.map_err(failed)?;
        Ok(Some(lease))
    }

    /// Extends the lease of a shard.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn heartbeat_shard(&self, lease: &ShardLease) -> Result<Standing> {
        self.extend(lease, None).await
    }

    /// Notes the numbers of a shard so far.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn report_shard(&self, lease: &ShardLease, metrics: &Metrics) -> Result<Standing> {
        self.extend(lease, Some(records::to_json(metrics)?)).await
    }

    async fn extend(&self, lease: &ShardLease, metrics: Option<String>) -> Result<Standing> {
        let now = self.database.now();
        let sql = AssertSqlSafe(format!(
            "UPDATE job_shards SET lease_expires_ms = {now} + $1, \
             metrics = COALESCE($2, metrics) WHERE job_id = $3 AND position = $4 \
             AND attempt = $5 AND done = 0 AND lease_owner IS NOT NULL \
             RETURNING (SELECT state FROM jobs WHERE id = job_id)"
        ));
        let state: Option<String> = sqlx::query_scalar(sql)
            .bind(milliseconds(self.limits.lease))
            .bind(metrics)
            .bind(lease.job.as_str())
            .bind(signed(lease.position))
            .bind(signed(lease.attempt))
            .fetch_optional(self.database.pool())
            .await
            .map_err(failed)?;
        standing(state.as_deref())
    }

    /// Stores the numbers of a whole shard: it is done.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn finish_shard(&self, lease: &ShardLease, metrics: &Metrics) -> Result<Standing> {
        let metrics = Some(records::to_json(metrics)?);
        self.leave(lease, 1, metrics).await
    }

    /// Gives a shard back unfinished.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn release_shard(&self, lease: &ShardLease) -> Result<Standing> {
        self.leave(lease, 0, None).await
    }

    async fn leave(
        &self,
        lease: &ShardLease,
        done: i64,
        metrics: Option<String>,
    ) -> Result<Standing> {
        let sql = "UPDATE job_shards SET done = $1, metrics = $2, lease_owner = NULL, \
                   lease_expires_ms = NULL WHERE job_id = $3 AND position = $4 \
                   AND attempt = $5 AND done = 0 AND lease_owner IS NOT NULL";
        let left = sqlx::query(sql)
            .bind(done)
            .bind(metrics)
            .bind(lease.job.as_str())
            .bind(signed(lease.position))
            .bind(signed(lease.attempt))
            .execute(self.database.pool())
            .await
            .map_err(failed)?;
        Ok(if left.rows_affected() == 0 { Standing::Lost } else { Standing::Held })
    }

    /// The shards of a job that has not ended, in order.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn shards(&self, job: &JobId) -> Result<Vec<Shard>> {
        let sql = "SELECT position, done, COALESCE(metrics, '') FROM job_shards \
                   WHERE job_id = $1 ORDER BY position";
        let rows = sqlx::query(sql).bind(job.as_str()).fetch_all(self.database.pool()).await;
        let shard = |row: &AnyRow| {
            let is_empty = column::<String>(row, 2)?.is_empty();
            Ok(Shard {
                position: number(row, 0)?,
                done: column::<i64>(row, 1)? == 1,
                metrics: if is_empty { Metrics::default() } else { json(row, 2)? },
            })
        };
        rows.map_err(failed)?.iter().map(shard).collect()
    }
}

fn index(row: &AnyRow, column: usize) -> Result<usize> {
    Ok(usize::try_from(number(row, column)?).unwrap_or(usize::MAX))
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
