//! Building blocks that know nothing about architectures: named weights, sites, linear layers, norms.

mod derived;
mod linear;
mod norm;
mod per_image;
mod site;
mod weights;

pub use derived::Derived;
pub use linear::Linear;
pub use norm::LayerNorm;
pub use per_image::{gelu, mean_of_tokens};
pub use site::{Operand, Role, Site, SiteId};
pub use weights::{Scope, WeightEdits, Weights};
