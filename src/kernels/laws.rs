//! Every instruction set of this machine against the plain loops, and against each other.

use std::sync::Mutex;

use proptest::prelude::*;

use crate::kernels::pack::{Operand, Uses};
use crate::kernels::{
    Codes, CodesTerm, InstructionSet, PackedRhs, Passing, Workers, batch_with, pass_batch, pass_on,
    product_on, reference,
};

/// Shapes and grids of one product.
#[derive(Clone, Debug)]
struct Case {
    m: usize,
    n: usize,
    group_columns: usize,
    groups: usize,
    lhs: Grid,
    rhs: Grid,
    bias: bool,
    seed: u64,
}

/// How codes are drawn.
#[derive(Clone, Copy, Debug)]
struct Grid {
    bits: u8,
    terms: usize,
    fill: Fill,
    zero_point: ZeroPoint,
}

#[derive(Clone, Copy, Debug)]
enum Fill {
    Random,
    /// Codes 0 and the largest only.
    Extreme,
    /// The largest code only: what saturates where anything can.
    Largest,
    /// Equal to the zero point but for one row in three.
    MostlyZero,
}

#[derive(Clone, Copy, Debug)]
enum ZeroPoint {
    Middle,
    Inside,
    /// Also beyond the grid, now and then by far.
    Anywhere,
}

/// A small generator of its own, so that a case is its seed (PCG-like).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn below(&mut self, end: u32) -> u32 {
        self.next() % end.max(1)
    }

    fn scale(&mut self) -> f32 {
        0.001 + self.below(10_000) as f32 * 1e-5
    }
}

fn draw(grid: Grid, [rows, columns, groups]: [usize; 3], random: &mut Random) -> Codes {
    let max_code = ((1u32 << grid.bits) - 1) as u8;
    let size = columns / groups;
    let terms = (0..grid.terms).map(|_| {
        let zero_point: Vec<i32> = (0..rows * groups)
            .map(|_| match grid.zero_point {
                ZeroPoint::Middle => i32::from(max_code / 2) + 1,
                ZeroPoint::Inside => random.below(u32::from(max_code) + 1) as i32,
                ZeroPoint::Anywhere if random.below(20) == 0 => {
                    100_000 - random.below(200_000) as i32
                }
                ZeroPoint::Anywhere => {
                    random.below(3 * u32::from(max_code)) as i32 - i32::from(max_code)
                }
            })
            .collect();
        let code = |index: usize| {
            let (row, group) = (index / columns, index % columns / size);
            match grid.fill {
                Fill::Random => random.below(u32::from(max_code) + 1) as u8,
                Fill::Extreme => max_code * (random.below(2) as u8),
                Fill::Largest => max_code,
                Fill::MostlyZero if row % 3 > 0 || group % 2 > 0 => {
                    zero_point[row * groups + group].clamp(0, i32::from(max_code)) as u8
                }
                Fill::MostlyZero => random.below(u32::from(max_code) + 1) as u8,
            }
        };
        let codes = (0..rows * columns).map(code).collect();
        let scale = (0..rows * groups).map(|_| random.scale()).collect();
        CodesTerm { codes, scale, zero_point, max_code }
    });
    Codes { rows, columns, groups, terms: terms.collect() }
}

struct Operands {
    lhs: Codes,
    rhs: Codes,
    bias: Option<Vec<f32>>,
}

impl Case {
    fn operands(&self) -> Operands {
        let mut random = Random(self.seed);
        let k = self.groups * self.group_columns;
        let lhs = draw(self.lhs, [self.m, k, self.groups], &mut random);
        let rhs = draw(self.rhs, [self.n, k, 1], &mut random);
        let bias = self.bias.then(|| (0..self.n).map(|_| random.scale()).collect());
        Operands { lhs, rhs, bias }
    }
}

fn available() -> impl Iterator<Item = InstructionSet> {
    let shapes = [InstructionSet::Like512, InstructionSet::LikeAvxVnni];
    InstructionSet::ALL.into_iter().chain(shapes).filter(|set| set.is_available())
}

