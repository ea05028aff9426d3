//! Staircases as tables: numbers whose first bits are the same share a bin, in which there is one step at most.

#![allow(unsafe_code, reason = "registers, and their loads")]

use super::staircase::Passed;
use crate::kernels::cpu::lanes::{FEW, LANES, Lanes, for_lanes, registers};

/// Bins at most: a block of threads on a GPU keeps them in shared memory.
const MAX_BINS: usize = 1024;

/// Bits of a float32's mantissa.
const MANTISSA: u32 = 23;

/// By how many eighths of a bin the borders of bins are moved when steps do not fit otherwise.
const TURNS: [u32; 4] = [0, 4, 2, 6];

/// Elements that are looked up together.
const BLOCK: usize = 4 * LANES;

/// The first number that has passed a threshold.
pub(crate) fn first_passed(threshold: f32, passed: Passed) -> f32 {
    match passed {
        Passed::AtLeast | Passed::NotBelow => threshold,
        Passed::Above => threshold.next_up(),
    }
}

/// Which numbers share a bin. Positive ones stand for their bits, to which something may have been added: what
/// follows are the same numbers in the same order.
#[derive(Debug, PartialEq)]
pub(crate) struct Layout {
    /// Bits that are not looked at.
    pub(crate) shift: u32,
    /// First bits of the numbers of the first bin.
    pub(crate) first: u32,
    pub(crate) bins: Vec<Bin>,
}

/// Numbers that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bin {
    /// From where on they have passed steps; `None` where they pass none.
    pub(crate) threshold: Option<u32>,
    /// Steps passed below it.
    pub(crate) below: usize,
    /// Steps passed from it on.
    pub(crate) above: usize,
}

impl Layout {
    /// The largest bins of the numbers `least..=most`, for ascending thresholds from `least` on; `None` without
    /// thresholds, or where bins would be too many.
    pub(crate) fn of(thresholds: &[u32], [least, most]: [u32; 2]) -> Option<Self> {
        thresholds.first()?;
        (0..MANTISSA).rev().find_map(|shift| Self::with(shift, thresholds, [least, most]))
    }

    /// As [`Layout::of`], without looking at `shift` bits.
    fn with(shift: u32, thresholds: &[u32], [least, most]: [u32; 2]) -> Option<Self> {
        let (first, last) = (least >> shift, most >> shift);
        let count = usize::try_from(last.checked_sub(first)?).ok()? + 1;
        if count > MAX_BINS {
            return None;
        }
        let bins = (first..=last).map(|bin| {
            let below = thresholds.partition_point(|t| t >> shift < bin);
            let above = thresholds.partition_point(|t| t >> shift <= bin);
            match &thresholds[below..above] {
                [] => Some(Bin { threshold: None, below, above }),
                [first, .., last] if first != last => None,
                [threshold, ..] => Some(Bin { threshold: Some(*threshold), below, above }),
            }
        });
        Some(Self { shift, first, bins: bins.collect::<Option<_>>()? })
    }
}

/// Counts the steps of a staircase that numbers have passed, by tables.
#[derive(Clone, Debug)]
pub(super) struct Bins {
    /// The table has no smaller numbers.
    least: f32,
    /// The smallest number that has passed all steps.
    all: f32,
    /// Whether all numbers below `least` have passed no step.
    none_below: bool,
    /// Whether what is no number has passed all steps, or none.
    nan_passes: bool,
    shift: u32,
    /// Added to the bits of a number to have that of its bin in front.
    turn: u32,
    offsets: Offsets,
}

/// By bin: what is added to the bits of a number to have its count in front.
#[derive(Clone, Debug)]
enum Offsets {
    /// Few, which registers hold, at the last bits of their number; there are no numbers below these.
    Few([u32; FEW]),
    /// Those of the bins from one on.
    Many(u32, Vec<u32>),
}

/// Counts the steps of numbers below a table.
type Below<'a> = &'a dyn Fn(&[f32], &mut [u8]);

