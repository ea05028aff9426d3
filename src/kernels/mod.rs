//! Hot loops on plain slices. Nothing here knows tensors or models.

pub mod passes;
