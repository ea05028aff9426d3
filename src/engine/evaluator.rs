//! Accuracy and fidelity of a model from its logits.

use serde::{Deserialize, Serialize};

/// Running totals over images; shards merge by addition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Images counted.
    pub images: u64,
    /// Images whose label is the top-1 class.
    pub top1_hits: u64,
    /// Images whose label is among the five highest logits.
    pub top5_hits: u64,
    /// Images whose top-1 class equals the float model's; counted only when float logits are given.
    pub agreements: u64,
    /// Images with float logits.
    pub compared: u64,
    /// Σ float² over all float logits.
    pub signal: f64,
    /// Σ (quantized − float)².
    pub noise: f64,
}

impl Metrics {
    /// Counts one image: its logits, its class, and the float model's logits if known.
    pub fn add(&mut self, logits: &[f32], label: usize, float: Option<&[f32]>) {
        self.images += 1;
        let ranked = top_k(logits, 5);
        self.top1_hits += u64::from(ranked.first() == Some(&label));
        self.top5_hits += u64::from(ranked.contains(&label));
        if let Some(float) = float {
            self.compared += 1;
            self.agreements += u64::from(ranked.first() == top_k(float, 1).first());
            for (q, f) in logits.iter().zip(float) {
                self.signal += f64::from(*f).powi(2);
                self.noise += (f64::from(*q) - f64::from(*f)).powi(2);
            }
        }
    }

    /// Adds another shard's totals.
    pub fn merge(&mut self, other: &Self) {
        self.images += other.images;
        self.top1_hits += other.top1_hits;
        self.top5_hits += other.top5_hits;
        self.agreements += other.agreements;
        self.compared += other.compared;
        self.signal += other.signal;
        self.noise += other.noise;
    }

    /// Top-1 accuracy in percent; NaN without images.
    pub fn top1(&self) -> f64 {
        percent(self.top1_hits, self.images)
    }

    /// Top-5 accuracy in percent; NaN without images.
    pub fn top5(&self) -> f64 {
        percent(self.top5_hits, self.images)
    }

    /// Share of images with the float model's top-1 class, in percent; NaN if never compared.
    pub fn agreement(&self) -> f64 {
        percent(self.agreements, self.compared)
    }

    /// 10·log10(Σfloat² / Σ(quantized − float)²) in dB; +∞ for equal logits, NaN if never compared.
    pub fn sqnr_db(&self) -> f64 {
        10.0 * (self.signal / self.noise).log10()
    }
}

/// Indices of the `k` largest values, largest first; the lower index first among equals.
pub fn top_k(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    order.truncate(k);
    order
}

fn percent(hits: u64, total: u64) -> f64 {
    100.0 * hits as f64 / total as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_hits_agreement_and_noise() {
        let mut metrics = Metrics::default();
        metrics.add(&[3.0, 1.0, 0.0], 0, Some(&[2.0, 1.0, 0.0]));
        metrics.add(&[0.0, 1.0, 0.0], 2, Some(&[1.0, 0.0, 0.0]));
        assert_eq!((metrics.top1(), metrics.top5(), metrics.agreement()), (50.0, 100.0, 50.0));
        assert!((metrics.sqnr_db() - 10.0 * (6.0f64 / 3.0).log10()).abs() < 1e-12);
        let mut merged = Metrics::default();
        merged.merge(&metrics);
        assert_eq!(merged, metrics);
    }

    #[test]
    fn ties_prefer_the_lower_index_and_empty_sets_are_nan() {
        assert_eq!(top_k(&[1.0, 2.0, 2.0, 0.0], 3), [1, 2, 0]);
        assert!(Metrics::default().top1().is_nan());
        assert!(Metrics::default().sqnr_db().is_nan());
    }
}
