//! Quantizers: mappings of reals onto finite grids, their granularity, search and plans.

pub mod bits;
pub mod cost;
pub(crate) mod dense;
pub mod dynamic;
pub(crate) mod encode;
pub mod granularity;
pub mod log2;
pub(crate) mod once;
pub mod plan;
pub(crate) mod planes;
pub mod quantizer;
pub mod search;
pub(crate) mod steps;
pub mod tokens;
pub mod uniform;

pub use bits::{BitWidth, Precision};
pub use cost::OperandCost;
pub use granularity::Granularity;
pub use plan::QuantPlan;
pub use quantizer::{IntTerm, Quantizer, QuantizerState, Slope};
