//! Products together with what lies between them. Where one static grid holds all values of an operand,
//! its codes are made where the values come to be, in the first-level cache; they never lie in memory as
//! float32. Every number is the one that single steps would give, to the bit.

#![allow(unsafe_code, reason = "parts of a result that do not lie together")]

use crate::kernels::codes::{buffer, recycle};
use crate::kernels::cpu::shuffle::transpose_bytes;
use crate::kernels::cpu_elementwise::{self, NormRow};
use crate::kernels::pack::Operand;
use crate::kernels::passes::affine::{self, Grid};
use crate::kernels::passes::{PARALLEL_ELEMENTS, Strided, for_rows};
use crate::kernels::scatter::Scatter;
use crate::kernels::{
    Codes, CodesTerm, Destination, Finish, InstructionSet, Job, PackedRhs, Passing, Scratch,
    Workers, pass_batch, pass_on, share_batch,
};

/// Scores that are computed before they are multiplied: they stay in the first or second cache.
const SCORES: usize = 12 << 10;

/// Values that become codes at once, at most.
const RUN: usize = 1024;

/// The order of the rows of an image: which of them stands where. Images follow each other.
#[derive(Clone, Debug)]
pub struct RowOrder(Vec<usize>);

impl RowOrder {
    /// `None` unless every row is there once.
    pub fn new(rows: Vec<usize>) -> Option<Self> {
        let mut seen = vec![false; rows.len()];
        let is_first = |row: &usize| {
            let entry = seen.get_mut(*row);
            entry.is_some_and(|seen| !std::mem::replace(seen, true))
        };
        let all_once = rows.iter().all(is_first);
        all_once.then_some(Self(rows))
    }

    /// The row of an image at every place.
    pub fn rows(&self) -> &[usize] {
        &self.0
    }

    /// The row that stands at a place of one of the images.
    pub(crate) fn row(order: Option<&Self>, place: usize) -> usize {
        let Some(Self(rows)) = order else { return place };
        place / rows.len() * rows.len() + rows[place % rows.len()]
    }
}

/// What makes codes of rows that come to be one after another.
pub trait RowEncoder: Sync {
    /// Codes of rows of `columns` values; terms may be missing that are zero in all of them.
    fn encode(&self, rows: &[f32], columns: usize) -> Codes;
}

impl RowEncoder for Grid {
    fn encode(&self, rows: &[f32], columns: usize) -> Codes {
        let mut codes = buffer(rows.len());
        affine::encode(rows, *self, &mut codes);
        codes_on(*self, columns, codes)
    }
}

/// Codes of rows of `columns` on one grid, whose zero point is an integer.
pub(crate) fn codes_on(grid: Grid, columns: usize, codes: Vec<u8>) -> Codes {
    let rows = codes.len() / columns.max(1);
    let term = CodesTerm {
        codes,
        scale: vec![grid.scale; rows],
        zero_point: vec![grid.zero_point as i32; rows],
        max_code: grid.max_code as u8,
    };
    Codes { rows, columns, groups: 1, terms: vec![term] }
}

/// Codes of the norm of every row of `x`, in some order.
pub(crate) fn normed(x: &[f32], norm: NormRow<'_>, order: Option<&RowOrder>, grid: Grid) -> Codes {
    let width = norm.weight.len();
    let mut codes = buffer(x.len());
    for_rows(&mut codes, width, |first, part| {
        let mut values = vec![0.0; width];
        for (place, codes) in part.chunks_exact_mut(width).enumerate() {
            let row = RowOrder::row(order, first + place);
            cpu_elementwise::layer_norm(&x[row * width..][..width], norm, &mut values);
            affine::encode(&values, grid, codes);
        }
    });
    codes_on(grid, width, codes)
}

/// Codes of what `change` makes of `lhs · rhsᵀ (+ bias)`.
pub(crate) fn encoded(
    (lhs, rhs): (&Codes, &PackedRhs),
    bias: Option<&[f32]>,
    change: impl Fn(&mut [f32]) + Sync,
    grid: Grid,
) -> Codes {
    let width = rhs.rows();
    let mut codes = buffer(lhs.rows * width);
    let target = Scatter::new(&mut codes);
    pass_on(Workers::shared(), (lhs, rhs), bias, &|row, column, values| {
        change(values);
        // SAFETY: every part of every row comes once.
        let codes = unsafe { target.part(row * width + column, values.len()) };
        affine::encode(values, grid, codes);
    });
    codes_on(grid, width, codes)
}

