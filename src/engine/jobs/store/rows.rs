//! Rows of the database as values.

use std::time::Duration;

use serde::de::DeserializeOwned;
use sqlx::any::AnyRow;
use sqlx::{Any, Row as _};

use super::{broken, records};
use crate::database::failed;
use crate::engine::jobs::{JobId, JobRecord, JobState};
use crate::error::Result;

/// Columns of a [`JobRecord`], in the order of [`record`].
pub(super) const RECORD: &str = "id, spec, state, created_ms, started_ms, ended_ms, progress, last_sequence, outcome, attempt, \
     lease_owner";

pub(super) fn record(row: &AnyRow) -> Result<JobRecord> {
    let optional_time = |index| column::<Option<i64>>(row, index)?.map(from_ms).transpose();
    let progress = column::<Option<String>>(row, 6)?;
    let outcome = column::<Option<String>>(row, 8)?;
    Ok(JobRecord {
        id: JobId::given(&column::<String>(row, 0)?),
        spec: std::sync::Arc::new(json(row, 1)?),
        state: JobState::parse(&column::<String>(row, 2)?)?,
        created: time(row, 3)?,
        started: optional_time(4)?,
        ended: optional_time(5)?,
        progress: progress.as_deref().map(records::from_json).transpose()?,
        last_sequence: number(row, 7)?,
        outcome: outcome.as_deref().map(records::outcome_from_json).transpose()?,
        attempt: number(row, 9)?,
        worker: column(row, 10)?,
    })
}

pub(super) fn column<'r, T>(row: &'r AnyRow, index: usize) -> Result<T>
where
    T: sqlx::Decode<'r, Any> + sqlx::Type<Any>,
{
    row.try_get(index).map_err(failed)
}

pub(super) fn number(row: &AnyRow, index: usize) -> Result<u64> {
    u64::try_from(column::<i64>(row, index)?).map_err(|_| broken())
}

pub(super) fn json<T: DeserializeOwned>(row: &AnyRow, index: usize) -> Result<T> {
    records::from_json(&column::<String>(row, index)?)
}

pub(super) fn time(row: &AnyRow, index: usize) -> Result<jiff::Timestamp> {
    from_ms(column(row, index)?)
}

pub(super) fn from_ms(ms: i64) -> Result<jiff::Timestamp> {
    jiff::Timestamp::from_millisecond(ms).map_err(|_| broken())
}

pub(super) fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}
