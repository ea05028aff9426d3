//! A checkpoint: `model.safetensors` and `config.json` in one folder, as timm publishes them.
//!
//! Order of trust: the file's header is checked against its size, names and shapes against the
//! config and the architecture, and only then are tensors made.

mod config;
mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::digest::hex;
use crate::error::{Error, Result};
use crate::model::args::unusable;
use crate::model::{ModelSpec, TensorShapes, family};
use crate::nn::Weights;

use config::Config;
pub(super) use config::complete;
use file::{Entry, Outline};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
/// Share of the image that the evaluation of all variants in timm's table keeps.
pub(super) const PUBLISHED_CROP_PCT: f64 = 0.9;
/// Names in one error message.
const SHOWN: usize = 3;

/// A float model read from disk, weights on the CPU.
#[derive(Debug)]
pub struct Checkpoint {
    /// What the weights are of.
    pub spec: Arc<ModelSpec>,
    /// float32 parameters under timm 0.6.13's names.
    pub weights: Weights,
    /// sha256 (hex) over `config.json` and `model.safetensors`.
    pub digest: String,
    /// Size of `model.safetensors` in bytes.
    pub bytes: u64,
}

impl Checkpoint {
    /// The files of a checkpoint's folder.
    pub const FILES: [&str; 2] = [CONFIG, MODEL];

    /// Reads and checks the folder.
    ///
    /// # Errors
    /// `NotFound` when the folder or one of its two files is missing; `InvalidArgument` on field
    /// `checkpoint` for unusable content; `Io` for unreadable files.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = file::read_config(&folder.join(CONFIG))?;
        // A wrong config is found before gigabytes are read.
        Self::check_config(&config)?;
        Self::from_bytes(&config, &file::read_model(&folder.join(MODEL))?)
    }

    /// The checkpoint of the two files' contents.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint`.
    pub(crate) fn from_bytes(config_bytes: &[u8], bytes: &[u8]) -> Result<Self> {
        let config = Config::parse(config_bytes)?;
        let (tensors, outline) = file::parse(bytes)?;
        let (spec, parameters) = fit(config, &outline)?;
        let mut weights = BTreeMap::new();
        for (name, (source, entry)) in parameters {
            weights.insert(name, file::read_tensor(&tensors, source, entry)?);
        }
        let mut hash = Sha256::new();
        hash.update(config_bytes);
        hash.update(bytes);
        Ok(Self {
            spec: Arc::new(spec),
            weights: Weights::new(weights),
            digest: hex(&hash.finalize()),
            bytes: bytes.len() as u64,
        })
    }

    /// Whether a `config.json` could be that of a checkpoint, as far as it tells without the tensors:
    /// its architecture is known, and so is every value that it gives.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint`.
    pub fn check_config(config: &[u8]) -> Result<()> {
        Config::parse(config)?.alone().map(drop)
    }

    /// Whether a `model.safetensors` may have so many bytes.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint`.
    pub fn check_size(size: u64) -> Result<()> {
        if size > file::MAX_MODEL_BYTES {
            let text = format!("{size} bytes are more than {}", file::MAX_MODEL_BYTES);
            return Err(unusable(text));
        }
        Ok(())
    }

    /// Says what the first eight bytes speak of against a file of `size` bytes being
    /// `model.safetensors`: pickles and archives are refused by content. The bytes up to the end of
    /// its header.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint`.
    pub fn check_start(start: &[u8], size: u64) -> Result<u64> {
        file::sniff(start, size)
    }

    /// Whether config and tensors fit, by the first bytes of a `model.safetensors` of `size` bytes,
    /// up to the end of its header: what is left to [`Checkpoint::open`] are the values.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint`.
    pub fn check_header(config: &[u8], header: &[u8], size: u64) -> Result<()> {
        let outline = file::outline(header, size)?;
        let (_, parameters) = fit(Config::parse(config)?, &outline)?;
        parameters.values().try_for_each(|(name, entry)| file::kind(name, entry).map(drop))
    }

    /// A checkpoint of given parts; its digest and size are those of the files that
    /// [`Checkpoint::save`] writes.
    ///
    /// # Errors
    /// `InvalidArgument` when the weights are not those of the architecture.
    pub(super) fn new(spec: ModelSpec, weights: Weights) -> Result<Self> {
        let shapes =
            weights.iter().map(|(name, tensor)| (name.to_owned(), tensor.size())).collect();
        check_parameters(&spec, &shapes)?;
        let mut sink = HashSink { hash: Sha256::new(), bytes: 0 };
        sink.hash.update(Config::of(&spec).to_json()?);
        file::write_model(&weights, &mut sink)?.map_err(|source| Error::io(MODEL, source))?;
        let HashSink { hash, bytes } = sink;
        Ok(Self { spec: Arc::new(spec), weights, digest: hex(&hash.finalize()), bytes })
    }

    /// Writes the two files into `folder`, which is made if need be. Names and numbers are canonical
    /// (timm 0.6.13, float32), so the digest of another layout is not preserved.
    ///
    /// # Errors
    /// `Io` when a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let path = folder.join(MODEL);
        let to_io = |source| Error::io(&path, source);
        let mut out = BufWriter::new(File::create(&path).map_err(to_io)?);
        file::write_model(&self.weights, &mut out)?.and_then(|()| out.flush()).map_err(to_io)?;
        let path = folder.join(CONFIG);
        fs::write(&path, Config::of(&self.spec).to_json()?).map_err(|s| Error::io(&path, s))
    }
}