/// `residual` plus `lhs · rhsᵀ (+ bias)`, whose rows stand in some order.
pub(crate) fn added(
    (lhs, rhs): (&Codes, &PackedRhs),
    bias: Option<&[f32]>,
    residual: &[f32],
    order: Option<&RowOrder>,
    out: &mut [f32],
) {
    let width = rhs.rows();
    assert!(residual.len() == lhs.rows * width && out.len() == residual.len(), "rows of the sum");
    let target = Scatter::new(out);
    pass_on(Workers::shared(), (lhs, rhs), bias, &|place, column, values| {
        let first = RowOrder::row(order, place) * width + column;
        cpu_elementwise::add(values, &residual[first..]);
        // SAFETY: every part of every row comes once, and no two places have the same row.
        unsafe { target.part(first, values.len()) }.copy_from_slice(values);
    });
}

/// What becomes of a row of scores, given its number over all images and heads. The scores are used up; the
/// result is as long.
pub(crate) type Softmax<'a> = &'a (dyn Fn(usize, &mut [f32], &mut [f32]) + Sync);

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Tokens that are attended to together.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Columns of a head.
    pub width: usize,
}

impl Heads {
    fn columns(self) -> usize {
        self.heads * self.width
    }
}

/// q, k and v of `lhs · rhsᵀ (+ bias)` [images·tokens, 3·heads·width], each on its grid, as their
/// products take them: q and k [images·heads·tokens, width], v [images·heads·width, tokens].
/// `query_scale` is a factor of q.
pub(crate) fn split_heads(
    (lhs, rhs): (&Codes, &PackedRhs),
    bias: Option<&[f32]>,
    shape: Heads,
    query_scale: Option<f32>,
    grids: [Grid; 3],
) -> [Codes; 3] {
    let (Heads { tokens, width, .. }, columns) = (shape, shape.columns());
    assert!(rhs.rows() == 3 * columns && lhs.rows.is_multiple_of(tokens), "q, k and v of tokens");
    let mut codes: [Vec<u8>; 3] = std::array::from_fn(|_| buffer(lhs.rows * columns));
    let targets = codes.each_mut().map(|codes| Scatter::new(codes.as_mut_slice()));
    let finish = |row: usize, first_column: usize, values: &mut [f32]| {
        let (image, token) = (row / tokens, row % tokens);
        let mut codes = [0; RUN];
        let (mut at, mut rest) = (first_column, values);
        while !rest.is_empty() {
            let (part, mut column) = (at / columns, at % columns);
            let (run, others) = rest.split_at_mut(rest.len().min(columns - column).min(RUN));
            if let Some(scale) = query_scale.filter(|_| part == 0) {
                affine::scale(run, scale);
            }
            let mut codes = &mut codes[..run.len()];
            affine::encode(run, grids[part], codes);
            (at, rest) = (at + codes.len(), others);
            while !codes.is_empty() {
                let (head, within) = (column / width, column % width);
                let (of_head, others) = codes.split_at_mut(codes.len().min(width - within));
                let matrix = (image * shape.heads + head) * tokens * width;
                let place = matrix + token * width + within;
                // SAFETY: every part of every row comes once, and each has places of its own.
                unsafe { targets[part].part(place, of_head.len()) }.copy_from_slice(of_head);
                column += of_head.len();
                codes = others;
            }
        }
    };
    pass_on(Workers::shared(), (lhs, rhs), bias, &finish);
    let [q, k, by_token] = codes;
    let mut v = buffer(by_token.len());
    for_rows(&mut v, tokens * width, |first, part| {
        let heads = by_token[first * tokens * width..].chunks_exact(tokens * width);
        for (from, to) in heads.zip(part.chunks_exact_mut(tokens * width)) {
            transpose_bytes(from, [tokens, width], to);
        }
    });
    recycle(by_token);
    [codes_on(grids[0], width, q), codes_on(grids[1], width, k), codes_on(grids[2], tokens, v)]
}

/// An operand of an attention whose heads lie side by side in rows, a token each.
#[derive(Clone, Copy, Debug)]
pub struct HeadRows<'a> {
    /// [images·tokens, heads·width], strided.
    pub rows: Strided<'a>,
    /// Number of rows.
    pub count: usize,
    /// Sizes of the attention.
    pub shape: Heads,
}

