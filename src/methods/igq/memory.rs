//! IGQ-ViT's operands in two passes over memory: extents of parts, then values on their grids.

use tch::Tensor;

use super::quantizer::{Layout, Part};
use crate::error::Result;
use crate::kernels::passes::Strided;
use crate::kernels::passes::affine::Grid;
use crate::kernels::passes::tokens::{self, Along, TokenGrids};
use crate::quant::BitWidth;
use crate::quant::dense::Dense;
use crate::quant::dynamic::Affine;
use crate::quant::uniform::Range;
use crate::tensor::to_vec_f32;

impl Layout {
    /// Where the parts of an operand x [images·windows, ..] are in its memory; `None` where it lies in
    /// an order that there is no pass for.
    fn in_memory(self, x: &Tensor, dense: &Dense) -> Option<tokens::Layout> {
        let size = |axis: usize| x.size().get(axis).map_or(1, |n| usize::try_from(*n).unwrap_or(0));
        let windows = usize::try_from(self.windows).ok().filter(|windows| *windows > 0)?;
        let (along, heads, rows) = match (self.part, dense.swapped()) {
            (Part::Channels, false) => (Along::Columns, 1, size(1)),
            (Part::HeadChannels, false) => (Along::Columns, size(1), size(2)),
            (Part::ValueChannels, true) => (Along::Columns, size(1), size(3)),
            (Part::ValueChannels | Part::ScoreRows, false) => (Along::Rows, size(1), size(2)),
            (Part::Channels | Part::HeadChannels | Part::ScoreRows, true) => return None,
        };
        let blocks = size(0) * heads;
        let set = |block: usize| match self.part {
            Part::ScoreRows => block,
            Part::Channels | Part::HeadChannels | Part::ValueChannels => {
                block / heads / windows * heads + block % heads
            }
        };
        let sets: Vec<usize> = (0..blocks).map(set).collect();
        let set_count = sets.last().map_or(0, |last| last + 1);
        let width = dense.width();
        let per_image = 0; // parts are not ranked
        Some(tokens::Layout { width, rows, sets, set_count, tokens_per_image: per_image, along })
    }

    /// Smallest and largest value of every part, as [`Layout::range`], from a pass over memory.
    fn range_in_memory(self, x: &Tensor, dense: &Dense, layout: &tokens::Layout) -> Result<Range> {
        let extents = layout.extents(Strided::dense(dense.values()?, layout.width));
        let size = x.size();
        let images = size[0] / self.windows;
        let shape = match self.part {
            Part::Channels => vec![images, 1, 1, size[2]],
            Part::HeadChannels => vec![images, 1, size[1], 1, size[3]],
            Part::ValueChannels => vec![images, 1, size[1], size[2], 1],
            Part::ScoreRows => vec![images, self.windows, size[1], size[2], 1],
        };
        let tensor = |values: Vec<f32>| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(&values)?.f_view(shape.as_slice())?)
        };
        let high = tensor(extents.iter().map(|extent| extent.high).collect())?;
        let low = match self.part {
            Part::ScoreRows => high.f_zeros_like()?,
            Part::Channels | Part::HeadChannels | Part::ValueChannels => {
                tensor(extents.iter().map(|extent| extent.low).collect())?
            }
        };
        Ok(Range { low, high })
    }

    /// x̂ in two passes over memory, given what makes the grids of ranges.
    pub(super) fn fake_quantize_in_passes(
        self,
        x: &Tensor,
        bits: BitWidth,
        affine: impl Fn(&Range) -> Result<Affine>,
    ) -> Result<Option<Tensor>> {
        let Some(dense) = Dense::of(x)? else { return Ok(None) };
        let Some(layout) = self.in_memory(x, &dense) else { return Ok(None) };
        let affine = affine(&self.range_in_memory(x, &dense, &layout)?)?;
        let parameters =
            to_vec_f32(&affine.scale)?.into_iter().zip(to_vec_f32(&affine.zero_point)?);
        let max_code = bits.max_code() as f32;
        let grids = parameters.map(|(scale, zero_point)| Grid { scale, zero_point, max_code });
        let grids = TokenGrids { layout: &layout, grids: grids.collect() };
        Ok(Some(dense.map(|x, out| grids.quantize(x, out))?))
    }
}
