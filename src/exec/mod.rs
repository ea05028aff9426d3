//! Executors: how a model's products are computed. The model says what, the executor says how.

mod float;
mod simulated;
mod tap;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::{Linear, Site};

pub use float::Float;
pub use simulated::{Simulated, WeightSource};
pub use tap::{Tap, TapSink};

/// Computes the two kinds of quantizable product.
pub trait Executor {
    /// `x · op.weightᵀ + op.bias`; x [.., in] → [.., out].
    ///
    /// # Errors
    /// `Device` when libtorch refuses; `Cancelled` from sinks that were asked to stop.
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor>;

    /// `lhs · rhsᵀ`; lhs [b, h, m, k], rhs [b, h, n, k] → [b, h, m, n].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor>;
}

/// The caller's choice of arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Float weights and activations.
    Float,
    /// Fake quantization in float32: the definition of each method.
    #[default]
    Simulated,
}

impl Backend {
    /// The name in flags, reports and result files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Simulated => "simulated",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "float" => Ok(Self::Float),
            "simulated" => Ok(Self::Simulated),
            other => Err(Error::invalid(
                "executor",
                format!("unknown executor `{other}`, known are float and simulated"),
            )),
        }
    }
}