impl HeadRows<'_> {
    /// Codes on a grid for every row, head by head: [images·heads·tokens, width].
    pub(crate) fn encode(&self, grids: &[Grid], max_code: u8) -> Codes {
        let Heads { tokens, heads, width } = self.shape;
        assert!(grids.len() == self.count && self.rows.width == heads * width, "grids of rows");
        let mut codes = buffer(self.count * heads * width);
        for_rows(&mut codes, tokens * heads * width, |first, part| {
            let mut row = vec![0; heads * width];
            for (image, part) in part.chunks_exact_mut(tokens * heads * width).enumerate() {
                for token in 0..tokens {
                    let index = (first + image) * tokens + token;
                    affine::encode(self.rows.row(index), grids[index], &mut row);
                    for (head, codes) in row.chunks_exact(width).enumerate() {
                        let at = (head * tokens + token) * width;
                        part[at..at + width].copy_from_slice(codes);
                    }
                }
            }
        });
        let of_heads =
            grids.chunks_exact(tokens).flat_map(|grids| std::iter::repeat_n(grids, heads));
        let of_heads: Vec<&Grid> = of_heads.flatten().collect();
        let term = CodesTerm {
            codes,
            scale: of_heads.iter().map(|grid| grid.scale).collect(),
            zero_point: of_heads.iter().map(|grid| grid.zero_point as i32).collect(),
            max_code,
        };
        Codes { rows: self.count * heads, columns: width, groups: 1, terms: vec![term] }
    }
}

