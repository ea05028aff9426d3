//! Quantizers: mappings of reals onto finite grids, their granularity, search and plans.

pub mod bits;
pub mod cost;
pub mod dynamic;
mod encode;
pub mod granularity;
pub mod log2;
pub mod plan;
pub mod quantizer;
pub mod search;
pub mod tokens;
pub mod uniform;

pub use bits::{BitWidth, Precision};
pub use cost::OperandCost;
pub use granularity::Granularity;
pub use plan::QuantPlan;
pub use quantizer::{IntTerm, Quantizer, QuantizerState};
