//! The stored form of a quantized model: one self-contained safetensors file.

pub mod content;
pub mod format;
pub mod pack;
pub mod store;

pub use format::{Artifact, Header};
