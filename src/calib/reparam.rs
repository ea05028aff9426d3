//! Scale reparameterization: per-channel grids of a LayerNorm's output become one grid per tensor,
//! and the difference moves into the LayerNorm and the linear layer behind it.
//!
//! Source: RepQ-ViT (ICCV 2023), section 3.2. With channel scales δ, minima m = −z ⊙ δ and the
//! common grid (δ̃, z̃), m̃ = −z̃·δ̃:
//!
//! r = δ/δ̃,  b = m/r − m̃;  γ ← γ/r,  β ← β/r − b;  W ← W·diag(r),  bias ← bias + W·b
//!
//! LN' = LN/r − b, and the layer computes in float what it computed before. For integer z̃ the codes
//! are those of the channel grids, whatever δ̃ > 0 is.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::{Role, Site, WeightEdits, Weights};
use crate::quant::uniform::{Range, Uniform};
use crate::quant::{BitWidth, Quantizer};

/// Smallest channel scale, as a share of the largest: a constant channel has none of its own.
const MIN_SCALE_SHARE: f64 = 1e-8;

/// Smallest channel scale if all channels are constant.
const MIN_SCALE: f64 = 1e-12;

/// Whether a LayerNorm can take over the channel scales of the site's input. (The classifier's norm
/// could, too, but the methods leave it alone.)
pub fn is_foldable(site: &Site) -> bool {
    site.norm.is_some() && matches!(site.role, Role::Qkv | Role::Fc1 | Role::Reduction)
}

/// One grid per channel of a LayerNorm's output.
#[derive(Debug)]
pub struct ChannelGrids {
    /// The grids, scale and zero point float32 `[channels]`.
    pub grids: Uniform,
    /// Channels that vary, bool `[channels]`. The others have the smallest scale and zero points of
    /// any size, which would spoil a mean.
    pub varying: Tensor,
}

impl ChannelGrids {
    /// The grids over channel ranges `[channels]`.
    ///
    /// # Errors
    /// `InvalidArgument` when a range is not finite; `Device` when libtorch refuses.
    pub fn from_range(range: &Range, bits: BitWidth) -> Result<Self> {
        let scale = range.high.f_sub(&range.low)?.f_div_scalar(bits.max_code())?;
        let floor = (scale.f_max()?.f_double_value(&[])? * MIN_SCALE_SHARE).max(MIN_SCALE);
        let varying = scale.f_gt(floor)?;
        Ok(Self { grids: Uniform::from_range(range, bits, floor)?, varying })
    }

    /// Number of constant channels.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn constant_channels(&self) -> Result<i64> {
        Ok(self.varying.f_logical_not()?.f_sum(Kind::Int64)?.f_int64_value(&[])?)
    }

    /// The grid (δ̃, z̃), shape `[1]`, of the varying channels; of all channels if none varies.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn common(&self, choice: CommonGrid) -> Result<Uniform> {
        let any = self.varying.f_any()?.f_int64_value(&[])? != 0;
        let middle = |values: &Tensor| -> Result<Tensor> {
            let values =
                if any { values.f_masked_select(&self.varying)? } else { values.shallow_clone() };
            let middle = match choice {
                CommonGrid::Mean | CommonGrid::FractionalMean => values.f_mean(Kind::Float)?,
                CommonGrid::Median => values.f_median()?,
            };
            Ok(middle.f_view([1])?)
        };
        let (scale, zero_point) = (middle(self.grids.scale())?, middle(self.grids.zero_point())?);
        let zero_point = match choice {
            CommonGrid::Mean | CommonGrid::Median => zero_point.f_round()?,
            CommonGrid::FractionalMean => zero_point,
        };
        Uniform::new(self.grids.bits(), scale, zero_point)
    }
}

