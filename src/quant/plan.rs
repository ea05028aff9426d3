//! The plan: which operand of which site is quantized how. A missing entry stays float.

use std::collections::BTreeMap;

use crate::nn::{Operand, SiteId};
use crate::quant::Quantizer;

/// Quantizers by site and operand.
#[derive(Debug, Default)]
pub struct QuantPlan {
    entries: BTreeMap<(SiteId, Operand), Box<dyn Quantizer>>,
}

impl QuantPlan {
    /// Adds or replaces the quantizer of an operand.
    pub fn insert(&mut self, site: SiteId, operand: Operand, quantizer: Box<dyn Quantizer>) {
        self.entries.insert((site, operand), quantizer);
    }

    /// The quantizer of an operand, if it is quantized.
    pub fn get(&self, site: SiteId, operand: Operand) -> Option<&dyn Quantizer> {
        self.entries.get(&(site, operand)).map(Box::as_ref)
    }

    /// All entries in forward order.
    pub fn iter(&self) -> impl Iterator<Item = (SiteId, Operand, &dyn Quantizer)> {
        self.entries.iter().map(|((site, operand), q)| (*site, *operand, q.as_ref()))
    }

    /// Number of quantized operands.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is quantized.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
