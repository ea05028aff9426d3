//! Calibration: what every method shares. A method sees a task and returns a [`Quantization`].

pub mod capture;
pub mod progress;
pub mod task;

pub use progress::{Progress, ProgressUpdate};
pub use task::{CalibrationReport, CalibrationTask, Quantization, SiteReport};
