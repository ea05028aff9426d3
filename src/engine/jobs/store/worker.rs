//! The side of the store that workers use: claim, heartbeat, report, finish.
//!
//! A worker holds a job by a lease, which its heartbeats extend. Should it stop beating, another
//! one claims the job with the next attempt number; whatever the first still writes under the old
//! number is refused. Leases go by the database's clock alone.

use sqlx::{Any, AssertSqlSafe, Transaction};

use super::{JobStore, append_event, cancelled, column, failed, milliseconds, records};
use crate::database::Database;
use crate::engine::garbage::spare;
use crate::engine::jobs::{JobId, JobOutcome, JobProgress, JobRecord, JobState};
use crate::error::{Error, Result};
use crate::telemetry::metrics;

/// The right to run a job, until its lease is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The job.
    pub id: JobId,
    /// How often the job was claimed, this time included: later writes by others carry a larger
    /// number.
    pub attempt: u64,
}

/// A job that a worker may run.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The job, the images that came with it included.
    pub record: JobRecord,
    /// The right to run it.
    pub lease: Lease,
}

/// What became of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It holds.
    Held,
    /// It holds, and the job is to stop.
    CancelRequested,
    /// Somebody else has the job, or it has ended: nothing was written.
    Lost,
}

impl JobStore {
    /// Takes the most urgent job, which is running from now on: a queued one, or one whose worker
    /// died. Jobs that were to be cancelled when their worker died, or killed too many, end here.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn claim(&self, worker: &str) -> Result<Option<Claimed>> {
        loop {
            let mut tx = self.database.write().await?;
            let now = self.database.clock(&mut tx).await?;
            let sql = AssertSqlSafe(format!(
                "SELECT id, state, attempts_left, kind FROM jobs WHERE active = 1 \
                 AND (state = 'queued' OR lease_expires_ms < $1) \
                 ORDER BY priority DESC, id LIMIT 1{}",
                self.database.skip_locked()
            ));
            let row = sqlx::query(sql).bind(now).fetch_optional(&mut *tx).await.map_err(failed)?;
            let Some(row) = row else { return Ok(None) };
            let id = JobId::given(&column::<String>(&row, 0)?);
            let state = JobState::parse(&column::<String>(&row, 1)?)?;
            let over = if state == JobState::Cancelling {
                Some(cancelled())
            } else if column::<i64>(&row, 2)? <= 0 {
                let workers = self.limits.attempts;
                Some(Err(std::sync::Arc::new(Error::WorkersDied { workers })))
            } else {
                None
            };
            if let Some(outcome) = over {
                self.end(&mut tx, &id, &outcome).await?;
                tx.commit().await.map_err(failed)?;
                note_takeover(state);
                let kind = column::<String>(&row, 3)?;
                if let Err(error) = &outcome {
                    // No worker is left to say so.
                    tracing::warn!(job = %id, kind, %error, "job ended");
                }
                metrics::job_ended(kind, JobState::of(&outcome).name(), None);
                self.changed.send_replace(());
                continue;
            }
            let sql = "UPDATE jobs SET state = 'running', attempt = attempt + 1, \
                       attempts_left = attempts_left - 1, lease_owner = $1, lease_expires_ms = $2, \
                       started_ms = COALESCE(started_ms, $3) WHERE id = $4";
            sqlx::query(sql)
                .bind(worker)
                .bind(now + milliseconds(self.limits.lease))
                .bind(now)
                .bind(id.as_str())
                .execute(&mut *tx)
                .await
                .map_err(failed)?;
            tx.commit().await.map_err(failed)?;
            note_takeover(state);
            let mut record = self.get(&id).await?;
            record.spec = self.with_contents(&id, (*record.spec).clone()).await?.into();
            let lease = Lease { id, attempt: record.attempt };
            return Ok(Some(Claimed { record, lease }));
        }
    }

    /// Extends a lease.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn heartbeat(&self, lease: &Lease) -> Result<Standing> {
        let now = self.database.now();
        let sql = AssertSqlSafe(format!(
            "UPDATE jobs SET lease_expires_ms = {now} + $1 \
             WHERE id = $2 AND attempt = $3 AND active = 1 AND lease_owner IS NOT NULL \
             RETURNING state"
        ));
        let state: Option<String> = sqlx::query_scalar(sql)
            .bind(milliseconds(self.limits.lease))
            .bind(lease.id.as_str())
            .bind(attempt(lease))
            .fetch_optional(self.database.pool())
            .await
            .map_err(failed)?;
        standing(state.as_deref())
    }

    /// Adds a progress event.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn report(&self, lease: &Lease, progress: &JobProgress) -> Result<Standing> {
        let mut tx = self.database.write().await?;
        let standing = standing_of(&self.database, &mut tx, lease).await?;
        if standing == Standing::Lost {
            return Ok(standing);
        }
        let now = self.database.clock(&mut tx).await?;
        // The latest state has no use for the sites of one step.
        let latest = JobProgress { sites: Vec::new(), ..progress.clone() };
        let sql = "UPDATE jobs SET progress = $1, lease_expires_ms = $2 WHERE id = $3";
        sqlx::query(sql)
            .bind(records::to_json(&latest)?)
            .bind(now + milliseconds(self.limits.lease))
            .bind(lease.id.as_str())
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        let body = Some(records::to_json(progress)?);
        append_event(&mut tx, &lease.id, now, "progress", body).await?;
        tx.commit().await.map_err(failed)?;
        self.changed.send_replace(());
        Ok(standing)
    }

    /// Ends a job, with its last event.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn finish(&self, lease: &Lease, outcome: &JobOutcome) -> Result<Standing> {
        let mut tx = self.database.write().await?;
        let standing = standing_of(&self.database, &mut tx, lease).await?;
        if standing != Standing::Lost {
            self.end(&mut tx, &lease.id, outcome).await?;
            tx.commit().await.map_err(failed)?;
            self.changed.send_replace(());
        }
        Ok(standing)
    }

    /// Gives a job back unfinished; the attempt does not count. One that was to be cancelled ends.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn release(&self, lease: &Lease) -> Result<()> {
        let mut tx = self.database.write().await?;
        match standing_of(&self.database, &mut tx, lease).await? {
            Standing::Lost => return Ok(()),
            Standing::CancelRequested => self.end(&mut tx, &lease.id, &cancelled()).await?,
            Standing::Held => {
                let sql = "UPDATE jobs SET state = 'queued', attempts_left = attempts_left + 1, \
                           lease_owner = NULL, lease_expires_ms = NULL WHERE id = $1";
                let query = sqlx::query(sql).bind(lease.id.as_str());
                query.execute(&mut *tx).await.map_err(failed)?;
            }
        }
        tx.commit().await.map_err(failed)?;
        self.changed.send_replace(());
        Ok(())
    }

    /// Notes that a unit of the calculation is done, and which stored object holds its result.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn keep_unit(&self, lease: &Lease, unit: &str, digest: &str) -> Result<Standing> {
        let mut tx = self.database.write().await?;
        let standing = standing_of(&self.database, &mut tx, lease).await?;
        if standing == Standing::Lost {
            return Ok(standing);
        }
        spare(&mut tx, digest).await?;
        let sql = "INSERT INTO job_units (job_id, unit, digest) VALUES ($1, $2, $3) \
                   ON CONFLICT (job_id, unit) DO UPDATE SET digest = excluded.digest";
        let query = sqlx::query(sql).bind(lease.id.as_str()).bind(unit).bind(digest);
        query.execute(&mut *tx).await.map_err(failed)?;
        tx.commit().await.map_err(failed)?;
        Ok(standing)
    }

    /// The object that holds the result of a unit, of this attempt or an earlier one.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn kept_unit(&self, id: &JobId, unit: &str) -> Result<Option<String>> {
        let sql = "SELECT digest FROM job_units WHERE job_id = $1 AND unit = $2";
        let query = sqlx::query_scalar(sql).bind(id.as_str()).bind(unit);
        query.fetch_optional(self.database.pool()).await.map_err(failed)
    }

    /// Ends all leases at once: for the one process that has the database to itself, at its start.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn forget_leases(&self) -> Result<()> {
        for sql in [
            "UPDATE jobs SET lease_expires_ms = 0 WHERE active = 1 AND state <> 'queued'",
            "UPDATE job_shards SET lease_expires_ms = 0 WHERE lease_owner IS NOT NULL",
        ] {
            sqlx::query(sql).execute(self.database.pool()).await.map_err(failed)?;
        }
        Ok(())
    }
}

