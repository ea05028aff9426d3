//! Softmax on a GPU, its weights as they are or rounded while they are computed.

use tch::{Kind, Tensor};

use super::attention::{BinArguments, Bins, Offsets, ScoreOffsets};
use super::compile::{PLAIN, Source};
use super::gpu::{Gpu, Launch, address, by_value, parts, to_i32, to_u32};
use super::operand::Tokens;
use super::quantize::{Plane, ROWS, Stairs, THREADS};
use crate::error::{Error, Result};

/// A uniform grid whose scale and zero point, float32 [1], are on a GPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct GridOnGpu<'a> {
    pub(super) scale: &'a Tensor,
    pub(super) zero_point: &'a Tensor,
    pub(super) max_code: f32,
}

/// Scores and what is added to them, as the kernels read them.
struct Scores {
    scores: Tensor,
    offsets: Offsets,
}

#[repr(C)]
struct SoftmaxArguments {
    scores: u64,
    bias: u64,
    mask: u64,
    out: u64,
    rows: i32,
    tokens: i32,
    heads: i32,
    windows: i32,
    scale: f32,
    max_code: f32,
    grid_scale: u64,
    grid_zero: u64,
}

#[repr(C)]
struct SteppedArguments {
    softmax: SoftmaxArguments,
    tokens: Tokens,
    sums: u64,
    largest: u64,
    bins: BinArguments,
}

by_value!(SoftmaxArguments, SteppedArguments);

fn source() -> Source {
    let text = concat!(
        include_str!("primitives.cu"),
        include_str!("tokens.cu"),
        include_str!("bins.cu"),
        include_str!("softmax.cu")
    );
    Source { name: "softmax", text, definitions: PLAIN, contract: false }
}

impl Scores {
    /// Those of a softmax, as [`Gpu::softmax`] takes them.
    fn new(gpu: &Gpu, scores: &Tensor, [bias, mask]: [Option<&Tensor>; 2]) -> Result<Self> {
        let (windows, heads, tokens, width) = scores.size4()?;
        let count = windows * heads * tokens * tokens;
        if tokens != width || !gpu.fits(Some(scores), Kind::Float, count) {
            return Err(Error::internal("scores of a softmax are no squares on its GPU"));
        }
        let offsets = ScoreOffsets { scale: 1.0, bias, mask };
        let offsets = offsets.dense(gpu, [windows, heads, tokens])?;
        Ok(Self { scores: scores.f_contiguous()?, offsets })
    }

    fn rows(&self) -> Result<i64> {
        let (b, heads, tokens, _) = self.scores.size4()?;
        Ok(b * heads * tokens)
    }

    fn arguments(
        &self,
        out: &Tensor,
        scale: f32,
        grid: Option<GridOnGpu<'_>>,
    ) -> Result<SoftmaxArguments> {
        let (_, heads, tokens, _) = self.scores.size4()?;
        Ok(SoftmaxArguments {
            scores: address(Some(&self.scores)),
            bias: address(self.offsets.bias.as_ref()),
            mask: address(self.offsets.mask.as_ref()),
            out: address(Some(out)),
            rows: to_i32(self.rows()?)?,
            tokens: to_i32(tokens)?,
            heads: to_i32(heads)?,
            windows: to_i32(self.offsets.masks)?,
            scale,
            max_code: grid.map_or(0.0, |grid| grid.max_code),
            grid_scale: address(grid.map(|grid| grid.scale)),
            grid_zero: address(grid.map(|grid| grid.zero_point)),
        })
    }
}

impl Gpu {
    /// Softmax over the last axis of scale · scores + bias + mask, for scores [b, heads, t, t], a bias
    /// [1, heads, t, t] and a mask [windows, 1, t, t] of which b is a multiple.
    ///
    /// # Errors
    /// `Internal` when shapes do not fit or the kernel does not start.
    pub fn softmax(
        &self,
        scores: &Tensor,
        scale: f32,
        terms: [Option<&Tensor>; 2],
    ) -> Result<Tensor> {
        self.softmax_on(scores, scale, terms, None)
    }

    /// [`Gpu::softmax`], rounded to a grid if there is one.
    pub(super) fn softmax_on(
        &self,
        scores: &Tensor,
        scale: f32,
        terms: [Option<&Tensor>; 2],
        grid: Option<GridOnGpu<'_>>,
    ) -> Result<Tensor> {
        let scores = Scores::new(self, scores, terms)?;
        let out = scores.scores.f_empty_like()?;
        let arguments = scores.arguments(&out, scale, grid)?;
        self.by_row(&source(), "softmax", scores.rows()?, &arguments)?;
        Ok(out)
    }

