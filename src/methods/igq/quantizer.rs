//! The quantizers of IGQ-ViT (methods/igq-vit.md, sections 2 to 4): static uniform grids, and the
//! assignment of every channel of every image, or of every row of scores, to the nearest of them.

use tch::{Device, Kind, Tensor};

use super::clusters::{Cluster, Extent};
use crate::error::{Error, Result};
use crate::quant::cost::{OperandCost, RANGE_BITS, elements, rows};
use crate::quant::dynamic::Affine;
use crate::quant::search::MIN_SCALE;
use crate::quant::uniform::Range;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::to_vec_f64;

/// Kind name of [`Grouped`] in artifacts.
pub(super) const GROUPED_KIND: &str = "igq_groups";
/// Kind name of [`OwnRange`] in artifacts.
pub(super) const OWN_RANGE_KIND: &str = "igq_own_range";

/// What of an operand is assigned to a grid as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Channels of a linear input [images·windows, tokens, channels].
    Channels,
    /// Head channels of q and k [images·windows, heads, tokens, channels].
    HeadChannels,
    /// Head channels of vᵀ [images·windows, heads, channels, tokens].
    ValueChannels,
    /// Rows of attention scores [images·windows, heads, rows, tokens]; they begin at 0.
    ScoreRows,
}

/// Every part, by its number in artifacts.
const PARTS: [Part; 4] = [Part::Channels, Part::HeadChannels, Part::ValueChannels, Part::ScoreRows];

/// Where the parts of an operand are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) part: Part,
    /// Windows of an image along axis 0: a channel is one part in all of them.
    pub(super) windows: i64,
}

impl Part {
    /// Bounds that a range has to be searched for.
    fn bounds(self) -> f64 {
        match self {
            Self::ScoreRows => 1.0,
            Self::Channels | Self::HeadChannels | Self::ValueChannels => 2.0,
        }
    }
}

impl Layout {
    /// Number of parts of one image's operand of that shape.
    fn parts(self, shape: &[i64]) -> f64 {
        let size = |axis: usize| shape.get(axis).map_or(1.0, |n| *n as f64);
        match self.part {
            Part::Channels => size(2),
            Part::HeadChannels => size(1) * size(3),
            Part::ValueChannels => size(1) * size(2),
            Part::ScoreRows => rows(shape),
        }
    }

    /// Sums that a product keeps apart when its operand has `grids` grids: none where a part is a row
    /// that a scale factors out of.
    fn partial_sums(self, grids: f64) -> f64 {
        match self.part {
            Part::Channels | Part::HeadChannels => grids,
            Part::ValueChannels | Part::ScoreRows => 1.0,
        }
    }

    /// x [images·windows, ..] → [images, windows, ..].
    fn by_image(self, x: &Tensor) -> Result<Tensor> {
        let mut shape = vec![x.size()[0] / self.windows, self.windows];
        shape.extend(&x.size()[1..]);
        Ok(x.f_reshape(shape)?)
    }

    /// Smallest and largest value of every part of x [images, windows, ..], the axes within a part
    /// kept with length 1.
    fn range(self, x: &Tensor) -> Result<Range> {
        let within: &[i64] = match self.part {
            Part::Channels => &[1, 2],
            Part::HeadChannels => &[1, 3],
            Part::ValueChannels => &[1, 4],
            Part::ScoreRows => &[4],
        };
        let high = x.f_amax(within, true)?;
        let low = match self.part {
            Part::ScoreRows => high.f_zeros_like()?,
            Part::Channels | Part::HeadChannels | Part::ValueChannels => x.f_amin(within, true)?,
        };
        Ok(Range { low, high })
    }

    /// The extents of all parts of an operand x [images·windows, ..].
    pub(super) fn extents(self, x: &Tensor) -> Result<Vec<Extent>> {
        let range = self.range(&self.by_image(x)?)?;
        let pairs = to_vec_f64(&range.low)?.into_iter().zip(to_vec_f64(&range.high)?);
        Ok(pairs.map(|(low, high)| Extent { low, high }).collect())
    }

    fn fake_quantize(self, x: &Tensor, grid: &AssignedGrid) -> Result<Tensor> {
        Ok(grid.affine.decode(&grid.codes()?)?.f_reshape(x.size())?)
    }

