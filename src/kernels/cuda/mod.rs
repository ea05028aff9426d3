//! Kernels for NVIDIA GPUs: CUDA C++ that NVRTC compiles at run time, launched on libtorch's tensors and
//! on the stream that libtorch uses.
//!
//! Neither a CUDA toolkit to build nor a GPU to compile is needed. [`Gpu::of`] gives the kernels of a
//! tensor's device once they have compiled and passed their check there; a device without
//! them, or where they fail, has none, and callers fall back to libtorch.

mod attention;
mod between;
mod check;
mod codes;
mod compile;
mod gpu;
mod operand;
mod product;
mod quantize;
mod softmax;
mod token_attention;

pub use attention::{Bins, FixedGrid, HeadCodes, HeadShape, ScoreOffsets};
pub use codes::{FixedCodes, GpuCodes, GpuWeight};
pub use gpu::Gpu;
pub use operand::Tokens;
pub use product::Epilogue;
pub use quantize::{Affine, Plane, Rounded, Stairs, Stretch};
pub use token_attention::{TokenAttention, TokenCodes, TokenHeads};
