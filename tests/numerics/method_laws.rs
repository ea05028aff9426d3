//! What holds for every method, whatever it does: the laws run over `METHODS`, so a newly registered
//! method is held to them at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tch::{Device, Kind, Tensor};
use vitq::artifact::Artifact;
use vitq::artifact::content::Source;
use vitq::bench::results::FLOAT_METHOD;
use vitq::calib::progress::Unwatched;
use vitq::calib::{
    CalibrationTask, Progress, ProgressUpdate, Quantization, QuantizeSpec, RoleBits, StemHeadPolicy,
};
use vitq::engine::QuantizedModel;
use vitq::error::{Error, Result};
use vitq::exec::{Backend, Float, Simulated, Tap, TapSink, WeightSource};
use vitq::methods::{self, METHODS, MethodEntry, MethodOptions};
use vitq::model::generated::{self, GeneratedOptions, generate};
use vitq::model::{Checkpoint, Model};
use vitq::nn::{Operand, Site};
use vitq::quant::{BitWidth, Quantizer};

/// Options that keep the tests quick; entries of methods that are not registered are not used.
const QUICK: &[(&str, &[(&str, &str)])] =
    &[("ias", &[("iterations", "2")]), ("dopq", &[("iterations", "2")])];

/// The smallest models that have everything: two blocks, several heads, shifted windows, a merging.
fn models() -> [Checkpoint; 2] {
    let vit = r#"{"embed_dim":16,"depth":2,"num_heads":2,"img_size":24,"patch_size":8}"#;
    let swin = r#"{"embed_dim":8,"depths":[2,1],"num_heads":[1,2],"img_size":32,"patch_size":4,
        "window_size":4}"#;
    [model("deit_tiny", vit), model("swin_tiny", swin)]
}

fn model(architecture: &str, model_args: &str) -> Checkpoint {
    let model_args = serde_json::from_str(model_args).unwrap();
    generate(architecture, GeneratedOptions { num_classes: 5, model_args, seed: 3 }).unwrap()
}

fn images(checkpoint: &Checkpoint, count: i64, seed: u64) -> Tensor {
    generated::images(count, checkpoint.spec.preprocessing.image_size, seed).unwrap()
}

fn bits(width: u32) -> BitWidth {
    BitWidth::new(width, "bits").unwrap()
}

fn request(method: &MethodEntry, weight_bits: u32, activation_bits: u32) -> QuantizeSpec {
    let quick = QUICK.iter().find(|(id, _)| *id == method.id);
    let options = quick.map_or(&[][..], |(_, options)| *options).iter();
    QuantizeSpec {
        method: method.id.to_owned(),
        options: options.map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        weight_bits: bits(weight_bits).into(),
        activation_bits: bits(activation_bits).into(),
        stem_head: StemHeadPolicy::Same,
        seed: 7,
        role_bits: RoleBits::default(),
    }
}

/// One calibration: a method's request, a model, its images.
struct Run<'a> {
    checkpoint: &'a Checkpoint,
    request: QuantizeSpec,
    images: Tensor,
}

impl Run<'_> {
    fn calibrate(&self, progress: &dyn Progress) -> Result<Quantization> {
        let entry = methods::find(&self.request.method).unwrap();
        let _guard = tch::no_grad_guard();
        let mut task = CalibrationTask {
            spec: Arc::clone(&self.checkpoint.spec),
            weights: self.checkpoint.weights.to_device(Device::Cpu).unwrap(),
            images: self.images.shallow_clone(),
            request: self.request.clone(),
            options: MethodOptions::resolve(entry.options, &self.request.options).unwrap(),
            device: Device::Cpu,
            progress,
        };
        (entry.build)().calibrate(&mut task)
    }

    fn quantization(&self) -> Quantization {
        let found = self.calibrate(&Unwatched);
        found.unwrap_or_else(|error| panic!("{}: {error}", self.name()))
    }

    fn artifact(&self, quantization: &Quantization) -> Artifact {
        let Self { checkpoint, request, .. } = self;
        let source = Source { checkpoint, request, calibration_digest: "", quantization };
        Artifact::build(&source).unwrap()
    }

    /// The quantized model, by way of its stored bytes.
    fn stored(&self, quantization: &Quantization) -> QuantizedModel {
        let bytes = self.artifact(quantization).to_bytes().unwrap();
        let artifact = Artifact::from_bytes("test", &bytes).unwrap();
        QuantizedModel::load(&artifact, Device::Cpu, Backend::Simulated).unwrap()
    }

    /// The float model that the plan belongs to.
    fn edited(&self, quantization: &Quantization) -> Model {
        let weights = self.checkpoint.weights.with(&quantization.edits);
        Model::build(&self.checkpoint.spec, &weights).unwrap()
    }

    fn name(&self) -> String {
        let QuantizeSpec { method, weight_bits, activation_bits, stem_head, .. } = &self.request;
        let model = &self.checkpoint.spec.architecture;
        format!("{method} w{weight_bits}a{activation_bits} {} on {model}", stem_head.name())
    }
}

