//! The quantizers of UBB: grouped linear inputs (methods/ubb.md, sections 5 and 6) and attention
//! operands (section 7). Ranges, bits and shifts are found anew for every image.

use tch::{Kind, Tensor};

use super::allocation::{Allocation, Scalars};
use crate::error::{Error, Result};
use crate::kernels::codes::buffer;
use crate::kernels::cuda::{self, Rounded, Tokens};
use crate::kernels::fused::{HeadRows, Heads};
use crate::kernels::passes::groups::{self as passes, GroupGrids};
use crate::kernels::passes::tokens::TokenGrids;
use crate::kernels::{Codes, InstructionSet};
use crate::quant::cost::{OperandCost, RANGE_BITS, rows};
use crate::quant::dense::Dense;
use crate::quant::dynamic::{Affine, ConstantRows};
use crate::quant::encode;
use crate::quant::once::Once;
use crate::quant::planes::Planes;
use crate::quant::steps::thresholds;
use crate::quant::tokens::{TokenLayout, shape4};
use crate::quant::uniform::Range;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};

/// Kind name of [`UbbLinear`] in artifacts.
pub(super) const LINEAR_KIND: &str = "ubb_linear";
/// Kind name of [`UbbAttention`] in artifacts.
pub(super) const ATTENTION_KIND: &str = "ubb_attention";

/// Largest shift exponent: a 4-bit field. The released code has no cap.
pub(super) const MAX_SHIFT: f64 = 15.0;
/// Bits of a shift exponent.
const SHIFT_BITS: f64 = 4.0;

/// The affine grid of every (token, group), with the shift of negatives where there is one.
#[derive(Debug)]
pub(super) struct GroupGrid {
    affine: Affine,
    /// Largest code, broadcastable to [images, tokens, groups, 1].
    max_code: Tensor,
    /// 2^s by which negatives are stretched, [images, tokens, groups, 1].
    stretch: Option<Tensor>,
}

/// What a [`GroupGrid`] is made from, besides the data's range.
#[derive(Clone, Copy, Debug)]
pub(super) struct GridRules {
    /// τ of the post-GELU shift; `None` for operands without a shift.
    pub(super) tau: Option<f64>,
    /// Treatment of constant groups.
    pub(super) constants: ConstantRows,
}

impl GroupGrid {
    /// The grid over `range` [images, tokens, groups, 1].
    pub(super) fn new(range: &Range, max_code: Tensor, rules: GridRules) -> Result<Self> {
        let Some(tau) = rules.tau else {
            let affine = Affine::from_range(range, &max_code, rules.constants)?;
            return Ok(Self { affine, max_code, stretch: None });
        };
        let stretch = shift_exponent(range, tau)?.f_clamp_max(MAX_SHIFT)?.f_exp2()?;
        let stretched = Range { low: range.low.f_mul(&stretch)?, high: range.high.shallow_clone() };
        let affine = Affine::from_range(&stretched, &max_code, rules.constants)?;
        Ok(Self { affine, max_code, stretch: Some(stretch) })
    }

    fn codes(&self, x: &Tensor) -> Result<Tensor> {
        match &self.stretch {
            Some(stretch) => {
                let stretched = x.f_mul(stretch)?.f_where_self(&x.f_lt(0.0)?, x)?;
                self.affine.codes(&stretched, &self.max_code)
            }
            None => self.affine.codes(x, &self.max_code),
        }
    }

    /// x̂ of x [images, tokens, groups, channels of a group].
    pub(super) fn fake_quantize(&self, x: &Tensor) -> Result<Tensor> {
        let value = self.affine.decode(&self.codes(x)?)?;
        match &self.stretch {
            Some(stretch) => Ok(value.f_div(stretch)?.f_where_self(&x.f_lt(0.0)?, &value)?),
            None => Ok(value),
        }
    }
}

/// s = round(log2(max(1, −τ·hi/lo))) where lo < 0 < hi, else 0 (section 6); not capped.
pub(super) fn shift_exponent(range: &Range, tau: f64) -> Result<Tensor> {
    let crosses = range.low.f_lt(0.0)?.f_logical_and(&range.high.f_gt(0.0)?)?;
    let ratio = range.high.f_div(&range.low)?.f_mul_scalar(-tau)?.f_clamp_min(1.0)?;
    let exponent = ratio.f_log2()?.f_round()?;
    Ok(exponent.f_where_self(&crosses, &exponent.f_zeros_like()?)?)
}