    /// The single integer term; parameters are per image, so windows repeat them.
    fn quantize(self, x: &Tensor, grid: &AssignedGrid) -> Result<IntTerm> {
        let parameter = |value: &Tensor| -> Result<Tensor> {
            let mut shape = value.size();
            shape[1] = self.windows;
            let repeated = value.f_expand(&shape, false)?;
            let images = shape.remove(0);
            shape[0] *= images;
            Ok(repeated.f_reshape(shape)?)
        };
        Ok(IntTerm {
            codes: grid.codes()?.f_reshape(x.size())?.f_to_kind(Kind::Int)?,
            scale: parameter(&grid.affine.scale)?,
            zero_point: parameter(&grid.affine.zero_point)?.f_to_kind(Kind::Int)?,
        })
    }

    fn store(self, state: QuantizerState) -> QuantizerState {
        let part = PARTS.iter().position(|part| *part == self.part).unwrap_or(0);
        state.scalar("part", part as f64).scalar("windows", self.windows as f64)
    }

    fn restore(state: &QuantizerState) -> Result<Self> {
        let part = PARTS.get(state.read_scalar("part")? as usize).copied();
        let windows = state.read_scalar("windows")? as i64;
        match part {
            Some(part) if windows > 0 => Ok(Self { part, windows }),
            _ => Err(Error::corrupt("artifact", "the parts of a grouped operand are unusable")),
        }
    }
}

/// An operand [images, windows, ..] with the grid that each of its parts was assigned to.
struct AssignedGrid {
    x: Tensor,
    affine: Affine,
    max_code: Tensor,
}

impl AssignedGrid {
    fn new(x: Tensor, affine: Affine, bits: BitWidth) -> Result<Self> {
        let max_code = Tensor::f_full([1], bits.max_code(), (Kind::Float, x.device()))?;
        Ok(Self { x, affine, max_code })
    }

    fn codes(&self) -> Result<Tensor> {
        self.affine.codes(&self.x, &self.max_code)
    }
}

/// Grids over ranges: s = (u − l)/L, z = round(−l/s). A range that lacks zero is widened to hold it, so
/// that z lies among the codes 0..L; to clamp it afterwards would cut the range's far end off instead.
fn affine(range: &Range, bits: BitWidth) -> Result<Affine> {
    let (low, high) = (range.low.f_clamp_max(0.0)?, range.high.f_clamp_min(0.0)?);
    // Each end is divided by itself: their difference could exceed float32.
    let step = |end: &Tensor| end.f_div_scalar(bits.max_code());
    let scale = step(&high)?.f_sub(&step(&low)?)?.f_clamp_min(MIN_SCALE)?;
    let zero = low.f_neg()?.f_div(&scale)?.f_round()?;
    Ok(Affine { scale, zero_point: zero.f_clamp(0.0, bits.max_code())? })
}

/// Which extent of a group its grid spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bounds {
    /// The mean of its members: clips about half of them, as the paper's minimization gives it.
    Mean,
    /// Their smallest and largest value: clips nothing that was seen.
    Max,
}

/// How grids are made of groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct GridRules {
    pub(super) bits: BitWidth,
    pub(super) bounds: Bounds,
    pub(super) device: Device,
}

/// G static grids; each part of each image goes to the one whose bounds are nearest to its own.
#[derive(Debug)]
pub(super) struct Grouped {
    bits: BitWidth,
    layout: Layout,
    /// Bounds (l, u) that parts are compared with, float32 [groups].
    centres: Range,
    /// The grids, float32 [groups].
    grids: Affine,
}

