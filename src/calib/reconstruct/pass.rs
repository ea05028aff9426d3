//! One reconstruction pass over a model, unit after unit, with caches that advance with it.

use tch::{Kind, Tensor};

use crate::calib::CalibrationTask;
use crate::calib::kept::{Tensors, restore_or_compute};
use crate::calib::reconstruct::{Examples, Schedule, Student, Trained, reconstruct, trainable};
use crate::error::{Error, Result};
use crate::exec::{Executor, Float, Simulated, WeightSource};
use crate::model::{Model, Unit};
use crate::nn::{Operand, WeightEdits, Weights};
use crate::quant::QuantPlan;

/// Iterations between two reports of progress, which are also the points where a pass can stop.
const ITERATIONS_PER_STEP: usize = 10;

/// Name, among a unit's kept parameters, of what came of its training: whether it diverged, and how
/// many parameters it changed. No parameter has it.
const OUTCOME: &str = "outcome";

/// Where a unit's inputs come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputSource {
    /// The float model: units are independent of each other.
    Teacher,
    /// The quantized model: a unit also corrects what the units before it left over.
    Quantized,
}

/// Gives the weights of a unit's squared errors, by the unit's index (see [`Examples::importance`]).
pub type Importance<'a> = dyn Fn(usize) -> Result<Option<Tensor>> + 'a;

/// A pass over all units in forward order. A unit in which the plan quantizes nothing is left as it
/// is.
pub struct Pass<'a, 'p> {
    /// The float model (the teacher), the images, and who watches.
    pub task: &'a CalibrationTask<'p>,
    /// The stage's name in progress reports.
    pub stage: &'static str,
    /// What is quantized how.
    pub plan: &'a QuantPlan,
    /// Where inputs come from.
    pub inputs: InputSource,
    /// How each unit is trained.
    pub schedule: Schedule,
    /// Weights of the squared errors; `None`: all elements count the same.
    pub importance: Option<&'a Importance<'a>>,
}

/// The result of a pass.
#[derive(Debug, Default)]
pub struct Reconstructed {
    /// New values of the trained parameters.
    pub edits: WeightEdits,
    /// Remarks: units whose training became non-finite.
    pub warnings: Vec<String>,
}

impl Pass<'_, '_> {
    /// Trains the units of the model that has the parameters `weights`.
    ///
    /// # Errors
    /// `Cancelled` when the task was asked to stop; whatever `importance` reports; `Device` when
    /// memory is short.
    pub fn run(&self, weights: &Weights) -> Result<Reconstructed> {
        let mut found = Reconstructed::default();
        if self.schedule.iterations == 0 || self.plan.is_empty() {
            return Ok(found);
        }
        let teacher = self.task.model()?;
        let mut float = self.task.images.shallow_clone();
        let mut quantized = match self.inputs {
            InputSource::Teacher => None,
            InputSource::Quantized => Some(self.task.images.shallow_clone()),
        };
        for (index, unit) in teacher.units.iter().enumerate() {
            self.task.step(self.stage, index + 1, teacher.units.len())?;
            let targets = self.outputs(unit.as_ref(), &mut Float, &float)?;
            let inputs = quantized.take().unwrap_or(float);
            if quantizes(self.plan, &teacher, index) {
                let start = weights.with(&found.edits);
                let student = Student {
                    spec: &self.task.spec,
                    weights: &start,
                    plan: self.plan,
                    unit: index,
                    trainable: &trainable(&teacher, &start, index)?,
                };
                let (edits, diverged) = self.trained(&teacher, &student, [&inputs, &targets])?;
                if diverged {
                    let path = unit.path();
                    let remark = format!("{path}: reconstruction diverged, parameters restored");
                    found.warnings.push(remark);
                }
                found.edits.extend(edits);
            }
            if self.inputs == InputSource::Quantized {
                let student = Model::build(&self.task.spec, &weights.with(&found.edits))?;
                let mut executor = Simulated::new(self.plan, WeightSource::Quantize);
                let unit = student.units[index].as_ref();
                quantized = Some(self.outputs(unit, &mut executor, &inputs)?);
            }
            float = targets;
        }
        Ok(found)
    }

