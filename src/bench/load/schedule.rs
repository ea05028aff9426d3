//! When requests start, and which: decided by a seed before the first one is sent.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::random::SplitMix64;

/// The requests of a load: models by weight, images in turn.
#[derive(Clone, Debug)]
pub struct Mix {
    weights: Vec<f64>,
    images: usize,
    per_request: usize,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index of the model.
    pub model: usize,
    /// Index of the first image; the others follow it, the first after the last.
    pub first_image: usize,
    /// Number of images.
    pub images: usize,
}

impl Mix {
    /// Requests for models of these weights, each with `per_request` of so many `images`.
    ///
    /// # Errors
    /// `InvalidArgument` on `model` for weights that are not positive numbers, on `images` without
    /// images.
    pub fn new(weights: Vec<f64>, images: usize, per_request: usize) -> Result<Self> {
        if weights.is_empty() || !weights.iter().all(|weight| weight.is_finite() && *weight > 0.0) {
            return Err(Error::invalid("model", "weights must be positive numbers"));
        }
        if images == 0 || per_request == 0 {
            return Err(Error::invalid("images", "at least one image is needed"));
        }
        Ok(Self { weights, images, per_request })
    }

    /// Number of models.
    pub fn models(&self) -> usize {
        self.weights.len()
    }

    /// Number of images in each request.
    pub fn images_per_request(&self) -> usize {
        self.per_request
    }

    /// The next request by the generator.
    pub(super) fn choose(&self, random: &mut Random) -> Choice {
        let total: f64 = self.weights.iter().sum();
        let mut left = random.uniform() * total;
        let found = self.weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a little at the end of the last one.
        let model = found.unwrap_or(self.weights.len() - 1);
        let first_image = (random.uniform() * self.images as f64) as usize;
        Choice { model, first_image: first_image.min(self.images - 1), images: self.per_request }
    }
}

/// Numbers by a seed.
#[derive(Clone, Debug)]
pub(super) struct Random(SplitMix64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(SplitMix64(seed))
    }

    /// Uniform in [0, 1), with 53 bits.
    fn uniform(&mut self) -> f64 {
        (self.0.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A request and when it is to start, from the start of the load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Arrival {
    pub(super) at: Duration,
    pub(super) choice: Choice,
}

/// Endless arrivals of a Poisson process: the gaps are exponentially distributed and independent.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    mix: Mix,
    rate: f64,
    random: Random,
    at: f64,
}

impl Arrivals {
    /// So many a second.
    pub(super) fn new(mix: Mix, rate: f64, seed: u64) -> Self {
        Self { mix, rate, random: Random::new(seed), at: 0.0 }
    }
}

impl Iterator for Arrivals {
    type Item = Arrival;

    fn next(&mut self) -> Option<Arrival> {
        // -ln(1 - u) / rate: u may be 0 and is never 1.
        self.at -= (1.0 - self.random.uniform()).ln() / self.rate;
        let at = Duration::try_from_secs_f64(self.at).ok()?;
        Some(Arrival { at, choice: self.mix.choose(&mut self.random) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrivals(seed: u64) -> Vec<Arrival> {
        let mix = Mix::new(vec![3.0, 1.0], 10, 2).unwrap();
        Arrivals::new(mix, 50.0, seed).take(20_000).collect()
    }

    #[test]
    fn arrivals_have_the_mean_and_the_spread_of_a_poisson_process() {
        let arrivals = arrivals(1);
        let times: Vec<f64> = arrivals.iter().map(|arrival| arrival.at.as_secs_f64()).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // Of 20,000 exponential gaps the mean is within 2 % and the deviation, which equals it,
        // within 4 % with more than four standard errors to spare on either.
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "{mean}");
        assert!((variance.sqrt() * 50.0 - 1.0).abs() < 0.05, "{variance}");
        assert!(gaps.iter().all(|gap| *gap >= 0.0));
    }

    #[test]
    fn models_come_by_weight_and_images_all() {
        let arrivals = arrivals(2);
        let second = arrivals.iter().filter(|arrival| arrival.choice.model == 1).count();
        assert!((4_700..5_300).contains(&second), "{second} of 20,000");
        for image in 0..10 {
            assert!(arrivals.iter().any(|arrival| arrival.choice.first_image == image));
        }
        assert!(arrivals.iter().all(|a| a.choice.first_image < 10 && a.choice.images == 2));
    }

    #[test]
    fn a_seed_gives_the_same_arrivals_again() {
        assert_eq!(arrivals(3), arrivals(3));
        assert_ne!(arrivals(3), arrivals(4));
    }

    #[test]
    fn nothing_to_send_is_refused() {
        for (weights, images, per_request) in [
            (vec![], 1, 1),
            (vec![0.0], 1, 1),
            (vec![f64::NAN], 1, 1),
            (vec![1.0], 0, 1),
            (vec![1.0], 1, 0),
        ] {
            assert!(Mix::new(weights, images, per_request).is_err());
        }
    }
}
