//! Hot loops on plain slices. Nothing here knows models.

pub mod cpu_slices;
pub mod passes;
