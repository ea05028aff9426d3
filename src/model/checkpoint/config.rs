//! timm's `config.json`, and the model spec that it and the tensors give together.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::args::{TensorShapes, check_each, contradiction, first_axis, unusable};
use crate::model::{
    FAMILIES, FamilyEntry, Interpolation, ModelSpec, Preprocessing, family, variant,
};

/// Most classes that are believed.
const MAX_CLASSES: i64 = 1_000_000;
/// timm's settings of training and of other input sizes; they change nothing here.
const WITHOUT_EFFECT: &[&str] = &[
    "attn_drop_rate",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_pad",
    "dynamic_img_size",
    "fix_init",
    "patch_drop_rate",
    "pos_drop_rate",
    "pretrained",
    "proj_drop_rate",
    "strict_img_size",
    "weight_init",
];

/// The parts of `config.json` that matter here.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Config {
    architecture: String,
    #[serde(default)]
    num_classes: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    global_pool: Option<String>,
    #[serde(default)]
    model_args: Option<Map<String, Value>>,
    #[serde(default, alias = "default_cfg")]
    pretrained_cfg: Option<Pretrained>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    label_names: Option<Vec<String>>,
}

/// timm's `pretrained_cfg`: how the model wants its images.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Pretrained {
    #[serde(default)]
    input_size: Option<[i64; 3]>,
    #[serde(default)]
    interpolation: Option<String>,
    #[serde(default)]
    crop_pct: Option<f64>,
    #[serde(default)]
    crop_mode: Option<String>,
    #[serde(default)]
    mean: Option<[f64; 3]>,
    #[serde(default)]
    std: Option<[f64; 3]>,
}

impl Config {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| unusable(format!("config.json: {error}")))
    }

    /// The config of a complete spec.
    pub(super) fn of(spec: &ModelSpec) -> Self {
        let Preprocessing { image_size, crop_pct, interpolation, mean, std } = spec.preprocessing;
        let interpolation = match interpolation {
            Interpolation::Bicubic => "bicubic",
            Interpolation::Bilinear => "bilinear",
            Interpolation::Nearest => "nearest",
        };
        Self {
            architecture: spec.architecture.clone(),
            num_classes: Some(spec.num_classes),
            global_pool: None,
            model_args: Some(spec.model_args.clone()),
            pretrained_cfg: Some(Pretrained {
                input_size: Some([3, image_size, image_size]),
                interpolation: Some(interpolation.to_owned()),
                crop_pct: Some(crop_pct),
                crop_mode: Some("center".to_owned()),
                mean: Some(mean),
                std: Some(std),
            }),
            label_names: Some(spec.labels.clone()).filter(|labels| !labels.is_empty()),
        }
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal(format!("a config is not JSON: {error}")))
    }

    /// Id of the family that the architecture belongs to.
    pub(super) fn family(&self) -> Result<&'static str> {
        let owner = FAMILIES.iter().find(|family| (family.owns)(&self.architecture));
        owner.map(|family| family.id).ok_or_else(|| {
            unusable(format!(
                "architecture `{}` is not supported, supported are ViT, DeiT and Swin of the first version (names that start with vit_, deit_ or swin_)",
                self.architecture
            ))
        })
    }

    /// Completes the config from the tensors and from timm's table, in that order.
    pub(super) fn into_spec(self, shapes: &TensorShapes) -> Result<ModelSpec> {
        let (mut spec, given) = self.alone()?;
        spec.num_classes = classes(given, shapes)?;
        (family(&spec.family)?.infer)(&mut spec, shapes)?;
        complete(spec)
    }

    /// What the config says by itself, with no classes yet; and how many classes it gives.
    pub(super) fn alone(self) -> Result<(ModelSpec, Option<i64>)> {
        let family = family(self.family()?)?;
        let published = variant(&self.architecture).map(|(_, variant)| variant);
        let pretrained = self.pretrained_cfg.unwrap_or_default();
        let mut args = known_args(family, self.model_args.unwrap_or_default())?;
        square(&mut args, "img_size")?;
        square(&mut args, "patch_size")?;
        if let Some(pool) = self.global_pool.filter(|pool| !pool.is_empty()) {
            agree(&mut args, "global_pool", pool.into())?;
        }
        if let Some([channels, height, width]) = pretrained.input_size {
            agree(&mut args, "in_chans", channels.into())?;
            if height != width {
                return Err(unusable(format!("input_size {height} by {width} is not square")));
            }
            agree(&mut args, "img_size", height.into())?;
        }
        check_each(&args)?;
        let preprocessing = preprocessing(pretrained, published.map(|v| v.normalization))?;
        let labels = self.label_names.unwrap_or_default();
        if let Some(classes) = self.num_classes {
            check_classes(classes, &labels)?;
        }
        let spec = ModelSpec {
            num_classes: 0,
            architecture: self.architecture,
            family: family.id.to_owned(),
            model_args: args,
            preprocessing,
            labels,
        };
        Ok((spec, self.num_classes))
    }
}

