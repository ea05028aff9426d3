//! Attention operands seen as tokens × features, heads merged, windows optionally regrouped.
//!
//! An operand [images·windows, heads, free, reduce] becomes [images, tokens, features]. With one
//! window per image, tokens are the free axis and features are heads × reduce. Regrouping
//! (methods/ubb.md, section 7.2) shares a token's parameters between the windows of a quadrant:
//! the √nW × √nW window grid is cut into 2 × 2 quadrants (a, a'), the tokens are (a, a', free) and
//! the features (window within the quadrant, head, reduce).

use tch::Tensor;

use crate::error::{Error, Result};
use crate::kernels::cuda::Tokens;
use crate::kernels::passes::tokens::{Along, Layout};
use crate::quant::QuantizerState;
use crate::quant::dense::Dense;

/// How an attention operand is laid out as tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenLayout {
    /// Windows per image that are regrouped; 1: every window is an image of its own.
    windows: i64,
    /// Whether every head has tokens of its own.
    heads: Heads,
}

/// What the heads of an attention have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heads {
    /// A token's parameters.
    Merged,
    /// Nothing: tokens are (head, free), features the reduced axis.
    Apart,
}

impl TokenLayout {
    /// Every leading index (image, or window) by itself.
    pub const PLAIN: Self = Self { windows: 1, heads: Heads::Merged };

    /// Every window, head and free index by itself.
    pub const PER_HEAD: Self = Self { windows: 1, heads: Heads::Apart };

    /// Windows regrouped by quadrant; plain where the window grid has no quadrants (√nW odd).
    pub fn regrouped(windows: i64) -> Self {
        let side = side_of(windows);
        if side * side == windows && side % 2 == 0 {
            Self { windows, ..Self::PLAIN }
        } else {
            Self::PLAIN
        }
    }

    /// Reads a stored layout.
    ///
    /// # Errors
    /// `CorruptArtifact` when the state lacks it.
    pub fn restore(state: &QuantizerState) -> Result<Self> {
        if state.scalars.contains_key("heads_apart") {
            return Ok(Self::PER_HEAD);
        }
        let windows = state.read_scalar("regrouped_windows")? as i64;
        let layout = Self::regrouped(windows);
        if layout.windows != windows {
            return Err(Error::corrupt(
                "artifact",
                format!("{windows} windows cannot be regrouped"),
            ));
        }
        Ok(layout)
    }

    /// Adds the layout to a state.
    pub fn store(self, state: QuantizerState) -> QuantizerState {
        match self.heads {
            Heads::Merged => state.scalar("regrouped_windows", self.windows as f64),
            Heads::Apart => state.scalar("heads_apart", 1.0),
        }
    }

    /// [images·windows, heads, free, reduce] → [images, tokens, features].
    ///
    /// # Errors
    /// `Device` when the shape does not fit.
    pub fn to_tokens(self, x: &Tensor) -> Result<Tensor> {
        let [rows, heads, free, reduce] = shape4(x)?;
        if self.heads == Heads::Apart {
            return Ok(x.f_reshape([rows, heads * free, reduce])?);
        }
        if self.windows == 1 {
            return Ok(x.f_transpose(1, 2)?.f_reshape([rows, free, heads * reduce])?);
        }
        let (images, half) = (rows / self.windows, side_of(self.windows) / 2);
        Ok(x.f_reshape([images, 2, half, 2, half, heads, free, reduce])?
            .f_permute([0, 1, 3, 6, 2, 4, 5, 7].as_slice())? // [b, a, a', free, p, p', h, reduce]
            .f_reshape([images, 4 * free, half * half * heads * reduce])?)
    }

    /// The inverse of [`TokenLayout::to_tokens`]; `like` is the operand.
    ///
    /// # Errors
    /// `Device` when the shape does not fit.
    pub fn from_tokens(self, tokens: &Tensor, like: &Tensor) -> Result<Tensor> {
        let [rows, heads, free, reduce] = shape4(like)?;
        if self.heads == Heads::Apart {
            return Ok(tokens.f_reshape([rows, heads, free, reduce])?);
        }
        if self.windows == 1 {
            return Ok(tokens.f_reshape([rows, free, heads, reduce])?.f_transpose(1, 2)?);
        }
        let (images, half) = (rows / self.windows, side_of(self.windows) / 2);
        Ok(tokens
            .f_reshape([images, 2, 2, free, half, half, heads, reduce])?
            .f_permute([0, 1, 4, 2, 5, 6, 3, 7].as_slice())? // [b, a, p, a', p', h, free, reduce]
            .f_reshape([rows, heads, free, reduce])?)
    }

