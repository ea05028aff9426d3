//! The methods, their typed options, and the registry. A new method is its file and one line.

mod dopq;
mod float;
#[cfg(test)]
mod goldens;
mod ias;
mod igq;
mod minmax;
mod options;
mod ptq4vit;
mod repq;
mod ubb;
mod vitq;

use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::quant::{Quantizer, QuantizerState};

pub use options::{MethodOptions, OptionKind, OptionSpec, OptionValue};

/// A float model and calibration images in, quantization parameters out. Pure: touches no live model.
pub trait Method: Send {
    /// Finds the quantization parameters.
    ///
    /// # Errors
    /// `Cancelled` when the task was asked to stop; `InvalidArgument` when an option does not fit
    /// the model; `Device` when libtorch refuses.
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization>;
}

/// One method of the registry.
#[derive(Debug)]
pub struct MethodEntry {
    /// The id in requests: `ubb`, `minmax`, ...
    pub id: &'static str,
    /// One line for a catalogue.
    pub summary: &'static str,
    /// Paper or source, one line.
    pub source: &'static str,
    /// The typed options with defaults.
    pub options: &'static [OptionSpec],
    /// Builds the method.
    pub build: fn() -> Box<dyn Method>,
    /// Restores a quantizer kind of the method's own; `None` for kinds it does not know.
    pub restore: fn(&QuantizerState) -> Option<Result<Box<dyn Quantizer>>>,
}

/// Every method, in the order of catalogues and tables.
pub const METHODS: &[&MethodEntry] = &[
    &float::METHOD,
    &minmax::METHOD,
    &ubb::METHOD,
    &ptq4vit::METHOD,
    &repq::METHOD,
    &igq::METHOD,
    &ias::METHOD,
    &dopq::METHOD,
    &vitq::METHOD,
];

/// The method of that id.
///
/// # Errors
/// `InvalidArgument` on field `method`, naming the known ids.
pub fn find(id: &str) -> Result<&'static MethodEntry> {
    METHODS.iter().copied().find(|method| method.id == id).ok_or_else(|| {
        let known = METHODS.iter().map(|m| m.id).collect::<Vec<_>>().join(", ");
        Error::invalid("method", format!("unknown method `{id}`, known are {known}"))
    })
}

/// Restores a stored quantizer of any kind.
///
/// # Errors
/// `CorruptArtifact` for an unknown kind or an incomplete state.
pub fn restore(state: &QuantizerState) -> Result<Box<dyn Quantizer>> {
    crate::quant::quantizer::restore_shared(state)
        .or_else(|| METHODS.iter().find_map(|method| (method.restore)(state)))
        .unwrap_or_else(|| {
            Err(Error::corrupt("artifact", format!("unknown quantizer kind `{}`", state.kind)))
        })
}
