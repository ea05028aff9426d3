//! The services over a real server with the digits models: one file per concern. One binary, so
//! that libtorch is linked once.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../support/admission.rs"]
mod admission;
mod bad_input;
mod cancel;
mod classify;
mod classify_stream;
mod drain;
mod evaluate;
mod faults;
mod hostile;
mod memory;
mod metrics;
mod models;
mod oip;
mod overload;
mod quantize;
mod raw;
mod reference;
mod reload;
mod response_cache;
mod security;
mod server;
mod shutdown;
mod soak;
mod surface;
mod uploads;
