//! The library's files, compiled again.

#[path = "../../src/engine/batcher/mod.rs"]
pub mod batcher;
#[path = "../../src/engine/device.rs"]
pub mod device;

pub(crate) use vitq::engine::{FloatModel, QuantizedModel};

/// What a device notes of a model; nobody looks at it here.
pub(crate) mod statistics {
    use std::time::Duration;

    use crate::engine::batcher::Pace;

    #[derive(Debug, Default)]
    pub(crate) struct Meter {
        pub(crate) pace: Pace,
        pub(crate) statistics: Statistics,
    }

    #[derive(Debug, Default)]
    pub(crate) struct Statistics;

    impl Statistics {
        pub(crate) fn note_batch(&self, _images: usize, _time: Duration) {}
    }
}

pub(crate) mod pipeline {
    pub(crate) use vitq::engine::pipeline::image_batch;
}
