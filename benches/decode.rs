//! Time to decode and preprocess JPEGs on one thread: `cargo bench --bench decode -- FOLDER ROUNDS`.
//! Without a folder it reads the test images; `scripts/decode_benchmark.py` sets it beside Pillow.
//! Prints JSON with milliseconds per image, one value for each round.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are its output")]

use std::fs;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use vitq::data::{DecodeLimits, RgbImage, decode, preprocess};
use vitq::model::{Interpolation, Preprocessing};

/// timm's usual evaluation transform: shorter side to 248, crop 224.
const HOW: Preprocessing = Preprocessing {
    image_size: 224,
    crop_pct: 0.9,
    interpolation: Interpolation::Bicubic,
    mean: [0.485, 0.456, 0.406],
    std: [0.229, 0.224, 0.225],
};

fn read(file: &[u8]) -> RgbImage {
    decode(file, &DecodeLimits::default(), "image").unwrap()
}

/// Milliseconds that each item took on average.
fn time<T>(items: &[T], mut work: impl FnMut(&T)) -> f64 {
    let start = Instant::now();
    items.iter().for_each(&mut work);
    1e3 * start.elapsed().as_secs_f64() / items.len() as f64
}

fn main() {
    // Cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let fixtures = || format!("{}/tests/fixtures/preprocess/images", env!("CARGO_MANIFEST_DIR"));
    let folder = PathBuf::from(arguments.next().unwrap_or_else(fixtures));
    let rounds: usize = arguments.next().map_or(5, |rounds| rounds.parse().unwrap());

    let mut names: Vec<PathBuf> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|name| name.extension().is_some_and(|extension| extension == "jpg"));
    names.sort();
    let files: Vec<Vec<u8>> = names.iter().map(|name| fs::read(name).unwrap()).collect();
    // Also warms the caches up.
    let images: Vec<RgbImage> = files.iter().map(|file| read(file)).collect();

    let (mut decoding, mut preprocessing, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        decoding.push(time(&files, |file| drop(black_box(read(file)))));
        preprocessing
            .push(time(&images, |image| drop(black_box(preprocess(image, &HOW).unwrap()))));
        whole.push(time(&files, |file| drop(black_box(preprocess(&read(file), &HOW).unwrap()))));
    }
    let figures = json!({
        "images": files.len(), "decode": decoding, "preprocess": preprocessing, "whole": whole,
    });
    println!("{figures}");
}
