//! Many images at once: decoded, preprocessed and laid out as one batch.

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::preprocess::{checked_size, preprocess_into};
use super::{DecodeLimits, Sample, decode};
use crate::digest::hex;
use crate::error::Result;
use crate::model::Preprocessing;

/// Preprocessed images.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    /// Number of images.
    pub count: usize,
    /// Height and width in pixels.
    pub image_size: i64,
    /// Normalised float32 `[count, 3, image_size, image_size]`, row-major.
    pub data: Vec<f32>,
}

impl Pixels {
    /// sha256 (hex) over the values as little-endian bytes, in order.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for values in self.data.chunks(4096) {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            hash.update(bytes);
        }
        hex(&hash.finalize())
    }
}

/// Reads, decodes and preprocesses the samples on all cores; the order is kept.
///
/// # Errors
/// Of the first sample that fails: `InvalidArgument` on its name, or `Io`.
pub fn load_pixels(
    samples: &[Sample],
    how: &Preprocessing,
    limits: &DecodeLimits,
) -> Result<Pixels> {
    let size = checked_size(how)? as usize;
    let image = 3 * size * size;
    let mut data = vec![0.0; samples.len() * image];
    let results: Vec<Result<()>> = data
        .par_chunks_exact_mut(image)
        .zip(samples)
        .map(|(out, sample)| {
            // One byte more than allowed at most: the decoder then refuses them.
            let bytes = sample.read((limits.max_bytes as u64).saturating_add(1))?;
            preprocess_into(&decode(&bytes, limits, &sample.name)?, how, out)
        })
        .collect();
    results.into_iter().collect::<Result<()>>()?;
    Ok(Pixels { count: samples.len(), image_size: how.image_size, data })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::data::Dataset;
    use crate::data::decode::Format;
    use crate::data::decode::encoded::encoded;
    use crate::error::Error;
    use crate::model::Interpolation;

    fn how() -> Preprocessing {
        let interpolation = Interpolation::Bicubic;
        Preprocessing { image_size: 2, crop_pct: 1.0, interpolation, mean: [0.0; 3], std: [1.0; 3] }
    }

    fn write_gray(path: &Path, gray: u8) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, encoded(Format::Png, 2, &[gray; 12])).unwrap();
    }

    #[test]
    fn samples_keep_their_order() {
        let root = tempfile::tempdir().unwrap();
        for gray in 0..20 {
            write_gray(&root.path().join(format!("c/{gray:02}.png")), gray);
        }
        let mut samples = Dataset::open(root.path(), "dataset").unwrap().samples;
        samples.reverse();
        let pixels = load_pixels(&samples, &how(), &DecodeLimits::default()).unwrap();
        assert_eq!((pixels.count, pixels.image_size, pixels.data.len()), (20, 2, 20 * 12));
        let first: Vec<f32> = pixels.data.chunks(12).map(|image| image[0] * 255.0).collect();
        assert_eq!(first, (0..20).rev().map(|gray| gray as f32).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_bad_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        write_gray(&root.path().join("c/1.png"), 1);
        fs::write(root.path().join("c/2.png"), "not an image").unwrap();
        fs::write(root.path().join("c/3.png"), "").unwrap();
        let samples = Dataset::open(root.path(), "dataset").unwrap().samples;
        let load = |limits: &DecodeLimits| load_pixels(&samples, &how(), limits).unwrap_err();
        let error = load(&DecodeLimits::default()).to_string();
        assert!(error.starts_with("c/2.png: the bytes are neither"), "{error}");
        let error = load(&DecodeLimits { max_bytes: 20, ..DecodeLimits::default() }).to_string();
        assert!(error.starts_with("c/1.png: 21 bytes exceed"), "{error}");
        fs::remove_file(root.path().join(&samples[0].name)).unwrap();
        assert!(matches!(load(&DecodeLimits::default()), Error::Io { .. }));
    }

    #[test]
    fn the_digest_is_the_sha256_of_the_little_endian_values() {
        let digest = |data: Vec<f32>| Pixels { count: 1, image_size: 1, data }.digest();
        // printf '\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x00\x3f' | sha256sum
        assert_eq!(
            digest(vec![1.0, -2.0, 0.5]),
            "2ce4bdb6b34a50ac7092eb9fee94337a27498e9eb9bae44192f15b88831b2422"
        );
        assert_ne!(digest(vec![0.0]), digest(vec![-0.0]));
    }
}
