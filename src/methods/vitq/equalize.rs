//! Equalization: static scales and offsets of channels that move into the layers around, so that a
//! dynamic grid is spread over channels of like range.
//!
//! LayerNorm output: x' = (x − m)/r per channel, which the norm's affine map and the layer behind it
//! take up (the algebra of RepQ-ViT, see [`crate::calib::reparam`]; SmoothQuant, arXiv 2211.10438,
//! balances activations against weights by a power of the range). q·kᵀ: q' = q·s, k' = (k − m)/s per
//! head channel; m adds the same number to all scores of a row, which softmax does not see.

use tch::{Kind, Tensor};

use crate::calib::reparam::ChannelGrids;
use crate::error::{Error, Result};
use crate::quant::search::MIN_SCALE;
use crate::quant::uniform::{MIN_WEIGHT_SCALE, Range, Uniform};
use crate::quant::{BitWidth, Quantizer};

/// Powers of the channel range that are tried.
const POWERS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// Smallest channel range, as a share of the largest.
const MIN_RANGE_SHARE: f64 = 1e-3;

/// Rows of the calibration tensor that a candidate is judged on.
const JUDGED_ROWS: i64 = 4096;

/// Scale r and offset m of each channel, float32 [channels].
#[derive(Debug)]
pub(super) struct Channels {
    pub(super) scale: Tensor,
    pub(super) offset: Tensor,
}

impl Channels {
    /// (x − m)/r.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_sub(&self.offset)?.f_div(&self.scale)?)
    }

    /// The same map as one grid per channel: the step is r, and code 0 lies at m.
    pub(super) fn grids(&self, bits: BitWidth) -> Result<ChannelGrids> {
        let zero_point = self.offset.f_neg()?.f_div(&self.scale)?;
        let grids = Uniform::new(bits, self.scale.shallow_clone(), zero_point)?;
        Ok(ChannelGrids { grids, varying: self.scale.f_gt(0.0)? })
    }
}

/// Range and middle of every channel of x [.., channels].
fn extents(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let rows = x.f_reshape([-1, x.size()[x.dim() - 1]])?;
    let (low, high) =
        (rows.f_amin([0i64].as_slice(), false)?, rows.f_amax([0i64].as_slice(), false)?);
    let middle = low.f_add(&high)?.f_mul_scalar(0.5)?;
    Ok((high.f_sub(&low)?, middle))
}

/// range^power, scaled to geometric mean 1; channels without range get the least.
fn balanced(range: &Tensor, power: f64) -> Result<Tensor> {
    let largest = range.f_max()?.f_double_value(&[])?;
    if largest <= 0.0 {
        return Ok(range.f_ones_like()?);
    }
    let log = range.f_clamp_min(largest * MIN_RANGE_SHARE)?.f_log()?;
    Ok(log.f_sub(&log.f_mean(Kind::Float)?)?.f_mul_scalar(power)?.f_exp()?)
}

/// The scales and offsets of least output error for x [images, tokens, channels] in front of
/// `weight` [out, channels], when `round` rounds the input and the weight is rounded to `bits`.
pub(super) fn search(
    x: &Tensor,
    weight: &Tensor,
    bits: BitWidth,
    round: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Channels> {
    let (range, middle) = extents(x)?;
    let tokens = x.size()[1];
    let images = (JUDGED_ROWS / tokens).clamp(1, x.size()[0]);
    let x = x.f_narrow(0, 0, images)?;
    let expected = x.f_matmul(&weight.f_tr()?)?;
    let none = middle.f_zeros_like()?;
    let mut best: Option<(f64, Channels)> = None;
    for power in POWERS {
        for offset in [&none, &middle] {
            let scale = balanced(&range, power)?;
            let channels = Channels { scale, offset: offset.shallow_clone() };
            let scaled = weight.f_mul(&channels.scale)?;
            let rounded = Uniform::from_range(&Range::per_row(&scaled)?, bits, MIN_WEIGHT_SCALE)?
                .fake_quantize(&scaled)?;
            let input = round(&channels.apply(&x)?)?;
            let constant = weight.f_mv(&channels.offset)?;
            let error = input.f_matmul(&rounded.f_tr()?)?.f_add(&constant)?.f_sub(&expected)?;
            let error = error.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?;
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, channels));
            }
        }
    }
    best.map(|(_, channels)| channels).ok_or_else(|| Error::internal("nothing was tried"))
}

