//! The real program: its commands, and several processes of it with what a cluster has beside them.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the steps are shown with --nocapture")]

#[path = "../support/admission.rs"]
mod admission;
#[path = "../support/gate.rs"]
mod gate;
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/program.rs"]
mod program;
#[path = "../support/reference.rs"]
mod reference;
#[path = "../support/requests.rs"]
mod requests;
#[path = "../clients/rust_example.rs"]
mod rust_example;
#[path = "../support/s3.rs"]
mod s3;

mod cli;
mod client;
mod cluster;
mod crash;
mod deployment;
#[cfg(feature = "hub")]
mod hub;
mod operations;
mod outage;
mod python_client;
mod replicas;
mod resume;
mod shards;
mod tritonclient;

use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
