//! Architectures: one forward each, written over [`Executor`]. A model is a list of units.

mod args;
mod checkpoint;
pub mod generated;
mod layers;
mod spec;
mod swin;
mod vit;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::nn::{Role, Site, SiteId, Weights};

pub use args::TensorShapes;
pub use checkpoint::Checkpoint;
pub use spec::{Interpolation, ModelSpec, Preprocessing};

/// A step of the forward pass: the stem, a block, a patch merging, the head.
///
/// Forwards may run on several threads at once: a unit reads its tensors, never writes to them, and
/// changes nothing of itself but behind a lock.
pub trait Unit: Send {
    /// Module path of the unit: `patch_embed`, `blocks.3`, `layers.0.downsample`, `head`.
    fn path(&self) -> &str;

    /// Full names of the learned tables that the unit adds to attention scores: trainable parameters
    /// beside its linear layers.
    fn score_tables(&self) -> Vec<String> {
        Vec::new()
    }

    /// Maps the previous unit's output (the image batch [n, 3, h, w] for the first) to its own.
    ///
    /// # Errors
    /// Whatever the executor reports.
    fn forward(&self, exec: &mut dyn Executor, x: &Tensor) -> Result<Tensor>;
}

/// An architecture with weights; its forward is the fold over its units.
pub struct Model {
    /// What the weights are of.
    pub spec: Arc<ModelSpec>,
    /// All quantizable products, by [`SiteId`].
    pub sites: Vec<Arc<Site>>,
    /// The steps of the forward pass.
    pub units: Vec<Box<dyn Unit>>,
}

impl Model {
    /// Builds the architecture that `spec` names over `weights`; every name must be used.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint` for a missing, unused or misshapen parameter.
    pub fn build(spec: &Arc<ModelSpec>, weights: &Weights) -> Result<Self> {
        let family = family(&spec.family)?;
        let used = RefCell::new(BTreeSet::new());
        let mut sites = SiteTable::default();
        let units = (family.build)(spec, &mut sites, weights, &used)?;
        weights.check_all_used(&used.borrow())?;
        Ok(Self { spec: Arc::clone(spec), sites: sites.sites, units })
    }

    /// Logits [n, classes] of normalised images [n, 3, h, w].
    ///
    /// # Errors
    /// Whatever the executor reports.
    pub fn forward(&self, exec: &mut dyn Executor, images: &Tensor) -> Result<Tensor> {
        let mut x = images.shallow_clone();
        for unit in &self.units {
            x = unit.forward(exec, &x)?;
        }
        Ok(x)
    }

    /// The site of that id.
    ///
    /// # Errors
    /// `Internal` when the model has no such site.
    pub fn site(&self, id: SiteId) -> Result<&Arc<Site>> {
        self.sites
            .get(id.0 as usize)
            .ok_or_else(|| Error::internal(format!("site {} is not part of the model", id.0)))
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("architecture", &self.spec.architecture)
            .field("units", &self.units.len())
            .field("sites", &self.sites.len())
            .finish()
    }
}

/// Hands out sites in forward order while a family builds its units.
#[derive(Debug, Default)]
pub struct SiteTable {
    sites: Vec<Arc<Site>>,
}

/// What a family says about a site; the table adds the id.
#[derive(Debug)]
pub struct NewSite<'a> {
    /// timm's module path.
    pub path: String,
    /// What the product computes.
    pub role: Role,
    /// The LayerNorm that feeds it directly.
    pub norm: Option<&'a str>,
    /// Index of the unit that holds it.
    pub unit: usize,
    /// Windows per image (1 outside windowed attention).
    pub windows: i64,
}

impl SiteTable {
    /// Registers the next site.
    pub fn add(&mut self, new: NewSite<'_>) -> Arc<Site> {
        let site = Arc::new(Site {
            id: SiteId(u32::try_from(self.sites.len()).unwrap_or(u32::MAX)),
            path: new.path,
            role: new.role,
            norm: new.norm.map(str::to_owned),
            unit: new.unit,
            windows: new.windows,
        });
        self.sites.push(Arc::clone(&site));
        site
    }
}

/// Builds the units of a model; every name it reads is recorded in the set.
pub type BuildFn = fn(
    &ModelSpec,
    &mut SiteTable,
    &Weights,
    &RefCell<BTreeSet<String>>,
) -> Result<Vec<Box<dyn Unit>>>;

/// One architecture family.
#[derive(Debug)]
pub struct FamilyEntry {
    /// `vit` or `swin`.
    pub id: &'static str,
    /// The published variants: short name, timm name.
    pub variants: &'static [Variant],
    /// Whether a timm architecture name belongs to the family.
    pub owns: fn(&str) -> bool,
    /// Every key of timm's `model_args` that the family reads.
    pub model_args: &'static [&'static str],
    /// Other keys with the value (as JSON) at which they change nothing; any other value is refused.
    pub neutral_args: &'static [(&'static str, &'static str)],
    /// Renames a parameter of another timm generation, given all names of the file; `None` drops a
    /// buffer that is recomputed.
    pub canonical_name: fn(&BTreeSet<String>, &str) -> Option<String>,
    /// Fills `model_args` from the tensors, and checks what is given against them.
    pub infer: fn(&mut ModelSpec, &TensorShapes) -> Result<()>,
    /// Every parameter of a complete spec; fails when its `model_args` contradict each other.
    pub parameters: fn(&ModelSpec) -> Result<Vec<Parameter>>,
    /// Builds the units.
    pub build: BuildFn,
}

/// A parameter of an architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// timm 0.6.13's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Whether a checkpoint may lack it.
    pub optional: bool,
}

/// A published variant of a family.
#[derive(Debug)]
pub struct Variant {
    /// `vit_tiny`, `deit_small`, `swin_base`, ...
    pub short: &'static str,
    /// `vit_tiny_patch16_224`, ...
    pub architecture: &'static str,
    /// timm's `model_args` of the variant, as a JSON object.
    pub model_args: &'static str,
    /// Mean and standard deviation of the variant's preprocessing.
    pub normalization: ([f64; 3], [f64; 3]),
}

/// Mean and standard deviation of ImageNet's pixels, which DeiT and Swin were trained with.
const IMAGENET_NORMALIZATION: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// Every architecture family; a new one is its file and one line here.
pub const FAMILIES: &[&FamilyEntry] = &[&vit::FAMILY, &swin::FAMILY];

/// The family of that id.
///
/// # Errors
/// `InvalidArgument` on field `checkpoint` for an unknown id.
pub fn family(id: &str) -> Result<&'static FamilyEntry> {
    FAMILIES
        .iter()
        .copied()
        .find(|family| family.id == id)
        .ok_or_else(|| Error::invalid("checkpoint", format!("unknown model family `{id}`")))
}

/// The published variant of a short name or a timm name (a tag after a dot does not matter).
pub fn variant(name: &str) -> Option<(&'static FamilyEntry, &'static Variant)> {
    let architecture = name.split('.').next().unwrap_or(name);
    FAMILIES.iter().find_map(|family| {
        let found = family
            .variants
            .iter()
            .find(|variant| variant.short == architecture || variant.architecture == architecture);
        found.map(|variant| (*family, variant))
    })
}
