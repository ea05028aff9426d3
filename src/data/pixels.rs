//! Many images at once: decoded, preprocessed and laid out as one batch.

use std::fs::File;
use std::io::Read;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::preprocess::{checked_size, preprocess_into};
use super::{DecodeLimits, Sample, decode};
use crate::error::{Error, Result};
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
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
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
            let bytes = read_limited(sample, limits)?;
            preprocess_into(&decode(&bytes, limits, &sample.name)?, how, out)
        })
        .collect();
    results.into_iter().collect::<Result<()>>()?;
    Ok(Pixels { count: samples.len(), image_size: how.image_size, data })
}

/// The file's bytes, one more than allowed at most: the decoder then refuses them.
fn read_limited(sample: &Sample, limits: &DecodeLimits) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = (limits.max_bytes as u64).saturating_add(1);
    File::open(&sample.path)
        .and_then(|file| file.take(most).read_to_end(&mut bytes))
        .map_err(|error| Error::io(&sample.path, error))?;
    Ok(bytes)
}