fn pack(lhs: &Codes, rhs: &Codes, set: InstructionSet) -> PackedRhs {
    let (lhs_groups, lhs_max_code) = (lhs.groups, lhs.max_code());
    PackedRhs::pack_rows(
        &Operand {
            codes: rhs,
            first: 0,
            rows: rhs.rows,
            lhs_groups,
            lhs_max_code,
            uses: Uses::Many,
        },
        set,
    )
}

fn multiply(workers: &Workers, operands: &Operands, set: InstructionSet) -> Vec<f32> {
    let Operands { lhs, rhs, bias } = operands;
    let mut out = vec![f32::NAN; lhs.rows * rhs.rows];
    product_on(workers, lhs, &pack(lhs, rhs, set), (bias.as_deref(), None), &mut out);
    out
}

/// Bits, so that a wrong sign of zero or a NaN shows.
fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// What rounding may do: half a last place of the largest numbers that are summed, for each of the
/// roundings, of which a group has up to six.
fn tolerances(operands: &Operands) -> Vec<f64> {
    let Operands { lhs, rhs, bias } = operands;
    let size = lhs.group_columns();
    let roundings = (6 * lhs.groups * lhs.terms.len() + 2) * rhs.terms.len();
    let mut out = Vec::new();
    for row in 0..lhs.rows {
        let x: f64 = lhs
            .terms
            .iter()
            .map(|term| {
                (0..lhs.groups)
                    .map(|group| {
                        let at = row * lhs.groups + group;
                        let reach = 256.0 + f64::from(term.zero_point[at]).abs();
                        f64::from(term.scale[at]) * reach
                    })
                    .sum::<f64>()
            })
            .sum();
        for channel in 0..rhs.rows {
            let w: f64 = rhs
                .terms
                .iter()
                .map(|term| {
                    f64::from(term.scale[channel])
                        * (256.0 + f64::from(term.zero_point[channel]).abs())
                })
                .sum();
            let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[channel]).abs());
            out.push((x * w * size as f64 + bias) * roundings as f64 * 2f64.powi(-24));
        }
    }
    out
}

fn check(case: &Case) {
    let operands = case.operands();
    let expected = reference::product(&operands.lhs, &operands.rhs, operands.bias.as_deref());
    let tolerance = tolerances(&operands);
    let alone = Workers::new(1);
    let portable = multiply(&alone, &operands, InstructionSet::Portable);
    for (i, (&found, &expected)) in portable.iter().zip(&expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= tolerance[i], "{case:?}: {found} for {expected} at {i}");
    }
    for set in available() {
        assert_eq!(bits(&multiply(&alone, &operands, set)), bits(&portable), "{case:?} {set:?}");
    }
}

fn grids() -> impl Strategy<Value = Grid> {
    let fill = prop_oneof![
        Just(Fill::Random),
        Just(Fill::Extreme),
        Just(Fill::Largest),
        Just(Fill::MostlyZero)
    ];
    let zero_point =
        prop_oneof![Just(ZeroPoint::Middle), Just(ZeroPoint::Inside), Just(ZeroPoint::Anywhere)];
    (3u8..=8, 1usize..=2, fill, zero_point).prop_map(|(bits, terms, fill, zero_point)| Grid {
        bits,
        terms,
        fill,
        zero_point,
    })
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..70, 1usize..70, 1usize..8, 1usize..200, grids(), grids(), any::<bool>(), any::<u64>())
        .prop_map(|(m, n, groups, k, lhs, rhs, bias, seed)| Case {
            m,
            n,
            group_columns: k.div_ceil(groups),
            groups,
            lhs,
            rhs,
            bias,
            seed,
        })
}

const PLAIN: Grid = Grid { bits: 8, terms: 1, fill: Fill::Random, zero_point: ZeroPoint::Inside };

