//! I&S-ViT's three stages (methods/ias-vit.md, section 2) for any recipe of static grids.

use crate::calib::reconstruct::{InputSource, Keep, Pass, Reconstructed, Schedule};
use crate::calib::static_grids::{Operands, Recipe, StaticGrids};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{OptionKind, OptionSpec};
use crate::model::Model;
use crate::nn::{WeightEdits, Weights};

/// Whether parameters are trained.
pub(in crate::methods) const LEARNING: OptionSpec = OptionSpec {
    name: "learning",
    help: "train weights by block reconstruction",
    kind: OptionKind::Choice(&["on", "off"]),
    default: "on",
};

/// Optimization steps.
pub(in crate::methods) const ITERATIONS: OptionSpec = OptionSpec {
    name: "iterations",
    help: "steps per unit and pass; 0: 1000 where anything has at most 4 bits, else 200",
    kind: OptionKind::Int { min: 0, max: 1_000_000 },
    default: "0",
};

/// Images per step.
pub(in crate::methods) const BATCH: OptionSpec = OptionSpec {
    name: "batch",
    help: "calibration images per step",
    kind: OptionKind::Int { min: 1, max: 65_536 },
    default: "64",
};

/// Adam's first step size.
pub(in crate::methods) const LEARNING_RATE: OptionSpec = OptionSpec {
    name: "learning_rate",
    help: "learning rate of the first step; it decays to 0 along a cosine",
    kind: OptionKind::Float { min: 0.0, max: 1.0 },
    default: "0.00004",
};

/// Images of the first forward.
pub(in crate::methods) const INIT_IMAGES: OptionSpec = OptionSpec {
    name: "init_images",
    help: "calibration images that activation ranges are fitted on, the first ones",
    kind: OptionKind::Int { min: 1, max: 65_536 },
    default: "64",
};

/// The kept parameters.
pub(in crate::methods) const KEEP: OptionSpec = OptionSpec {
    name: "keep",
    help: "parameters after the last step, or the initial ones if these are better on a fixed batch",
    kind: OptionKind::Choice(&["last", "best"]),
    default: "last",
};

/// Steps where something has at most [`FEW_BITS`], and elsewhere (the authors' settings).
const AUTOMATIC_ITERATIONS: (usize, usize) = (1000, 200);
const FEW_BITS: u8 = 4;

/// Runs the three stages.
///
/// # Errors
/// `Cancelled` when the task was asked to stop; `InvalidArgument` when an activation is not finite;
/// `Device` when libtorch refuses.
pub(in crate::methods) fn run(
    task: &CalibrationTask<'_>,
    recipe: &Recipe<'_>,
) -> Result<Quantization> {
    let model = task.model()?;
    let schedule = schedule(task, &model)?;
    let count = task.options.int(INIT_IMAGES.name)?.min(task.images.size()[0]);
    let mut grids = StaticGrids::new(task, recipe, &model);
    // Activations are quantized finely, weights not at all; each unit learns by itself.
    grids.calibrate(&model, &task.images.f_narrow(0, 0, count)?, Operands::Activations)?;
    let mut edits = learn(&mut grids, &task.weights, InputSource::Teacher, schedule)?;
    // The channel grids move into norms and weights.
    edits.extend(grids.fold(&task.weights.with(&edits))?);
    // Everything is quantized; each unit also learns to correct what those before it left over.
    grids.fit_weights(&task.weights.with(&edits))?;
    edits.extend(learn(&mut grids, &task.weights.with(&edits), InputSource::Quantized, schedule)?);
    Ok(grids.finish(edits))
}

/// One pass over all units with what is quantized so far.
fn learn(
    grids: &mut StaticGrids<'_, '_>,
    weights: &Weights,
    inputs: InputSource,
    schedule: Schedule,
) -> Result<WeightEdits> {
    let stage = match inputs {
        InputSource::Teacher => "reconstruct activations",
        InputSource::Quantized => "reconstruct all",
    };
    let (task, plan) = (grids.log.task(), &grids.plan);
    let pass = Pass { task, stage, plan, inputs, schedule, importance: None };
    let Reconstructed { edits, warnings } = pass.run(weights)?;
    warnings.into_iter().for_each(|warning| grids.log.warn(warning));
    Ok(edits)
}

/// The options of reconstruction, resolved.
fn schedule(task: &CalibrationTask<'_>, model: &Model) -> Result<Schedule> {
    let options = &task.options;
    let iterations = match (options.choice(LEARNING.name)?, options.int(ITERATIONS.name)?) {
        ("off", _) => 0,
        (_, 0) => automatic_iterations(task, model),
        (_, given) => usize::try_from(given).unwrap_or(usize::MAX),
    };
    Ok(Schedule {
        iterations,
        batch: usize::try_from(options.int(BATCH.name)?).unwrap_or(usize::MAX),
        learning_rate: options.float(LEARNING_RATE.name)?,
        seed: task.request.seed,
        keep: if options.choice(KEEP.name)? == "best" { Keep::Best } else { Keep::Last },
    })
}

fn automatic_iterations(task: &CalibrationTask<'_>, model: &Model) -> usize {
    let bits = |role| task.weight_bits(role).into_iter().chain(task.activation_bits(role));
    let least = model.sites.iter().flat_map(|site| bits(site.role)).map(|bits| bits.get()).min();
    let (many, few) = AUTOMATIC_ITERATIONS;
    if least.is_some_and(|bits| bits <= FEW_BITS) { many } else { few }
}