/// Ratios from which on the capped exponent is 1, 2, …, [`MAX_SHIFT`].
static RATIOS: Once<Vec<f32>> = Once::new();

/// The ratios at which the shift exponent changes; `None` where there is no telling.
pub(super) fn shift_steps() -> Option<&'static [f32]> {
    let passed = |ratio: &Tensor| -> Result<Tensor> {
        Ok(ratio.f_log2()?.f_round()?.f_clamp(0.0, MAX_SHIFT)?)
    };
    RATIOS.get(|| thresholds(1.0, MAX_SHIFT as usize, passed)).map(Vec::as_slice)
}

/// Dynamic per token × channel group, with token-wise bits n−1, n, n+1.
#[derive(Clone, Debug)]
pub(in crate::methods) struct UbbLinear {
    pub(super) allocation: Allocation,
    pub(super) scalars: Scalars,
    pub(super) groups: i64,
    pub(super) rules: GridRules,
}

impl UbbLinear {
    /// [images, tokens, channels] → [images, tokens, groups, channels / groups].
    pub(super) fn grouped(x: &Tensor, groups: i64) -> Result<Tensor> {
        let shape = x.size();
        let &[images, tokens, channels] = shape.as_slice() else {
            return Err(Error::internal(format!(
                "a linear input has shape {shape:?}, three axes are needed"
            )));
        };
        Ok(x.f_reshape([images, tokens, groups, channels / groups])?)
    }

    /// Grids in two visits of memory; `None` where tensor code has to find them.
    fn pass(&self, x: &Tensor) -> Result<Option<(Dense, GroupGrids)>> {
        let Some(dense) = Dense::in_order(x)?.filter(|_| x.dim() == 3) else { return Ok(None) };
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let (channels, tokens) = (size(x.size()[2]), size(x.size()[1]));
        let (groups, rules) = (size(self.groups), self.allocation.rules(&self.scalars, channels));
        if groups == 0 || channels % groups != 0 {
            return Ok(None);
        }
        let shift = match (self.rules.tau, shift_steps()) {
            (None, _) => None,
            (Some(tau), Some(steps)) => Some(passes::Shift { factor: -tau as f32, steps }),
            (Some(_), None) => return Ok(None),
        };
        let shape = passes::Grouped { channels, group: channels / groups, tokens };
        let constants = self.rules.constants.into();
        let grids = GroupGrids::new(dense.values()?, shape, &rules, (constants, shift));
        Ok(Some((dense, grids)))
    }

    fn grid(&self, x: &Tensor) -> Result<(GroupGrid, Tensor)> {
        let grouped = Self::grouped(x, self.groups)?;
        let max_code =
            self.allocation.max_codes(x, &self.scalars)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
        let grid = GroupGrid::new(&Range::per_row(&grouped)?, max_code, self.rules)?;
        Ok((grid, grouped))
    }

    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let (allocation, scalars) = Allocation::restore(state)?;
        let tau =
            state.scalars.contains_key("tau").then(|| state.read_scalar("tau")).transpose()?;
        let groups = state.read_scalar("groups")? as i64;
        Ok(Self {
            allocation,
            scalars,
            groups,
            rules: GridRules { tau, constants: read_constants(state)? },
        })
    }
}

