//! Progress of a calibration, and the way to stop one.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::calib::kept::Tensors;
use crate::error::{Error, Result};

/// One step of a long calculation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProgressUpdate {
    /// What is being done: `load`, `calibrate`, `weights`, `report`, `store`, ...
    pub stage: String,
    /// Units done within the stage.
    pub unit: usize,
    /// Units of the stage.
    pub units: usize,
    /// Images seen so far.
    pub images: usize,
    /// Images in all.
    pub images_total: usize,
    /// Signal-to-noise ratio of a site that was just finished.
    pub site: Option<SiteSqnr>,
    /// Loss of the latest iteration, where something is learned.
    pub loss: Option<f64>,
}

/// The quantization error of one operand of a site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteSqnr {
    /// The site's path.
    pub path: String,
    /// `input`, `weight`, `lhs` or `rhs`.
    pub operand: String,
    /// 10·log10(Σx² / Σ(x − x̂)²) in dB.
    pub sqnr_db: f64,
}

/// Receives progress, keeps what is finished, and says whether to stop. Neither reporting nor keeping
/// ever fails a job.
pub trait Progress: Sync {
    /// Takes note of a step. Must return quickly.
    fn report(&self, update: ProgressUpdate);

    /// Whether the work is to stop at the next safe point.
    fn is_cancelled(&self) -> bool;

    /// What [`Progress::keep`] was given for this unit by an earlier attempt at the very same
    /// calibration, bit for bit; `None` if it is not there, or damaged.
    fn restore(&self, _unit: &str) -> Option<Tensors> {
        None
    }

    /// Keeps the result of a finished unit for a later attempt, if it can.
    fn keep(&self, _unit: &str, _result: &[(String, Tensor)]) {}

    /// A safe point between two reports.
    ///
    /// # Errors
    /// `Cancelled` once the work is to stop.
    fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// Progress that nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Progress for Unwatched {
    fn report(&self, _update: ProgressUpdate) {}

    fn is_cancelled(&self) -> bool {
        false
    }
}
