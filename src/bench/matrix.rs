//! What a benchmark runs: checkpoints × devices × methods × bits × policies × seeds × executors.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use tch::Device;

use crate::bench::results::FLOAT_METHOD;
use crate::calib::RoleBits;
use crate::calib::task::{QuantizeSpec, StemHeadPolicy};
use crate::data::{Dataset, DecodeLimits, Sample, load_pixels};
use crate::engine::pipeline::{self, CalibrationImages};
use crate::error::{Error, Result};
use crate::exec::Backend;
use crate::methods;
use crate::model::{Checkpoint, ModelSpec};
use crate::quant::Precision;

/// Seed of the images that a `limit` selects: a limit means the same images in every run.
const LIMIT_SEED: u64 = 0;

/// Every combination of these is one row.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Checkpoint folders.
    pub checkpoints: Vec<PathBuf>,
    /// Where calibration images come from; only a run of `float` alone needs none.
    pub calibration: Option<CalibrationChoice>,
    /// Data set that is scored.
    pub validation: PathBuf,
    /// Score at most this many images, spread over the classes by a fixed seed.
    pub limit: Option<usize>,
    /// Method ids; `float` is the checkpoint itself and has no further combinations.
    pub methods: Vec<String>,
    /// Weight and activation bits.
    pub bits: Vec<(Precision, Precision)>,
    /// Exceptions by role, the same in every cell.
    pub role_bits: RoleBits,
    /// Treatments of stem and head.
    pub stem_heads: Vec<StemHeadPolicy>,
    /// Options; each goes to the methods that have one of that name.
    pub options: BTreeMap<String, String>,
    /// Seeds of calibration.
    pub seeds: Vec<u64>,
    /// Arithmetic of the quantized forwards.
    pub executors: Vec<Backend>,
    /// Where to run.
    pub devices: Vec<Device>,
    /// Images per forward.
    pub batch_sizes: Vec<usize>,
    /// What happens to the artifacts.
    pub artifacts: ArtifactPolicy,
}

/// Which images calibrate.
#[derive(Clone, Debug)]
pub struct CalibrationChoice {
    /// The data set.
    pub dataset: PathBuf,
    /// Which of its images.
    pub selection: Selection,
}

/// A way to choose calibration images.
#[derive(Clone, Debug)]
pub enum Selection {
    /// That many images, chosen by the row's seed.
    Count(usize),
    /// Exactly these, by paths relative to the data set.
    Listed(Vec<String>),
}

/// What happens to the artifacts of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArtifactPolicy {
    /// They are measured and dropped.
    Discard,
    /// They are written to `artifacts/` beside the results.
    Keep,
}

/// A row's combination without executor and batch size: one calibration serves all of those.
#[derive(Clone, Debug)]
pub(super) enum Cell {
    Float,
    Quantized(QuantizeSpec),
}

impl Matrix {
    /// All cells of one checkpoint on one device, each request checked.
    pub(super) fn cells(&self) -> Result<Vec<Cell>> {
        self.check_options()?;
        let mut cells = Vec::new();
        for method in &self.methods {
            if method == FLOAT_METHOD {
                cells.push(Cell::Float);
                continue;
            }
            let entry = methods::find(method)?;
            let options = self.options.iter();
            let options: BTreeMap<_, _> = options
                .filter(|(name, _)| entry.options.iter().any(|spec| spec.name == name.as_str()))
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
            for (weight_bits, activation_bits) in &self.bits {
                for stem_head in &self.stem_heads {
                    for seed in &self.seeds {
                        let spec = QuantizeSpec {
                            method: method.clone(),
                            options: options.clone(),
                            weight_bits: *weight_bits,
                            activation_bits: *activation_bits,
                            stem_head: *stem_head,
                            seed: *seed,
                            role_bits: self.role_bits.clone(),
                        };
                        pipeline::validate(&spec)?;
                        cells.push(Cell::Quantized(spec));
                    }
                }
            }
        }
        Ok(cells)
    }

    /// An option that no method of the run has is a mistake.
    fn check_options(&self) -> Result<()> {
        let mut known = Vec::new();
        for method in self.methods.iter().filter(|method| *method != FLOAT_METHOD) {
            known.extend(methods::find(method)?.options.iter().map(|spec| spec.name));
        }
        match self.options.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => {
                let known = match known.as_slice() {
                    [] => "they take none".to_owned(),
                    known => format!("known are: {}", known.join(", ")),
                };
                let reason = format!("no method of this run has this option, {known}");
                Err(Error::invalid(format!("options.{name}"), reason))
            }
            None => Ok(()),
        }
    }

    /// Rows of one checkpoint on one device.
    pub(super) fn rows(&self, cells: &[Cell]) -> usize {
        let rows = |cell: &Cell| match cell {
            Cell::Float => self.batch_sizes.len(),
            Cell::Quantized(_) => self.executors.len() * self.batch_sizes.len(),
        };
        cells.iter().map(rows).sum()
    }

    pub(super) fn validation_set(&self) -> Result<Dataset> {
        Dataset::open(&self.validation, "val")
    }

    /// The images of the set that are scored, with the model's classes.
    pub(super) fn validation_samples(
        &self,
        dataset: &Dataset,
        model: &ModelSpec,
    ) -> Result<Vec<Sample>> {
        let dataset = dataset.clone();
        let (dataset, remark) = dataset.for_model(&model.labels, model.num_classes, "val")?;
        if let Some(remark) = remark {
            tracing::warn!("val: {remark}");
        }
        match self.limit {
            Some(limit) if limit < dataset.samples.len() => {
                dataset.subset(limit, LIMIT_SEED, "limit")
            }
            _ => Ok(dataset.samples),
        }
    }

    /// The calibration images of every seed, as the checkpoint wants them.
    pub(super) fn load_calibrations(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<BTreeMap<u64, Rc<CalibrationImages>>> {
        let mut calibrations = BTreeMap::new();
        if self.methods.iter().all(|method| method == FLOAT_METHOD) {
            return Ok(calibrations);
        }
        let choice = self
            .calibration
            .as_ref()
            .ok_or_else(|| Error::invalid("calib", "calibration images are needed to quantize"))?;
        let dataset = Dataset::open(&choice.dataset, "calib")?;
        let load = |samples: &[Sample]| -> Result<Rc<CalibrationImages>> {
            let how = &checkpoint.spec.preprocessing;
            let pixels = load_pixels(samples, how, &DecodeLimits::default())?;
            Ok(Rc::new(CalibrationImages::from_pixels(&pixels)?))
        };
        match &choice.selection {
            Selection::Listed(names) => {
                let images = load(&dataset.listed(names, "calib_files")?)?;
                calibrations.extend(self.seeds.iter().map(|seed| (*seed, Rc::clone(&images))));
            }
            Selection::Count(count) => {
                for seed in &self.seeds {
                    let samples = dataset.subset(*count, *seed, "calib_images")?;
                    calibrations.insert(*seed, load(&samples)?);
                }
            }
        }
        Ok(calibrations)
    }
}