fn plain(m: usize, n: usize, k: usize) -> Case {
    Case { m, n, group_columns: k, groups: 1, lhs: PLAIN, rhs: PLAIN, bias: true, seed: 7 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 200 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_kernel_gives_the_plain_product(case in cases()) {
        check(&case);
    }

    #[test]
    fn a_row_does_not_depend_on_other_rows(case in cases(), first in 0usize..70, count in 1usize..9) {
        let all = case.operands();
        let first = first % case.m;
        let count = count.min(case.m - first);
        for set in available() {
            let whole = multiply(&Workers::new(1), &all, set);
            let lhs = rows(&all.lhs, first, count);
            let some = Operands { lhs, rhs: all.rhs.clone(), bias: all.bias.clone() };
            let part = multiply(&Workers::new(1), &some, set);
            prop_assert_eq!(bits(&part), bits(&whole[first * case.n..(first + count) * case.n]));
        }
    }

    #[test]
    fn a_batch_is_its_products(case in cases(), batch in 1usize..4) {
        let mut random = Random(case.seed);
        let k = case.groups * case.group_columns;
        let lhs = draw(case.lhs, [batch * case.m, k, case.groups], &mut random);
        let rhs = draw(case.rhs, [batch * case.n, k, 1], &mut random);
        for set in available() {
            let mut out = vec![f32::NAN; batch * case.m * case.n];
            batch_with(set, &Workers::new(2), (&lhs, &rhs), batch, &mut out);
            for (i, out) in out.chunks_exact(case.m * case.n).enumerate() {
                let one = Operands {
                    lhs: rows(&lhs, i * case.m, case.m),
                    rhs: rows(&rhs, i * case.n, case.n),
                    bias: None,
                };
                prop_assert_eq!(bits(out), bits(&multiply(&Workers::new(1), &one, set)));
            }
        }
    }
}

#[test]
fn every_part_is_finished_once() {
    let (m, n, k) = if cfg!(miri) { (13, 35, 8) } else { (199, 331, 97) };
    let operands = plain(m, n, k).operands();
    let Operands { lhs, rhs, bias } = &operands;
    // What is added tells where.
    let place = |row: usize, column: usize| (row * n + column) as f32;
    for set in available() {
        for threads in [1, 3] {
            let workers = Workers::new(threads);
            let mut expected = multiply(&workers, &operands, set);
            for (at, value) in expected.iter_mut().enumerate() {
                *value += place(at / n, at % n);
            }
            let finish = |row: usize, first: usize, part: &mut [f32]| {
                for (offset, value) in part.iter_mut().enumerate() {
                    *value += place(row, first + offset);
                }
            };
            let mut found = vec![f32::NAN; m * n];
            let packed = pack(lhs, rhs, set);
            product_on(&workers, lhs, &packed, (bias.as_deref(), Some(&finish)), &mut found);
            assert_eq!(bits(&found), bits(&expected), "{set:?}, {threads} threads");
            // The same, kept by nobody but who is told.
            let found = Mutex::new(vec![0.0; m * n]);
            let seen = |row: usize, first: usize, part: &mut [f32]| {
                let mut found = found.lock().unwrap();
                for (offset, value) in part.iter().enumerate() {
                    found[row * n + first + offset] += value + place(row, first + offset);
                }
            };
            pass_on(&workers, (lhs, &packed), bias.as_deref(), &seen);
            let found = found.into_inner().unwrap();
            assert_eq!(bits(&found), bits(&expected), "{set:?}, {threads} threads");
        }
    }
}

#[test]
fn a_batch_passes_in_parts_or_rows() {
    // So many columns that a product of weights would not keep their panels together.
    let (batch, m, n, k) = if cfg!(miri) { (2, 3, 70, 8) } else { (3, 17, 2500, 64) };
    let mut random = Random(5);
    let lhs = draw(PLAIN, [batch * m, k, 1], &mut random);
    let rhs = draw(PLAIN, [batch * n, k, 1], &mut random);
    for set in available() {
        let mut expected = vec![f32::NAN; batch * m * n];
        batch_with(set, &Workers::new(1), (&lhs, &rhs), batch, &mut expected);
        for passing in [Passing::Parts, Passing::Rows] {
            let found = Mutex::new(vec![0.0; batch * m * n]);
            let seen = |row: usize, first: usize, part: &mut [f32]| {
                assert!(passing == Passing::Parts || (first, part.len()) == (0, n));
                let mut found = found.lock().unwrap();
                for (value, part) in found[row * n + first..].iter_mut().zip(part) {
                    *value += *part;
                }
            };
            pass_batch(set, &Workers::new(2), (&lhs, &rhs), batch, (&seen, passing));
            assert_eq!(bits(&found.into_inner().unwrap()), bits(&expected), "{set:?}");
        }
    }
}

fn rows(codes: &Codes, first: usize, count: usize) -> Codes {
    let part = |width: usize| first * width..(first + count) * width;
    let terms = codes.terms.iter().map(|term| CodesTerm {
        codes: term.codes[part(codes.columns)].to_vec(),
        scale: term.scale[part(codes.groups)].to_vec(),
        zero_point: term.zero_point[part(codes.groups)].to_vec(),
        max_code: term.max_code,
    });
    Codes { rows: count, columns: codes.columns, groups: codes.groups, terms: terms.collect() }
}

#[test]
fn the_number_of_threads_does_not_show() {
    // Large enough to be shared out, with ends in both directions.
    let (m, n, k) = if cfg!(miri) { (13, 35, 8) } else { (199, 331, 97) };
    let operands = plain(m, n, k).operands();
    for set in available() {
        let alone = multiply(&Workers::new(1), &operands, set);
        for threads in [2, 3, 5] {
            assert_eq!(bits(&multiply(&Workers::new(threads), &operands, set)), bits(&alone));
        }
    }
}

#[test]
fn the_largest_codes_do_not_saturate() {
    for (lhs_bits, rhs_bits) in [(8, 8), (8, 4), (4, 8), (5, 4), (6, 6), (4, 4), (3, 7)] {
        for zero_point in [ZeroPoint::Middle, ZeroPoint::Inside] {
            for fill in [Fill::Largest, Fill::Extreme] {
                let grid = |bits| Grid { bits, terms: 1, fill, zero_point };
                let k = if cfg!(miri) { 40 } else { 1536 };
                check(&Case { lhs: grid(lhs_bits), rhs: grid(rhs_bits), ..plain(7, 33, k) });
            }
        }
    }
}

#[test]
fn empty_products_are_empty_or_the_bias() {
    for (m, n, k) in [(0, 5, 8), (5, 0, 8), (5, 3, 0), (0, 0, 0)] {
        let case = plain(m, n, k);
        check(&case);
        check(&Case { rhs: Grid { bits: 4, ..PLAIN }, ..case.clone() });
        let Operands { lhs, rhs, .. } = case.operands();
        for set in available() {
            let mut out = vec![f32::NAN; m * n];
            batch_with(set, &Workers::new(1), (&lhs, &rhs), 1, &mut out);
            assert!(out.iter().all(|&number| number == 0.0 || k > 0));
        }
    }
}

#[test]
fn an_operand_without_terms_is_zero() {
    let mut operands = plain(3, 4, 5).operands();
    operands.lhs.terms.clear();
    for set in available() {
        let found = multiply(&Workers::new(1), &operands, set);
        assert_eq!(found, operands.bias.as_ref().unwrap().repeat(3));
    }
}

#[test]
fn small_codes_stay_two_per_byte() {
    let grid = Grid { bits: 4, ..PLAIN };
    let case = Case { rhs: grid, ..plain(1, 384, 384) };
    let Operands { rhs, .. } = case.operands();
    let float = 4 * 384 * 384;
    assert!(PackedRhs::pack(&rhs, 1, 15).resident_bytes() * 100 < float * 14);
}
