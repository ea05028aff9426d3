//! Block reconstruction: unit by unit, parameters are trained until the quantized unit gives what
//! the float unit gives (BRECQ, arXiv 2102.05426, without its rounding variables; I&S-ViT).
//!
//! [`reconstruct`] trains one unit on given inputs and targets. [`Pass`] walks over a model, one unit
//! after the other: the caches of the units' inputs and outputs advance with it, so that no prefix of
//! the model is computed twice. At most three caches live at a time (the float model's input and
//! output of the unit, and the quantized model's input); DeiT-B with 1024 images has
//! 1024 · 197 tokens · 768 channels · 4 bytes = 620 MB per cache, 1.86 GB in all, beside 617 MB of
//! images.
//!
//! Fake quantization is differentiable (rounding is straight-through), so training is a plain
//! forward of the unit with the plan's quantizers. Quantizers stay as they are.

mod adam;
mod pass;
mod sample;

use std::sync::Arc;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::exec::{Simulated, WeightSource};
use crate::model::{Model, ModelSpec};
use crate::nn::{WeightEdits, Weights};
use crate::quant::QuantPlan;

use adam::{Adam, cosine};
use sample::Sampler;

pub use pass::{Importance, InputSource, Pass, Reconstructed};

/// How a unit is trained: Adam, cosine decay to 0, random batches.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Optimization steps; 0 leaves every parameter as it is.
    pub iterations: usize,
    /// Images per step.
    pub batch: usize,
    /// Learning rate of the first step.
    pub learning_rate: f64,
    /// Seed of the batches.
    pub seed: u64,
    /// Which parameters are the result.
    pub keep: Keep,
}

/// Which parameters a reconstruction returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Those after the last step.
    Last,
    /// Those after the last step if they are better on a fixed batch, else the initial ones.
    Best,
}

/// The unit to train.
#[derive(Debug)]
pub struct Student<'a> {
    /// The model's description.
    pub spec: &'a Arc<ModelSpec>,
    /// All parameters of the model; the trained ones start from here.
    pub weights: &'a Weights,
    /// What is quantized how, inside the unit.
    pub plan: &'a QuantPlan,
    /// Index of the unit.
    pub unit: usize,
    /// Full names of the parameters to train; [`trainable`] gives the usual ones.
    pub trainable: &'a [String],
}

/// What a unit is to map to what, for all images.
#[derive(Debug)]
pub struct Examples<'a> {
    /// The unit's inputs, float32 [n, ..].
    pub inputs: &'a Tensor,
    /// The float unit's outputs, float32 [n, ..].
    pub targets: &'a Tensor,
    /// Weight of every element's squared error, broadcastable to the targets, leading axis 1 or n;
    /// `None`: all count the same.
    pub importance: Option<&'a Tensor>,
}

/// The result of training a unit.
#[derive(Debug)]
pub struct Trained {
    /// New values of the trained parameters; empty if the initial ones are kept.
    pub edits: WeightEdits,
    /// Loss on the first batch of images before training.
    pub loss_before: f64,
    /// Loss on the same batch after training.
    pub loss_after: f64,
    /// Whether training became non-finite, and the initial parameters were restored.
    pub diverged: bool,
}

