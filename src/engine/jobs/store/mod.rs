//! Jobs in the database: submitted, found, watched. `worker` and `shards` are the side that runs them.

mod records;
mod rows;
mod shards;
mod submit;
mod worker;

use std::time::Duration;

use sqlx::{Any, AssertSqlSafe, Transaction};
use tokio::sync::watch;

use super::{
    ImageChoice, JobEvent, JobEventKind, JobId, JobOutcome, JobRecord, JobSpec, JobState,
    QuantizeJob,
};
use crate::database::{Database, broken, column, failed, is_duplicate, milliseconds, number, time};
use crate::engine::resources::ResourceKind;
use crate::error::{Error, Result};
use crate::telemetry::metrics;

pub(super) use records::failures;
use rows::{RECORD, json, record};
pub use shards::{Shard, ShardLease, ShardWorker};

pub(in crate::engine) use worker::standing_of;
pub use worker::{Claimed, Lease, Standing};

/// Events that are kept per job: an hour and more at five a second.
const MAX_EVENTS: i64 = 20_000;
/// Events that one reading gives.
const EVENTS_PAGE: i64 = 1000;
/// Heartbeats within the time of a lease: so many may go missing.
const BEATS_PER_LEASE: u32 = 12;
/// How often a watcher looks for what another process did.
const POLL: Duration = Duration::from_millis(500);

/// Bounds of a [`JobStore`].
#[derive(Clone, Debug)]
pub struct JobLimits {
    /// Jobs that may wait for a worker.
    pub queued: usize,
    /// Jobs of one principal that may wait or run.
    pub per_principal: usize,
    /// Workers that may die over one job before it counts as failed.
    pub attempts: u32,
    /// Time without a heartbeat after which a worker counts as dead.
    pub lease: Duration,
    /// Time for which jobs are kept after their end.
    pub keep: Duration,
    /// Silence after which watchers get a sign of life.
    pub heartbeat: Duration,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            queued: 64,
            per_principal: 64,
            attempts: 3,
            lease: Duration::from_secs(60),
            keep: Duration::from_secs(30 * 24 * 60 * 60),
            heartbeat: Duration::from_secs(15),
        }
    }
}

/// Which jobs are listed: all that have every property that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobFilter {
    /// Whether it has ended.
    pub done: Option<bool>,
    /// Where it stands.
    pub state: Option<JobState>,
    /// The model that it makes or reads.
    pub model: Option<String>,
    /// `quantize` or `evaluate`.
    pub kind: Option<String>,
}

/// The jobs that have not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Jobs that wait for a worker.
    pub queued: u64,
    /// Jobs that run.
    pub running: u64,
    /// Jobs that run and were asked to stop.
    pub cancelling: u64,
    /// For how long the oldest of the waiting ones has been there.
    pub oldest: Duration,
}

/// Keeps jobs and their events.
#[derive(Debug)]
pub struct JobStore {
    database: Database,
    limits: JobLimits,
    /// Wakes this process's watchers at once; changes by others are found by looking.
    changed: watch::Sender<()>,
}

impl JobStore {
    /// A store in this database.
    pub fn new(database: Database, limits: JobLimits) -> Self {
        Self { database, limits, changed: watch::Sender::new(()) }
    }

    /// Bounds of the store.
    pub fn limits(&self) -> &JobLimits {
        &self.limits
    }

    /// Time between two heartbeats of a lease.
    pub fn beat_pause(&self) -> Duration {
        self.limits.lease / BEATS_PER_LEASE
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn get(&self, id: &JobId) -> Result<JobRecord> {
        let sql = AssertSqlSafe(format!("SELECT {RECORD} FROM jobs WHERE id = $1"));
        let row = sqlx::query(sql).bind(id.as_str()).fetch_optional(self.database.pool()).await;
        record(&row.map_err(failed)?.ok_or_else(|| not_found(id))?)
    }

    /// At most `count` jobs, newest first, that are older than `before`.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn list(
        &self,
        filter: &JobFilter,
        before: Option<&JobId>,
        count: usize,
    ) -> Result<Vec<JobRecord>> {
        let JobFilter { done, state, model, kind } = filter;
        let text = |value: Option<&str>| value.unwrap_or_default().to_owned();
        // An empty parameter asks for nothing: PostgreSQL wants the type of every parameter known.
        let sql = AssertSqlSafe(format!(
            "SELECT {RECORD} FROM jobs WHERE ($1 = '' OR id < $1) AND ($2 = '' OR model = $2) \
             AND ($3 = '' OR kind = $3) AND ($4 = '' OR state = $4) AND ($5 < 0 OR active = $5) \
             ORDER BY id DESC LIMIT $6"
        ));
        let rows = sqlx::query(sql)
            .bind(text(before.map(JobId::as_str)))
            .bind(text(model.as_deref()))
            .bind(text(kind.as_deref()))
            .bind(text(state.map(JobState::name)))
            .bind(done.map_or(-1, |done| i64::from(!done)))
            .bind(i64::try_from(count).unwrap_or(i64::MAX))
            .fetch_all(self.database.pool())
            .await
            .map_err(failed)?;
        rows.iter().map(record).collect()
    }