    /// The trained parameters of a unit, and whether its training diverged: from an earlier attempt
    /// at this calibration, if one got that far.
    fn trained(
        &self,
        teacher: &Model,
        student: &Student<'_>,
        examples: [&Tensor; 2],
    ) -> Result<(WeightEdits, bool)> {
        let unit = format!("{}.{:03}", self.stage.replace(' ', "-"), student.unit);
        let fits = |kept: &Tensors| {
            let is_ours = |(name, tensor): &(String, Tensor)| match name.as_str() {
                OUTCOME => {
                    // All trained parameters are there, or none where the initial ones stayed.
                    tensor.size() == [2]
                        && tensor.kind() == Kind::Int64
                        && tensor.f_int64_value(&[1]).is_ok_and(|n| n == kept.len() as i64 - 1)
                }
                name => {
                    student.trainable.iter().any(|known| known == name)
                        && student.weights.find(name).is_some_and(|known| {
                            known.size() == tensor.size() && known.kind() == tensor.kind()
                        })
                }
            };
            kept.iter().all(is_ours) && kept.iter().any(|(name, _)| name == OUTCOME)
        };
        let kept = restore_or_compute(self.task, &unit, fits, || {
            let Trained { edits, diverged, .. } = self.train(teacher, student, examples)?;
            let outcome = Tensor::f_from_slice(&[i64::from(diverged), edits.len() as i64])?;
            Ok(edits.into_iter().chain([(OUTCOME.to_owned(), outcome)]).collect())
        })?;
        let mut edits: WeightEdits = kept.into_iter().collect();
        let diverged = match edits.remove(OUTCOME) {
            Some(outcome) => outcome.f_int64_value(&[0])? != 0,
            None => false,
        };
        Ok((edits, diverged))
    }

    /// Trains one unit on inputs and targets.
    fn train(
        &self,
        teacher: &Model,
        student: &Student<'_>,
        [inputs, targets]: [&Tensor; 2],
    ) -> Result<Trained> {
        let (unit, units) = (student.unit, teacher.units.len());
        let importance = self.importance.map(|of| of(unit)).transpose()?.flatten();
        let examples = Examples { inputs, targets, importance: importance.as_ref() };
        let mut step = |iteration: usize, loss: f64| match iteration % ITERATIONS_PER_STEP {
            0 => self.task.step_loss(self.stage, unit + 1, units, loss),
            _ => Ok(()),
        };
        let trained = reconstruct(student, &examples, &self.schedule, &mut step)?;
        let (before, after) = (trained.loss_before, trained.loss_after);
        tracing::debug!(stage = self.stage, unit, before, after, "reconstructed");
        Ok(trained)
    }

    /// A unit's outputs of all images, batch by batch.
    fn outputs(&self, unit: &dyn Unit, exec: &mut dyn Executor, inputs: &Tensor) -> Result<Tensor> {
        let images = inputs.size()[0];
        let batch = self.schedule.batch.max(1) as i64;
        let mut all: Option<Tensor> = None;
        for first in (0..images).step_by(batch as usize) {
            let count = batch.min(images - first);
            let part = unit.forward(exec, &inputs.f_narrow(0, first, count)?)?;
            let all = match &all {
                Some(all) => all,
                None => {
                    let mut shape = part.size();
                    shape[0] = images;
                    all.insert(part.f_new_empty(shape, (part.kind(), part.device()))?)
                }
            };
            all.f_narrow(0, first, count)?.f_copy_(&part)?;
        }
        all.ok_or_else(|| Error::internal("there are no calibration images"))
    }
}

/// Whether the plan quantizes an operand of the unit.
fn quantizes(plan: &QuantPlan, model: &Model, unit: usize) -> bool {
    model.sites.iter().any(|site| {
        site.unit == unit
            && [Operand::Lhs, Operand::Rhs].iter().any(|o| plan.get(site.id, *o).is_some())
    })
}
