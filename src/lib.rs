//! vitq quantizes vision transformers on request and serves them over gRPC.
//!
//! The map, each line using only the lines above it:
//! - [`error`]: one error type, by the caller's situation
//! - [`tensor`], [`digest`], `random`, `sync`: small tensor helpers; sha256 as text; reproducible
//!   numbers; locks and channels
//! - [`kernels`]: integer matrix products and one-pass quantization on the CPU
//! - [`nn`]: named weights, sites, linear layers
//! - [`quant`]: quantizers, granularity, plans
//! - [`exec`]: executors: float, simulated, integer, taps
//! - [`model`]: ViT/DeiT and Swin over executors; checkpoints
//! - [`data`]: images, preprocessing, data sets
//! - [`calib`]: calibration tasks, capture, progress
//! - [`methods`]: the quantization methods and their registry
//! - [`telemetry`]: logs, traces, metrics
//! - [`artifact`]: the stored form of a quantized model
//! - [`database`]: SQLite or PostgreSQL
//! - [`engine`]: quantized models on devices, batching, jobs, evaluation
//! - [`mod@bench`]: method × model × bits runs and their reports
//! - [`grpc`]: the services
//! - [`shutdown`], [`config`]: signals, the server's settings
//! - [`cli`]: one file per command
//! - `fuzzing`: entry points of the fuzzer

pub mod artifact;
pub mod bench;
pub mod calib;
pub mod cli;
pub mod config;
pub mod data;
pub mod database;
pub mod device;
pub mod digest;
pub mod engine;
pub mod error;
pub mod exec;
#[doc(hidden)]
pub mod fuzzing;
pub mod grpc;
pub mod kernels;
pub mod methods;
pub mod model;
pub mod nn;
pub mod quant;
mod random;
pub mod shutdown;
mod sync;
pub mod telemetry;
pub mod tensor;

pub use error::{Error, Result};
