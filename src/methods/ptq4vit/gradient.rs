//! How much each element of an output matters: the magnitude of a gradient there
//! (methods/ptq4vit.md, section 6; paper, section 3.2).
//!
//! The released code differentiates the divergence between a network's prediction and the same
//! network's prediction. That is zero but for rounding noise in the logits, so in effect it spreads
//! random numbers from the logits backwards (`noise`). The others are gradients of well-defined
//! losses. Each is given by the loss's gradient at the logits, the residual.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use tch::{Kind, Tensor};

use crate::calib::CalibrationTask;
use crate::error::{Error, Result};
use crate::exec::{Float, Simulated, Tap, TapSink, WeightSource};
use crate::model::Model;
use crate::nn::{Site, SiteId};
use crate::quant::QuantPlan;
use crate::random::SplitMix64;

use super::settings::Settings;

/// Images that are differentiated at a time, as released. Bounds the memory of a backward pass.
const MICRO_BATCH: i64 = 4;

/// Largest power of two by which gradients are multiplied, well within float32.
const MAX_EXPONENT: f64 = 120.0;

/// Which gradient weighs the errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gradient {
    /// The root of the empirical Fisher matrix's diagonal per element: the mean over the images of the
    /// squared gradient of the cross-entropy with the float network's own decision.
    Fisher,
    /// Of the divergence of the network with its initial scales from the float network.
    Perturbed,
    /// None: every element counts the same.
    Mse,
    /// Of a random combination of the logits, as released in effect.
    Noise,
}

impl Gradient {
    /// The gradient of that option value.
    pub(super) fn parse(name: &str) -> Self {
        match name {
            "perturbed" => Self::Perturbed,
            "mse" => Self::Mse,
            "noise" => Self::Noise,
            _ => Self::Fisher,
        }
    }
}

/// Finds the gradients at the outputs of one unit after another. Only one unit's are held, and only
/// from that unit on is the network differentiated.
pub(super) struct Gradients<'t, 'p> {
    kind: Gradient,
    task: &'t CalibrationTask<'p>,
    model: &'t Model,
    /// Quantizers of the differentiated network; empty for the float network.
    plan: QuantPlan,
    /// Gradient of the loss at the logits, float32 [images, classes]; none for [`Gradient::Mse`].
    residuals: Option<Tensor>,
    /// Input of the next unit in the differentiated network.
    x: Tensor,
}

impl<'t, 'p> Gradients<'t, 'p> {
    /// Starts before the first unit. `plan` rounds the network that is differentiated.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn new(
        settings: &Settings<'t, 'p>,
        model: &'t Model,
        plan: QuantPlan,
    ) -> Result<Self> {
        let (kind, task) = (settings.gradient, settings.task);
        let prediction = || -> Result<Tensor> {
            Ok(model.forward(&mut Float, &task.images)?.f_softmax(-1, Kind::Float)?)
        };
        let residuals = match kind {
            Gradient::Mse => None,
            Gradient::Fisher => {
                let prediction = prediction()?;
                let decision = prediction.f_argmax(-1, false)?.f_one_hot(prediction.size()[1])?;
                Some(prediction.f_sub(&decision)?)
            }
            Gradient::Perturbed => {
                let mut executor = Simulated::new(&plan, WeightSource::Quantize);
                let rounded = model.forward(&mut executor, &task.images)?;
                Some(rounded.f_softmax(-1, Kind::Float)?.f_sub(&prediction()?)?)
            }
            Gradient::Noise => {
                let shape = [task.images.size()[0], task.spec.num_classes];
                let values = normal_numbers(task.request.seed, shape[0] * shape[1]);
                Some(Tensor::f_from_slice(&values)?.f_view(shape)?.f_to_device(task.device)?)
            }
        };
        Ok(Self { kind, task, model, plan, residuals, x: task.images.shallow_clone() })
    }

    /// The gradients at the outputs of the next unit, which is `unit`.
    ///
    /// # Errors
    /// `Cancelled` when the task was asked to stop; `Device` when libtorch refuses.
    pub(super) fn of_unit(&mut self, unit: usize) -> Result<UnitGradients> {
        let mut found = UnitGradients { kind: self.kind, sites: BTreeMap::new() };
        let Some(residuals) = &self.residuals else { return Ok(found) };
        let images = self.x.size()[0];
        for first in (0..images).step_by(MICRO_BATCH as usize) {
            self.task.progress.check_cancelled()?;
            let count = MICRO_BATCH.min(images - first);
            let x = self.x.f_narrow(0, first, count)?;
            let residuals = residuals.f_narrow(0, first, count)?;
            tch::with_grad(|| self.differentiate(unit, &x, &residuals))?
                .into_iter()
                .try_for_each(|(site, gradient)| found.add(site, gradient, count))?;
        }
        let mut executor = Simulated::new(&self.plan, WeightSource::Quantize);
        self.x = self.model.units[unit].forward(&mut executor, &self.x)?;
        Ok(found)
    }

    /// Gradients of the loss at the outputs of a unit with input `x`.
    fn differentiate(
        &self,
        unit: usize,
        x: &Tensor,
        residuals: &Tensor,
    ) -> Result<Vec<(SiteId, Tensor)>> {
        let leaf = x.f_detach()?.f_set_requires_grad(true)?;
        let mut executor = Simulated::new(&self.plan, WeightSource::Quantize);
        let mut outputs = Outputs::default();
        let units = &self.model.units;
        let mut x = units[unit].forward(&mut Tap::new(&mut executor, &mut outputs), &leaf)?;
        for unit in &units[unit + 1..] {
            x = unit.forward(&mut executor, &x)?;
        }
        let Outputs { sites, tensors } = outputs;
        // Summed over the images, so that an image's gradient does not depend on its batch.
        let loss = x.f_mul(residuals)?.f_sum(Kind::Float)?;
        let gradients = Tensor::f_run_backward(&[loss], &tensors, false, false)?;
        Ok(sites.into_iter().zip(gradients).collect())
    }
}

