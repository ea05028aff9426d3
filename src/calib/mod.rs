//! Calibration: what every method shares. A method sees a task and returns a [`Quantization`].

pub mod capture;
pub mod kept;
pub mod progress;
pub mod reconstruct;
pub mod reparam;
pub mod report;
pub mod role_bits;
pub mod static_grids;
pub mod task;

pub use progress::{Progress, ProgressUpdate};
pub use report::SiteLog;
pub use role_bits::RoleBits;
pub use task::{
    CalibrationReport, CalibrationTask, Quantization, QuantizeSpec, SiteReport, StemHeadPolicy,
};
