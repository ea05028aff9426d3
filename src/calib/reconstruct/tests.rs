//! A unit learns, repeats itself, stops when asked, and survives what is not finite.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::Device;

use super::*;
use crate::calib::progress::{Progress, ProgressUpdate, Unwatched};
use crate::calib::{CalibrationTask, QuantizeSpec, RoleBits, StemHeadPolicy};
use crate::exec::Float;
use crate::methods::MethodOptions;
use crate::model::Checkpoint;
use crate::model::generated::{GeneratedOptions, generate, images};
use crate::nn::Operand;
use crate::quant::BitWidth;
use crate::quant::uniform::{Range, Uniform};

const VIT: &str = r#"{"embed_dim":16,"depth":2,"num_heads":2,"img_size":32}"#;
const SWIN: &str = r#"{"embed_dim":8,"depths":[2,1],"num_heads":[1,2],"img_size":56}"#;
const SCHEDULE: Schedule =
    Schedule { iterations: 12, batch: 4, learning_rate: 1e-3, seed: 7, keep: Keep::Last };

fn checkpoint(architecture: &str) -> Checkpoint {
    let args = if architecture.starts_with("swin") { SWIN } else { VIT };
    let model_args = serde_json::from_str(args).unwrap();
    generate(architecture, GeneratedOptions { num_classes: 3, model_args, seed: 1 }).unwrap()
}

fn task<'p>(checkpoint: &Checkpoint, progress: &'p dyn Progress) -> CalibrationTask<'p> {
    let side = checkpoint.spec.preprocessing.image_size;
    CalibrationTask {
        spec: Arc::clone(&checkpoint.spec),
        weights: Weights::new(checkpoint.weights.share()),
        images: images(6, side, 2).unwrap(),
        request: QuantizeSpec {
            method: "ias".to_owned(),
            options: BTreeMap::new(),
            weight_bits: BitWidth::EIGHT.into(),
            activation_bits: BitWidth::EIGHT.into(),
            stem_head: StemHeadPolicy::Same,
            seed: 7,
            role_bits: RoleBits::default(),
        },
        options: MethodOptions::default(),
        device: Device::Cpu,
        progress,
    }
}

/// Three-bit weights, nothing else.
fn weight_plan(model: &Model, weights: &Weights) -> QuantPlan {
    let mut plan = QuantPlan::default();
    for site in model.sites.iter().filter(|site| !site.role.is_matmul()) {
        let weight = weights.find(&format!("{}.weight", site.path)).unwrap();
        let range = Range::per_row(&weight.flatten(1, -1)).unwrap();
        let grid = Uniform::from_range(&range, BitWidth::new(3, "bits").unwrap(), 1e-10).unwrap();
        plan.insert(site.id, Operand::Rhs, Box::new(grid));
    }
    plan
}

fn run(
    task: &CalibrationTask<'_>,
    inputs: InputSource,
    schedule: Schedule,
) -> Result<Reconstructed> {
    let _guard = tch::no_grad_guard();
    let plan = weight_plan(&task.model()?, &task.weights);
    let pass = Pass { task, stage: "reconstruct", plan: &plan, inputs, schedule, importance: None };
    pass.run(&task.weights)
}

/// Squared error of the quantized model's logits.
fn error(task: &CalibrationTask<'_>, edits: &WeightEdits) -> f64 {
    let _guard = tch::no_grad_guard();
    let teacher = task.model().unwrap();
    let plan = weight_plan(&teacher, &task.weights);
    let student = task.model_with(edits).unwrap();
    let mut executor = Simulated::new(&plan, WeightSource::Quantize);
    let found = student.forward(&mut executor, &task.images).unwrap();
    let expected = teacher.forward(&mut Float, &task.images).unwrap();
    (found - expected).square().sum(Kind::Double).double_value(&[])
}

#[test]
fn a_pass_brings_the_logits_closer_and_repeats_itself() {
    for architecture in ["vit_tiny", "swin_tiny"] {
        let checkpoint = checkpoint(architecture);
        let task = task(&checkpoint, &Unwatched);
        let before = error(&task, &WeightEdits::new());
        for inputs in [InputSource::Teacher, InputSource::Quantized] {
            let found = run(&task, inputs, SCHEDULE).unwrap();
            assert!(found.warnings.is_empty());
            let after = error(&task, &found.edits);
            assert!(after < 0.9 * before, "{architecture} {inputs:?}: {before} {after}");
            let again = run(&task, inputs, SCHEDULE).unwrap();
            assert_eq!(found.edits, again.edits, "{architecture} {inputs:?}");
        }
        // Every linear layer and score table moved; norms and embeddings did not.
        let found = run(&task, InputSource::Teacher, SCHEDULE).unwrap();
        for (name, tensor) in task.weights.iter() {
            let fixed = name.contains("norm") || name == "cls_token" || name == "pos_embed";
            assert_eq!(found.edits.contains_key(name), !fixed, "{name}");
            assert!(fixed || found.edits[name] != *tensor, "{name}");
        }
    }
}