/// Keeps the outputs of the products, which are nodes of the graph.
#[derive(Default)]
struct Outputs {
    sites: Vec<SiteId>,
    tensors: Vec<Tensor>,
}

impl TapSink for Outputs {
    fn output(&mut self, site: &Site, y: &Tensor) -> Result<()> {
        self.sites.push(site.id);
        self.tensors.push(y.shallow_clone());
        Ok(())
    }
}

/// The gradients at the outputs of one unit.
#[derive(Debug)]
pub(super) struct UnitGradients {
    kind: Gradient,
    sites: BTreeMap<SiteId, SiteGradient>,
}

/// The gradients at one output.
#[derive(Debug)]
enum SiteGradient {
    /// Sum of squares over the images, float64 [1, ..].
    Squares(Tensor),
    /// As they are, in micro-batches.
    Each(Vec<Tensor>),
}

impl UnitGradients {
    /// Takes the gradient of some images, float32 [images·windows, ..].
    fn add(&mut self, site: SiteId, gradient: Tensor, images: i64) -> Result<()> {
        if self.kind != Gradient::Fisher {
            let each = self.sites.entry(site).or_insert_with(|| SiteGradient::Each(Vec::new()));
            if let SiteGradient::Each(each) = each {
                each.push(gradient);
            }
            return Ok(());
        }
        let images_first = gradient.f_reshape([&[images, -1], &gradient.size()[1..]].concat())?;
        // In float64 the squares of small gradients do not vanish.
        let squares = images_first.f_to_kind(Kind::Double)?.f_square()?;
        let squares = squares.f_sum_dim_intlist([0i64].as_slice(), true, Kind::Double)?;
        let sum = match self.sites.remove(&site) {
            Some(SiteGradient::Squares(sum)) => sum.f_add(&squares)?,
            _ => squares,
        };
        self.sites.insert(site, SiteGradient::Squares(sum));
        Ok(())
    }