impl Quantizer for UbbLinear {
    fn bits(&self) -> BitWidth {
        self.allocation.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match self.pass(x)? {
            Some((dense, grids)) => dense.map(|x, out| grids.quantize(x, out)).map(Some),
            None => Ok(None),
        }
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (grid, grouped) = self.grid(x)?;
        Ok(grid.fake_quantize(&grouped)?.f_reshape(x.size())?)
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        let &[_, tokens, channels] = x.size().as_slice() else { return Ok(None) };
        if self.groups < 1 || channels % self.groups != 0 {
            return Ok(None);
        }
        let stretch = match (self.rules.tau, shift_steps()) {
            (None, _) => None,
            (Some(tau), Some(steps)) => Some(cuda::Stretch { factor: -tau as f32, steps }),
            (Some(_), None) => return Ok(None),
        };
        let rules = self.allocation.rules(&self.scalars, usize::try_from(channels).unwrap_or(0));
        let grids = cuda::Affine {
            tokens: Tokens::new(tokens, channels, 1, 0)?,
            groups: self.groups,
            max_code: self.bits().max_code() as f32,
            rules: Some((rules, tokens)),
            exact_constants: self.rules.constants == ConstantRows::Exact,
            stretch,
        };
        Rounded::affine(x, &grids)
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let bits = self.code_bits();
        let Some((dense, grids)) = self.pass(x)?.filter(|_| bits <= u8::BITS) else {
            return Ok(None);
        };
        let groups = usize::try_from(self.groups).unwrap_or(0);
        let Some(mut planes) = Planes::of(&dense, groups, bits)? else { return Ok(None) };
        let x = dense.values()?;
        let Some(stretches) = &grids.stretches else {
            planes.push_grids(grids.encode(x), &grids.grids);
            return Ok(Some(planes.finish()));
        };
        // Kernels for which small codes are faster have two products of these rather than one.
        let fold = !InstructionSet::best().prefers_small_codes();
        for (sign, codes) in grids.encode_signs(x, stretches, fold).into_iter().enumerate() {
            let largest = if fold && sign == 0 { u8::MAX } else { encode::max_code(bits) };
            planes.push_up_to(largest, codes);
        }
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (grid, grouped) = self.grid(x)?;
        let codes = grid.codes(&grouped)?;
        let shape = x.size();
        let per_group = [shape[0], shape[1], self.groups];
        let term = |codes: &Tensor, scale: &Tensor, zero: &Tensor| -> Result<IntTerm> {
            Ok(IntTerm {
                codes: codes.f_reshape(shape.as_slice())?.f_to_kind(Kind::Int)?,
                scale: scale.f_reshape(per_group)?,
                zero_point: zero.f_reshape(per_group)?.f_to_kind(Kind::Int)?,
            })
        };
        let (scale, zero) = (&grid.affine.scale, &grid.affine.zero_point);
        let Some(stretch) = &grid.stretch else {
            return Ok(Some(vec![term(&codes, scale, zero)?]));
        };
        // The code tells the sign: q < z is a stretched negative, and q = z decodes to 0 either way.
        // Where all values have one sign, z may lie beyond the codes: the other term is 0 with any z.
        let (above, below) = (zero.f_minimum(&grid.max_code)?, zero.f_clamp_min(0.0)?);
        Ok(Some(vec![
            term(&codes.f_maximum(&above)?, scale, &above)?,
            term(&codes.f_minimum(&below)?, &scale.f_div(stretch)?, &below)?,
        ]))
    }

    fn code_bits(&self) -> u32 {
        self.allocation.code_bits()
    }

    fn state(&self) -> QuantizerState {
        let state =
            self.allocation.store(&self.scalars, QuantizerState::new(LINEAR_KIND, self.bits()));
        let state =
            store_constants(self.rules.constants, state).scalar("groups", self.groups as f64);
        match self.rules.tau {
            Some(tau) => state.scalar("tau", tau),
            None => state,
        }
    }

    /// A grid, and perhaps a shift, per token and group; every group is summed apart, and of
    /// shifted ones the negatives, too.
    fn cost(&self, shape: &[i64]) -> OperandCost {
        let signs = if self.rules.tau.is_some() { 2.0 } else { 1.0 };
        let shift = if self.rules.tau.is_some() { SHIFT_BITS } else { 0.0 };
        let groups = self.groups as f64;
        let cost = self.allocation.cost(shape, rows(shape));
        OperandCost {
            metadata_bits: cost.metadata_bits + rows(shape) * groups * (RANGE_BITS + shift),
            partial_sums: groups * signs,
            ..cost
        }
    }
}

/// Dynamic per token, heads merged, with token-wise bits; windows regrouped as the layout says.
#[derive(Clone, Debug)]
pub(in crate::methods) struct UbbAttention {
    pub(super) allocation: Allocation,
    pub(super) scalars: Scalars,
    pub(super) layout: TokenLayout,
    pub(super) constants: ConstantRows,
}

impl UbbAttention {
    /// The grid and the operand as [images, tokens, 1, features].
    fn grid(&self, x: &Tensor) -> Result<(GroupGrid, Tensor)> {
        let tokens = self.layout.to_tokens(x)?;
        let max_code =
            self.allocation.max_codes(&tokens, &self.scalars)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
        let tokens = tokens.f_unsqueeze(2)?;
        let rules = GridRules { tau: None, constants: self.constants };
        Ok((GroupGrid::new(&Range::per_row(&tokens)?, max_code, rules)?, tokens))
    }

    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let (allocation, scalars) = Allocation::restore(state)?;
        let layout = TokenLayout::restore(state)?;
        Ok(Self { allocation, scalars, layout, constants: read_constants(state)? })
    }
}

