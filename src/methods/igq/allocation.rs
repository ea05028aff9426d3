//! Group counts per layer (methods/igq-vit.md, section 6): the least Σ Ω(g) within a budget of bit
//! operations, a multiple-choice knapsack solved by dynamic programming.
//!
//! The operations of a product N×K by K×H that depend on g are the additions of partial sums and the
//! comparisons of the assignment, 32·g·(N·H + K); all others cancel in the constraint, and the 32
//! too. Rows of scores are scaled one by one, without partial sums: only comparisons count.

/// Units that a budget is divided into.
const BUDGET_UNITS: usize = 10_000;

/// One decision: how many groups an operand gets.
#[derive(Clone, Debug)]
pub(super) struct Decision {
    /// What one more group costs.
    pub(super) cost: f64,
    /// What the operand gets without allocation.
    pub(super) fixed: i64,
    /// Ω: the loss under each candidate, in their order.
    pub(super) losses: Vec<f64>,
}

/// The index of each decision's candidate. `candidates` ascend, and the first is at most every fixed
/// count; costs and losses are finite.
///
/// Costs beyond the cheapest choice are rounded up to whole units, so a budget is never exceeded and
/// the cheapest choice always fits. What rounding excludes is made up for: the fixed counts
/// themselves win where they are candidates and lose no more than what was found.
pub(super) fn allocate(decisions: &[Decision], candidates: &[i64]) -> Vec<usize> {
    let least = candidates.first().copied().unwrap_or(0);
    let beyond = |decision: &Decision, count: i64| decision.cost * (count - least) as f64;
    let budget: f64 = decisions.iter().map(|decision| beyond(decision, decision.fixed)).sum();
    let units = |decision: &Decision, count: i64| -> usize {
        match beyond(decision, count) {
            cost if cost <= 0.0 => 0,
            // Saturates where the budget is nothing: such a choice fits nowhere.
            cost => (cost / budget * BUDGET_UNITS as f64).ceil() as usize,
        }
    };
    // least_loss[b]: of the decisions so far within b units; choices[i][b]: the last one's candidate.
    let mut least_loss = vec![0.0f64; BUDGET_UNITS + 1];
    let mut choices = Vec::with_capacity(decisions.len());
    for decision in decisions {
        let options: Vec<(usize, f64)> = candidates
            .iter()
            .map(|count| units(decision, *count))
            .zip(decision.losses.iter().copied())
            .collect();
        let mut next = vec![f64::INFINITY; BUDGET_UNITS + 1];
        let mut choice = vec![0u8; BUDGET_UNITS + 1];
        for within in 0..=BUDGET_UNITS {
            for (index, (cost, loss)) in options.iter().enumerate() {
                let Some(rest) = within.checked_sub(*cost) else { continue };
                if least_loss[rest] + loss < next[within] {
                    next[within] = least_loss[rest] + loss;
                    choice[within] = index as u8;
                }
            }
        }
        least_loss = next;
        choices.push((options, choice));
    }
    let mut within = BUDGET_UNITS;
    let mut found: Vec<usize> = Vec::with_capacity(decisions.len());
    for (options, choice) in choices.iter().rev() {
        let index = usize::from(choice[within]);
        within -= options[index].0;
        found.push(index);
    }
    found.reverse();
    let fixed: Option<Vec<usize>> = decisions
        .iter()
        .map(|decision| candidates.iter().position(|count| *count == decision.fixed))
        .collect();
    match fixed {
        Some(fixed) if loss(decisions, &fixed) <= loss(decisions, &found) => fixed,
        _ => found,
    }
}

fn loss(decisions: &[Decision], choice: &[usize]) -> f64 {
    decisions.iter().zip(choice).map(|(decision, index)| decision.losses[*index]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANDIDATES: [i64; 4] = [4, 6, 8, 12];

    fn cost(decisions: &[Decision], choice: &[usize]) -> f64 {
        decisions.iter().zip(choice).map(|(d, index)| d.cost * CANDIDATES[*index] as f64).sum()
    }

    fn budget(decisions: &[Decision]) -> f64 {
        decisions.iter().map(|decision| decision.cost * decision.fixed as f64).sum()
    }

    /// The least loss within `share` of the budget beyond the cheapest choice.
    fn brute_force(decisions: &[Decision], share: f64) -> f64 {
        let cheapest = cost(decisions, &vec![0; decisions.len()]);
        let limit = cheapest + (budget(decisions) - cheapest) * share;
        let mut best = f64::INFINITY;
        for mut number in 0..CANDIDATES.len().pow(decisions.len() as u32) {
            let choice: Vec<usize> = decisions
                .iter()
                .map(|_| {
                    let index = number % CANDIDATES.len();
                    number /= CANDIDATES.len();
                    index
                })
                .collect();
            if cost(decisions, &choice) <= limit * (1.0 + 1e-12) {
                best = best.min(loss(decisions, &choice));
            }
        }
        best
    }

    fn decisions(seed: u64, fixed: i64) -> Vec<Decision> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        (0..5)
            .map(|_| Decision {
                cost: 1.0 + 1000.0 * uniform(),
                fixed,
                // Not always falling: more groups can fit the calibration worse.
                losses: CANDIDATES.map(|count| uniform() / count as f64).into(),
            })
            .collect()
    }

    #[test]
    fn it_equals_brute_force_up_to_the_rounding_of_costs() {
        for seed in 0..20 {
            for fixed in [4, 6, 8, 12] {
                let decisions = decisions(seed, fixed);
                let found = allocate(&decisions, &CANDIDATES);
                assert!(cost(&decisions, &found) <= budget(&decisions) * (1.0 + 1e-12));
                let found = loss(&decisions, &found);
                assert!(found >= brute_force(&decisions, 1.0) - 1e-12);
                // Five costs are rounded up by less than a unit each.
                let rounded = 1.0 - 5.0 / BUDGET_UNITS as f64;
                assert!(found <= brute_force(&decisions, rounded) + 1e-12, "{seed} {fixed}");
            }
        }
    }

    #[test]
    fn groups_go_where_they_help() {
        let flat = Decision { cost: 10.0, fixed: 8, losses: vec![1.0, 0.9, 0.85, 0.8] };
        let steep = Decision { cost: 10.0, fixed: 8, losses: vec![9.0, 5.0, 3.0, 0.5] };
        let found = allocate(&[flat.clone(), steep, flat], &CANDIDATES);
        assert_eq!(found[1], 3);
        assert!(found[0] < 3 && found[2] < 3);
    }

    #[test]
    fn fixed_counts_win_ties() {
        let decision = Decision { cost: 3.3, fixed: 8, losses: vec![1.0; 4] };
        assert_eq!(allocate(&vec![decision; 7], &CANDIDATES), [2; 7]);
        assert_eq!(allocate(&[], &CANDIDATES), Vec::<usize>::new());
    }
}
