//! Whole forwards of a checkpoint, one whenever a line asks for it: vitq's side of
//! scripts/yardsticks.py, which measures others in turns with it. See docs/performance.md.
//!
//! The first line of output names the contenders (`float`, `integer ubb w4a4`, …) and says how long
//! each calibration took. After it, each line of input is a contender's number and a batch size, and
//! its answer is `{"seconds": …, "logits": […]}`: the time of one forward and the first image's logits.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::collections::BTreeMap;
use std::io::{self, BufRead as _};
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use serde_json::json;
use tch::{Device, Tensor};
use vitq::calib::progress::Unwatched;
use vitq::calib::task::StemHeadPolicy;
use vitq::calib::{QuantizeSpec, RoleBits};
use vitq::engine::pipeline::{self, CalibrationImages};
use vitq::engine::{FloatModel, QuantizedModel};
use vitq::exec::Backend;
use vitq::model::Checkpoint;
use vitq::model::generated::images;
use vitq::quant::{BitWidth, Precision};

/// Seeds of the images that are measured, the same as the other side's, and of those to calibrate on.
const MEASURED: u64 = 0;
const CALIBRATION: u64 = 1;

#[derive(Debug, Parser)]
struct Args {
    /// Checkpoint folder.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Methods, each simulated and in integers.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', default_value = "minmax,repq,ubb")]
    methods: Vec<String>,
    /// Bits of weights and activations.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "4,8")]
    bits: Vec<u32>,
    /// Generated images to calibrate on.
    #[arg(long, value_name = "N", default_value_t = 8)]
    calib_images: i64,
    /// cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A model by name.
struct Contender {
    name: String,
    forward: Box<dyn Fn(&Tensor) -> Tensor>,
}

fn main() {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&args.checkpoint).unwrap();
    let side = checkpoint.spec.preprocessing.image_size;
    let calibration = CalibrationImages {
        images: images(args.calib_images, side, CALIBRATION).unwrap(),
        digest: format!("generated {CALIBRATION}"),
    };
    let float = FloatModel::load(&checkpoint, Device::Cpu).unwrap();
    let mut contenders = vec![Contender {
        name: "float".to_owned(),
        forward: Box::new(move |images| float.forward(images).unwrap()),
    }];
    let mut calibration_seconds = BTreeMap::new();
    for method in &args.methods {
        for bits in &args.bits {
            let name = format!("{method} w{bits}a{bits}");
            let spec = specification(method, *bits);
            let quantized =
                pipeline::quantize(&checkpoint, &calibration, &spec, Device::Cpu, &Unwatched);
            let quantized = quantized.unwrap();
            calibration_seconds.insert(name.clone(), quantized.calibration_seconds);
            for backend in [Backend::Simulated, Backend::Integer] {
                let model = QuantizedModel::load(&quantized.artifact, Device::Cpu, backend);
                let model = model.unwrap();
                contenders.push(Contender {
                    name: format!("{backend} {name}"),
                    forward: Box::new(move |images| model.forward(images).unwrap()),
                });
            }
        }
    }
    let names: Vec<&str> = contenders.iter().map(|contender| contender.name.as_str()).collect();
    println!("{}", json!({ "contenders": names, "calibration_seconds": calibration_seconds }));
    answer(&contenders, side);
}

fn specification(method: &str, bits: u32) -> QuantizeSpec {
    let bits = Precision::Bits(BitWidth::new(bits, "bits").unwrap());
    QuantizeSpec {
        method: method.to_owned(),
        options: BTreeMap::new(),
        weight_bits: bits,
        activation_bits: bits,
        stem_head: StemHeadPolicy::Float,
        seed: 0,
        role_bits: RoleBits::default(),
    }
}

/// Runs what the lines of input ask for.
fn answer(contenders: &[Contender], side: i64) {
    // Made once: libtorch's threads spin for a while after they have made them.
    let mut batches = BTreeMap::new();
    for line in io::stdin().lock().lines() {
        let line = line.unwrap();
        let (number, batch) = line.split_once(' ').unwrap();
        let contender = &contenders[number.parse::<usize>().unwrap()];
        let count: i64 = batch.parse().unwrap();
        let batch = batches.entry(count).or_insert_with(|| images(count, side, MEASURED).unwrap());
        let start = Instant::now();
        let logits = (contender.forward)(batch);
        let seconds = start.elapsed().as_secs_f64();
        let logits = Vec::<f32>::try_from(logits.get(0)).unwrap();
        println!("{}", json!({ "seconds": seconds, "logits": logits }));
    }
}