    /// Where the tokens are of an operand whose rows, tokens of `blocks` windows of `free`, have all
    /// `width` values of their heads side by side; `None` where heads have nothing in common.
    pub(crate) fn of_rows(self, blocks: usize, free: usize, width: usize) -> Option<Layout> {
        if self.heads == Heads::Apart {
            return None;
        }
        let (sets, set_count) = self.sets(blocks, 1);
        let tokens_per_image = if self.windows == 1 { free } else { 4 * free };
        Some(Layout { width, rows: free, sets, set_count, tokens_per_image, along: Along::Rows })
    }

    /// The set of tokens of every block, heads of `rows` windows, and how many there are.
    fn sets(self, rows: usize, heads: usize) -> (Vec<usize>, usize) {
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let (windows, half) = (size(self.windows), size(side_of(self.windows) / 2));
        let set = |window: usize, head: usize| match (self.heads, self.windows) {
            (Heads::Apart, _) => window * heads + head,
            (Heads::Merged, 1) => window,
            (Heads::Merged, _) => {
                let (image, window) = (window / windows, window % windows);
                let (row, column) = (window / (2 * half), window % (2 * half));
                (image * 2 + row / half) * 2 + column / half
            }
        };
        let sets: Vec<usize> =
            (0..rows * heads).map(|block| set(block / heads, block % heads)).collect();
        let count = sets.iter().max().map_or(0, |last| last + 1);
        (sets, count)
    }

    /// Where the tokens of an operand are in its memory.
    ///
    /// # Errors
    /// `Internal` for another number of axes.
    pub(crate) fn in_memory(self, x: &Tensor, dense: &Dense) -> Result<Layout> {
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let [rows, heads, free, reduce] = shape4(x)?.map(size);
        let quadrants = if self.windows == 1 { 1 } else { 4 };
        let (sets, set_count) = self.sets(rows, heads);
        let tokens_per_image = match self.heads {
            Heads::Apart => heads * free,
            Heads::Merged => quadrants * free,
        };
        let (height, width, along) = if dense.swapped() {
            (reduce, free, Along::Columns)
        } else {
            (free, reduce, Along::Rows)
        };
        Ok(Layout { width, rows: height, sets, set_count, tokens_per_image, along })
    }

    /// The same for kernels on a GPU, of an operand of that shape.
    ///
    /// # Errors
    /// `Internal` for numbers beyond 32 bits.
    pub(crate) fn on_gpu(self, [_, heads, free, reduce]: [i64; 4]) -> Result<Tokens> {
        match (self.heads, self.windows) {
            (Heads::Apart, _) => Tokens::new(free, reduce, 1, 0),
            (Heads::Merged, 1) => Tokens::new(free, reduce, heads, 0),
            (Heads::Merged, windows) => Tokens::new(free, reduce, heads, side_of(windows) / 2),
        }
    }

    /// Tokens of an image of an operand of that shape, which are ranked together.
    pub(crate) fn tokens_per_image(self, [_, heads, free, _]: [i64; 4]) -> i64 {
        match (self.heads, self.windows) {
            (Heads::Apart, _) => heads * free,
            (Heads::Merged, 1) => free,
            (Heads::Merged, _) => 4 * free,
        }
    }

    /// Values of a token of an operand of that shape.
    pub(crate) fn features(self, [_, heads, _, reduce]: [i64; 4]) -> usize {
        let windows = side_of(self.windows) / 2;
        let features = match (self.heads, self.windows) {
            (Heads::Apart, _) => reduce,
            (Heads::Merged, 1) => heads * reduce,
            (Heads::Merged, _) => windows * windows * heads * reduce,
        };
        usize::try_from(features).unwrap_or(0)
    }

    /// Tokens of one image's operand of that shape.
    pub fn token_count(self, shape: &[i64]) -> f64 {
        let &[rows, _, free, _] = shape else { return crate::quant::cost::rows(shape) };
        if self.heads == Heads::Apart {
            return crate::quant::cost::rows(shape);
        }
        let windows = if self.windows == 1 { rows } else { 4 * (rows / self.windows) };
        (windows * free) as f64
    }

