//! The library's files, compiled again.

#[path = "../../src/engine/batcher/mod.rs"]
pub mod batcher;
#[path = "../../src/engine/device.rs"]
pub mod device;

pub(crate) use vitq::engine::{FloatModel, QuantizedModel};

pub(crate) mod pipeline {
    pub(crate) use vitq::engine::pipeline::image_batch;
}
