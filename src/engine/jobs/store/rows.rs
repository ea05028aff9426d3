//! Rows of the database as values.

use serde::de::DeserializeOwned;
use sqlx::any::AnyRow;

use super::records;
use crate::database::{column, from_ms, number, time};
use crate::engine::jobs::{JobId, JobRecord, JobState};
use crate::error::Result;
use crate::telemetry::TraceContext;

/// Columns of a [`JobRecord`], in the order of [`record`].
pub(super) const RECORD: &str = "id, spec, state, created_ms, started_ms, ended_ms, progress, last_sequence, outcome, attempt, \
     lease_owner, (SELECT time_ms FROM job_events WHERE job_id = jobs.id \
     ORDER BY sequence DESC LIMIT 1), traceparent";

pub(super) fn record(row: &AnyRow) -> Result<JobRecord> {
    let optional_time = |index| column::<Option<i64>>(row, index)?.map(from_ms).transpose();
    let progress = column::<Option<String>>(row, 6)?;
    let outcome = column::<Option<String>>(row, 8)?;
    let trace = column::<Option<String>>(row, 12)?;
    let (created, started, ended) = (time(row, 3)?, optional_time(4)?, optional_time(5)?);
    let updated = [started, ended, optional_time(11)?].into_iter().flatten().max();
    Ok(JobRecord {
        id: JobId::given(&column::<String>(row, 0)?),
        spec: std::sync::Arc::new(json(row, 1)?),
        state: JobState::parse(&column::<String>(row, 2)?)?,
        created,
        started,
        ended,
        updated: updated.map_or(created, |updated| updated.max(created)),
        progress: progress.as_deref().map(records::from_json).transpose()?,
        last_sequence: number(row, 7)?,
        outcome: outcome.as_deref().map(records::outcome_from_json).transpose()?,
        attempt: number(row, 9)?,
        worker: column(row, 10)?,
        trace: trace.and_then(|parent| TraceContext::parse(&parent, None)),
    })
}

pub(super) fn json<T: DeserializeOwned>(row: &AnyRow, index: usize) -> Result<T> {
    records::from_json(&column::<String>(row, index)?)
}