/// Notes that a claimed job was another worker's, if it was.
fn note_takeover(state: JobState) {
    if state != JobState::Queued {
        metrics::job_taken_over();
    }
}

/// Locks the job of a lease for the transaction, if the lease still holds.
///
/// # Errors
/// `Unavailable`.
pub(in crate::engine) async fn standing_of(
    database: &Database,
    tx: &mut Transaction<'static, Any>,
    lease: &Lease,
) -> Result<Standing> {
    let sql = AssertSqlSafe(format!(
        "SELECT state FROM jobs WHERE id = $1 AND attempt = $2 AND active = 1 \
         AND lease_owner IS NOT NULL{}",
        database.for_update()
    ));
    let state: Option<String> = sqlx::query_scalar(sql)
        .bind(lease.id.as_str())
        .bind(attempt(lease))
        .fetch_optional(&mut **tx)
        .await
        .map_err(failed)?;
    standing(state.as_deref())
}

fn attempt(lease: &Lease) -> i64 {
    i64::try_from(lease.attempt).unwrap_or(i64::MAX)
}

pub(super) fn standing(state: Option<&str>) -> Result<Standing> {
    Ok(match state.map(JobState::parse).transpose()? {
        None => Standing::Lost,
        Some(JobState::Cancelling) => Standing::CancelRequested,
        Some(_) => Standing::Held,
    })
}