/// [`mixed`] as codes on a grid: [images·tokens, heads·width].
pub(crate) fn mixed_codes(
    qkv: [&Codes; 3],
    shape: Heads,
    (softmax, scores): (Softmax<'_>, &dyn RowEncoder),
    grid: Grid,
) -> Codes {
    let columns = shape.columns();
    let mut codes = buffer(qkv[0].rows * shape.width);
    let target = Scatter::new(&mut codes);
    mixed(qkv, shape, (softmax, scores), &|row, column, values| {
        // SAFETY: every part of every row comes once.
        let codes = unsafe { target.part(row * columns + column, values.len()) };
        affine::encode(values, grid, codes);
    });
    codes_on(grid, columns, codes)
}

/// [`mixed`] as values: [images·tokens, heads·width].
pub(crate) fn mixed_values(
    qkv: [&Codes; 3],
    shape: Heads,
    (softmax, scores): (Softmax<'_>, &dyn RowEncoder),
    out: &mut [f32],
) {
    let columns = shape.columns();
    assert_eq!(out.len(), qkv[0].rows * shape.width, "length of the result");
    let target = Scatter::new(out);
    mixed(qkv, shape, (softmax, scores), &|row, column, values| {
        // SAFETY: every part of every row comes once.
        unsafe { target.part(row * columns + column, values.len()) }.copy_from_slice(values);
    });
}

/// What `softmax` makes of q·kᵀ: [images·heads·tokens, tokens].
pub(crate) fn weights(
    [q, k]: [&Codes; 2],
    Heads { tokens, .. }: Heads,
    softmax: Softmax<'_>,
    out: &mut [f32],
) {
    assert_eq!(out.len(), q.rows * tokens, "length of the result");
    let target = Scatter::new(out);
    let finish = |row: usize, _: usize, scores: &mut [f32]| {
        // SAFETY: every row comes once.
        softmax(row, scores, unsafe { target.part(row * tokens, tokens) });
    };
    let batch = q.rows / tokens.max(1);
    pass_batch(InstructionSet::best(), Workers::shared(), (q, k), batch, (&finish, Passing::Rows));
}

/// Scores [images·heads·tokens, tokens] times v as [`split_heads`] makes it, an image's heads side by
/// side: [images·tokens, heads·width].
pub(crate) fn mixed_heads([scores, v]: [&Codes; 2], shape: Heads, out: &mut [f32]) {
    let Heads { tokens, heads, width } = shape;
    let columns = shape.columns();
    assert_eq!(out.len(), scores.rows * width, "length of the result");
    let target = Scatter::new(out);
    let finish = |row: usize, column: usize, values: &mut [f32]| {
        let (matrix, token) = (row / tokens, row % tokens);
        let first = (matrix / heads * tokens + token) * columns + matrix % heads * width + column;
        // SAFETY: every part of every row comes once.
        unsafe { target.part(first, values.len()) }.copy_from_slice(values);
    };
    let batch = scores.rows / tokens.max(1);
    pass_batch(
        InstructionSet::best(),
        Workers::shared(),
        (scores, v),
        batch,
        (&finish, Passing::Parts),
    );
}

/// What `softmax` makes of q·kᵀ, times v, an image's heads side by side, for operands as [`split_heads`]
/// makes them. `place` is given parts of rows of the result.
fn mixed(
    [q, k, v]: [&Codes; 3],
    Heads { tokens, heads, width }: Heads,
    (softmax, scores): (Softmax<'_>, &dyn RowEncoder),
    place: Finish<'_>,
) {
    for codes in [q, k, v] {
        codes.check();
    }
    let matrices = q.rows / tokens;
    assert!(q.rows.is_multiple_of(tokens) && matrices.is_multiple_of(heads), "rows of heads");
    assert!(k.rows == q.rows && q.columns == width && k.columns == width, "queries and keys");
    assert!(v.rows == matrices * width && v.columns == tokens, "values");
    let set = InstructionSet::best();
    let pack = |lhs: &Codes, codes, first, rows| {
        PackedRhs::pack_rows(&Operand::of_batch(lhs, codes, first, rows), set)
    };
    let work = |matrix: usize, scratch: &mut Scratch| {
        let keys = pack(q, k, matrix * tokens, tokens);
        let height = keys.kernel.tile_rows(1);
        let together = (SCORES / tokens / height * height).max(height);
        let together = together.min((PARALLEL_ELEMENTS - 1) / tokens).clamp(1, tokens);
        let mut weights = vec![0.0; together * tokens];
        let mut values = None;
        for first in (0..tokens).step_by(together) {
            let count = together.min(tokens - first);
            let weights = &mut weights[..count * tokens];
            let first_row = matrix * tokens + first;
            let (rows, panels) = (first_row..first_row + count, 0..keys.panels());
            let target = Scatter::new(weights);
            let finish = |row: usize, _: usize, scores: &mut [f32]| {
                // SAFETY: every row comes once.
                softmax(row, scores, unsafe { target.part((row - first_row) * tokens, tokens) });
            };
            let finish = Some(&finish as Finish<'_>);
            let job = Job { lhs: q, rows, rhs: &keys, panels, bias: None, finish };
            keys.kernel.run(&job, Destination::Nowhere(Passing::Rows), scratch);

            let codes = scores.encode(weights, tokens);
            codes.check();
            // The largest code is a property of the grid, the same for all rows.
            let rhs = values.get_or_insert_with(|| pack(&codes, v, matrix * width, width));
            assert!(codes.max_code() <= rhs.lhs_max_code, "codes of the scores");
            let (image, head) = (matrix / heads, matrix % heads);
            let finish = |row: usize, column: usize, part: &mut [f32]| {
                place(image * tokens + first + row, head * width + column, part);
            };
            let (rows, panels, finish) = (0..count, 0..rhs.panels(), Some(&finish as Finish<'_>));
            let job = Job { lhs: &codes, rows, rhs, panels, bias: None, finish };
            rhs.kernel.run(&job, Destination::Nowhere(Passing::Parts), scratch);
            codes.recycle();
        }
    };
    share_batch(Workers::shared(), (0..matrices).collect(), tokens * tokens * width, work);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu_elementwise::ScoreRow;
    use crate::kernels::{product, product_batch, transpose};

    /// Numbers that repeat themselves only after long.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) as f32 * 0.7123).sin() * 2.0).collect()
    }

    const GRID: Grid = Grid { scale: 0.031, zero_point: 121.0, max_code: 255.0 };

    fn operand(rows: usize, columns: usize, seed: usize) -> Codes {
        GRID.encode(&numbers(rows * columns, seed), columns)
    }

    fn weight(rows: usize, columns: usize, seed: usize) -> PackedRhs {
        PackedRhs::pack(&operand(rows, columns, seed), 1, 255)
    }

    /// Another order of every image's rows.
    fn order(rows: usize) -> RowOrder {
        RowOrder::new((0..rows).map(|row| (row + rows / 3) % rows).rev().collect()).unwrap()
    }

    #[test]
    fn an_order_has_every_row_once() {
        assert!(RowOrder::new(vec![2, 0, 1]).is_some());
        for rows in [vec![0, 0], vec![1, 2], vec![3]] {
            assert!(RowOrder::new(rows).is_none());
        }
        let order = RowOrder::new(vec![2, 0, 1]).unwrap();
        assert_eq!([0, 1, 5].map(|place| RowOrder::row(Some(&order), place)), [2, 0, 4]);
        assert_eq!(RowOrder::row(None, 5), 5);
    }

    #[test]
    fn norms_are_encoded_in_their_order() {
        for (images, tokens, width) in [(1, 1, 3), (2, 6, 96), (3, 197, 384)] {
            let x = numbers(images * tokens * width, 1);
            let (factors, offsets) = (numbers(width, 2), numbers(width, 3));
            let norm = NormRow { weight: &factors, bias: &offsets, eps: 1e-6 };
            let grid = Grid { scale: 0.05, zero_point: 120.0, max_code: 255.0 };
            let order = order(tokens);
            for order in [None, Some(&order)] {
                let mut values = vec![0.0; x.len()];
                for (place, out) in values.chunks_exact_mut(width).enumerate() {
                    let row = RowOrder::row(order, place);
                    cpu_elementwise::layer_norm(&x[row * width..][..width], norm, out);
                }
                assert_eq!(normed(&x, norm, order, grid), grid.encode(&values, width));
            }
        }
    }

    #[test]
    fn products_are_changed_encoded_and_added() {
        for (rows, width, columns) in [(1, 1, 8), (5, 33, 12), (199, 1537, 97)] {
            let (lhs, rhs) = (operand(rows, columns, 1), weight(width, columns, 2));
            let bias = numbers(width, 3);
            let mut values = vec![0.0; rows * width];
            product(&lhs, &rhs, Some(&bias), None, &mut values);
            let residual = numbers(rows * width, 4);

            let order = order(rows);
            for order in [None, Some(&order)] {
                let mut expected = residual.clone();
                for (place, part) in values.chunks_exact(width).enumerate() {
                    let at = RowOrder::row(order, place) * width;
                    cpu_elementwise::add(&mut expected[at..at + width], part);
                }
                let mut found = vec![f32::NAN; rows * width];
                added((&lhs, &rhs), Some(&bias), &residual, order, &mut found);
                assert_eq!(found, expected);
            }

            cpu_elementwise::gelu(&mut values);
            let grid = Grid { scale: 0.4, zero_point: 3.0, max_code: 255.0 };
            let found = encoded((&lhs, &rhs), Some(&bias), cpu_elementwise::gelu, grid);
            assert_eq!(found, grid.encode(&values, width));
        }
    }

    /// Images or windows, and the sizes of their attention.
    const ATTENTIONS: [(usize, Heads); 5] = [
        (1, Heads { tokens: 1, heads: 1, width: 4 }),
        (3, Heads { tokens: 7, heads: 3, width: 5 }),
        (4, Heads { tokens: 49, heads: 3, width: 32 }),
        (2, Heads { tokens: 197, heads: 2, width: 64 }),
        (1, Heads { tokens: 3, heads: 40, width: 64 }),
    ];

    #[test]
    fn heads_are_split_as_they_come() {
        for (images, shape) in ATTENTIONS {
            let Heads { tokens, heads, width } = shape;
            let (rows, columns) = (images * tokens, heads * width);
            let (lhs, rhs) = (operand(rows, 24, 1), weight(3 * columns, 24, 2));
            let bias = numbers(3 * columns, 3);
            let mut values = vec![0.0; rows * 3 * columns];
            product(&lhs, &rhs, Some(&bias), None, &mut values);
            for scale in [None, Some(0.176f32)] {
                let grids = [(0.02, 128.0), (0.03, 9.0), (0.04, 200.0)]
                    .map(|(scale, zero_point)| Grid { scale, zero_point, max_code: 255.0 });
                let found = split_heads((&lhs, &rhs), Some(&bias), shape, scale, grids);
                for (part, found) in found.iter().enumerate() {
                    let mut expected = Vec::new();
                    for matrix in 0..images * heads {
                        let (image, head) = (matrix / heads, matrix % heads);
                        let mut of_head = Vec::new();
                        for token in 0..tokens {
                            let first = (image * tokens + token) * 3 * columns;
                            let first = first + part * columns + head * width;
                            of_head.extend_from_slice(&values[first..first + width]);
                        }
                        if part == 0 {
                            of_head.iter_mut().for_each(|q| *q *= scale.unwrap_or(1.0));
                        }
                        if part == 2 {
                            let rows = of_head.clone();
                            transpose(&rows, width, [tokens, width], &mut of_head);
                        }
                        expected.extend(of_head);
                    }
                    let length = if part == 2 { tokens } else { width };
                    assert_eq!(*found, grids[part].encode(&expected, length), "{shape:?} {part}");
                }
            }
        }
    }

    #[test]
    fn rows_of_heads_are_encoded_as_matrices() {
        for (images, shape) in ATTENTIONS {
            let Heads { tokens, heads, width } = shape;
            let (rows, columns) = (images * tokens, heads * width);
            let values = numbers(rows * 3 * columns, 1);
            let grid = |row: usize| Grid {
                scale: 0.01 + row as f32 * 1e-3,
                zero_point: (row % 16) as f32,
                max_code: 15.0,
            };
            let grids: Vec<Grid> = (0..rows).map(grid).collect();
            let strided =
                Strided { values: &values[columns..], stride: 3 * columns, width: columns };
            let found = HeadRows { rows: strided, count: rows, shape }.encode(&grids, 15);
            assert_eq!((found.rows, found.columns), (rows * heads, width));
            for row in 0..found.rows {
                let (matrix, token) = (row / tokens, row % tokens);
                let from = matrix / heads * tokens + token;
                let first = from * 3 * columns + columns + matrix % heads * width;
                let expected = grids[from].encode(&values[first..first + width], width);
                let term = &found.terms[0];
                assert_eq!(term.codes[row * width..][..width], expected.terms[0].codes);
                assert_eq!(term.scale[row], grids[from].scale);
                assert_eq!(term.zero_point[row], grids[from].zero_point as i32);
            }
        }
    }

    #[test]
    fn an_attention_is_its_steps() {
        for (images, shape) in ATTENTIONS {
            let Heads { tokens, heads, width } = shape;
            let matrices = images * heads;
            let q = operand(matrices * tokens, width, 1);
            let k = operand(matrices * tokens, width, 2);
            let v = operand(matrices * width, tokens, 3);
            let softmax = |row: usize, scores: &mut [f32], out: &mut [f32]| {
                let scale = 0.1 + (row % 5) as f32 * 0.01;
                cpu_elementwise::softmax(scores, ScoreRow { scale, bias: &[], mask: &[] }, out);
            };

            let mut scores = vec![0.0; matrices * tokens * tokens];
            product_batch(&q, &k, matrices, &mut scores);
            let mut expected = vec![0.0; scores.len()];
            let rows = scores.chunks_exact_mut(tokens).zip(expected.chunks_exact_mut(tokens));
            rows.enumerate().for_each(|(row, (scores, out))| softmax(row, scores, out));
            let mut found = vec![f32::NAN; expected.len()];
            weights([&q, &k], shape, &softmax, &mut found);
            assert_eq!(found, expected, "{shape:?}");

            let grid = Grid { scale: 1.0 / 255.0, zero_point: 0.0, max_code: 255.0 };
            let attended = grid.encode(&expected, tokens);
            let mut by_head = vec![0.0; matrices * tokens * width];
            product_batch(&attended, &v, matrices, &mut by_head);
            let mut expected = vec![0.0; by_head.len()];
            for (row, values) in by_head.chunks_exact(width).enumerate() {
                let (matrix, token) = (row / tokens, row % tokens);
                let at = ((matrix / heads * tokens + token) * heads + matrix % heads) * width;
                expected[at..at + width].copy_from_slice(values);
            }
            let mut found = vec![f32::NAN; expected.len()];
            mixed_heads([&attended, &v], shape, &mut found);
            assert_eq!(found, expected, "{shape:?}");
            found.fill(f32::NAN);
            mixed_values([&q, &k, &v], shape, (&softmax, &grid), &mut found);
            assert_eq!(found, expected, "{shape:?}");
            let found = mixed_codes([&q, &k, &v], shape, (&softmax, &grid), GRID);
            assert_eq!(found, GRID.encode(&expected, heads * width), "{shape:?}");
        }
    }
}