/// How one grid is chosen for all channels. With an integer zero point the choice changes no code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommonGrid {
    /// Mean scale, rounded mean zero point.
    Mean,
    /// Mean scale and mean zero point, a fraction: runs in float, has no integer form.
    FractionalMean,
    /// Medians (the lower of two): least mean absolute deviation from the channels'.
    Median,
}

/// The new affine map of the site's LayerNorm and the new weight and bias of its linear layer, which
/// gets a bias if it has none. `common` is the grid (δ̃, z̃), shape `[1]`.
///
/// # Errors
/// `Internal` when the site has no norm or a parameter is missing; `Device` when libtorch refuses.
pub fn fold(
    weights: &Weights,
    site: &Site,
    channels: &ChannelGrids,
    common: &Uniform,
) -> Result<WeightEdits> {
    let norm = site
        .norm
        .as_ref()
        .ok_or_else(|| Error::internal(format!("no norm feeds {}", site.path)))?;
    let parameter = |name: &str| {
        weights.find(name).ok_or_else(|| Error::internal(format!("{name} is missing")))
    };
    let names = [
        format!("{norm}.weight"),
        format!("{norm}.bias"),
        format!("{}.weight", site.path),
        format!("{}.bias", site.path),
    ];
    let ratio = channels.grids.scale().f_div(common.scale())?; // r [channels]
    let shift = code_zero(&channels.grids)?.f_div(&ratio)?.f_sub(&code_zero(common)?)?; // b
    let gain = parameter(&names[0])?.f_div(&ratio)?;
    let offset = parameter(&names[1])?.f_div(&ratio)?.f_sub(&shift)?;
    let weight = parameter(&names[2])?.f_mul(&ratio)?; // [out, channels]
    let moved = weight.f_mv(&shift)?;
    let bias = match weights.find(&names[3]) {
        Some(bias) => bias.f_add(&moved)?,
        None => moved,
    };
    Ok(names.into_iter().zip([gain, offset, weight, bias]).collect())
}

