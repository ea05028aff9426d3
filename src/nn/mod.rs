//! Building blocks that know nothing about architectures: named weights, sites, linear layers, norms.

mod blocks;
mod derived;
mod linear;
mod norm;
mod per_image;
mod site;
mod weights;
mod windows;

pub use blocks::{Attention, Mlp};
pub use derived::Derived;
pub use linear::Linear;
pub use norm::LayerNorm;
pub use per_image::{gelu, mean_of_tokens};
pub use site::{Operand, Role, Site, SiteId};
pub use weights::{Scope, WeightEdits, Weights};
pub use windows::Windows;