    /// One value per token, [images, tokens, 1] → [images·windows, 1 or heads, free, 1].
    ///
    /// # Errors
    /// `Device` when the shape does not fit.
    pub fn from_token_parameters(self, values: &Tensor, like: &Tensor) -> Result<Tensor> {
        let [rows, heads, free, _] = shape4(like)?;
        if self.heads == Heads::Apart {
            return Ok(values.f_reshape([rows, heads, free, 1])?);
        }
        if self.windows == 1 {
            return Ok(values.f_reshape([rows, 1, free, 1])?);
        }
        let (images, half) = (rows / self.windows, side_of(self.windows) / 2);
        Ok(values
            .f_reshape([images, 2, 1, 2, 1, 1, free, 1])?
            .f_expand([images, 2, half, 2, half, 1, free, 1], false)?
            .f_reshape([rows, 1, free, 1])?)
    }
}

/// √windows, rounded.
fn side_of(windows: i64) -> i64 {
    (windows as f64).sqrt().round() as i64
}

/// [windows, heads, free, reduce] of an attention operand.
///
/// # Errors
/// `Internal` for another number of axes.
pub(crate) fn shape4(x: &Tensor) -> Result<[i64; 4]> {
    <[i64; 4]>::try_from(x.size()).map_err(|shape| {
        Error::internal(format!("an attention operand has shape {shape:?}, four axes are needed"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws::sample;

    #[test]
    fn regrouping_and_back_is_the_identity() {
        for (windows, images) in [(1, 3), (4, 2), (16, 2), (64, 1), (9, 2)] {
            let x = sample(&[images * windows, 2, 5, 3], 1);
            let layout = TokenLayout::regrouped(windows);
            let tokens = layout.to_tokens(&x).unwrap();
            assert!(layout.from_tokens(&tokens, &x).unwrap().equal(&x));
            let expected = if windows == 1 || windows == 9 { 5 } else { 20 };
            assert_eq!(tokens.size()[1], expected);
            let counted = layout.token_count(&x.size());
            assert_eq!(counted, (tokens.size()[0] * expected) as f64);
        }
    }

    #[test]
    fn a_single_window_is_untouched() {
        assert_eq!(TokenLayout::regrouped(1), TokenLayout::PLAIN);
        assert_eq!(TokenLayout::regrouped(9), TokenLayout::PLAIN);
    }

    #[test]
    fn heads_apart_have_tokens_of_their_own() {
        let x = sample(&[3, 2, 5, 4], 1);
        let layout = TokenLayout::PER_HEAD;
        let tokens = layout.to_tokens(&x).unwrap();
        assert_eq!(tokens.size(), [3, 10, 4]);
        assert!(layout.from_tokens(&tokens, &x).unwrap().equal(&x));
        let maxima = layout.from_token_parameters(&tokens.amax([-1i64].as_slice(), true), &x);
        assert!(maxima.unwrap().equal(&x.amax([-1i64].as_slice(), true)));
        let stored = layout.store(QuantizerState::new("test", crate::quant::BitWidth::EIGHT));
        assert_eq!(TokenLayout::restore(&stored).unwrap(), layout);
    }

    #[test]
    fn a_quadrant_shares_its_parameters() {
        let x = sample(&[16, 2, 5, 3], 2);
        let layout = TokenLayout::regrouped(16);
        let maxima = layout.to_tokens(&x).unwrap().amax([-1i64].as_slice(), true);
        let per_window = layout.from_token_parameters(&maxima, &x).unwrap();
        let per_window = per_window.view([4, 4, 5]);
        for (row, column) in [(0, 0), (0, 2), (2, 0), (2, 2)] {
            let first = per_window.get(row).get(column);
            for (dr, dc) in [(0, 1), (1, 0), (1, 1)] {
                assert!(per_window.get(row + dr).get(column + dc).equal(&first));
            }
            let windows = x.view([4, 4, 2, 5, 3]).narrow(0, row, 2).narrow(1, column, 2);
            assert!(windows.amax([0i64, 1, 2, 4].as_slice(), false).equal(&first));
        }
    }
}
