//! Effective bits and bit operations of a model: what makes methods comparable whose grids are
//! dynamic, grouped, mixed, or leave something float (docs/methods.md has the definitions).

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::exec::{Backend, Float, Tap, TapSink};
use crate::model::Model;
use crate::nn::{Operand, Site};
use crate::quant::QuantPlan;
use crate::quant::cost::{OperandCost, elements, rows};

/// BOPs of one 32-bit operation.
const WORD: f64 = 32.0;

/// What one image costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BitCost {
    /// Bits per weight of all products, float ones as 32.
    pub weight_bits: f64,
    /// Bits per activation that enters a product, float ones as 32.
    pub activation_bits: f64,
    /// Bits of parameters found at run time, per activation; not part of `activation_bits`.
    pub metadata_bits: f64,
    /// Bit operations in 10^9: multiplications, partial sums and the search of parameters.
    pub gbops: f64,
    /// Share of `gbops` that is not multiplications, in percent.
    pub overhead_percent: f64,
}

/// The cost of a model on `device` under a plan. `Backend::Float` runs quantized weights with float activations.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn bit_cost(
    model: &Model,
    plan: &QuantPlan,
    backend: Backend,
    device: Device,
) -> Result<BitCost> {
    let mut shapes = Shapes { pending: None, sites: Vec::new() };
    let side = model.spec.preprocessing.image_size;
    // Only shapes are looked at.
    let image = Tensor::f_zeros([1, 3, side, side], (Kind::Float, device))?;
    let _logits = model.forward(&mut Tap::new(&mut Float, &mut shapes), &image)?;
    let mut total = Total::default();
    for (site, lhs, rhs) in &shapes.sites {
        let cost = |operand: Operand, shape: &[i64]| {
            let is_weight = operand == Operand::Rhs && !site.role.is_matmul();
            match plan.get(site.id, operand) {
                Some(quantizer) if is_weight || backend != Backend::Float => quantizer.cost(shape),
                _ => OperandCost::float(),
            }
        };
        let (left, right) = (cost(Operand::Lhs, lhs), cost(Operand::Rhs, rhs));
        total.activation(&left, elements(lhs));
        if site.role.is_matmul() {
            total.activation(&right, elements(rhs));
        } else {
            total.weights += elements(rhs);
            total.weight_bits += right.element_bits * elements(rhs);
        }
        // Every row of lhs meets the rows of rhs that belong to it: all of a weight's, those of its
        // own head for the attention products.
        let columns = rhs.iter().rev().nth(1).map_or(1.0, |n| *n as f64);
        let outputs = rows(lhs) * columns;
        let macs = outputs * lhs.last().map_or(1.0, |n| *n as f64);
        total.products += macs * left.element_bits * right.element_bits;
        let sums = left.partial_sums * right.partial_sums - 1.0;
        total.overhead += WORD * (outputs * sums + left.operations + right.operations);
    }
    total.finish()
}

/// Collects the operands' shapes of every product.
struct Shapes {
    pending: Option<Vec<i64>>,
    sites: Vec<(Site, Vec<i64>, Vec<i64>)>,
}

impl TapSink for Shapes {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        match (operand, self.pending.take()) {
            (Operand::Lhs, _) => self.pending = Some(x.size()),
            (Operand::Rhs, Some(lhs)) => self.sites.push((site.clone(), lhs, x.size())),
            (Operand::Rhs, None) => {
                return Err(Error::internal(format!("{} has one operand", site.path)));
            }
        }
        Ok(())
    }
}

/// Sums over all products.
#[derive(Debug, Default)]
struct Total {
    weights: f64,
    weight_bits: f64,
    activations: f64,
    activation_bits: f64,
    metadata_bits: f64,
    products: f64,
    overhead: f64,
}

impl Total {
    fn activation(&mut self, cost: &OperandCost, elements: f64) {
        self.activations += elements;
        self.activation_bits += cost.element_bits * elements;
        self.metadata_bits += cost.metadata_bits;
    }