/// Trains a unit. `step` is called before every iteration with its index and the latest loss, and may
/// stop the work.
///
/// # Errors
/// Whatever `step` reports; `Internal` for a parameter that does not exist; `Device` when libtorch
/// refuses.
pub fn reconstruct(
    student: &Student<'_>,
    examples: &Examples<'_>,
    schedule: &Schedule,
    step: &mut dyn FnMut(usize, f64) -> Result<()>,
) -> Result<Trained> {
    let Student { spec, weights, plan, unit, trainable } = *student;
    let leaves = leaves(weights, trainable)?;
    let model = Model::build(spec, &weights.with(&leaves))?;
    let unit = model.units.get(unit).ok_or_else(|| Error::internal(format!("no unit {unit}")))?;
    let loss_of = |examples: &Examples<'_>| -> Result<Tensor> {
        let mut executor = Simulated::new(plan, WeightSource::Quantize);
        examples.loss(&unit.forward(&mut executor, examples.inputs)?)
    };
    let check = Selection::first(examples, schedule.batch)?;
    let measure = || Ok::<f64, Error>(loss_of(&check.examples())?.f_double_value(&[])?);
    let loss_before = tch::no_grad(measure)?;
    let mut adam = Adam::new(leaves.values().map(Tensor::shallow_clone).collect())?;
    let mut sampler = Sampler::new(examples.inputs.size()[0], schedule.seed, student.unit);
    let mut latest = loss_before;
    for iteration in 0..schedule.iterations {
        step(iteration, latest)?;
        if !latest.is_finite() {
            break;
        }
        let batch = Selection::drawn(examples, sampler.draw(schedule.batch))?;
        let loss = tch::with_grad(|| loss_of(&batch.examples()))?;
        latest = loss.f_double_value(&[])?;
        let gradients = Tensor::f_run_backward(&[loss], adam.parameters(), false, false)?;
        let rate = cosine(schedule.learning_rate, iteration, schedule.iterations);
        tch::no_grad(|| adam.step(&gradients, rate))?;
    }
    let loss_after = tch::no_grad(measure)?;
    let diverged = !latest.is_finite() || !loss_after.is_finite();
    let worse = schedule.keep == Keep::Best && loss_after > loss_before;
    let edits = if diverged || worse || schedule.iterations == 0 {
        WeightEdits::new()
    } else {
        leaves
            .iter()
            .map(|(name, leaf)| Ok((name.clone(), leaf.f_detach()?)))
            .collect::<Result<_>>()?
    };
    Ok(Trained { edits, loss_before, loss_after, diverged })
}

/// The parameters that reconstruction usually trains in a unit: weights and biases of its linear
/// layers and the tables added to its attention scores; norms and embeddings stay.
///
/// # Errors
/// `Internal` when the model has no such unit.
pub fn trainable(model: &Model, weights: &Weights, unit: usize) -> Result<Vec<String>> {
    let linear = model.sites.iter().filter(|site| site.unit == unit && !site.role.is_matmul());
    let names =
        linear.flat_map(|site| ["weight", "bias"].map(|name| format!("{}.{name}", site.path)));
    let unit = model.units.get(unit).ok_or_else(|| Error::internal(format!("no unit {unit}")))?;
    Ok(names.chain(unit.score_tables()).filter(|name| weights.find(name).is_some()).collect())
}

/// Copies of the parameters that collect gradients.
fn leaves(weights: &Weights, names: &[String]) -> Result<WeightEdits> {
    let leaf = |name: &String| -> Result<(String, Tensor)> {
        let tensor = weights
            .find(name)
            .ok_or_else(|| Error::internal(format!("parameter {name} is missing")))?;
        Ok((name.clone(), tensor.f_detach_copy()?.f_set_requires_grad(true)?))
    };
    names.iter().map(leaf).collect()
}

impl Examples<'_> {
    /// The squared error, weighted, summed over axis 1, mean over the rest.
    fn loss(&self, outputs: &Tensor) -> Result<Tensor> {
        let error = outputs.f_sub(self.targets)?.f_square()?;
        let error = match self.importance {
            Some(importance) => error.f_mul(importance)?,
            None => error,
        };
        let averaged = error.numel() as f64 / error.size()[1] as f64;
        Ok(error.f_sum(Kind::Float)?.f_div_scalar(averaged)?)
    }
}

/// The examples of one batch.
struct Selection {
    inputs: Tensor,
    targets: Tensor,
    importance: Option<Tensor>,
}

impl Selection {
    /// The first `count` images.
    fn first(examples: &Examples<'_>, count: usize) -> Result<Self> {
        let count = (count as i64).min(examples.inputs.size()[0]);
        Self::new(examples, |x| Ok(x.f_narrow(0, 0, count)?))
    }

    /// The images of these indices.
    fn drawn(examples: &Examples<'_>, indices: &[i64]) -> Result<Self> {
        let indices = Tensor::f_from_slice(indices)?.f_to(examples.inputs.device())?;
        Self::new(examples, |x| Ok(x.f_index_select(0, &indices)?))
    }

    fn new(examples: &Examples<'_>, select: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let importance = match examples.importance {
            Some(shared) if shared.size()[0] == 1 => Some(shared.shallow_clone()),
            Some(own) => Some(select(own)?),
            None => None,
        };
        Ok(Self {
            inputs: select(examples.inputs)?,
            targets: select(examples.targets)?,
            importance,
        })
    }

    fn examples(&self) -> Examples<'_> {
        let Self { inputs, targets, importance } = self;
        Examples { inputs, targets, importance: importance.as_ref() }
    }
}

#[cfg(test)]
mod tests;
