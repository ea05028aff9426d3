//! Accuracy and fidelity of a model from its logits.

use serde::{Deserialize, Serialize};

use super::exact_sum::ExactSum;

/// Running totals over images. They are exact: the same for any order, and any split into shards.
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
    pub signal: ExactSum,
    /// Σ (quantized − float)².
    pub noise: ExactSum,
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
            let pairs = || logits.iter().zip(float).map(|(q, f)| (f64::from(*q), f64::from(*f)));
            self.signal.add(pairs().map(|(_, f)| f.powi(2)).sum());
            self.noise.add(pairs().map(|(q, f)| (q - f).powi(2)).sum());
        }
    }

    /// Adds another shard's totals.
    pub fn merge(&mut self, other: &Self) {
        self.images += other.images;
        self.top1_hits += other.top1_hits;
        self.top5_hits += other.top5_hits;
        self.agreements += other.agreements;
        self.compared += other.compared;
        self.signal.merge(&other.signal);
        self.noise.merge(&other.noise);
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
        10.0 * (self.signal.value() / self.noise.value()).log10()
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
    }

    /// Totals of some images, with numbers whose plain sums depend on their order.
    fn totals(images: std::ops::Range<usize>) -> Metrics {
        let mut metrics = Metrics::default();
        for image in images {
            let value = |class: usize| {
                ((image * 7 + class * 3) as f32).sin() * 10_f32.powi(class as i32 - 3)
            };
            let logits: Vec<f32> = (0..6).map(value).collect();
            let float: Vec<f32> = logits.iter().map(|logit| logit * 1.01 + 1e-3).collect();
            metrics.add(&logits, image % 6, (image % 5 != 0).then_some(&float));
        }
        metrics
    }

    #[test]
    fn shards_merge_to_the_numbers_of_the_whole_in_any_order() {
        let whole = totals(0..200);
        for size in [1, 7, 32, 199, 200] {
            let mut shards: Vec<Metrics> = (0..200)
                .step_by(size)
                .map(|first| totals(first..(first + size).min(200)))
                .collect();
            for turn in 0..shards.len().min(5) {
                shards.rotate_left(turn);
                let mut merged = Metrics::default();
                for shard in &shards {
                    let json = serde_json::to_string(shard).unwrap();
                    merged.merge(&serde_json::from_str(&json).unwrap());
                }
                assert_eq!(merged, whole);
                assert_eq!(merged.sqnr_db().to_bits(), whole.sqnr_db().to_bits());
            }
        }
    }

    #[test]
    fn ties_prefer_the_lower_index_and_empty_sets_are_nan() {
        assert_eq!(top_k(&[1.0, 2.0, 2.0, 0.0], 3), [1, 2, 0]);
        assert!(Metrics::default().top1().is_nan());
        assert!(Metrics::default().sqnr_db().is_nan());
    }
}
