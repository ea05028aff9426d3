//! Windows: splitting tokens into them, shifting them, and what attention within them adds.

use tch::{Device, Tensor};

use crate::error::Result;
use crate::model::swin::args::Stage;
use crate::nn::Windows;

/// What timm adds to a score across the border of a shifted window.
const MASKED: f32 = -100.0;

/// The windows of a block, and what lies at their borders.
#[derive(Debug)]
pub(super) struct ShiftedWindows {
    tokens: Windows,
    /// [windows, 1, window², window²], 0 or −100; only with a shift.
    mask: Option<Tensor>,
}

impl ShiftedWindows {
    /// The windows of a stage, of whose tokens the first `shift` rows and columns move to the end.
    pub(super) fn new(stage: &Stage, shift: i64) -> Result<Self> {
        let &Stage { resolution, window, .. } = stage;
        let side = resolution / window;
        let token = |place: i64| {
            let (index, place) = (place / (window * window), place % (window * window));
            let row = index / side * window + place / window;
            let column = index % side * window + place % window;
            ((row + shift) % resolution * resolution + (column + shift) % resolution) as usize
        };
        let tokens = Windows::new(side * side, (0..resolution * resolution).map(token).collect())?;
        let mask = (shift > 0).then(|| shift_mask(stage, shift)).transpose()?;
        Ok(Self { tokens, mask })
    }

    /// The same windows on a device.
    pub(super) fn to_device(&self, device: Device) -> Result<Self> {
        let mask = self.mask.as_ref().map(|mask| mask.f_to(device)).transpose()?;
        Ok(Self { tokens: self.tokens.to_device(device)?, mask })
    }

    /// Which token stands where.
    pub(super) fn tokens(&self) -> &Windows {
        &self.tokens
    }

    /// What is added to the scores of each window, [windows, 1, window², window²], if anything.
    pub(super) fn score_mask(&self) -> Option<&Tensor> {
        self.mask.as_ref()
    }
}

/// After the shift, a window at the border holds tokens from opposite sides of the image: tokens
/// of different regions must not see each other.
fn shift_mask(stage: &Stage, shift: i64) -> Result<Tensor> {
    let &Stage { resolution, window, .. } = stage;
    let band = |at: i64| match at {
        at if at < resolution - window => 0,
        at if at < resolution - shift => 1,
        _ => 2,
    };
    let side = resolution / window;
    let tokens = window * window;
    let mut values = Vec::new();
    for index in 0..side * side {
        let (top, left) = (index / side * window, index % side * window);
        let region = |token: i64| (band(top + token / window), band(left + token % window));
        for i in 0..tokens {
            let row = (0..tokens).map(|j| if region(i) == region(j) { 0.0 } else { MASKED });
            values.extend(row);
        }
    }
    Ok(Tensor::f_from_slice(&values)?.f_reshape([side * side, 1, tokens, tokens])?)
}

/// Looks up the bias of every pair of tokens in `table` [(2·window − 1)², heads] by their distance:
/// [1, heads, window², window²].
pub(super) fn relative_bias(table: &Tensor) -> Result<Tensor> {
    let (rows, heads) = table.size2()?;
    let window = (rows.isqrt() + 1) / 2;
    let tokens = window * window;
    let index: Vec<i64> = (0..tokens * tokens)
        .map(|pair| {
            let (i, j) = (pair / tokens, pair % tokens);
            let rows = i / window - j / window + window - 1;
            let columns = i % window - j % window + window - 1;
            rows * (2 * window - 1) + columns
        })
        .collect();
    let index = Tensor::f_from_slice(&index)?.f_to(table.device())?;
    Ok(table
        .f_index_select(0, &index)?
        .f_reshape([tokens, tokens, heads])?
        .f_permute([2, 0, 1])?
        .f_contiguous()?
        .f_unsqueeze(0)?)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn stage(resolution: i64, window: i64) -> Stage {
        Stage {
            dim: 4,
            hidden: 8,
            heads: 2,
            depth: 2,
            resolution,
            window,
            shift: window / 2,
            merged: None,
        }
    }

    #[test]
    fn tokens_are_shifted_and_split_as_timm_does() {
        for (resolution, window, shift) in [(6, 3, 0), (6, 3, 1), (8, 4, 2), (7, 7, 0)] {
            let windows = ShiftedWindows::new(&stage(resolution, window), shift).unwrap();
            let (side, tokens) = (resolution / window, resolution * resolution);
            let x = Tensor::arange(2 * tokens * 4, (Kind::Float, Device::Cpu));
            let expected = x
                .reshape([2, resolution, resolution, 4])
                .roll([-shift, -shift], [1, 2])
                .reshape([2, side, window, side, window, 4])
                .permute([0, 1, 3, 2, 4, 5])
                .reshape([2 * side * side, window * window, 4]);
            let x = x.reshape([2, tokens, 4]);
            assert_eq!(windows.tokens().split(&x).unwrap(), expected);
            assert_eq!(windows.tokens().join(&expected).unwrap(), x);
        }
    }

    #[test]
    fn tokens_from_opposite_borders_do_not_see_each_other() {
        let windows = ShiftedWindows::new(&stage(4, 2), 1).unwrap();
        let mask = windows.mask.as_ref().unwrap();
        // The first window is whole; the last holds the four corners of the image.
        assert_eq!(mask.get(0).abs().max().double_value(&[]), 0.0);
        let corners = Tensor::eye(4, (Kind::Float, Device::Cpu)) * 100.0 - 100.0;
        assert_eq!(mask.get(3).squeeze(), corners);
    }

    #[test]
    fn the_bias_depends_on_the_distance_only() {
        let table = Tensor::arange(9, (Kind::Float, Device::Cpu)).reshape([9, 1]);
        let bias = relative_bias(&table).unwrap();
        assert_eq!(bias.size(), [1, 1, 4, 4]);
        // Same place: the table's centre. One row down, seen from one row up: rows = -1.
        assert_eq!(bias.double_value(&[0, 0, 2, 2]), 4.0);
        assert_eq!(bias.double_value(&[0, 0, 0, 2]), 1.0);
        assert_eq!(bias.double_value(&[0, 0, 0, 1]), 3.0);
    }
}