    /// A job that has not ended and reads the checkpoint or data set of that name.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn active_with(&self, kind: ResourceKind, name: &str) -> Result<Option<JobId>> {
        let filter = JobFilter { done: Some(false), ..JobFilter::default() };
        let jobs = self.list(&filter, None, usize::MAX).await?;
        Ok(jobs.into_iter().find(|job| job.spec.needs(kind, name)).map(|job| job.id))
    }

    /// Forgets a job that has ended.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it has not ended; `Unavailable`.
    pub async fn delete(&self, id: &JobId) -> Result<()> {
        let sql = "DELETE FROM jobs WHERE id = $1 AND active = 0";
        let deleted = sqlx::query(sql).bind(id.as_str()).execute(self.database.pool()).await;
        if deleted.map_err(failed)?.rows_affected() == 0 {
            self.get(id).await?;
            let reason = format!("operation `{id}` has not ended, cancel it first");
            return Err(Error::FailedPrecondition { reason });
        }
        Ok(())
    }

    /// Forgets jobs that ended long ago, see [`JobLimits::keep`]; how many.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn expire(&self) -> Result<u64> {
        let now = self.database.now();
        let sql =
            AssertSqlSafe(format!("DELETE FROM jobs WHERE active = 0 AND ended_ms < {now} - $1"));
        let query = sqlx::query(sql).bind(milliseconds(self.limits.keep));
        Ok(query.execute(self.database.pool()).await.map_err(failed)?.rows_affected())
    }

    /// Notes that a job is to stop. A queued one ends at once, one that has ended stays as it is.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn request_cancel(&self, id: &JobId) -> Result<()> {
        let mut tx = self.database.write().await?;
        let sql = AssertSqlSafe(format!(
            "SELECT state, kind FROM jobs WHERE id = $1{}",
            self.database.for_update()
        ));
        let query = sqlx::query(sql).bind(id.as_str());
        let row = query.fetch_optional(&mut *tx).await.map_err(failed)?;
        let row = row.ok_or_else(|| not_found(id))?;
        let state = JobState::parse(&column::<String>(&row, 0)?)?;
        match state {
            JobState::Queued => self.end(&mut tx, id, &cancelled()).await?,
            JobState::Running => {
                let sql = "UPDATE jobs SET state = 'cancelling' WHERE id = $1";
                let query = sqlx::query(sql).bind(id.as_str());
                query.execute(&mut *tx).await.map_err(failed)?;
            }
            JobState::Cancelling | JobState::Succeeded | JobState::Failed | JobState::Cancelled => {
            }
        }
        tx.commit().await.map_err(failed)?;
        if state == JobState::Queued {
            let kind = column::<String>(&row, 1)?;
            metrics::job_ended(kind, JobState::Cancelled.name(), None);
        }
        self.changed.send_replace(());
        Ok(())
    }

    /// How many jobs there are in each state in which they have not ended, and for how long the
    /// oldest has been waiting for a worker.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn workload(&self) -> Result<Workload> {
        let now = self.database.now();
        let sql = AssertSqlSafe(format!(
            "SELECT state, COUNT(*), {now} - MIN(created_ms) FROM jobs WHERE active = 1 \
             GROUP BY state"
        ));
        let rows = sqlx::query(sql).fetch_all(self.database.pool()).await.map_err(failed)?;
        let mut workload = Workload::default();
        for row in &rows {
            let (count, age) = (number(row, 1)?, column::<i64>(row, 2)?.max(0));
            match JobState::parse(&column::<String>(row, 0)?)? {
                JobState::Queued => {
                    workload.queued = count;
                    workload.oldest = Duration::from_millis(age.unsigned_abs());
                }
                JobState::Running => workload.running = count,
                JobState::Cancelling => workload.cancelling = count,
                JobState::Succeeded | JobState::Failed | JobState::Cancelled => {}
            }
        }
        Ok(workload)
    }

    /// Events with a larger sequence number than `after`, in order, a page of them. Of a long
    /// history the oldest progress may be missing.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn events(&self, id: &JobId, after: u64) -> Result<Vec<JobEvent>> {
        let sql = "SELECT sequence, time_ms, kind, body FROM job_events \
                   WHERE job_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3";
        let rows = sqlx::query(sql)
            .bind(id.as_str())
            .bind(i64::try_from(after).unwrap_or(i64::MAX))
            .bind(EVENTS_PAGE)
            .fetch_all(self.database.pool())
            .await
            .map_err(failed)?;
        let mut events = Vec::with_capacity(rows.len());
        for row in &rows {
            let kind = match column::<String>(row, 2)?.as_str() {
                "accepted" => JobEventKind::Accepted,
                "progress" => JobEventKind::Progress(json(row, 3)?),
                _ => JobEventKind::Ended(self.get(id).await?.outcome.ok_or_else(broken)?),
            };
            events.push(JobEvent { sequence: number(row, 0)?, time: time(row, 1)?, kind });
        }
        if events.is_empty() {
            self.get(id).await?;
        }
        Ok(events)
    }

    /// Returns once a job has events beyond `after`, or has ended.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn changed(&self, id: &JobId, after: u64) -> Result<()> {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            let sql = "SELECT last_sequence, active FROM jobs WHERE id = $1";
            let query = sqlx::query(sql).bind(id.as_str());
            let row = query.fetch_optional(self.database.pool()).await.map_err(failed)?;
            let row = row.ok_or_else(|| not_found(id))?;
            if number(&row, 0)? > after || column::<i64>(&row, 1)? == 0 {
                return Ok(());
            }
            // The sender lives in self, and the timeout is the other way out.
            let _ = tokio::time::timeout(POLL, changes.changed()).await;
        }
    }

    /// Ends a job that is locked by the transaction, with its last event.
    async fn end(
        &self,
        tx: &mut Transaction<'static, Any>,
        id: &JobId,
        outcome: &JobOutcome,
    ) -> Result<()> {
        let now = self.database.clock(tx).await?;
        let sql = "UPDATE jobs SET state = $1, active = 0, outcome = $2, ended_ms = $3, \
                   lease_owner = NULL, lease_expires_ms = NULL WHERE id = $4";
        sqlx::query(sql)
            .bind(JobState::of(outcome).name())
            .bind(records::outcome_to_json(outcome)?)
            .bind(now)
            .bind(id.as_str())
            .execute(&mut **tx)
            .await
            .map_err(failed)?;
        for sql in [
            "DELETE FROM job_images WHERE job_id = $1",
            "INSERT INTO condemned (digest) SELECT DISTINCT digest FROM job_units \
             WHERE job_id = $1 ON CONFLICT (digest) DO NOTHING",
            "DELETE FROM job_units WHERE job_id = $1",
            "DELETE FROM job_shards WHERE job_id = $1",
        ] {
            sqlx::query(sql).bind(id.as_str()).execute(&mut **tx).await.map_err(failed)?;
        }
        append_event(tx, id, now, "ended", None).await
    }

    /// The images that came with a job.
    async fn with_contents(&self, id: &JobId, mut spec: JobSpec) -> Result<JobSpec> {
        if let JobSpec::Quantize(QuantizeJob {
            images: ImageChoice::Inline { contents, .. }, ..
        }) = &mut spec
        {
            let sql = "SELECT content FROM job_images WHERE job_id = $1 ORDER BY position";
            let rows = sqlx::query(sql).bind(id.as_str()).fetch_all(self.database.pool()).await;
            for row in &rows.map_err(failed)? {
                contents.push(column::<Vec<u8>>(row, 0)?.into());
            }
        }
        Ok(spec)
    }
}

