//! The labelled images that a run scores: a digest to recognise them, and their pixels in chunks.

use std::collections::HashMap;
use std::ops::Range;

use rayon::prelude::*;
use tch::{Device, Tensor};

use crate::data::{DecodeLimits, Sample, load_pixels};
use crate::digest::sha256_hex;
use crate::engine::pipeline::image_batch;
use crate::error::Result;
use crate::model::Preprocessing;

/// Pixels up to this many bytes are kept between rows; larger sets are decoded anew for each.
const RESIDENT_BYTES: usize = 1 << 30;
/// Images decoded at a time when they are not kept.
const CHUNK_IMAGES: usize = 512;

/// Recognises sets of samples: models may have different classes for the same files, which are read
/// once.
#[derive(Debug, Default)]
pub struct Digests {
    /// sha256 (hex) of files by name.
    contents: HashMap<String, String>,
}

impl Digests {
    /// sha256 (hex) over the names, classes and file contents of the samples, in order.
    ///
    /// # Errors
    /// `Io` for an unreadable file.
    pub fn of(&mut self, samples: &[Sample]) -> Result<String> {
        let unread = samples.par_iter().filter(|sample| !self.contents.contains_key(&sample.name));
        let read = unread
            .map(|sample| Ok((sample.name.clone(), sha256_hex(&sample.read(u64::MAX)?))))
            .collect::<Result<Vec<_>>>()?;
        self.contents.extend(read);
        let line = |sample: &Sample| {
            let content = self.contents.get(&sample.name).map_or("", String::as_str);
            format!("{}\n{}\n{content}\n", sample.name, sample.class)
        };
        Ok(sha256_hex(samples.iter().map(line).collect::<String>().as_bytes()))
    }
}

/// Validation images as one model wants them.
#[derive(Debug)]
pub struct Validation<'a> {
    samples: &'a [Sample],
    how: Preprocessing,
    limits: DecodeLimits,
    kept: Option<Tensor>,
}

impl<'a> Validation<'a> {
    /// Decodes and keeps the images if they fit into memory, else leaves them on disk.
    ///
    /// # Errors
    /// As [`load_pixels`].
    pub fn open(samples: &'a [Sample], how: Preprocessing) -> Result<Self> {
        let limits = DecodeLimits::default();
        let side = usize::try_from(how.image_size).unwrap_or(0);
        let bytes = samples.len() * 3 * side * side * size_of::<f32>();
        let kept = (bytes <= RESIDENT_BYTES)
            .then(|| image_batch(&load_pixels(samples, &how, &limits)?))
            .transpose()?;
        Ok(Self { samples, how, limits, kept })
    }

    /// Whether all pixels are in memory, so that a second pass costs no decoding.
    pub fn is_resident(&self) -> bool {
        self.kept.is_some()
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Class index of an image.
    pub fn class(&self, image: usize) -> usize {
        self.samples[image].class
    }

    /// Shows `visit` all images in order, in batches [b, 3, h, w] on `device` of at most
    /// `batch_size` images, with the indices of the images in each.
    ///
    /// # Errors
    /// What `visit` reports; as [`load_pixels`].
    pub fn for_each_batch(
        &self,
        batch_size: usize,
        device: Device,
        mut visit: impl FnMut(Range<usize>, &Tensor) -> Result<()>,
    ) -> Result<()> {
        // A chunk is a whole number of batches, so that only the last batch may be smaller.
        let chunk = CHUNK_IMAGES.div_ceil(batch_size) * batch_size;
        for first in (0..self.len()).step_by(chunk) {
            let count = chunk.min(self.len() - first);
            let pixels = match &self.kept {
                Some(all) => narrow(all, first, count)?,
                None => {
                    let samples = &self.samples[first..first + count];
                    image_batch(&load_pixels(samples, &self.how, &self.limits)?)?
                }
            };
            for start in (0..count).step_by(batch_size) {
                let size = batch_size.min(count - start);
                let batch = narrow(&pixels, start, size)?.f_to_device(device)?;
                visit(first + start..first + start + size, &batch)?;
            }
        }
        Ok(())
    }
}

fn narrow(images: &Tensor, start: usize, count: usize) -> Result<Tensor> {
    Ok(images.f_narrow(0, start as i64, count as i64)?)
}
