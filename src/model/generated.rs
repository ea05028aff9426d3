//! Full-size models whose weights come from a hash, for parity tests and speed measurements.
//!
//! docs/checkpoints.md defines the hash; scripts/timm_reference.py computes the same bits in numpy.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde_json::{Map, Value};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::model::checkpoint::{self, PUBLISHED_CROP_PCT};
use crate::model::{
    Checkpoint, FAMILIES, Interpolation, ModelSpec, Parameter, Preprocessing, variant,
};
use crate::nn::Weights;
use crate::random::{GOLDEN, fnv1a, mix};

/// Elements that one thread computes at a time.
const RUN: usize = 1 << 16;

/// What may differ from the published variant.
#[derive(Clone, Debug)]
pub struct GeneratedOptions {
    /// Number of classes of the head.
    pub num_classes: i64,
    /// timm's `model_args` that replace the variant's (`depth`, `img_size`, ...).
    pub model_args: Map<String, Value>,
    /// Seed of weights.
    pub seed: u64,
}

impl Default for GeneratedOptions {
    fn default() -> Self {
        Self { num_classes: 1000, model_args: Map::new(), seed: 0 }
    }
}

/// A checkpoint of a published variant (by short or timm name) with generated weights.
///
/// # Errors
/// `InvalidArgument` on field `architecture` for an unknown name, on `checkpoint` for `model_args`
/// that contradict each other.
pub fn generate(architecture: &str, options: GeneratedOptions) -> Result<Checkpoint> {
    let (family, published) = variant(architecture).ok_or_else(|| {
        let known = FAMILIES.iter().flat_map(|family| family.variants).map(|v| v.short);
        let known = known.collect::<Vec<_>>().join(", ");
        let reason = format!("unknown architecture `{architecture}`, known are: {known}");
        Error::invalid("architecture", reason)
    })?;
    let GeneratedOptions { num_classes, model_args, seed } = options;
    let (mean, std) = published.normalization;
    let spec = checkpoint::complete(ModelSpec {
        architecture: published.architecture.to_owned(),
        family: family.id.to_owned(),
        num_classes,
        model_args,
        preprocessing: Preprocessing {
            image_size: 0,
            crop_pct: PUBLISHED_CROP_PCT,
            interpolation: Interpolation::Bicubic,
            mean,
            std,
        },
        labels: Vec::new(),
    })?;
    let mut tensors = BTreeMap::new();
    for parameter in (family.parameters)(&spec)? {
        if !parameter.optional {
            let tensor = generate_parameter(&parameter, seed)?;
            tensors.insert(parameter.name, tensor);
        }
    }
    Checkpoint::new(spec, Weights::new(tensors))
}

/// Normalised images [count, 3, side, side], uniform in [−2, 2).
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn images(count: i64, side: i64, seed: u64) -> Result<Tensor> {
    let shape = [count, 3, side, side];
    let values = affine("images", seed, &shape, Affine { offset: 0.0, scale: 2.0 });
    Ok(Tensor::f_from_slice(&values)?.f_reshape(shape)?)
}

/// value = uniform · scale + offset, each step rounded to float32.
#[derive(Clone, Copy)]
struct Affine {
    offset: f32,
    scale: f32,
}

fn generate_parameter(parameter: &Parameter, seed: u64) -> Result<Tensor> {
    let Parameter { name, shape, .. } = parameter;
    // Scales keep activations near unit variance through any depth.
    let affine_map = match (name.rsplit('.').next(), shape.as_slice()) {
        (Some("weight"), [_]) => Affine { offset: 1.0, scale: 0.25 },
        (Some("weight"), [_, fan_in @ ..]) => {
            let fan_in: i64 = fan_in.iter().product();
            Affine { offset: 0.0, scale: (3.0 / fan_in as f64).sqrt() as f32 }
        }
        (Some("bias"), _) => Affine { offset: 0.0, scale: 0.1 },
        _ => Affine { offset: 0.0, scale: 0.5 },
    };
    let values = affine(name, seed, shape, affine_map);
    Ok(Tensor::f_from_slice(&values)?.f_reshape(shape)?)
}