/// The value of code 0: −z·δ.
fn code_zero(grid: &Uniform) -> Result<Tensor> {
    Ok(grid.zero_point().f_neg()?.f_mul(grid.scale())?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::Device;

    use super::*;
    use crate::nn::{Operand, SiteId};
    use crate::quant::uniform::laws::sample;

    const CHANNELS: i64 = 12;

    fn site() -> Site {
        Site {
            id: SiteId(0),
            path: "downsample.reduction".to_owned(),
            role: Role::Reduction,
            norm: Some("downsample.norm".to_owned()),
            unit: 0,
            windows: 1,
        }
    }

    fn four() -> BitWidth {
        BitWidth::new(4, "bits").unwrap()
    }

    fn value(x: f32) -> Tensor {
        Tensor::from_slice(&[x])
    }

    /// A norm with outlier channels, one constant channel (3), and a layer; `bias` or none.
    fn weights(bias: Option<Tensor>) -> Weights {
        let gain = sample(&[CHANNELS], 2).exp() * sample(&[CHANNELS], 3);
        let _ = gain.narrow(0, 3, 1).zero_();
        let mut tensors = BTreeMap::from([
            ("downsample.norm.weight".to_owned(), gain),
            ("downsample.norm.bias".to_owned(), sample(&[CHANNELS], 4) + 0.3),
            ("downsample.reduction.weight".to_owned(), sample(&[7, CHANNELS], 5)),
        ]);
        tensors.extend(bias.map(|bias| ("downsample.reduction.bias".to_owned(), bias)));
        Weights::new(tensors)
    }

    fn normed(x: &Tensor, weights: &Weights) -> Tensor {
        let get = |name: &str| weights.find(&format!("downsample.norm.{name}"));
        x.layer_norm([CHANNELS], get("weight"), get("bias"), 1e-6, false)
    }

    fn product(x: &Tensor, weights: &Weights) -> Tensor {
        let get = |name: &str| weights.find(&format!("downsample.reduction.{name}"));
        normed(x, weights).linear(get("weight").unwrap(), get("bias"))
    }

    fn channels(x: &Tensor) -> ChannelGrids {
        let low = x.amin([0i64, 1].as_slice(), false);
        let high = x.amax([0i64, 1].as_slice(), false);
        ChannelGrids::from_range(&Range { low, high }, four()).unwrap()
    }

    fn commons() -> Vec<Uniform> {
        [(0.2, 7.0), (1e-3, -4.0), (35.0, 0.0)]
            .map(|(scale, zero)| Uniform::new(four(), value(scale), value(zero)).unwrap())
            .into()
    }

    #[test]
    fn the_product_stays_and_the_norm_is_divided_and_shifted() {
        let x = sample(&[3, 9, CHANNELS], 1);
        for bias in [None, Some(sample(&[7], 6))] {
            let before = weights(bias);
            let grids = channels(&normed(&x, &before));
            for common in commons() {
                let after = before.with(&fold(&before, &site(), &grids, &common).unwrap());
                let (old, new) = (product(&x, &before), product(&x, &after));
                let worst = (&old - &new).abs().max().double_value(&[]);
                assert!(worst <= 2e-5 * old.abs().max().double_value(&[]), "{worst}");
                // LN' = LN/r − b
                let ratio = grids.grids.scale() / common.scale();
                let shift = code_zero(&grids.grids).unwrap() / &ratio - code_zero(&common).unwrap();
                let expected = normed(&x, &before) / &ratio - shift;
                let live = |t: &Tensor| t.masked_select(&grids.varying);
                let worst = (live(&expected) - live(&normed(&x, &after))).abs().max();
                let scale = live(&expected).abs().max().double_value(&[]);
                assert!(worst.double_value(&[]) <= 1e-5 * scale);
            }
        }
    }

    #[test]
    fn codes_are_those_of_the_channel_grids() {
        let x = sample(&[3, 9, CHANNELS], 1);
        let before = weights(None);
        let ln = normed(&x, &before);
        let grids = channels(&ln);
        let codes = |grid: &Uniform, x: &Tensor| grid.quantize(x).unwrap().unwrap().remove(0).codes;
        let expected = codes(&grids.grids, &ln).masked_select(&grids.varying);
        for common in commons() {
            let after = before.with(&fold(&before, &site(), &grids, &common).unwrap());
            let found = codes(&common, &normed(&x, &after)).masked_select(&grids.varying);
            assert!(found.equal(&expected));
        }
    }

    #[test]
    fn a_constant_channel_spoils_neither_means_nor_product() {
        let x = sample(&[3, 9, CHANNELS], 1);
        let before = weights(None);
        let grids = channels(&normed(&x, &before));
        assert_eq!(grids.constant_channels().unwrap(), 1);
        for choice in [CommonGrid::Mean, CommonGrid::FractionalMean, CommonGrid::Median] {
            let common = grids.common(choice).unwrap();
            assert!(common.zero_point().abs().double_value(&[0]) <= 30.0, "{common:?}");
        }
        let after = fold(&before, &site(), &grids, &commons()[0]).unwrap();
        assert!(after.values().all(|tensor| tensor.isfinite().all().int64_value(&[]) == 1));
        // All channels constant: still finite.
        let flat = Tensor::full([2, 3, CHANNELS], 1.5, (Kind::Float, Device::Cpu));
        let grids = channels(&flat);
        let common = grids.common(CommonGrid::Mean).unwrap();
        let after = fold(&before, &site(), &grids, &common).unwrap();
        assert!(after.values().all(|tensor| tensor.isfinite().all().int64_value(&[]) == 1));
    }

    #[test]
    fn only_norms_in_front_of_blocks_and_mergings_fold() {
        assert!(is_foldable(&site()));
        assert!(!is_foldable(&Site { role: Role::Head, ..site() }));
        assert!(!is_foldable(&Site { norm: None, ..site() }));
        assert_eq!(site().operand_name(Operand::Lhs), "input");
    }
}
