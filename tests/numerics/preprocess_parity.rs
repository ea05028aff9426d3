//! Decoding and preprocessing against Pillow and timm (tests/fixtures/preprocess).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vitq::data::{DecodeLimits, Pixels, RgbImage, decode, preprocess, resize_and_crop};
use vitq::model::{Interpolation, Preprocessing};

use crate::reference::root;

/// Greatest mean difference from timm in levels of a uint8 (DESIGN.md, section 3).
const MEAN_LEVELS: f64 = 0.1;
/// Greatest difference of a pixel after the resize: sums close to a half may round either way.
const MAX_LEVELS: u8 = 1;

fn fixtures() -> PathBuf {
    root("tests/fixtures/preprocess")
}

fn read(path: &Path) -> RgbImage {
    let bytes = fs::read(path).unwrap();
    decode(&bytes, &DecodeLimits::default(), &path.display().to_string()).unwrap()
}

/// Greatest and mean absolute difference in levels.
fn difference(ours: &RgbImage, theirs: &RgbImage) -> (u8, f64) {
    assert_eq!((ours.width, ours.height), (theirs.width, theirs.height));
    let pairs = || ours.pixels.iter().zip(theirs.pixels.iter()).map(|(a, b)| a.abs_diff(*b));
    let total: f64 = pairs().map(f64::from).sum();
    (pairs().max().unwrap(), total / ours.pixels.len() as f64)
}

/// The presets of the index with their names.
fn presets(index: &Value) -> Vec<(String, Preprocessing)> {
    let triple = |value: &Value| serde_json::from_value(value.clone()).unwrap();
    let preset = |(name, config): (&String, &Value)| {
        let how = Preprocessing {
            image_size: config["input_size"][1].as_i64().unwrap(),
            crop_pct: config["crop_pct"].as_f64().unwrap(),
            interpolation: Interpolation::Bicubic,
            mean: triple(&config["mean"]),
            std: triple(&config["std"]),
        };
        (name.clone(), how)
    };
    index["presets"].as_object().unwrap().iter().map(preset).collect()
}

fn index() -> Value {
    serde_json::from_slice(&fs::read(fixtures().join("index.json")).unwrap()).unwrap()
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn decoding_matches_pillow_in_every_mode() {
    let mut count = 0;
    for entry in fs::read_dir(fixtures().join("modes/images")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let expected = read(&fixtures().join(format!("modes/expected/{name}.png")));
        let (max, mean) = difference(&read(&path), &expected);
        eprintln!("{name}: max {max}, mean {mean:.4}");
        assert_eq!(max, 0, "{name}: mean {mean}");
        count += 1;
    }
    assert_eq!(count, 30);
}

#[test]
fn resize_and_crop_match_timm() {
    let index = index();
    for (preset, how) in presets(&index) {
        for (name, image) in index["images"].as_object().unwrap() {
            let file = image["results"][&preset]["uint8_png"].as_str().unwrap();
            let ours = resize_and_crop(&read(&fixtures().join("images").join(name)), &how).unwrap();
            let (max, mean) = difference(&ours, &read(&fixtures().join(file)));
            eprintln!("{preset} {name}: max {max}, mean {mean:.5}");
            assert!(max <= MAX_LEVELS && mean <= MEAN_LEVELS, "{preset} {name}: {max}, {mean}");
        }
    }
}

#[test]
fn normalisation_equals_timm_to_the_bit() {
    let index = index();
    for (preset, how) in presets(&index) {
        // The stored crops have the model's size already, so only normalisation is left to do.
        let how = Preprocessing { crop_pct: 1.0, ..how };
        for (name, image) in index["images"].as_object().unwrap() {
            let result = &image["results"][&preset];
            let crop = read(&fixtures().join(result["uint8_png"].as_str().unwrap()));
            let mut hash = Sha256::new();
            hash.update(&*crop.pixels);
            assert_eq!(hex(hash), result["sha256_uint8_hwc"].as_str().unwrap(), "{name}");
            let data = preprocess(&crop, &how).unwrap();
            let pixels = Pixels { count: 1, image_size: how.image_size, data };
            let expected = result["sha256_f32_chw_little_endian"].as_str().unwrap();
            assert_eq!(pixels.digest(), expected, "{preset} {name}");
        }
    }
}