    /// The bits of [`Gpu::softmax`] on stairs relative to the largest weight of a token
    /// ([`Rounded::stairs`](super::Rounded::stairs)); `None` where only that does it.
    ///
    /// # Errors
    /// As [`Gpu::softmax`].
    pub fn stepped_softmax(
        &self,
        scores: &Tensor,
        scale: f32,
        terms: [Option<&Tensor>; 2],
        stairs: &Stairs<'_>,
    ) -> Result<Option<Tensor>> {
        let (b, heads, rows, width) = scores.size4()?;
        let Some((tokens, least_ratio)) = stairs.relative else { return Ok(None) };
        let half = i64::from(tokens.half);
        let members = i64::from(tokens.heads) * (4 * half * half).max(1);
        let fits = [i64::from(tokens.rows), i64::from(tokens.width)] == [rows, width]
            && members > 0
            && b * heads % members == 0
            && b * heads * rows > 0;
        let Some(planes) = value_bytes(stairs).filter(|_| fits) else { return Ok(None) };
        let stairs = Stairs { planes, relative: Some((tokens, least_ratio)), ..*stairs };
        let Some(bins) = Bins::kept(self, &stairs)? else { return Ok(None) };

        let scores = Scores::new(self, scores, terms)?;
        let (rows, out) = (scores.rows()?, scores.scores.f_empty_like()?);
        let on_gpu = (Kind::Float, self.device());
        let sums = Tensor::f_empty([rows, 2], on_gpu)?;
        let largest = Tensor::f_zeros([tokens.count(out.numel() as i64)], on_gpu)?;
        let arguments = SteppedArguments {
            softmax: scores.arguments(&out, scale, None)?,
            tokens,
            sums: address(Some(&sums)),
            largest: address(Some(&largest)),
            bins: bins.arguments(),
        };
        let grid = (to_u32(parts(rows, ROWS))?, 1, 1);
        let shared = to_u32(bins.bytes())?;
        let sum = self.function(&source(), "sum_rows", 0)?;
        let step = self.function(&source(), "step_rows", 0)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: scores, bias and mask were checked, results are of their shape, there are sums for every row and a
        // largest weight for every token of the blocks, a multiple of those that share tokens; all live until the
        // call ends.
        unsafe {
            self.launch(&sum, Launch { grid, threads: THREADS, shared: 0 }, &arguments)?;
            self.launch(&step, Launch { grid, threads: THREADS, shared }, &arguments)?;
        }
        Ok(Some(out))
    }
}

/// Planes whose codes are the upper bytes of values, the lower ones of which are zero; `None` where they are not.
fn value_bytes(stairs: &Stairs<'_>) -> Option<Vec<Plane>> {
    let bits = stairs.values.map(f32::to_bits);
    if bits.get(1..=stairs.stairs.len())?.iter().any(|bits| bits & 0xffff != 0) {
        return None;
    }
    let bits = |steps: usize| if steps == 0 { 0 } else { bits[steps] };
    let plane = |shift: u32| Plane {
        codes: std::array::from_fn(|steps| (bits(steps) >> shift) as u8),
        factor: 1.0,
    };
    Some(vec![plane(16), plane(24)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::compile::argument_bytes;
    use crate::kernels::passes::staircase::{Passed, Staircase, values_of};

    #[test]
    fn the_kernels_compile_for_both_generations() {
        for capability in [(8, 0), (9, 0)] {
            let program = source().compile(capability).unwrap().to_src();
            for (kernel, bytes) in [
                ("softmax", size_of::<SoftmaxArguments>()),
                ("sum_rows", size_of::<SteppedArguments>()),
                ("step_rows", size_of::<SteppedArguments>()),
            ] {
                assert_eq!(argument_bytes(&program, kernel), bytes, "{kernel}");
            }
        }
    }

    #[test]
    fn values_of_few_bits_are_two_bytes() {
        let stairs = Staircase::new(vec![0.1, 0.5], Passed::AtLeast).unwrap();
        let planes = |values: &[f32]| {
            let values = values_of(values);
            value_bytes(&Stairs {
                stairs: &stairs,
                values: &values,
                relative: None,
                planes: vec![],
            })
        };
        // What is decoded below the first step is zero whatever its value.
        let found = planes(&[0.3, -0.375, 2f32.powi(-28)]).unwrap();
        for (steps, value) in [0.0, -0.375, 2f32.powi(-28)].into_iter().enumerate() {
            let [low, high] = [0, 1].map(|plane| u32::from(found[plane].codes[steps]));
            assert_eq!(f32::from_bits(low << 16 | high << 24), value, "{steps}");
        }
        assert!(planes(&[0.0, 0.3, 0.5]).is_none());
    }
}
