//! Quantized models on devices, batching, jobs, evaluation.

pub mod evaluator;
pub mod pipeline;
pub mod quantized_model;

pub use quantized_model::{FloatModel, QuantizedModel};