#[test]
fn without_iterations_or_quantizers_nothing_changes() {
    let checkpoint = checkpoint("vit_tiny");
    let task = task(&checkpoint, &Unwatched);
    let none = Schedule { iterations: 0, ..SCHEDULE };
    assert!(run(&task, InputSource::Quantized, none).unwrap().edits.is_empty());
    let plan = QuantPlan::default();
    let inputs = InputSource::Quantized;
    let (stage, schedule) = ("reconstruct", SCHEDULE);
    let pass = Pass { task: &task, stage, plan: &plan, inputs, schedule, importance: None };
    assert!(pass.run(&task.weights).unwrap().edits.is_empty());
}

/// Asks to stop after so many reports.
struct Impatient(AtomicUsize);

impl Progress for Impatient {
    fn report(&self, _update: ProgressUpdate) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn a_pass_stops_between_iterations() {
    let checkpoint = checkpoint("vit_tiny");
    // Unit, iteration 0, iteration 10: the fourth report is within the first unit, too.
    let progress = Impatient(AtomicUsize::new(3));
    let task = task(&checkpoint, &progress);
    let endless = Schedule { iterations: usize::MAX >> 11, ..SCHEDULE };
    let stopped = run(&task, InputSource::Teacher, endless);
    assert!(matches!(stopped, Err(Error::Cancelled)));
}

#[test]
fn what_diverges_is_restored() {
    let checkpoint = checkpoint("vit_tiny");
    let task = task(&checkpoint, &Unwatched);
    let wild = Schedule { learning_rate: 1e38, ..SCHEDULE };
    let found = run(&task, InputSource::Teacher, wild).unwrap();
    assert!(found.warnings.contains(&"head: reconstruction diverged, parameters restored".into()));
    assert!(!found.edits.contains_key("head.weight"));
    assert!(found.edits.values().all(|edit| edit.isfinite().all().int64_value(&[]) == 1));
}

/// Trains the first block of a small model on the second unit's inputs.
fn train_block(schedule: &Schedule, importance: Option<&Tensor>) -> Trained {
    let _guard = tch::no_grad_guard();
    let checkpoint = checkpoint("vit_tiny");
    let task = task(&checkpoint, &Unwatched);
    let model = task.model().unwrap();
    let inputs = model.units[0].forward(&mut Float, &task.images).unwrap();
    let targets = model.units[1].forward(&mut Float, &inputs).unwrap();
    let student = Student {
        spec: &task.spec,
        weights: &task.weights,
        plan: &weight_plan(&model, &task.weights),
        unit: 1,
        trainable: &trainable(&model, &task.weights, 1).unwrap(),
    };
    let examples = Examples { inputs: &inputs, targets: &targets, importance };
    let mut losses = Vec::new();
    let mut note = |iteration: usize, loss: f64| {
        assert_eq!(iteration, losses.len());
        losses.push(loss);
        Ok(())
    };
    let trained = reconstruct(&student, &examples, schedule, &mut note).unwrap();
    assert_eq!((losses.len(), losses[0]), (schedule.iterations, trained.loss_before));
    // Steps on images without importance move nothing.
    let differ = losses.iter().any(|loss| *loss != losses[0]);
    assert!(trained.loss_before == 0.0 || differ, "each is told: {losses:?}");
    trained
}

#[test]
fn the_best_is_kept_on_request() {
    let good = train_block(&Schedule { keep: Keep::Best, ..SCHEDULE }, None);
    assert!(good.loss_after < good.loss_before && good.edits.len() == 8);
    let coarse = Schedule { learning_rate: 0.3, ..SCHEDULE };
    let last = train_block(&coarse, None);
    assert!(last.loss_after > last.loss_before && last.edits.len() == 8);
    let best = train_block(&Schedule { keep: Keep::Best, ..coarse }, None);
    assert!(best.edits.is_empty() && !best.diverged);
}

#[test]
fn errors_are_weighted_by_importance() {
    let plain = train_block(&SCHEDULE, None);
    let image = (Kind::Float, Device::Cpu);
    // The width is 16. Shared by all images, then one for each.
    let shared = train_block(&SCHEDULE, Some(&Tensor::full([1, 1, 16], 3.0, image)));
    assert!((shared.loss_before / plain.loss_before - 3.0).abs() < 1e-4);
    let own = Tensor::zeros([6, 1, 1], image);
    let ignored = train_block(&SCHEDULE, Some(&own));
    assert_eq!((ignored.loss_before, ignored.loss_after), (0.0, 0.0));
    let _ = own.narrow(0, 0, 1).fill_(1.0);
    let first = train_block(&SCHEDULE, Some(&own));
    assert!(first.loss_before > 0.0 && first.loss_before < plain.loss_before);
}