/// Fills what is still missing from timm's table, and checks what no tensor speaks about.
pub(in crate::model) fn complete(mut spec: ModelSpec) -> Result<ModelSpec> {
    if let Some((_, published)) = variant(&spec.architecture) {
        let defaults: Map<String, Value> = serde_json::from_str(published.model_args)
            .map_err(|error| Error::internal(format!("{}: {error}", published.short)))?;
        for (key, value) in defaults {
            spec.model_args.entry(key).or_insert(value);
        }
    }
    check_classes(spec.num_classes, &spec.labels)?;
    // Checks the arguments against each other, the image size among them.
    (family(&spec.family)?.parameters)(&spec)?;
    let image = spec.model_args.get("img_size").and_then(Value::as_i64);
    spec.preprocessing.image_size = image.unwrap_or(0);
    Ok(spec)
}

fn check_classes(classes: i64, labels: &[String]) -> Result<()> {
    if !(1..=MAX_CLASSES).contains(&classes) {
        return Err(unusable(format!("{classes} classes, expected 1 to {MAX_CLASSES}")));
    }
    if !labels.is_empty() && labels.len() as i64 != classes {
        return Err(unusable(format!("{} label_names for {classes} classes", labels.len())));
    }
    Ok(())
}

/// The arguments that the family reads; others must be known to change nothing.
fn known_args(family: &FamilyEntry, given: Map<String, Value>) -> Result<Map<String, Value>> {
    let mut args = Map::new();
    for (key, value) in given {
        let neutral = family.neutral_args.iter().any(|(name, json)| {
            *name == key && serde_json::from_str::<Value>(json).is_ok_and(|same| same == value)
        });
        if value.is_null() || neutral || WITHOUT_EFFECT.contains(&key.as_str()) {
            continue;
        }
        if !family.model_args.contains(&key.as_str()) {
            return Err(unusable(format!("model_args.{key} = {value} is not supported")));
        }
        args.insert(key, value);
    }
    Ok(args)
}

/// Replaces a pair of equal sides by one number.
fn square(args: &mut Map<String, Value>, key: &str) -> Result<()> {
    let Some(Value::Array(sides)) = args.get(key) else { return Ok(()) };
    match sides.as_slice() {
        [height, width] if height == width => {
            let side = height.clone();
            args.insert(key.to_owned(), side);
            Ok(())
        }
        _ => Err(unusable(format!("{key} {} is not square", Value::from(sides.clone())))),
    }
}

/// Enters a value that the config gives elsewhere; `model_args` must not contradict it.
fn agree(args: &mut Map<String, Value>, key: &str, value: Value) -> Result<()> {
    match args.get(key) {
        Some(given) if *given != value => Err(unusable(format!(
            "the config says {key} = {given} in model_args and {value} elsewhere"
        ))),
        _ => {
            args.insert(key.to_owned(), value);
            Ok(())
        }
    }
}

fn classes(given: Option<i64>, shapes: &TensorShapes) -> Result<i64> {
    let found = first_axis(shapes, "head.weight")?;
    match given {
        Some(given) if given != found => {
            Err(contradiction("num_classes", &given.into(), &found.into()))
        }
        _ => Ok(found),
    }
}

/// Image size 0 stands for one that is still to be found.
fn preprocessing(
    given: Pretrained,
    published: Option<([f64; 3], [f64; 3])>,
) -> Result<Preprocessing> {
    let silent = |key: &str| {
        unusable(format!(
            "the config does not give {key}, and the architecture is not in timm's table"
        ))
    };
    let known = published.is_some();
    if let Some(mode) = given.crop_mode.as_deref().filter(|mode| *mode != "center") {
        return Err(unusable(format!("crop_mode `{mode}` is not supported, only center is")));
    }
    let interpolation = match given.interpolation.as_deref() {
        Some("bicubic") => Interpolation::Bicubic,
        Some("bilinear") => Interpolation::Bilinear,
        Some("nearest") => Interpolation::Nearest,
        Some(other) => {
            return Err(unusable(format!(
                "interpolation `{other}` is not supported, supported are bicubic, bilinear and nearest"
            )));
        }
        None if known => Interpolation::Bicubic,
        None => return Err(silent("interpolation")),
    };
    let crop_pct = match given.crop_pct {
        Some(share) if share > 0.0 && share <= 1.0 => share,
        Some(share) => {
            return Err(unusable(format!("crop_pct is {share}, expected above 0, at most 1")));
        }
        None if known => super::PUBLISHED_CROP_PCT,
        None => return Err(silent("crop_pct")),
    };
    let mean = given.mean.or(published.map(|(mean, _)| mean)).ok_or_else(|| silent("mean"))?;
    let std = given.std.or(published.map(|(_, std)| std)).ok_or_else(|| silent("std"))?;
    if std.iter().any(|deviation| *deviation <= 0.0) {
        return Err(unusable(format!("std is {std:?}, expected numbers above 0")));
    }
    Ok(Preprocessing { image_size: 0, crop_pct, interpolation, mean, std })
}