/// Every method on every model.
fn runs() -> Vec<(&'static MethodEntry, Checkpoint)> {
    METHODS.iter().flat_map(|method| models().map(|checkpoint| (*method, checkpoint))).collect()
}

fn is_finite(logits: &Tensor) -> bool {
    logits.isfinite().all().int64_value(&[]) == 1
}

#[test]
fn an_artifact_computes_what_the_method_found_whatever_the_batch() {
    for (method, checkpoint) in runs() {
        for (weight_bits, activation_bits) in [(3, 3), (4, 4), (8, 8), (4, 8), (8, 4)] {
            let run = Run {
                request: request(method, weight_bits, activation_bits),
                images: images(&checkpoint, 4, 1),
                checkpoint: &checkpoint,
            };
            let found = run.quantization();
            let (model, stored) = (run.edited(&found), run.stored(&found));
            let images = images(&checkpoint, 32, 2);
            let _guard = tch::no_grad_guard();
            let mut executor = Simulated::new(&found.plan, WeightSource::Quantize);
            let all = model.forward(&mut executor, &images).unwrap();
            assert!(is_finite(&all), "{}", run.name());
            assert!(stored.forward(&images).unwrap().equal(&all), "{} restored", run.name());
            for (batch, end) in [(1, 4), (7, 28)] {
                for first in (0..end).step_by(batch as usize) {
                    let part = stored.forward(&images.narrow(0, first, batch)).unwrap();
                    let name = run.name();
                    assert!(part.equal(&all.narrow(0, first, batch)), "{name}, {batch} at {first}");
                }
            }
        }
    }
}

#[test]
fn equal_requests_give_equal_artifacts() {
    for (method, checkpoint) in runs() {
        let run = Run {
            request: request(method, 4, 4),
            images: images(&checkpoint, 3, 1),
            checkpoint: &checkpoint,
        };
        let bytes = || run.artifact(&run.quantization()).to_bytes().unwrap();
        assert_eq!(bytes(), bytes(), "{}", run.name());
    }
}

#[test]
fn stem_and_head_follow_the_policy() {
    for (method, checkpoint) in runs().into_iter().filter(|(method, _)| method.id != FLOAT_METHOD) {
        for (stem_head, expected) in [
            (StemHeadPolicy::Float, [None; 4]),
            (StemHeadPolicy::Int8, [Some(8); 4]),
            // Pixels are 8-bit data whatever the request.
            (StemHeadPolicy::Same, [Some(8), Some(4), Some(5), Some(4)]),
        ] {
            let request = QuantizeSpec { stem_head, ..request(method, 4, 5) };
            let run = Run { request, images: images(&checkpoint, 2, 1), checkpoint: &checkpoint };
            let sites = run.artifact(&run.quantization()).header.sites;
            let bits = |path: &str, operand: &str| Some(sites.get(path)?.get(operand)?.bits);
            let found = [("patch_embed.proj", "input"), ("patch_embed.proj", "weight")]
                .into_iter()
                .chain([("head", "input"), ("head", "weight")])
                .map(|(path, operand)| bits(path, operand));
            assert!(found.eq(expected), "{}: {sites:?}", run.name());
        }
    }
}

/// Asks to stop after a number of reports.
struct StopAfter {
    reports: AtomicUsize,
    limit: usize,
}

impl StopAfter {
    fn new(limit: usize) -> Self {
        Self { reports: AtomicUsize::new(0), limit }
    }
}