/// Canonical name → name in the file, and what its header says of the tensor.
type Parameters<'f> = BTreeMap<String, (&'f str, &'f Entry)>;

/// The model of a config and of the tensors that a header lists, which must be its parameters.
fn fit(config: Config, outline: &Outline) -> Result<(ModelSpec, Parameters<'_>)> {
    let parameters = canonical_names(&config, outline)?;
    let mut shapes = TensorShapes::new();
    for (canonical, (name, entry)) in &parameters {
        shapes.insert(canonical.clone(), file::shape(name, entry)?);
    }
    let spec = config.into_spec(&shapes)?;
    check_parameters(&spec, &shapes)?;
    Ok((spec, parameters))
}

/// The tensors under canonical names, without buffers.
fn canonical_names<'f>(config: &Config, outline: &'f Outline) -> Result<Parameters<'f>> {
    let rename = family(config.family()?)?.canonical_name;
    let given: BTreeSet<String> = outline.keys().cloned().collect();
    let mut parameters = Parameters::new();
    for (name, entry) in outline {
        let Some(canonical) = rename(&given, name) else { continue };
        if let Some((other, _)) = parameters.insert(canonical, (name, entry)) {
            return Err(unusable(format!("parameters {other} and {name} are the same one")));
        }
    }
    Ok(parameters)
}

/// Fails unless the tensors are exactly the architecture's parameters.
fn check_parameters(spec: &ModelSpec, shapes: &TensorShapes) -> Result<()> {
    let parameters = (family(&spec.family)?.parameters)(spec)?;
    for parameter in &parameters {
        match shapes.get(&parameter.name) {
            None if parameter.optional => {}
            None => return Err(unusable(format!("parameter {} is missing", parameter.name))),
            Some(shape) if *shape == parameter.shape => {}
            Some(shape) => {
                return Err(unusable(format!(
                    "parameter {} has shape {shape:?}, the config asks for {:?}",
                    parameter.name, parameter.shape
                )));
            }
        }
    }
    let known: BTreeSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    let unknown: Vec<&str> =
        shapes.keys().map(String::as_str).filter(|name| !known.contains(name)).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let shown = unknown.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    Err(unusable(format!(
        "{} parameters are not part of {}: {shown}",
        unknown.len(),
        spec.architecture
    )))
}

/// Hashes and counts what is written to it.
struct HashSink {
    hash: Sha256,
    bytes: u64,
}

impl Write for HashSink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