    /// The importance of the elements of a site's output, whose shape is `shape` with the images
    /// first: |g| up to a factor, for each image or one for all. `None` if all count the same, or if
    /// the gradient vanishes or is not finite.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn importance(&mut self, site: &Site, shape: &[i64]) -> Result<Option<Tensor>> {
        if self.kind == Gradient::Mse {
            return Ok(None);
        }
        let importance = match self.sites.remove(&site.id) {
            Some(SiteGradient::Squares(sum)) => {
                sum.f_sqrt()?.f_reshape([&[1], &shape[1..]].concat())?
            }
            Some(SiteGradient::Each(batches)) => {
                Tensor::f_cat(&batches, 0)?.f_abs()?.f_reshape(shape)?
            }
            None => return Err(Error::internal(format!("{} has no gradient", site.path))),
        };
        let largest = importance.f_max()?.f_double_value(&[])?;
        if largest == 0.0 || !largest.is_finite() {
            return Ok(None);
        }
        // Squared errors of small weights would underflow. A power of two changes nothing else.
        let exponent = largest.log2().floor().clamp(-MAX_EXPONENT, MAX_EXPONENT);
        Ok(Some(importance.f_mul_scalar((-exponent).exp2())?.f_to_kind(Kind::Float)?))
    }
}

/// Standard normal numbers, always the same for a seed: SplitMix64 through the transform of Box and
/// Muller.
fn normal_numbers(seed: u64, count: i64) -> Vec<f32> {
    let mut generator = SplitMix64(seed);
    let mut uniform = || (generator.bits() >> 11) as f64 / (1u64 << 53) as f64;
    (0..count)
        .map(|_| {
            // 1 − u is not zero.
            let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
            (radius * (TAU * uniform()).cos()) as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tch::Device;

    use super::*;
    use crate::calib::progress::Unwatched;
    use crate::calib::{QuantizeSpec, RoleBits, StemHeadPolicy};
    use crate::methods::MethodOptions;
    use crate::methods::ptq4vit::settings::OPTIONS;
    use crate::model::generated::{GeneratedOptions, generate, images};
    use crate::quant::BitWidth;

    /// A small model's task on `count` images.
    fn task(short: &str, gradient: &str, count: i64) -> CalibrationTask<'static> {
        let (args, side) = match short {
            "vit_tiny" => {
                (r#"{"embed_dim":8,"depth":2,"num_heads":2,"img_size":32,"patch_size":16}"#, 32)
            }
            _ => (r#"{"embed_dim":8,"depths":[2,1],"num_heads":[1,2],"img_size":56}"#, 56),
        };
        let model_args = serde_json::from_str(args).unwrap();
        let options = GeneratedOptions { num_classes: 5, model_args, seed: 3 };
        let checkpoint = generate(short, options).unwrap();
        let given = BTreeMap::from([("gradient".to_owned(), gradient.to_owned())]);
        let request = QuantizeSpec {
            method: "ptq4vit".to_owned(),
            options: given.clone(),
            weight_bits: BitWidth::EIGHT.into(),
            activation_bits: BitWidth::EIGHT.into(),
            stem_head: StemHeadPolicy::Same,
            seed: 7,
            role_bits: RoleBits::default(),
        };
        CalibrationTask {
            spec: Arc::clone(&checkpoint.spec),
            weights: checkpoint.weights.to_device(Device::Cpu).unwrap(),
            images: images(count, side, 1).unwrap(),
            request,
            options: MethodOptions::resolve(OPTIONS, &given).unwrap(),
            device: Device::Cpu,
            progress: &Unwatched,
        }
    }

    /// The gradients at all sites, as they are stored.
    fn all(task: &CalibrationTask<'_>) -> BTreeMap<SiteId, Tensor> {
        let _guard = tch::no_grad_guard();
        let settings = Settings::read(task).unwrap();
        let model = task.model().unwrap();
        let mut gradients = Gradients::new(&settings, &model, QuantPlan::default()).unwrap();
        let mut found = BTreeMap::new();
        for unit in 0..model.units.len() {
            for (site, gradient) in gradients.of_unit(unit).unwrap().sites {
                let gradient = match gradient {
                    SiteGradient::Squares(sum) => sum,
                    SiteGradient::Each(batches) => Tensor::cat(&batches, 0),
                };
                found.insert(site, gradient);
            }
        }
        assert_eq!(found.len(), model.sites.len());
        found
    }

    /// The same from one backward pass through the whole network, images [n·windows, ..].
    fn at_once(task: &CalibrationTask<'_>, residuals: &Tensor) -> BTreeMap<SiteId, Tensor> {
        let model = task.model().unwrap();
        let leaf = task.images.detach().set_requires_grad(true);
        let mut outputs = Outputs::default();
        let logits = model.forward(&mut Tap::new(&mut Float, &mut outputs), &leaf).unwrap();
        let loss = (logits * residuals).sum(Kind::Float);
        let gradients = Tensor::run_backward(&[loss], &outputs.tensors, false, false);
        outputs.sites.into_iter().zip(gradients).collect()
    }

    fn assert_close(found: &Tensor, expected: &Tensor) {
        let scale = expected.abs().max().double_value(&[]);
        let worst = (found - expected.view_as(found)).abs().max().double_value(&[]);
        assert!(worst <= 1e-4 * scale, "{worst} of {scale}");
    }

    #[test]
    fn gradients_are_those_of_the_whole_network() {
        for short in ["vit_tiny", "swin_tiny"] {
            // More images than a micro-batch.
            let task = task(short, "noise", 5);
            let residuals = Tensor::from_slice(&normal_numbers(7, 25)).view([5, 5]);
            let expected = at_once(&task, &residuals);
            let found = all(&task);
            for (site, found) in &found {
                assert_close(found, &expected[site]);
            }
            // At the logits the gradient is the residual itself.
            assert_close(&found.values().last().unwrap().view([5, 5]), &residuals);
        }
    }

    #[test]
    fn the_fisher_diagonal_is_a_mean_of_squares() {
        for short in ["vit_tiny", "swin_tiny"] {
            let task = task(short, "fisher", 5);
            let logits = task.model().unwrap().forward(&mut Float, &task.images).unwrap();
            let decision = logits.argmax(-1, false).one_hot(5);
            let expected = at_once(&task, &(logits.softmax(-1, Kind::Float) - decision));
            for (site, found) in &all(&task) {
                let each = &expected[site];
                let windows = each.size()[0] / 5;
                let shape = [&[5, windows], &each.size()[1..]].concat();
                let squares = each.to_kind(Kind::Double).reshape(shape).square();
                assert_close(found, &squares.sum_dim_intlist([0i64].as_slice(), true, None));
            }
        }
    }

    fn importance(values: &[f32], kind: Gradient) -> Option<Tensor> {
        let site = task("vit_tiny", "mse", 1).model().unwrap().sites[0].clone();
        let mut gradients = UnitGradients { kind, sites: BTreeMap::new() };
        let gradient = Tensor::from_slice(values).view([2, 1, -1]);
        gradients.add(site.id, gradient.shallow_clone(), 2).unwrap();
        gradients.importance(&site, &gradient.size()).unwrap()
    }

    #[test]
    fn importance_keeps_ratios_of_tiny_gradients() {
        for factor in [1.0f32, 1e-30] {
            let values = [3.0f32, -1.0, 4.0, 0.0].map(|value| value * factor);
            let each = importance(&values, Gradient::Noise).unwrap();
            assert_close(
                &(&each / each.get(0).get(0).get(0)),
                &Tensor::from_slice(&[1.0f32, 1.0 / 3.0, 4.0 / 3.0, 0.0]),
            );
            let mean = importance(&values, Gradient::Fisher).unwrap();
            assert_eq!(mean.size(), [1, 1, 2]);
            assert!(
                (mean.double_value(&[0, 0, 0]) / mean.double_value(&[0, 0, 1]) - 5.0).abs() < 1e-5
            );
            assert!(each.max().double_value(&[]) >= 1.0);
        }
    }

    #[test]
    fn a_gradient_that_vanishes_or_is_not_finite_weighs_nothing() {
        for kind in [Gradient::Fisher, Gradient::Perturbed] {
            assert!(importance(&[0.0; 4], kind).is_none());
            assert!(importance(&[1.0, f32::NAN, 1.0, 1.0], kind).is_none());
            assert!(importance(&[1.0, f32::INFINITY, 1.0, 1.0], kind).is_none());
        }
    }

    #[test]
    fn normal_numbers_are_normal_and_depend_on_the_seed_alone() {
        let values = normal_numbers(1, 20_000);
        let mean = |f: fn(f64) -> f64| {
            values.iter().map(|v| f(f64::from(*v))).sum::<f64>() / values.len() as f64
        };
        assert!(mean(|v| v).abs() < 0.03 && (mean(|v| v * v) - 1.0).abs() < 0.03);
        assert!((mean(|v| v.powi(4)) - 3.0).abs() < 0.2);
        assert_eq!(values[..9], normal_numbers(1, 9));
        assert_ne!(values[..9], normal_numbers(2, 9));
    }
}