    fn finish(self) -> Result<BitCost> {
        if self.weights == 0.0 || self.activations == 0.0 {
            return Err(Error::internal("a model has no products"));
        }
        let bops = self.products + self.overhead;
        Ok(BitCost {
            weight_bits: self.weight_bits / self.weights,
            activation_bits: self.activation_bits / self.activations,
            metadata_bits: self.metadata_bits / self.activations,
            gbops: bops / 1e9,
            overhead_percent: 100.0 * self.overhead / bops,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::generated::{GeneratedOptions, generate};
    use crate::nn::Role;
    use crate::quant::BitWidth;
    use crate::quant::dynamic::DynamicToken;
    use crate::quant::log2::{Log2Row, ZeroCode};
    use crate::quant::tokens::TokenLayout;
    use crate::quant::uniform::{Range, Uniform};

    /// A ViT of one block: 5 tokens of 24 channels, 3 heads, patches of 16 pixels, 7 classes.
    fn model() -> Model {
        let args = json!({"img_size": 32, "embed_dim": 24, "depth": 1});
        let options = GeneratedOptions {
            num_classes: 7,
            model_args: args.as_object().unwrap().clone(),
            seed: 0,
        };
        let checkpoint = generate("vit_tiny", options).unwrap();
        Model::build(&checkpoint.spec, &checkpoint.weights).unwrap()
    }

    fn four() -> BitWidth {
        BitWidth::new(4, "bits").unwrap()
    }

    fn grid() -> Box<Uniform> {
        let range = Range::per_tensor(&Tensor::from_slice(&[-1.0f32, 1.0])).unwrap();
        Box::new(Uniform::from_range(&range, four(), 1e-8).unwrap())
    }

    fn cost(model: &Model, plan: &QuantPlan) -> BitCost {
        bit_cost(model, plan, Backend::Simulated, Device::Cpu).unwrap()
    }

    /// Multiplications of one image, by hand: stem, qkv, q·kᵀ, scores·v, proj, fc1, fc2, head.
    const MACS: [f64; 8] = [
        4.0 * 768.0 * 24.0,
        5.0 * 24.0 * 72.0,
        3.0 * 5.0 * 5.0 * 8.0,
        3.0 * 5.0 * 5.0 * 8.0,
        5.0 * 24.0 * 24.0,
        5.0 * 24.0 * 96.0,
        5.0 * 96.0 * 24.0,
        24.0 * 7.0,
    ];

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found} {expected}");
    }

    #[test]
    fn a_float_model_has_32_bits_and_its_multiplications() {
        let found = cost(&model(), &QuantPlan::default());
        close(found.weight_bits, 32.0);
        close(found.activation_bits, 32.0);
        close(found.gbops, 1024.0 * MACS.iter().sum::<f64>() / 1e9);
        assert_eq!((found.metadata_bits, found.overhead_percent), (0.0, 0.0));
    }

    #[test]
    fn static_grids_cost_the_product_of_their_bits() {
        let model = model();
        let mut plan = QuantPlan::default();
        for site in &model.sites {
            if !site.role.is_stem_or_head() {
                plan.insert(site.id, Operand::Lhs, grid());
                plan.insert(site.id, Operand::Rhs, grid());
            }
        }
        let found = cost(&model, &plan);
        let stem_and_head = MACS[0] + MACS[7];
        let inner: f64 = MACS[1..7].iter().sum();
        close(found.gbops, (1024.0 * stem_and_head + 16.0 * inner) / 1e9);
        let (float, quantized) = (768.0 * 24.0 + 24.0 * 7.0, 24.0 * (72.0 + 24.0 + 96.0 + 96.0));
        close(found.weight_bits, (32.0 * float + 4.0 * quantized) / (float + quantized));
        // Pixels and the class token stay float; q, k, v 3·5·8 each, scores 3·5·5.
        let (float, quantized) = (4.0 * 768.0 + 24.0, 5.0 * (3.0 * 24.0 + 96.0) + 360.0 + 75.0);
        close(found.activation_bits, (32.0 * float + 4.0 * quantized) / (float + quantized));
        let weights_only = bit_cost(&model, &plan, Backend::Float, Device::Cpu).unwrap();
        close(weights_only.activation_bits, 32.0);
        close(weights_only.weight_bits, found.weight_bits);
    }

    #[test]
    fn what_is_found_at_run_time_is_counted_apart() {
        let model = model();
        let site = |role| model.sites.iter().find(|site| site.role == role).unwrap().id;
        let mut plan = QuantPlan::default();
        plan.insert(site(Role::Proj), Operand::Lhs, Box::new(DynamicToken::new(four())));
        let scores = Log2Row::new(four(), ZeroCode::Extra, TokenLayout::PLAIN);
        plan.insert(site(Role::ScoreValue), Operand::Lhs, Box::new(scores));
        let found = cost(&model, &plan);
        // Five tokens with a scale and a zero point, five query rows with a maximum (heads share).
        let activations = 4.0 * 768.0 + 24.0 + 5.0 * (3.0 * 24.0 + 96.0) + 360.0 + 75.0;
        close(found.metadata_bits, (5.0 * 64.0 + 5.0 * 32.0) / activations);
        let symbols = 17f64.log2();
        let saved = 120.0 * (32.0 - 4.0) + 75.0 * (32.0 - symbols);
        close(found.activation_bits, 32.0 - saved / activations);
        let others = MACS.iter().sum::<f64>() - MACS[3] - MACS[4];
        let products = 1024.0 * others + 32.0 * (symbols * MACS[3] + 4.0 * MACS[4]);
        let search = 32.0 * (2.0 * 120.0 + 75.0);
        close(found.gbops, (products + search) / 1e9);
        close(found.overhead_percent, 100.0 * search / (products + search));
    }
}