impl Bins {
    /// For ascending thresholds; `None` where steps are too close to each other.
    pub(super) fn of(thresholds: &[f32], passed: Passed) -> Option<Self> {
        let firsts: Vec<f32> = thresholds.iter().map(|t| first_passed(*t, passed)).collect();
        if !firsts.last()?.is_finite() {
            return None;
        }
        // Numbers too small to be normal ones are as close to each other as those above them.
        let normal = firsts.partition_point(|t| *t < 2.0 * f32::MIN_POSITIVE);
        let from = |skipped| Self::from(skipped, &firsts, passed);
        from(0).or_else(|| (normal > 0).then(|| from(normal)).flatten())
    }

    /// A table from a step on.
    fn from(skipped: usize, thresholds: &[f32], passed: Passed) -> Option<Self> {
        let all = *thresholds.last()?;
        let lowest = *thresholds.get(skipped).filter(|lowest| **lowest > 0.0)?;
        let least = lowest.next_down();
        let bits: Vec<u32> = thresholds[skipped..].iter().map(|t| t.to_bits()).collect();
        let (turn, layout) = (0..=MANTISSA).rev().find_map(|shift| {
            TURNS.into_iter().find_map(|eighths| {
                let turn = (eighths << shift) / 8;
                let turned: Vec<u32> = bits.iter().map(|bits| bits + turn).collect();
                let bounds = [least, all].map(|bound| bound.to_bits() + turn);
                Layout::with(shift, &turned, bounds).map(|layout| (turn, layout))
            })
        })?;
        let Layout { shift, first, bins } = layout;
        let offset = |(bin, Bin { threshold, below, above }): (u32, &Bin)| {
            let step = |count: usize| u32::try_from(skipped + count).map(|count| count << shift);
            let from = threshold.unwrap_or(bin << shift);
            let count = if threshold.is_some() { *above } else { *below };
            (above - below <= 1).then_some(step(count).ok()?.wrapping_sub(from).wrapping_add(turn))
        };
        let offsets: Vec<u32> = (first..).zip(&bins).map(offset).collect::<Option<_>>()?;
        let none_below = skipped == 0;
        let offsets = if none_below && offsets.len() <= FEW {
            let mut few = [0; FEW];
            (first..).zip(offsets).for_each(|(bin, offset)| few[bin as usize % FEW] = offset);
            Offsets::Few(few)
        } else {
            Offsets::Many(first, offsets)
        };
        let nan_passes = passed != Passed::AtLeast;
        Some(Self { least, all, none_below, nan_passes, shift, turn, offsets })
    }

    /// Number of steps that each of `x` has passed. `below` is asked for that of numbers which the table does not
    /// have, and others beside them.
    pub(super) fn count(&self, x: &[f32], below: Below<'_>, out: &mut [u8]) {
        match &self.offsets {
            Offsets::Few(offsets) => few(x, self, offsets, out),
            Offsets::Many(first, offsets) => many(x, self, (*first, offsets, below), out),
        }
    }
}

/// A number in `least..=all` that has passed as many steps.
#[inline(always)]
unsafe fn bounded<L: Lanes>(x: L, [least, all]: [L; 2], nan_passes: bool) -> L {
    // SAFETY: the caller has the instruction set.
    unsafe {
        // The bound is chosen where x is no number.
        if nan_passes { x.smaller(all).larger(least) } else { x.larger(least).smaller(all) }
    }
}

for_lanes!(
    fn few, few_of, (x: &[f32], bins: &Bins, offsets: &[u32; FEW], out: &mut [u8])
);

#[inline(always)]
unsafe fn few_of<L: Lanes>(x: &[f32], bins: &Bins, offsets: &[u32; FEW], out: &mut [u8]) {
    // SAFETY: registers are within both; the caller has the instruction set.
    unsafe {
        let bounds = [L::splat(bins.least), L::splat(bins.all)];
        let turn = L::splat(f32::from_bits(bins.turn));
        super::affine::encode_registers!(L, x, out, |x| {
            let x = bounded(x, bounds, bins.nan_passes);
            let offset = x.add_bits(turn).move_bits(bins.shift).entry(offsets);
            x.add_bits(offset).move_bits(bins.shift)
        });
    }
}