impl Progress for StopAfter {
    fn report(&self, _update: ProgressUpdate) {
        self.reports.fetch_add(1, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.reports.load(Ordering::Relaxed) >= self.limit
    }
}

#[test]
fn a_calibration_can_be_cancelled_at_every_report() {
    for (method, checkpoint) in runs() {
        let run = Run {
            request: request(method, 4, 4),
            images: images(&checkpoint, 2, 1),
            checkpoint: &checkpoint,
        };
        let watcher = StopAfter::new(usize::MAX);
        run.calibrate(&watcher).unwrap();
        let reports = watcher.reports.into_inner();
        let operands = 2 * run.edited(&Quantization::default()).sites.len();
        assert!(method.id == FLOAT_METHOD || reports >= operands, "{}: {reports}", run.name());
        for limit in [0, reports / 2, reports - 1] {
            let found = run.calibrate(&StopAfter::new(limit));
            assert!(matches!(found, Err(Error::Cancelled)), "{} after {limit}", run.name());
        }
    }
}

/// Images that a careless statistic stumbles over.
fn odd_images(checkpoint: &Checkpoint) -> [(&'static str, Tensor); 5] {
    let plain = images(checkpoint, 2, 1);
    let outlier = plain.copy();
    let _ = outlier.narrow(3, 5, 1).narrow(2, 4, 1).narrow(1, 1, 1).narrow(0, 1, 1).fill_(1e6);
    [
        ("one image", plain.narrow(0, 0, 1)),
        ("constant images", plain.full_like(0.7)),
        ("images of zeros", plain.zeros_like()),
        ("an outlier", outlier),
        ("large images", &plain * 1e4),
    ]
}

#[test]
fn odd_images_calibrate_and_compute() {
    for (method, checkpoint) in runs() {
        for (what, images) in odd_images(&checkpoint) {
            for width in [3, 8] {
                let request = request(method, width, width);
                let images = images.shallow_clone();
                let run = Run { request, images, checkpoint: &checkpoint };
                let model = run.stored(&run.quantization());
                for (input, images) in odd_images(&checkpoint) {
                    let logits = model.forward(&images).unwrap();
                    assert!(is_finite(&logits), "{} from {what}, {input}", run.name());
                }
            }
        }
    }
}

#[test]
fn pixels_that_are_not_numbers_are_refused() {
    for (method, checkpoint) in runs().into_iter().filter(|(method, _)| method.id != FLOAT_METHOD) {
        for pixel in [f64::NAN, f64::INFINITY] {
            let images = images(&checkpoint, 2, 1);
            let _ =
                images.narrow(3, 5, 1).narrow(2, 4, 1).narrow(1, 1, 1).narrow(0, 1, 1).fill_(pixel);
            let run = Run { request: request(method, 4, 4), images, checkpoint: &checkpoint };
            let error = run.calibrate(&Unwatched).err();
            let refused = matches!(error, Some(Error::InvalidArgument { .. }));
            assert!(refused, "{} with {pixel}: {error:?}", run.name());
        }
    }
}

/// Every operand of a forward.
#[derive(Default)]
struct Operands(Vec<(Site, Operand, Tensor)>);

impl TapSink for Operands {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        self.0.push((site.clone(), operand, x.shallow_clone()));
        Ok(())
    }
}

/// Kinds whose grid does not depend on the input.
const STATIC_KINDS: [&str; 2] = ["uniform", "log_sqrt2"];

/// The laws of one quantizer on one operand of `rows` rows per image.
fn check_quantizer(quantizer: &dyn Quantizer, x: &Tensor, rows: Option<i64>) {
    let (name, fake) = (quantizer.state().kind, quantizer.fake_quantize(x).unwrap());
    assert_eq!(fake.size(), x.size(), "{name}");
    let largest = fake.abs().max().double_value(&[]);
    if let Some(terms) = quantizer.quantize(x).unwrap() {
        let sum = terms.iter().fold(fake.zeros_like(), |sum, term| {
            assert_eq!((term.codes.size(), term.codes.kind()), (x.size(), Kind::Int), "{name}");
            sum + term.dequantize().unwrap()
        });
        let worst = (sum - &fake).abs().max().double_value(&[]);
        assert!(worst <= 1e-6 * largest, "{name}: terms differ by {worst} of {largest}");
    }
    let restored = methods::restore(&quantizer.state()).unwrap();
    assert!(restored.fake_quantize(x).unwrap().equal(&fake), "{name} restored");
    assert_eq!(restored.bits(), quantizer.bits(), "{name}");
    if let Some(rows) = rows {
        for first in (0..x.size()[0]).step_by(rows as usize) {
            let alone = quantizer.fake_quantize(&x.narrow(0, first, rows)).unwrap();
            assert!(alone.equal(&fake.narrow(0, first, rows)), "{name}: image {}", first / rows);
        }
    }
    if STATIC_KINDS.contains(&name.as_str()) {
        let worst = (quantizer.fake_quantize(&fake).unwrap() - &fake).abs().max();
        assert!(worst.double_value(&[]) <= 1e-6 * largest, "{name} is not idempotent");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..Default::default() })]

    /// Shapes vary with the model: heads, widths, tokens, windows.
    #[test]
    fn quantizers_of_any_shape_keep_the_laws(
        heads in 1i64..=3,
        side in 1i64..=3,
        swin: bool,
        width in 3u32..=8,
        count in 1i64..=3,
        seed in 0u64..1000,
    ) {
        let dim = 8 * heads;
        let checkpoint = if swin {
            let size = 4 * side;
            model("swin_tiny", &format!(
                r#"{{"embed_dim":{dim},"depths":[2],"num_heads":[{heads}],"img_size":{size},
                    "patch_size":2,"window_size":2}}"#
            ))
        } else {
            let size = 4 * side;
            model("vit_tiny", &format!(
                r#"{{"embed_dim":{dim},"depth":1,"num_heads":{heads},"img_size":{size},"patch_size":4}}"#
            ))
        };
        for method in METHODS {
            let run = Run {
                request: request(method, width, width),
                images: images(&checkpoint, count, seed),
                checkpoint: &checkpoint,
            };
            let found = run.quantization();
            let mut operands = Operands::default();
            let _guard = tch::no_grad_guard();
            let other = images(&checkpoint, 3, seed + 1);
            let model = run.edited(&found);
            let _logits = model.forward(&mut Tap::new(&mut Float, &mut operands), &other).unwrap();
            for (site, operand, x) in &operands.0 {
                let Some(quantizer) = found.plan.get(site.id, *operand) else { continue };
                let is_weight = *operand == Operand::Rhs && !site.role.is_matmul();
                check_quantizer(quantizer, x, (!is_weight).then_some(site.windows));
            }
            prop_assert!(method.id == FLOAT_METHOD || found.plan.len() >= 14, "{}", run.name());
        }
    }
}
