//! Images, preprocessing and data sets. Free of libtorch: pixels leave as plain floats.
//!
//! [`decode`] bytes → [`preprocess`] by the model's spec → [`load_pixels`] for whole sets, which
//! [`Dataset`] lists and draws samples from.

mod dataset;
mod decode;
mod pixel_buffer;
mod pixels;
mod preprocess;
mod resample;

pub use dataset::{
    Dataset, Sample, Source, check_classes, check_subset, check_tar_start, has_image_name, is_tar,
};
pub(crate) use decode::decode_by_content;
pub use decode::{DecodeLimits, RgbImage, check_start, decode, is_image};
pub use pixel_buffer::PixelBuffer;
pub use pixels::{Pixels, load_pixels};
pub use preprocess::{preprocess, resize_and_crop};