for_lanes!(
    fn many, many_of,
    (x: &[f32], bins: &Bins, table: (u32, &[u32], Below<'_>), out: &mut [u8])
);

#[inline(always)]
unsafe fn many_of<L: Lanes>(
    x: &[f32],
    bins: &Bins,
    (first, offsets, below): (u32, &[u32], Below<'_>),
    out: &mut [u8],
) {
    let Bins { least, all, none_below, nan_passes, shift, turn, .. } = *bins;
    // To count bins from the first.
    let before = turn.wrapping_sub(first << shift);
    for (x, out) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        let (mut inside, mut found) = ([0.0f32; BLOCK], [0u32; BLOCK]);
        let (whole, rest) = registers(x.len());
        let mut is_below = false;
        // SAFETY: registers are within a block; the caller has the instruction set.
        unsafe {
            let (bounds, before) =
                ([L::splat(least), L::splat(all)], L::splat(f32::from_bits(before)));
            for at in (0..x.len()).step_by(LANES) {
                let number = if at < whole {
                    L::load(x.as_ptr().add(at))
                } else {
                    L::load_first(x.as_ptr().add(at), rest, all)
                };
                let number_inside = bounded(number, bounds, nan_passes);
                is_below |= number_inside.differs(number.smaller(bounds[1]));
                number_inside.store(inside.as_mut_ptr().add(at));
                let bin = number_inside.add_bits(before).move_bits(shift);
                bin.store(found.as_mut_ptr().cast::<f32>().add(at));
            }
        }
        if is_below && !none_below {
            below(x, out);
            continue;
        }
        // Not gathered: many processors are slow at that.
        for found in &mut found {
            *found = offsets[*found as usize];
        }
        // SAFETY: as above.
        unsafe {
            for at in (0..x.len()).step_by(LANES) {
                let number = L::load(inside.as_ptr().add(at));
                let offset = L::load(found.as_ptr().cast::<f32>().add(at));
                let count = number.add_bits(offset).move_bits(shift);
                if at < whole {
                    count.store_bytes(out.as_mut_ptr().add(at));
                } else {
                    count.store_first_bytes(out.as_mut_ptr().add(at), rest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::lanes::Plain;

    /// Stairs of logarithms, few and many, and irregular ones.
    fn staircases() -> Vec<Vec<f32>> {
        let powers = |count: u32, exponent: f32| -> Vec<f32> {
            (0..count).rev().map(|e| 0.9 * 2f32.powf(exponent * e as f32)).collect()
        };
        vec![
            powers(16, -0.5),
            powers(15, -1.0),
            powers(250, -0.5),
            powers(100, -0.37),
            vec![0.25, 0.26, 0.75],
            powers(256, -0.5).iter().map(|power| power * 0.01).collect(),
            [-3.0, -2.0, 0.0].into_iter().chain(powers(40, -1.0)).collect(),
            powers(16, -0.5).iter().map(|power| power * 1.18).collect(),
            vec![1e-45, 1.0, 3.0e38],
            vec![0.5],
        ]
    }

    /// Numbers at and beside thresholds, and what is special.
    fn numbers(thresholds: &[f32]) -> Vec<f32> {
        let mut x: Vec<f32> =
            thresholds.iter().flat_map(|t| [t.next_down(), *t, t.next_up(), t * 1.3]).collect();
        x.extend([0.0, -0.0, -1.0, 1e-45, -1e-45, 1e-30, 0.3, 0.7, 1.0, 1e30]);
        x.extend([f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN]);
        x
    }

    fn bits_of(numbers: &[f32]) -> Vec<u32> {
        numbers.iter().map(|number| number.to_bits()).collect()
    }

    #[test]
    fn layouts_tell_the_steps_of_every_number() {
        let roots: Vec<f32> = (0..16).rev().map(|e| 0.9 * 2f32.powf(-0.5 * e as f32)).collect();
        let many: Vec<f32> = (0..256).rev().map(|e| 2f32.powf(-0.5 * e as f32)).collect();
        let one = 1f32.to_bits();
        for thresholds in [roots, many, vec![0.25, 0.26, 0.75], vec![0.1, 0.3, 0.3, 0.9, 1.5]] {
            let bits = bits_of(&thresholds);
            let layout = Layout::of(&bits, [bits[0], one]).unwrap();
            let near = thresholds.iter().flat_map(|t| [t.next_down(), *t, t.next_up()]);
            let near = near.filter(|x| *x <= 1.0); // as weights are
            for x in near.chain([0.0, 1e-30, 0.3, 0.7, 1.0, 1f32.next_up()]) {
                let bin = (x.to_bits() >> layout.shift).saturating_sub(layout.first) as usize;
                let Bin { threshold, below, above } = layout.bins[bin.min(layout.bins.len() - 1)];
                let has_passed = threshold.is_some_and(|threshold| x.to_bits() >= threshold);
                let found = if has_passed { above } else { below };
                assert_eq!(found, thresholds.partition_point(|t| *t <= x), "{x}");
            }
        }
        assert_eq!(first_passed(0.5, Passed::Above), 0.5f32.next_up());
        // Closer than a mantissa of few bits tells apart.
        let close = bits_of(&[1e-9, 0.5, 0.500_001]);
        assert_eq!(Layout::of(&close, [close[0], one]), None);
        assert_eq!(Layout::of(&[], [0, one]), None);
    }

    /// Counts by the registers of `L`.
    unsafe fn found<L: Lanes>(x: &[f32], bins: &Bins, below: Below<'_>) -> Vec<u8> {
        let mut counts = vec![99; x.len()];
        // SAFETY: the caller has the instruction set.
        unsafe {
            match &bins.offsets {
                Offsets::Few(offsets) => few_of::<L>(x, bins, offsets, &mut counts),
                Offsets::Many(first, offsets) => {
                    many_of::<L>(x, bins, (*first, offsets, below), &mut counts);
                }
            }
        }
        counts
    }

    #[test]
    fn tables_count_what_comparisons_count() {
        let mut kinds = std::collections::BTreeSet::new();
        for thresholds in staircases() {
            let x = numbers(&thresholds);
            for passed in [Passed::AtLeast, Passed::NotBelow, Passed::Above] {
                let bins = Bins::of(&thresholds, passed).unwrap();
                let are_few = matches!(bins.offsets, Offsets::Few(_));
                kinds.insert((are_few, bins.none_below, bins.turn > 0));
                let count = |x: &f32| thresholds.iter().filter(|t| passed.has(*x, **t)).count();
                let below = |x: &[f32], out: &mut [u8]| {
                    assert!(x.iter().any(|x| x.is_nan() || *x < thresholds[thresholds.len() / 2]));
                    out.iter_mut().zip(x).for_each(|(out, x)| *out = count(x) as u8);
                };
                let lengths = [0, 1, 15, 16, 17, 49, 1000];
                let ends = lengths.map(|len| &x[x.len().saturating_sub(len)..]);
                for x in ends.into_iter().chain(x.chunks(1)) {
                    let expected: Vec<u8> = x.iter().map(|x| count(x) as u8).collect();
                    let mut counts = vec![99; x.len()];
                    bins.count(x, &below, &mut counts);
                    assert_eq!(counts, expected, "{passed:?}");
                    // SAFETY: plain code is always available, the others were asked for.
                    unsafe {
                        assert_eq!(found::<Plain>(x, &bins, &below), expected, "{passed:?}");
                        #[cfg(target_arch = "x86_64")]
                        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                            use crate::kernels::cpu::lanes::Avx2;
                            assert_eq!(found::<Avx2>(x, &bins, &below), expected, "{passed:?}");
                        }
                    }
                }
            }
        }
        for kind in
            [(true, true, false), (true, true, true), (false, true, false), (false, false, false)]
        {
            assert!(kinds.contains(&kind), "{kind:?} of {kinds:?}");
        }
    }

    #[test]
    fn stairs_that_no_table_holds_are_told() {
        for thresholds in [
            vec![],
            vec![0.0],
            vec![-1.0, 0.5, 0.5],
            vec![0.5, 0.5],
            vec![0.5, f32::INFINITY],
            vec![1e-9, 0.5, 0.500_001],
            (0..=256).map(|step| 1.0 + step as f32).collect(),
        ] {
            assert!(Bins::of(&thresholds, Passed::AtLeast).is_none(), "{thresholds:?}");
        }
        assert!(Bins::of(&[0.5, f32::MAX], Passed::Above).is_none());
    }
}
