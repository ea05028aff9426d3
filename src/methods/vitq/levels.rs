//! The levels of a score codebook: dynamic programming over a histogram finds the best ones exactly.

/// Largest level.
pub(super) const TOP: usize = 255;

/// Histogram bins between two neighbouring levels.
pub(super) const BINS_PER_LEVEL: usize = 16;

/// The `count` levels of least squared error for a histogram over 0..=TOP in steps of
/// 1/[`BINS_PER_LEVEL`], when every bin goes to its nearest level.
pub(super) fn best_levels(histogram: &[f64], count: usize) -> Vec<f32> {
    let cost = GapCosts::new(histogram);
    let candidates = TOP + 1;
    // least[j]: error of everything left of level j when it is the last of k levels chosen so far.
    let mut least: Vec<f64> = (0..candidates).map(|j| cost.left_of(j)).collect();
    let mut previous = Vec::with_capacity(count - 1);
    for chosen in 1..count {
        let mut next = vec![f64::INFINITY; candidates];
        let mut from = vec![0usize; candidates];
        for j in chosen..candidates {
            for (i, before) in least.iter().enumerate().take(j).skip(chosen - 1) {
                let error = before + cost.between(i, j);
                if error < next[j] {
                    (next[j], from[j]) = (error, i);
                }
            }
        }
        least = next;
        previous.push(from);
    }
    let total = |j: usize| least[j] + cost.right_of(j);
    let mut level = (count - 1..candidates).min_by(|a, b| total(*a).total_cmp(&total(*b)));
    let mut levels = Vec::with_capacity(count);
    for from in previous.iter().rev() {
        let Some(at) = level else { break };
        levels.push(at as f32);
        level = Some(from[at]);
    }
    levels.extend(level.map(|at| at as f32));
    levels.reverse();
    levels
}

/// Errors of the bins between two chosen levels, from running sums over the histogram.
struct GapCosts {
    /// Running sums of mass, mass·position and mass·position², position in levels.
    sums: [Vec<f64>; 3],
}

impl GapCosts {
    fn new(histogram: &[f64]) -> Self {
        let mut sums = [vec![0.0], vec![0.0], vec![0.0]];
        for (bin, mass) in histogram.iter().enumerate() {
            let position = bin as f64 / BINS_PER_LEVEL as f64;
            for (power, sum) in sums.iter_mut().enumerate() {
                let last = sum[sum.len() - 1];
                sum.push(last + mass * position.powi(power as i32));
            }
        }
        Self { sums }
    }

    /// Error of the bins first..end when they go to `level`.
    fn at(&self, level: usize, first: usize, end: usize) -> f64 {
        let moment = |power: usize| self.sums[power][end] - self.sums[power][first];
        let level = level as f64;
        moment(2) - 2.0 * level * moment(1) + level * level * moment(0)
    }

    fn left_of(&self, level: usize) -> f64 {
        self.at(level, 0, level * BINS_PER_LEVEL + 1)
    }

    fn right_of(&self, level: usize) -> f64 {
        self.at(level, level * BINS_PER_LEVEL + 1, TOP * BINS_PER_LEVEL + 1)
    }

    /// The bins above level `i` up to level `j`; those up to the midpoint go to `i`.
    fn between(&self, i: usize, j: usize) -> f64 {
        let (first, end) = (i * BINS_PER_LEVEL + 1, j * BINS_PER_LEVEL + 1);
        let middle = (i + j) * BINS_PER_LEVEL / 2 + 1;
        self.at(i, first, middle) + self.at(j, middle, end)
    }
}
