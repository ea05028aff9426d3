//! Speed of the integer products: `cargo bench --bench kernels -- [ROUNDS [GRID]]`.
//!
//! Gop/s (a multiplication and an addition are two) of DeiT-S products at batch 8, best of the
//! rounds, beside what the inner instruction reaches from registers in the same run. Prints a table,
//! one row per shape and grid, for one thread and for all.

#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use vitq::kernels::{
    Codes, CodesTerm, InstructionSet, PackedRhs, Workers, product_batch_on, product_on,
};

/// Images of a batch.
const BATCH: usize = 8;
/// Tokens of an image.
const TOKENS: usize = 197;
/// Heads, each of 64 channels.
const HEADS: usize = 6;
/// Groups of channels of a group-scaled operand.
const GROUPS: usize = 8;
/// Steps of the loop that finds the peak.
const PEAK_STEPS: u64 = 500_000;
/// Length of a round at least.
const ROUND_SECONDS: f64 = 0.004;

/// What is multiplied.
#[derive(Clone, Copy)]
struct Grid {
    name: &'static str,
    /// Codes of the left operand, one bit more where tokens differ.
    lhs_bits: u32,
    rhs_bits: u32,
    groups: usize,
    terms: usize,
}

const GRIDS: [Grid; 5] = [
    Grid { name: "w4a4", lhs_bits: 4, rhs_bits: 4, groups: 1, terms: 1 },
    Grid { name: "w6a6", lhs_bits: 6, rhs_bits: 6, groups: 1, terms: 1 },
    Grid { name: "w8a8", lhs_bits: 8, rhs_bits: 8, groups: 1, terms: 1 },
    Grid { name: "ubb w4a4", lhs_bits: 5, rhs_bits: 4, groups: GROUPS, terms: 1 },
    Grid { name: "ubb w4a4 gelu", lhs_bits: 5, rhs_bits: 4, groups: GROUPS, terms: 2 },
];

/// Codes from a multiplicative generator, bell-shaped, around the zero point.
fn operand(rows: usize, columns: usize, groups: usize, terms: usize, bits: u32) -> Codes {
    let mut state = 1u64;
    let mut uniform = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let end = 1u32 << bits;
    let term = CodesTerm {
        codes: (0..rows * columns)
            .map(|_| ((uniform() % end + uniform() % end + uniform() % end) / 3) as u8)
            .collect(),
        scale: vec![0.01; rows * groups],
        zero_point: vec![(end / 2) as i32; rows * groups],
        max_code: (end - 1) as u8,
    };
    Codes { rows, columns, groups, terms: vec![term; terms] }
}

/// Gop/s of `work` and, in turns with it, from registers; the best of the rounds of each. Others may
/// slow down some rounds of both, hence many short ones.
fn best(
    (rounds, threads): (usize, usize),
    operations: usize,
    packed: &PackedRhs,
    mut work: impl FnMut(),
) -> (f64, f64) {
    work();
    let (mut reached, mut highest) = (0.0f64, 0.0f64);
    for _ in 0..rounds {
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed().as_secs_f64() < ROUND_SECONDS {
            work();
            count += 1;
        }
        let seconds = start.elapsed().as_secs_f64() / f64::from(count);
        reached = reached.max(operations as f64 / seconds / 1e9);
        highest = highest.max(peak(packed, threads));
    }
    (reached, highest)
}

/// Gop/s from registers on `threads` threads at once.
fn peak(packed: &PackedRhs, threads: usize) -> f64 {
    let one = || {
        let start = Instant::now();
        let count = black_box(packed).spin(PEAK_STEPS);
        2.0 * count as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum()
    })
}

fn main() {
    // Cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let rounds = arguments.next().and_then(|rounds| rounds.parse().ok()).unwrap_or(20);
    let only = arguments.next();
    let all = thread::available_parallelism().map_or(1, usize::from);
    println!("instruction set {}", InstructionSet::best().name());
    println!("| grid | m × n × k | threads | Gop/s | peak | share |");
    println!("|---|---|---:|---:|---:|---:|");
    for threads in if all > 1 { vec![1, all] } else { vec![1] } {
        let workers = Workers::new(threads);
        for grid in GRIDS {
            if only.as_ref().is_some_and(|only| only != grid.name) {
                continue;
            }
            let Grid { lhs_bits, rhs_bits, groups, terms, .. } = grid;
            let print = |shape: String, (reached, peak): (f64, f64)| {
                let (name, share) = (grid.name, reached / peak);
                println!(
                    "| {name} | {shape} | {threads} | {reached:.0} | {peak:.0} | {share:.2} |"
                );
            };
            let pack =
                |rhs: &Codes, groups| PackedRhs::pack(rhs, groups, ((1u32 << lhs_bits) - 1) as u8);
            for (m, n, k) in [
                (BATCH * TOKENS, 1152, 384),
                (BATCH * TOKENS, 384, 384),
                (BATCH * TOKENS, 1536, 384),
                (BATCH * TOKENS, 384, 1536),
                (TOKENS, 1152, 384),
            ] {
                let lhs = operand(m, k, groups, terms, lhs_bits);
                let packed = pack(&operand(n, k, 1, 1, rhs_bits), groups);
                let mut out = vec![0.0; m * n];
                let how = (rounds, threads);
                let figures = best(how, 2 * m * n * k * terms, &packed, || {
                    product_on(&workers, &lhs, &packed, (None, None), black_box(&mut out));
                });
                print(format!("{m} × {n} × {k}"), figures);
            }
            if groups > 1 {
                continue;
            }
            for (m, n, k) in [(TOKENS, TOKENS, 64), (TOKENS, 64, TOKENS)] {
                let count = BATCH * HEADS;
                let lhs = operand(count * m, k, 1, 1, lhs_bits);
                let rhs = operand(count * n, k, 1, 1, rhs_bits);
                let mut out = vec![0.0; count * m * n];
                let packed = pack(&operand(n, k, 1, 1, rhs_bits), 1);
                let how = (rounds, threads);
                let figures = best(how, 2 * count * m * n * k, &packed, || {
                    product_batch_on(&workers, &lhs, &rhs, count, black_box(&mut out));
                });
                print(format!("{count} · {m} × {n} × {k}"), figures);
            }
        }
    }
}
