//! What outlives a process: jobs and their events, and finished models.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/s3.rs"]
mod s3;

mod artifact_store;
mod job_store;
mod watchers;