fn affine(name: &str, seed: u64, shape: &[i64], map: Affine) -> Vec<f32> {
    let stream = fnv1a(&format!("{seed}/{name}"));
    let mut values = vec![0f32; shape.iter().product::<i64>() as usize];
    // Long runs: a parallel iterator per element costs more than the hash.
    values.par_chunks_mut(RUN).enumerate().for_each(|(run, values)| {
        for (index, value) in ((run * RUN) as u64..).zip(values) {
            *value = uniform(stream, index) * map.scale + map.offset;
        }
    });
    values
}

/// Element `index` of a stream, in [−1, 1): splitmix64's output for the state after index + 1 steps,
/// of which 24 bits fill a float32 significand exactly.
#[inline]
fn uniform(stream: u64, index: u64) -> f32 {
    let z = mix(stream.wrapping_add((index + 1).wrapping_mul(GOLDEN)));
    (z >> 40) as f32 * (1.0 / 8_388_608.0) - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FAMILIES, Model};

    /// The first values that scripts/timm_reference.py gives, as bits.
    #[test]
    fn the_hash_gives_the_same_bits_as_numpy() {
        let cases: [(&str, &[i64], [u32; 4]); 4] = [
            (
                "blocks.0.attn.qkv.weight",
                &[6, 5],
                [0xbee8_de89, 0xbf2b_2c11, 0xbed9_ebcc, 0x3d4d_8eb6],
            ),
            ("norm.weight", &[4], [0x3f8d_3efa, 0x3f79_da13, 0x3f62_1672, 0x3f8c_f31b]),
            ("head.bias", &[4], [0x3cea_0967, 0x3cfd_f4e7, 0x3cc5_c580, 0x3db5_d09f]),
            ("pos_embed", &[1, 2, 2], [0x3d2c_eea0, 0xbc94_b140, 0x3e19_e5d0, 0x3e96_6f5a]),
        ];
        for (name, shape, bits) in cases {
            let parameter =
                Parameter { name: name.to_owned(), shape: shape.to_vec(), optional: false };
            assert_eq!(first_bits(&generate_parameter(&parameter, 0).unwrap()), bits, "{name}");
        }
        let bits = [0x3ffa_e5ec, 0x3f0d_1314, 0x3f54_2a64, 0x3fd2_84ba];
        assert_eq!(first_bits(&images(1, 2, 0).unwrap()), bits);
    }

    fn first_bits(tensor: &Tensor) -> Vec<u32> {
        let values: Vec<f32> = Vec::try_from(tensor.reshape([-1])).unwrap();
        values.iter().take(4).map(|value| value.to_bits()).collect()
    }

    #[test]
    fn every_variant_builds_at_a_small_size() {
        for published in FAMILIES.iter().flat_map(|family| family.variants) {
            let small = match published.short.starts_with("swin") {
                true => r#"{"embed_dim":8,"depths":[2,1],"num_heads":[1,2],"img_size":56}"#,
                false => r#"{"embed_dim":8,"depth":2,"num_heads":2,"img_size":32}"#,
            };
            let model_args = serde_json::from_str(small).unwrap();
            let options = GeneratedOptions { num_classes: 3, model_args, seed: 1 };
            let checkpoint = generate(published.short, options).unwrap();
            let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
            // The list of parameters and what building reads are the same names.
            let sites: Vec<&str> = model.sites.iter().map(|site| site.path.as_str()).collect();
            assert_eq!((sites[0], sites.last()), ("patch_embed.proj", Some(&"head")));
        }
    }

    #[test]
    fn unknown_names_and_contradictions_are_refused() {
        let error = generate("vit_huge", GeneratedOptions::default()).unwrap_err();
        assert!(error.to_string().starts_with("architecture: "), "{error}");
        let wrong = r#"{"num_heads":5}"#;
        let model_args = serde_json::from_str(wrong).unwrap();
        let options = GeneratedOptions { model_args, ..GeneratedOptions::default() };
        let error = generate("vit_tiny", options).unwrap_err();
        assert_eq!(error.to_string(), "checkpoint: a width of 192 is not a multiple of 5 heads");
    }
}
