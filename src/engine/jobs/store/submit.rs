//! Submitting a job, or finding the one that is meant.

use std::time::Duration;

use sqlx::{Any, Transaction};

use super::{JobStore, append_event, column, failed, is_duplicate, records};
use crate::engine::jobs::{JobId, NewJob, Novelty, Submitted};
use crate::error::{Error, Result};

/// When a caller who met a full queue should come back.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Notes which job a request made or found.
const REMEMBER: &str =
    "INSERT INTO job_requests (request_id, job_id, spec_hash) VALUES ($1, $2, $3)";
/// Submissions that lose a race look again so often.
const SUBMIT_ROUNDS: usize = 5;

/// What a job is found by.
struct Hashes {
    /// [`JobSpec::fingerprint`]: of the request that an id stands for.
    request: String,
    /// [`JobSpec::work_fingerprint`]: of what is under way.
    work: String,
}

impl JobStore {
    /// The job that an earlier call with this request id made or found.
    ///
    /// # Errors
    /// `InvalidArgument` on `request_id` when that call asked for something else; `Unavailable`.
    pub async fn find_request(&self, request_id: &str, spec_hash: &str) -> Result<Option<JobId>> {
        let sql = "SELECT job_id, spec_hash FROM job_requests WHERE request_id = $1";
        let row = sqlx::query(sql).bind(request_id).fetch_optional(self.database.pool()).await;
        let Some(row) = row.map_err(failed)? else { return Ok(None) };
        if column::<String>(&row, 1)? == spec_hash {
            return Ok(Some(JobId::given(&column::<String>(&row, 0)?)));
        }
        let reason = "an earlier call with this id asked for something else";
        Err(Error::invalid("request_id", reason))
    }

    /// Adds a job as queued, with its first event. While an equal job is under way, that one is
    /// returned instead.
    ///
    /// # Errors
    /// As [`JobStore::find_request`]; `Busy` while a different job makes the same model;
    /// `Overloaded` when too many jobs wait; `QuotaExceeded` when too many are the principal's;
    /// `Unavailable`.
    pub async fn submit(&self, job: &NewJob) -> Result<Submitted> {
        let hashes =
            Hashes { request: job.spec.fingerprint()?, work: job.spec.work_fingerprint()? };
        for _ in 0..SUBMIT_ROUNDS {
            if let Some(id) = self.standing_in(job, &hashes).await? {
                return Ok(Submitted { id, novelty: Novelty::Replayed });
            }
            match self.insert(job, &hashes).await? {
                Some(id) => {
                    self.changed.send_replace(());
                    return Ok(Submitted { id, novelty: Novelty::New });
                }
                None => continue, // somebody else was faster: it is found in the next round
            }
        }
        Err(Error::Overloaded {
            reason: "too many clients ask for this job at once".to_owned(),
            retry_after: Duration::from_secs(1),
        })
    }

    /// The job that answers a submission without a new one.
    async fn standing_in(&self, job: &NewJob, hashes: &Hashes) -> Result<Option<JobId>> {
        let Hashes { request, work } = hashes;
        if let Some(request_id) = &job.request_id
            && let Some(id) = self.find_request(request_id, request).await?
        {
            return Ok(Some(id));
        }
        let sql = "SELECT id, spec_hash FROM jobs \
                   WHERE active = 1 AND (spec_hash = $1 OR target = $2) ORDER BY id LIMIT 1";
        let target = job.spec.target().map(|model| model.as_str().to_owned());
        let query = sqlx::query(sql).bind(work).bind(target);
        let row = query.fetch_optional(self.database.pool()).await.map_err(failed)?;
        let Some(row) = row else { return Ok(None) };
        let id = JobId::given(&column::<String>(&row, 0)?);
        if column::<String>(&row, 1)? != *work {
            let model = job.spec.model().to_string();
            return Err(Error::Busy { model, operation: id.operation() });
        }
        let Some(request_id) = &job.request_id else { return Ok(Some(id)) };
        let query = sqlx::query(REMEMBER).bind(request_id).bind(id.as_str()).bind(request);
        match query.execute(self.database.pool()).await {
            Ok(_) => Ok(Some(id)),
            Err(error) if is_duplicate(&error) => self.find_request(request_id, request).await,
            Err(error) => Err(failed(error)),
        }
    }

    async fn check_quota(&self, tx: &mut Transaction<'_, Any>, principal: &str) -> Result<()> {
        let sql = "SELECT COUNT(*) FROM jobs WHERE principal = $1 AND active = 1";
        let query = sqlx::query_scalar(sql).bind(principal.to_owned());
        let jobs: i64 = query.fetch_one(&mut **tx).await.map_err(failed)?;
        let most = self.limits.per_principal;
        if usize::try_from(jobs).unwrap_or(usize::MAX) < most {
            return Ok(());
        }
        let reason = format!("{principal} has {jobs} jobs under way, at most {most} are allowed");
        Err(Error::QuotaExceeded { subject: principal.to_owned(), reason })
    }

    /// `None` when a job or request that stands in the way appeared meanwhile.
    async fn insert(&self, job: &NewJob, hashes: &Hashes) -> Result<Option<JobId>> {
        let Hashes { request, work } = hashes;
        let id = JobId::new();
        let mut tx = self.database.write().await?;
        let sql = "SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND active = 1";
        let queued: i64 = sqlx::query_scalar(sql).fetch_one(&mut *tx).await.map_err(failed)?;
        if usize::try_from(queued).unwrap_or(usize::MAX) >= self.limits.queued {
            return Err(Error::Overloaded {
                reason: format!("{queued} jobs are waiting already"),
                retry_after: RETRY_AFTER,
            });
        }
        self.check_quota(&mut tx, &job.principal).await?;
        let now = self.database.clock(&mut tx).await?;
        let sql = "INSERT INTO jobs (id, kind, model, target, spec, spec_hash, priority, state, \
                   active, attempt, attempts_left, created_ms, last_sequence, principal, \
                   traceparent) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, 'queued', 1, 0, $8, $9, 0, $10, $11)";
        let inserted = sqlx::query(sql)
            .bind(id.as_str())
            .bind(job.spec.kind())
            .bind(job.spec.model().as_str())
            .bind(job.spec.target().map(|model| model.as_str().to_owned()))
            .bind(records::to_json(&job.spec)?)
            .bind(work)
            .bind(i64::from(job.priority))
            .bind(i64::from(self.limits.attempts))
            .bind(now)
            .bind(&job.principal)
            .bind(job.trace.as_ref().map(ToString::to_string))
            .execute(&mut *tx)
            .await;
        match inserted {
            Ok(_) => {}
            Err(error) if is_duplicate(&error) => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        if let Some(request_id) = &job.request_id {
            let query = sqlx::query(REMEMBER).bind(request_id).bind(id.as_str()).bind(request);
            match query.execute(&mut *tx).await {
                Ok(_) => {}
                Err(error) if is_duplicate(&error) => return Ok(None),
                Err(error) => return Err(failed(error)),
            }
        }
        for (position, content) in (0_i64..).zip(job.spec.contents()) {
            let sql = "INSERT INTO job_images (job_id, position, content) VALUES ($1, $2, $3)";
            let query = sqlx::query(sql).bind(id.as_str()).bind(position).bind(content.to_vec());
            query.execute(&mut *tx).await.map_err(failed)?;
        }
        append_event(&mut tx, &id, now, "accepted", None).await?;
        tx.commit().await.map_err(failed)?;
        Ok(Some(id))
    }
}