/// Adds an event to a job that is locked by the transaction.
async fn append_event(
    tx: &mut Transaction<'static, Any>,
    id: &JobId,
    now: i64,
    kind: &str,
    body: Option<String>,
) -> Result<()> {
    let sql =
        "UPDATE jobs SET last_sequence = last_sequence + 1 WHERE id = $1 RETURNING last_sequence";
    let query = sqlx::query_scalar(sql).bind(id.as_str());
    let sequence: i64 = query.fetch_one(&mut **tx).await.map_err(failed)?;
    let sql = "INSERT INTO job_events (job_id, sequence, time_ms, kind, body) \
               VALUES ($1, $2, $3, $4, $5)";
    sqlx::query(sql)
        .bind(id.as_str())
        .bind(sequence)
        .bind(now)
        .bind(kind)
        .bind(body)
        .execute(&mut **tx)
        .await
        .map_err(failed)?;
    if sequence > MAX_EVENTS {
        // The first event says that the job exists; the oldest progress behind it can go.
        let sql = "DELETE FROM job_events WHERE job_id = $1 AND sequence = $2";
        let query = sqlx::query(sql).bind(id.as_str()).bind(sequence - MAX_EVENTS + 1);
        query.execute(&mut **tx).await.map_err(failed)?;
    }
    Ok(())
}

fn cancelled() -> JobOutcome {
    Err(std::sync::Arc::new(Error::Cancelled))
}

fn not_found(id: &JobId) -> Error {
    Error::NotFound { kind: "operation", name: id.operation() }
}