/// Scales and offsets of the outputs of a qkv layer [.., 3·dim], which leave softmax(q·kᵀ) as it is:
/// q and k get like ranges channel by channel, and k loses its middle. v stays.
///
/// # Errors
/// `Device` when libtorch refuses.
pub(super) fn query_key(outputs: &Tensor) -> Result<Channels> {
    let (range, middle) = extents(outputs)?;
    let (range, middle) = (range.f_chunk(3, 0)?, middle.f_chunk(3, 0)?);
    let floor = |t: &Tensor| -> Result<Tensor> {
        let least = t.f_max()?.f_double_value(&[])? * MIN_RANGE_SHARE;
        Ok(t.f_clamp_min(least.max(MIN_SCALE))?)
    };
    let scale = floor(&range[0])?.f_div(&floor(&range[1])?)?.f_sqrt()?; // of q; k gets 1/scale
    let (one, zero) = (scale.f_ones_like()?, scale.f_zeros_like()?);
    Ok(Channels {
        offset: Tensor::f_cat(&[&zero, &middle[1], &zero], 0)?,
        scale: Tensor::f_cat(&[&scale, &scale.f_reciprocal()?, &one], 0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws::sample;

    /// Two channels in eight are far larger and off centre: [4, 9, 8].
    fn outliers() -> Tensor {
        let gain = Tensor::from_slice(&[1.0f32, 1.0, 40.0, 1.0, 1.0, 1.0, 25.0, 1.0]);
        let offset = Tensor::from_slice(&[0.0f32, 0.0, 60.0, 0.0, 0.0, 0.0, -30.0, 0.0]);
        sample(&[4, 9, 8], 3) * gain + offset
    }

    #[test]
    fn the_search_lowers_the_output_error() {
        let x = outliers();
        let weight = sample(&[6, 8], 4);
        let bits = BitWidth::new(4, "bits").unwrap();
        let round = |x: &Tensor| {
            let grid = Uniform::from_range(&Range::per_tensor(x)?, bits, 1e-10)?;
            grid.fake_quantize(x)
        };
        let found = search(&x, &weight, bits, round).unwrap();
        let error = |channels: &Channels| {
            let scaled = &weight * &channels.scale;
            let input = round(&channels.apply(&x).unwrap()).unwrap();
            let output = input.matmul(&scaled.tr()) + weight.mv(&channels.offset);
            (output - x.matmul(&weight.tr())).square().sum(Kind::Double).double_value(&[])
        };
        let (scale, offset) = (found.scale.ones_like(), found.offset.zeros_like());
        assert!(error(&found) < 0.3 * error(&Channels { scale, offset }));
        // Offsets pay here: the outliers are off centre.
        assert!(found.offset.abs().max().double_value(&[]) > 10.0);
    }

    #[test]
    fn the_channel_grids_are_the_same_map() {
        let x = outliers();
        let (range, middle) = extents(&x).unwrap();
        let channels = Channels { scale: balanced(&range, 0.5).unwrap(), offset: middle };
        let grids = channels.grids(BitWidth::EIGHT).unwrap().grids;
        let mapped = &x / grids.scale() + grids.zero_point();
        assert!(mapped.allclose(&channels.apply(&x).unwrap(), 1e-4, 1e-4, false));
    }

    #[test]
    fn softmax_of_the_scores_does_not_see_the_balance() {
        let outputs = sample(&[2, 9, 3 * 8], 5) * 3.0 + 0.7;
        let channels = query_key(&outputs).unwrap();
        let attention = |outputs: &Tensor| {
            let parts = outputs.chunk(3, 2);
            let scores = parts[0].matmul(&parts[1].transpose(1, 2));
            (scores.softmax(-1, Kind::Float), parts[2].shallow_clone())
        };
        let balanced = channels.apply(&outputs).unwrap();
        let (before, after) = (attention(&outputs), attention(&balanced));
        assert!(before.0.allclose(&after.0, 1e-4, 1e-5, false));
        assert!(before.1.equal(&after.1));
        let ranges = extents(&balanced).unwrap().0.chunk(3, 0);
        assert!(ranges[0].allclose(&ranges[1], 1e-4, 1e-5, false));
    }

    #[test]
    fn channels_without_range_are_finite() {
        let x = Tensor::zeros([1, 3, 12], (Kind::Float, tch::Device::Cpu));
        let channels = query_key(&x).unwrap();
        assert!(channels.apply(&x).unwrap().equal(&x));
        assert!(
            balanced(&extents(&x).unwrap().0, 1.0)
                .unwrap()
                .equal(&Tensor::ones([12], (Kind::Float, tch::Device::Cpu)))
        );
    }
}
