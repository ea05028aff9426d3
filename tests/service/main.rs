//! The services over a real server with the digits models: one file per concern. One binary, so
//! that libtorch is linked once.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod bad_input;
mod cancel;
mod classify;
mod classify_stream;
mod evaluate;
mod models;
mod oip;
mod overload;
mod quantize;
mod reload;
mod response_cache;
mod security;
mod server;
mod shutdown;
mod surface;
mod uploads;
