//! A sum of floats that does not depend on the order of its terms.
//!
//! Shewchuk, Adaptive Precision Floating-Point Arithmetic and Fast Robust Geometric Predicates, 1997:
//! grow-expansion, with the rounding of Python's `math.fsum`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The exact sum of finite floats; NaN once a term was not finite.
#[derive(Clone, Debug, Default)]
pub struct ExactSum {
    /// Floats that do not overlap, smallest first: their sum, as real numbers, is that of all terms.
    parts: Vec<f64>,
    is_nan: bool,
}

impl ExactSum {
    /// Adds a term.
    pub fn add(&mut self, term: f64) {
        self.is_nan |= !term.is_finite();
        if self.is_nan {
            return;
        }
        let mut carry = term;
        let mut kept = 0;
        for index in 0..self.parts.len() {
            let (sum, error) = two_sum(carry, self.parts[index]);
            if error != 0.0 {
                self.parts[kept] = error;
                kept += 1;
            }
            carry = sum;
        }
        self.parts.truncate(kept);
        if carry != 0.0 {
            self.parts.push(carry);
        }
    }

    /// Adds all terms of another sum.
    pub fn merge(&mut self, other: &Self) {
        self.is_nan |= other.is_nan;
        other.parts.iter().for_each(|part| self.add(*part));
    }

    /// The float nearest to the sum, ties to even.
    pub fn value(&self) -> f64 {
        if self.is_nan {
            return f64::NAN;
        }
        let mut rest = self.parts.iter().rev().copied();
        let mut high = rest.next().unwrap_or(0.0);
        while let Some(part) = rest.next() {
            let (sum, error) = two_sum(high, part);
            high = sum;
            if error != 0.0 {
                // Half way between two floats it is the parts below that decide.
                let pulls = rest.next().is_some_and(|next| (next < 0.0) == (error < 0.0));
                let further = high + 2.0 * error;
                if pulls && further - high == 2.0 * error {
                    high = further;
                }
                break;
            }
        }
        high
    }
}

/// The rounded sum of two floats, and what rounding took from it (Knuth).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let of_b = sum - a;
    (sum, (a - (sum - of_b)) + (b - of_b))
}

/// Equal if both round to the same float; sums that are not numbers are equal, too.
impl PartialEq for ExactSum {
    fn eq(&self, other: &Self) -> bool {
        self.value().total_cmp(&other.value()).is_eq()
    }
}

/// The parts, or null.
impl Serialize for ExactSum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (!self.is_nan).then_some(&self.parts).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ExactSum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Stored {
            Parts(Vec<f64>),
            /// As sums were stored before they were exact.
            Rounded(f64),
        }
        let terms = match Option::deserialize(deserializer)? {
            Some(Stored::Parts(parts)) => parts,
            Some(Stored::Rounded(sum)) => vec![sum],
            None => vec![f64::NAN],
        };
        let mut sum = Self::default();
        terms.into_iter().for_each(|term| sum.add(term));
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(terms: &[f64]) -> ExactSum {
        let mut sum = ExactSum::default();
        terms.iter().for_each(|term| sum.add(*term));
        sum
    }

    #[test]
    fn small_terms_are_not_lost_and_ties_go_to_even() {
        assert_eq!(sum(&[]).value(), 0.0);
        assert_eq!(sum(&[1e100, 1.0, -1e100]).value(), 1.0);
        assert_eq!(sum(&[0.1; 10]).value(), 1.0);
        let half = f64::EPSILON / 2.0;
        let step = 1.0 + f64::EPSILON;
        assert_eq!(sum(&[1.0, half]).value(), 1.0);
        assert_eq!(sum(&[1.0, half, 1e-40]).value(), step);
        assert_eq!(sum(&[step, half]).value(), step + f64::EPSILON);
        assert_eq!(sum(&[step, half, -1e-40]).value(), step);
    }

    #[test]
    fn what_is_not_finite_spoils_the_sum_for_good() {
        for term in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let spoiled = sum(&[1.0, term, 2.0]);
            assert!(spoiled.value().is_nan());
            let json = serde_json::to_string(&spoiled).unwrap();
            let again: ExactSum = serde_json::from_str(&json).unwrap();
            assert!(again.value().is_nan(), "{json}");
            let mut merged = sum(&[1.0]);
            merged.merge(&spoiled);
            assert_eq!(merged, spoiled);
        }
    }

    #[test]
    fn sums_that_were_stored_rounded_can_be_read() {
        for (json, value) in [("2.5", 2.5), ("3", 3.0)] {
            assert_eq!(serde_json::from_str::<ExactSum>(json).unwrap().value(), value);
        }
    }

    proptest! {
        #[test]
        fn neither_order_nor_grouping_nor_storage_matters(
            terms in prop::collection::vec(-1e12_f64..1e12, 0..40),
            scales in prop::collection::vec(-60_i32..60, 40),
            cut: prop::sample::Index,
            turn: prop::sample::Index,
        ) {
            let mut terms: Vec<f64> =
                terms.iter().zip(scales).map(|(term, scale)| term * 2_f64.powi(scale)).collect();
            let whole = sum(&terms);
            if !terms.is_empty() {
                let middle = turn.index(terms.len());
                terms.rotate_left(middle);
                terms.reverse();
            }
            let (first, second) = terms.split_at(cut.index(terms.len() + 1));
            let json = serde_json::to_string(&sum(first)).unwrap();
            let mut merged: ExactSum = serde_json::from_str(&json).unwrap();
            merged.merge(&sum(second));
            prop_assert_eq!(merged.value().to_bits(), whole.value().to_bits());
        }
    }
}
