//! Which tokens get a bit more and which a bit less (UBB's allocation): tokens ranked by range, swaps
//! counted as long as they pay.

/// The static rules of an allocation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Nominal bits n.
    pub bits: u8,
    /// Whether bits are mixed at all.
    pub mixed: bool,
    /// Factor of token 0's range, 1 without priority.
    pub first_factor: f32,
    /// Smallest number of swaps.
    pub min_swaps: usize,
    /// c: how much more the large range must gain than the small one loses.
    pub threshold: f32,
    /// Where and how far around the density is counted; `None`: no token has a weight.
    pub density: Option<Density>,
}

/// The window of a density count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Density {
    /// μ, the centre.
    pub centre: f32,
    /// Half width in units of the token's range.
    pub radius: f32,
    /// Smallest count.
    pub floor: f32,
}

impl Density {
    /// The half-open window of a token of that range.
    #[inline(always)]
    pub fn window(self, range: f32) -> (f32, f32) {
        let radius = range * self.radius;
        (-radius + self.centre, radius + self.centre)
    }

    /// The weight of a token with `count` values in the window.
    pub fn weight(self, count: u32) -> f32 {
        let count = count as f32;
        1.0 / if count < self.floor { self.floor } else { count }
    }
}

impl Rules {
    /// Whether the allocation has to look at counts.
    pub fn counts(&self) -> bool {
        self.mixed && self.density.is_some()
    }

    /// Weighted ranges of tokens with those counts.
    pub fn gains(&self, ranges: &[f32], counts: &[u32]) -> Vec<f32> {
        match self.density {
            Some(density) => {
                ranges.iter().zip(counts).map(|(range, n)| range * density.weight(*n)).collect()
            }
            None => ranges.iter().map(|range| range * 0.0).collect(),
        }
    }

    /// Largest code of every token of one image.
    pub fn max_codes(&self, ranges: &[f32], counts: &[u32], out: &mut [f32]) {
        let max_code = |bits: u8| ((1u32 << bits) - 1) as f32;
        out.fill(max_code(self.bits));
        let tokens = ranges.len();
        if !self.mixed || tokens < 2 {
            return;
        }
        let order = descending(ranges);
        let gains = self.gains(ranges, counts);
        let ranked: Vec<f32> = order.iter().map(|token| gains[*token as usize]).collect();
        let swaps = profitable_swaps(&ranked, self.threshold).max(self.min_swaps);
        let first_lowered = tokens.saturating_sub(swaps);
        for (rank, token) in order.iter().enumerate() {
            let (raised, lowered) = (rank < swaps, rank >= first_lowered);
            let bits = self.bits + u8::from(raised) - u8::from(lowered);
            out[*token as usize] = max_code(bits);
        }
    }
}

/// Number of leading pairs with gain_k − c·gain_{T−1−k} > 0, gains in rank order.
pub fn profitable_swaps(gains: &[f32], threshold: f32) -> usize {
    let pairs = gains.iter().zip(gains.iter().rev());
    pairs.take_while(|(gain, loss)| *gain - *loss * threshold > 0.0).count()
}

/// Indices by descending value, NaN first, the lower index first among equals.
pub fn descending(values: &[f32]) -> Vec<u32> {
    let mut keys: Vec<u64> = values
        .iter()
        .zip(0u64..)
        .map(|(value, index)| u64::from(descending_key(*value)) << 32 | index)
        .collect();
    keys.sort_unstable();
    keys.into_iter().map(|key| key as u32).collect()
}

/// A number that falls as the value rises.
fn descending_key(value: f32) -> u32 {
    if value.is_nan() {
        return 0;
    }
    let bits = (value + 0.0).to_bits(); // −0 is equal to 0
    if bits >> 31 == 0 { 0x8000_0000 - bits } else { bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_stable_and_begins_with_nan() {
        let values = [1.0, f32::NAN, -0.0, 3.0, 0.0, f32::INFINITY, -2.0, 3.0, f32::NEG_INFINITY];
        assert_eq!(descending(&values), [1, 5, 3, 7, 0, 2, 4, 6, 8]);
    }
}
