//! How much each element of an output matters: the magnitude of a gradient there
//! (methods/ptq4vit.md, section 6; paper, section 3.2).
//!
//! The released code differentiates the divergence between a network's prediction and the same
//! network's prediction: zero but for rounding noise. The gradients here are of well-defined losses.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::calib::CalibrationTask;
use crate::error::{Error, Result};
use crate::exec::{Float, Simulated, Tap, TapSink, WeightSource};
use crate::model::Model;
use crate::nn::{Site, SiteId};
use crate::quant::QuantPlan;

use super::settings::Settings;

/// Images that are differentiated at a time, as released. Bounds the memory of a backward pass.
const MICRO_BATCH: i64 = 4;

/// Largest power of two by which gradients are multiplied, well within float32.
const MAX_EXPONENT: f64 = 120.0;

/// Which gradient weighs the errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gradient {
    /// The root of the mean over the images of the squared gradient of the cross-entropy with the
    /// float network's own decision: a diagonal of the empirical Fisher matrix per element.
    Fisher,
    /// Of the divergence between the float network and the network with its initial scales.
    Perturbed,
    /// None: every element counts the same.
    Mse,
    /// Standard normal numbers, which is what the released code's are in effect.
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

    /// Whether it is found by differentiation, and may vanish.
    pub(super) fn is_differentiated(self) -> bool {
        matches!(self, Self::Fisher | Self::Perturbed)
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
    /// Distribution that the cross-entropy is with, float32 [images, classes]; none if nothing is
    /// differentiated.
    targets: Option<Tensor>,
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
        let x = task.images.shallow_clone();
        let mut gradients = Self { kind, task, model, plan, targets: None, x };
        if kind.is_differentiated() {
            let logits = model.forward(&mut Float, &task.images)?;
            gradients.targets = Some(match kind {
                Gradient::Perturbed => logits.f_softmax(-1, Kind::Float)?,
                Gradient::Fisher | Gradient::Mse | Gradient::Noise => {
                    let classes = logits.size()[1];
                    logits.f_argmax(-1, false)?.f_one_hot(classes)?.f_to_kind(Kind::Float)?
                }
            });
        }
        Ok(gradients)
    }

    /// The gradients at the outputs of the next unit, which is `unit`.
    ///
    /// # Errors
    /// `Cancelled` when the task was asked to stop; `Device` when libtorch refuses.
    pub(super) fn of_unit(&mut self, unit: usize) -> Result<UnitGradients> {
        let mut batches: BTreeMap<SiteId, Vec<Tensor>> = BTreeMap::new();
        if let Some(targets) = &self.targets {
            let images = self.x.size()[0];
            for first in (0..images).step_by(MICRO_BATCH as usize) {
                if self.task.progress.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                let count = MICRO_BATCH.min(images - first);
                let x = self.x.f_narrow(0, first, count)?;
                let targets = targets.f_narrow(0, first, count)?;
                for (site, gradient) in tch::with_grad(|| self.differentiate(unit, &x, &targets))? {
                    batches.entry(site).or_default().push(gradient);
                }
            }
            let mut executor = Simulated::new(&self.plan, WeightSource::Quantize);
            self.x = self.model.units[unit].forward(&mut executor, &self.x)?;
        }
        let join = |(site, parts): (SiteId, Vec<Tensor>)| Ok((site, Tensor::f_cat(&parts, 0)?));
        let sites = batches.into_iter().map(join).collect::<Result<_>>()?;
        Ok(UnitGradients { kind: self.kind, seed: self.task.request.seed, sites })
    }

    /// Gradients of the cross-entropy at the outputs of a unit with input `x`.
    fn differentiate(
        &self,
        unit: usize,
        x: &Tensor,
        targets: &Tensor,
    ) -> Result<Vec<(SiteId, Tensor)>> {
        let leaf = x.f_detach()?.f_set_requires_grad(true)?;
        let mut executor = Simulated::new(&self.plan, WeightSource::Quantize);
        let mut outputs = Outputs::default();
        let units = &self.model.units;
        let mut x = units[unit].forward(&mut Tap::new(&mut executor, &mut outputs), &leaf)?;
        for unit in &units[unit + 1..] {
            x = unit.forward(&mut executor, &x)?;
        }
        // Summed, so that an image's gradient does not depend on its batch.
        let loss = x.f_log_softmax(-1, Kind::Float)?.f_mul(targets)?.f_sum(Kind::Float)?.f_neg()?;
        let Outputs { sites, tensors } = outputs;
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
    seed: u64,
    sites: BTreeMap<SiteId, Tensor>,
}

impl UnitGradients {
    /// The importance of the elements of a site's output, whose shape is `shape` with the images
    /// first: |g| up to a factor, for each image or one for all. `None` if all count the same, or if
    /// the gradient vanishes or is not finite.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn importance(&mut self, site: &Site, shape: &[i64]) -> Result<Option<Tensor>> {
        let gradient = match self.kind {
            Gradient::Mse => return Ok(None),
            Gradient::Noise => return Ok(Some(noise(self.seed, site, shape)?)),
            Gradient::Fisher | Gradient::Perturbed => self.sites.remove(&site.id),
        };
        let Some(gradient) = gradient else {
            return Err(Error::internal(format!("{} has no gradient", site.path)));
        };
        let gradient = gradient.f_reshape(shape)?.f_abs()?;
        let largest = gradient.f_max()?.f_double_value(&[])?;
        if largest == 0.0 || !largest.is_finite() {
            return Ok(None);
        }
        // Squares of small numbers would underflow. A power of two is exact.
        let exponent = largest.log2().floor().clamp(-MAX_EXPONENT, MAX_EXPONENT);
        let gradient = gradient.f_mul_scalar((-exponent).exp2())?;
        Ok(Some(if self.kind == Gradient::Fisher {
            let mean = gradient.f_square()?.f_mean_dim([0i64].as_slice(), true, Kind::Float)?;
            mean.f_sqrt()?
        } else {
            gradient
        }))
    }
}

/// Magnitudes of standard normal numbers, always the same for a seed and a site.
fn noise(seed: u64, site: &Site, shape: &[i64]) -> Result<Tensor> {
    let count: i64 = shape.iter().product();
    let mut state = seed.wrapping_mul(GOLDEN).wrapping_add(u64::from(site.id.0) << 40);
    let mut values = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
    for _ in 0..count {
        // Box and Muller's transform; 1 − u is not zero.
        let radius = (-2.0 * (1.0 - uniform(&mut state)).ln()).sqrt();
        let angle = std::f64::consts::TAU * uniform(&mut state);
        values.push((radius * angle.cos()).abs() as f32);
    }
    Ok(Tensor::f_from_slice(&values)?.f_reshape(shape)?)
}

/// Increment of SplitMix64.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The next number of SplitMix64 as a fraction in [0, 1).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(GOLDEN);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 11) as f64 / (1u64 << 53) as f64
}