impl Grouped {
    /// The quantizer of calibrated groups.
    pub(super) fn new(layout: Layout, clusters: &[Cluster], rules: GridRules) -> Result<Self> {
        let column = |value: &dyn Fn(&Cluster) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = clusters.iter().map(|cluster| value(cluster) as f32).collect();
            Ok(Tensor::f_from_slice(&values)?.f_to_device(rules.device)?)
        };
        let centres = Range {
            low: column(&|cluster| cluster.mean.low)?,
            high: column(&|cluster| cluster.mean.high)?,
        };
        let grids = match rules.bounds {
            Bounds::Mean => affine(&centres, rules.bits)?,
            Bounds::Max => {
                let low = column(&|cluster| cluster.hull.low)?;
                let high = column(&|cluster| cluster.hull.high)?;
                affine(&Range { low, high }, rules.bits)?
            }
        };
        Ok(Self { bits: rules.bits, layout, centres, grids })
    }

    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let read = |name: &str| state.read_tensor(name);
        let centres = Range { low: read("low")?, high: read("high")? };
        let grids = Affine { scale: read("scale")?, zero_point: read("zero_point")? };
        let shape = centres.low.size();
        let fits = shape.len() == 1
            && shape[0] > 0
            && [&centres.high, &grids.scale, &grids.zero_point].iter().all(|t| t.size() == shape);
        if !fits {
            return Err(Error::corrupt("artifact", "the grids of a grouped operand do not match"));
        }
        Ok(Self { bits: state.read_bits()?, layout: Layout::restore(state)?, centres, grids })
    }

    /// Number of the group of every part, int64, shaped as `range`: the least distance
    /// (hi − u)² + (lo − l)² (the paper's equation 4), the lowest number of equals.
    fn assign(&self, range: &Range) -> Result<Tensor> {
        // Squares of float32 values neither overflow nor vanish in float64.
        let distance = |value: &Tensor, bound: &Tensor| -> Result<Tensor> {
            let value = value.f_to_kind(Kind::Double)?.f_unsqueeze(-1)?;
            Ok(value.f_sub(&bound.f_to_kind(Kind::Double)?)?.f_square()?)
        };
        let high = distance(&range.high, &self.centres.high)?;
        let low = distance(&range.low, &self.centres.low)?;
        Ok(high.f_add(&low)?.f_argmin(-1, false)?)
    }

    fn grid(&self, x: &Tensor) -> Result<AssignedGrid> {
        let x = self.layout.by_image(x)?;
        let affine = self.affine(&self.layout.range(&x)?)?;
        AssignedGrid::new(x, affine, self.bits)
    }

    /// The grid of every part.
    fn affine(&self, range: &Range) -> Result<Affine> {
        let group = self.assign(range)?;
        let of_group = |parameter: &Tensor| -> Result<Tensor> {
            Ok(parameter
                .f_index_select(0, &group.f_view([-1])?)?
                .f_view(group.size().as_slice())?)
        };
        Ok(Affine {
            scale: of_group(&self.grids.scale)?,
            zero_point: of_group(&self.grids.zero_point)?,
        })
    }
}

impl Quantizer for Grouped {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        self.layout.fake_quantize_in_passes(x, self.bits, |range: &Range| self.affine(range))
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        self.layout.fake_quantize(x, &self.grid(x)?)
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        Ok(Some(vec![self.layout.quantize(x, &self.grid(x)?)?]))
    }

    fn state(&self) -> QuantizerState {
        self.layout
            .store(QuantizerState::new(GROUPED_KIND, self.bits))
            .scalar("groups", self.centres.low.numel() as f64)
            .tensor("low", &self.centres.low)
            .tensor("high", &self.centres.high)
            .tensor("scale", &self.grids.scale)
            .tensor("zero_point", &self.grids.zero_point)
    }

    fn cost(&self, shape: &[i64]) -> OperandCost {
        // Ranges, then a comparison with every group (methods/igq-vit.md, section 6).
        let (parts, groups) = (self.layout.parts(shape), self.centres.low.numel() as f64);
        OperandCost {
            metadata_bits: parts * groups.log2().ceil(),
            operations: self.layout.part.bounds() * elements(shape) + parts * groups,
            partial_sums: self.layout.partial_sums(groups),
            ..OperandCost::of_grid(self.bits)
        }
    }
}

/// A grid of its own for every part, from minimum and maximum: what infinitely many groups would give
/// (the paper's "upper bound").
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnRange {
    pub(super) bits: BitWidth,
    pub(super) layout: Layout,
}

impl OwnRange {
    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        Ok(Self { bits: state.read_bits()?, layout: Layout::restore(state)? })
    }

    fn grid(self, x: &Tensor) -> Result<AssignedGrid> {
        let x = self.layout.by_image(x)?;
        let affine = affine(&self.layout.range(&x)?, self.bits)?;
        AssignedGrid::new(x, affine, self.bits)
    }
}

impl Quantizer for OwnRange {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        self.layout.fake_quantize_in_passes(x, self.bits, |range: &Range| affine(range, self.bits))
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        self.layout.fake_quantize(x, &self.grid(x)?)
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        Ok(Some(vec![self.layout.quantize(x, &self.grid(x)?)?]))
    }

    fn state(&self) -> QuantizerState {
        self.layout.store(QuantizerState::new(OWN_RANGE_KIND, self.bits))
    }

    fn cost(&self, shape: &[i64]) -> OperandCost {
        let parts = self.layout.parts(shape);
        OperandCost {
            metadata_bits: parts * RANGE_BITS,
            operations: self.layout.part.bounds() * elements(shape),
            partial_sums: self.layout.partial_sums(parts),
            ..OperandCost::of_grid(self.bits)
        }
    }
}
