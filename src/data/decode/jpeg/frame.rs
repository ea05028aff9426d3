//! The frame: an image's components and their coefficients or samples.

use super::dct;

/// An image while it is decoded.
pub(super) struct Frame {
    /// Columns.
    pub(super) width: usize,
    /// Rows.
    pub(super) height: usize,
    /// Whether coefficients come in several scans, to be transformed when all are there.
    pub(super) progressive: bool,
    /// Greatest sampling factors.
    pub(super) h_max: usize,
    pub(super) v_max: usize,
    /// Minimum coded units in a row and in a column of an interleaved scan.
    pub(super) mcus: (usize, usize),
    pub(super) components: Vec<Component>,
}

/// One colour component, at its own resolution.
pub(super) struct Component {
    pub(super) id: u8,
    /// Sampling factors, 1..=4.
    pub(super) h: usize,
    pub(super) v: usize,
    /// Destination number of its quantization table.
    pub(super) quantization: usize,
    /// The table as it stood when the component's first scan began.
    pub(super) steps: Option<[u16; 64]>,
    /// Samples that belong to the image.
    pub(super) width: usize,
    pub(super) height: usize,
    /// Blocks in a row, whole MCUs.
    pub(super) blocks: usize,
    /// Samples, row-major, `8 · blocks` a row.
    pub(super) samples: Vec<u8>,
    /// Coefficients of a progressive image, 64 for each block, in natural order.
    pub(super) coefficients: Vec<i16>,
}

/// Two bytes, the high one first.
pub(super) fn be16(bytes: &[u8], at: usize) -> Result<u16, String> {
    let pair = bytes.get(at..).and_then(|rest| rest.first_chunk());
    pair.map(|pair| u16::from_be_bytes(*pair)).ok_or_else(|| "a JPEG segment is too short".into())
}

impl Frame {
    /// A frame header; its size must have been checked.
    pub(super) fn parse(payload: &[u8], progressive: bool) -> Result<Self, String> {
        let (height, width) = (be16(payload, 1)?.into(), be16(payload, 3)?.into());
        let [8, _, _, _, _, count, ref specs @ ..] = *payload else {
            return Err("only JPEG images of 8 bits a sample are supported".into());
        };
        if specs.len() != 3 * usize::from(count) || !(1..=4).contains(&count) {
            return Err("the JPEG image's frame header is damaged".into());
        }
        let factors = |spec: &[u8]| (usize::from(spec[1] >> 4), usize::from(spec[1] & 15));
        let (mut h_max, mut v_max) = (1, 1);
        for (h, v) in specs.chunks_exact(3).map(factors) {
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) {
                return Err("the JPEG image's sampling factors are out of range".into());
            }
            (h_max, v_max) = (h_max.max(h), v_max.max(v));
        }
        let mcus = (usize::div_ceil(width, 8 * h_max), usize::div_ceil(height, 8 * v_max));
        let component = |spec: &[u8]| {
            let (h, v) = factors(spec);
            let (blocks, rows) = (mcus.0 * h, mcus.1 * v);
            Component {
                id: spec[0],
                h,
                v,
                quantization: spec[2].into(),
                steps: None,
                width: usize::div_ceil(width * h, h_max),
                height: usize::div_ceil(height * v, v_max),
                blocks,
                // Gray where a scan never comes or ends early.
                samples: vec![128; 64 * blocks * rows],
                coefficients: if progressive { vec![0; 64 * blocks * rows] } else { Vec::new() },
            }
        };
        let components = specs.chunks_exact(3).map(component).collect();
        Ok(Self { width, height, progressive, h_max, v_max, mcus, components })
    }

    /// Transforms the coefficients of a progressive image.
    pub(super) fn finish(&mut self) {
        for component in &mut self.components {
            let coefficients = std::mem::take(&mut component.coefficients);
            for (at, block) in coefficients.as_chunks().0.iter().enumerate() {
                component.transform(at % component.blocks, at / component.blocks, block);
            }
        }
    }
}

impl Component {
    /// Writes the samples of a block's coefficients.
    pub(super) fn transform(&mut self, column: usize, row: usize, block: &[i16; 64]) {
        if let Some(steps) = &self.steps {
            let stride = 8 * self.blocks;
            let start = 8 * row * stride + 8 * column;
            dct::inverse(block, steps, &mut self.samples[start..], stride);
        }
    }

    /// A row of samples that belong to the image; rows outside repeat the nearest one.
    pub(super) fn row(&self, at: isize) -> &[u8] {
        let row = at.clamp(0, self.height as isize - 1) as usize;
        &self.samples[8 * self.blocks * row..][..self.width]
    }
}