impl Quantizer for UbbAttention {
    fn bits(&self) -> BitWidth {
        self.allocation.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(dense) = Dense::of(x)? else { return Ok(None) };
        let layout = self.layout.in_memory(x, &dense)?;
        let rules = self.allocation.rules(&self.scalars, layout.features());
        let constants = self.constants.into();
        dense
            .map(|x, out| TokenGrids::new(x, &layout, &rules, constants).quantize(x, out))
            .map(Some)
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (grid, tokens) = self.grid(x)?;
        self.layout.from_tokens(&grid.fake_quantize(&tokens)?, x)
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        match self.token_grids(shape4(x)?)? {
            Some(grids) => Rounded::affine(x, &grids),
            None => Ok(None),
        }
    }

    fn token_grids(&self, shape: [i64; 4]) -> Result<Option<cuda::Affine<'_>>> {
        let rules = self.allocation.rules(&self.scalars, self.layout.features(shape));
        Ok(Some(cuda::Affine {
            tokens: self.layout.on_gpu(shape)?,
            groups: 1,
            max_code: self.bits().max_code() as f32,
            rules: Some((rules, self.layout.tokens_per_image(shape))),
            exact_constants: self.constants == ConstantRows::Exact,
            stretch: None,
        }))
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let bits = self.code_bits();
        let Some(dense) = Dense::rows(x)?.filter(|_| bits <= u8::BITS) else { return Ok(None) };
        let Some(mut planes) = Planes::of(&dense, 1, bits)? else { return Ok(None) };
        let layout = self.layout.in_memory(x, &dense)?;
        let rules = self.allocation.rules(&self.scalars, layout.features());
        let x = dense.values()?;
        let grids = TokenGrids::new(x, &layout, &rules, self.constants.into());
        let mut codes = buffer(x.len());
        grids.encode(x, &mut codes);
        planes.push_grids(codes, &grids.row_grids());
        Ok(Some(planes.finish()))
    }

    fn encode_heads(&self, x: &HeadRows<'_>) -> Option<Codes> {
        let (bits, Heads { tokens, width, .. }) = (self.code_bits(), x.shape);
        if bits > u8::BITS || !encode::is_taken(width, 1, bits) {
            return None;
        }
        let layout = self.layout.of_rows(x.count / tokens, tokens, x.rows.width)?;
        let rules = self.allocation.rules(&self.scalars, layout.features());
        let grids = TokenGrids::of(x.rows, &layout, &rules, self.constants.into());
        Some(x.encode(&grids.row_grids(), encode::max_code(bits)))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (grid, tokens) = self.grid(x)?;
        let codes = self.layout.from_tokens(&grid.codes(&tokens)?, x)?;
        Ok(Some(vec![IntTerm {
            codes: codes.f_to_kind(Kind::Int)?,
            scale: self.layout.from_token_parameters(&grid.affine.scale, x)?,
            zero_point: self
                .layout
                .from_token_parameters(&grid.affine.zero_point, x)?
                .f_to_kind(Kind::Int)?,
        }]))
    }

    fn code_bits(&self) -> u32 {
        self.allocation.code_bits()
    }

    fn state(&self) -> QuantizerState {
        let state =
            self.allocation.store(&self.scalars, QuantizerState::new(ATTENTION_KIND, self.bits()));
        self.layout.store(store_constants(self.constants, state))
    }

    /// A grid per token.
    fn cost(&self, shape: &[i64]) -> OperandCost {
        let tokens = self.layout.token_count(shape);
        let cost = self.allocation.cost(shape, tokens);
        OperandCost { metadata_bits: cost.metadata_bits + tokens * RANGE_BITS, ..cost }
    }
}

fn store_constants(constants: ConstantRows, state: QuantizerState) -> QuantizerState {
    state.scalar("exact_constants", f64::from(u8::from(constants == ConstantRows::Exact)))
}

fn read_constants(state: &QuantizerState) -> Result<ConstantRows> {
    let exact = state.read_scalar("exact_constants")? != 0.0;
    Ok(if exact { ConstantRows::Exact } else { ConstantRows::SmallestScale })
}

#[cfg(test)]
mod tests;
