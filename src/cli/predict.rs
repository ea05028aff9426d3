//! `vitq predict`: logits of a checkpoint or artifact, computed in this process.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use tch::{Device, Tensor};

use crate::artifact::Artifact;
use crate::bench::results::write_atomically;
use crate::cli::args;
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::data::{DecodeLimits, Sample, Source, has_image_name, load_pixels};
use crate::engine::pipeline::image_batch;
use crate::engine::{FloatModel, QuantizedModel};
use crate::error::{Error, Result};
use crate::exec::{Backend, SiteCounts};
use crate::model::{Checkpoint, ModelSpec};

/// Name of the input in a tensor file and of the output.
const INPUT: &str = "input";
const LOGITS: &str = "logits";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Float checkpoint folder.
    #[arg(long, value_name = "DIR", required_unless_present = "artifact")]
    checkpoint: Option<PathBuf>,
    /// Quantized model.
    #[arg(long, value_name = "FILE", conflicts_with = "checkpoint")]
    artifact: Option<PathBuf>,
    /// Folder of images, searched through its subfolders.
    #[arg(long, value_name = "DIR", required_unless_present = "tensor")]
    images: Option<PathBuf>,
    /// safetensors file with `input`: normalised float32 [n, 3, height, width].
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    tensor: Option<PathBuf>,
    /// Arithmetic of an artifact's forward: simulated, integer, float.
    #[arg(long, value_name = "NAME", default_value = "simulated", conflicts_with = "checkpoint")]
    executor: Backend,
    /// Where to run: auto, cpu, cuda:N.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// Images per forward.
    #[arg(long, value_name = "N", default_value = "32", value_parser = args::positive)]
    batch_size: usize,
    /// File to write: float32 `logits` [n, classes], and the file names in its metadata.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Either kind of model.
enum Loaded {
    Float(FloatModel),
    Quantized(QuantizedModel),
}

impl Loaded {
    fn spec(&self) -> &ModelSpec {
        match self {
            Self::Float(model) => model.spec(),
            Self::Quantized(model) => model.spec(),
        }
    }

    fn site_counts(&self) -> SiteCounts {
        match self {
            Self::Float(model) => {
                SiteCounts { float: model.model().sites.len(), ..SiteCounts::default() }
            }
            Self::Quantized(model) => model.site_counts(),
        }
    }

    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            Self::Float(model) => model.forward(images),
            Self::Quantized(model) => model.forward(images),
        }
    }
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let device = args::device(&self.device)?;
        let model = self.load(device)?;
        let (logits, names) = match (&self.images, &self.tensor) {
            (Some(folder), _) => {
                let samples = list_images(folder)?;
                let logits = self.of_images(&model, &samples)?;
                (logits, samples.into_iter().map(|sample| sample.name).collect())
            }
            (None, Some(file)) => (self.in_batches(&model, &read_input(file)?)?, Vec::new()),
            (None, None) => return Err(Failure::Usage("nothing to compute".to_owned())),
        };
        write_logits(&self.output, &logits, &names)?;
        let (count, classes) = logits.size2().map_err(Error::from)?;
        let sites = model.site_counts();
        let mut text = format!("{count} x {classes} logits in {}", self.output.display());
        if self.artifact.is_some() {
            text.push_str(&format!(", computed as {sites}"));
        }
        let json =
            json!({ "images": count, "classes": classes, "output": self.output, "sites": sites });
        output.result(text, &json)
    }

    fn load(&self, device: Device) -> Result<Loaded, Failure> {
        match (&self.checkpoint, &self.artifact) {
            (Some(folder), _) => {
                let checkpoint = Checkpoint::open(folder)?;
                Ok(Loaded::Float(FloatModel::load(&checkpoint, device)?))
            }
            (None, Some(file)) => {
                let bytes = std::fs::read(file).map_err(|e| Error::io(file, e))?;
                let artifact = Artifact::from_bytes(&file.display().to_string(), &bytes)?;
                let model = QuantizedModel::load(&artifact, device, self.executor)?;
                Ok(Loaded::Quantized(model))
            }
            (None, None) => Err(Failure::Usage("no model".to_owned())),
        }
    }

    /// Decodes and computes a batch at a time: memory stays bounded, however many images there are.
    fn of_images(&self, model: &Loaded, samples: &[Sample]) -> Result<Tensor> {
        let how = &model.spec().preprocessing;
        let batches = samples.chunks(self.batch_size).map(|samples| {
            let pixels = load_pixels(samples, how, &DecodeLimits::default())?;
            Ok(model.forward(&image_batch(&pixels)?)?.f_to_device(Device::Cpu)?)
        });
        Ok(Tensor::f_cat(&batches.collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn in_batches(&self, model: &Loaded, input: &Tensor) -> Result<Tensor> {
        let side = model.spec().preprocessing.image_size;
        let shape = input.size();
        if shape.len() != 4 || shape[0] == 0 || shape[1..] != [3, side, side] {
            let reason = format!("`{INPUT}` is {shape:?}, the model takes [n, 3, {side}, {side}]");
            return Err(Error::invalid("tensor", reason));
        }
        let batches = input.f_split(self.batch_size as i64, 0)?;
        let logits =
            batches.iter().map(|batch| Ok(model.forward(batch)?.f_to_device(Device::Cpu)?));
        Ok(Tensor::f_cat(&logits.collect::<Result<Vec<_>>>()?, 0)?)
    }
}

/// Images below a folder, sorted by folder, then by name; hidden entries and links to folders are
/// left out.
pub(super) fn list_images(root: &Path) -> Result<Vec<Sample>> {
    let mut paths = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))? {
            let entry = entry.map_err(|e| Error::io(&folder, e))?;
            let kind = entry.file_type().map_err(|e| Error::io(entry.path(), e))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if kind.is_dir() {
                folders.push(entry.path());
            } else if has_image_name(&entry.path()) {
                paths.push(entry.path());
            }
        }
    }
    if paths.is_empty() {
        let reason = format!("{} holds no JPEG, PNG or WebP files", root.display());
        return Err(Error::invalid("images", reason));
    }
    // Paths compare part by part, so that a folder's files stay together.
    paths.sort();
    let sample = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
        Sample { source: Source::File(path), name, class: 0 }
    };
    Ok(paths.into_iter().map(sample).collect())
}

fn read_input(path: &Path) -> Result<Tensor> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let refuse = |reason: String| Error::invalid("tensor", format!("{}: {reason}", path.display()));
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| refuse(format!("not a safetensors file: {error}")))?;
    let view = file.tensor(INPUT).map_err(|_| refuse(format!("holds no tensor `{INPUT}`")))?;
    if view.dtype() != Dtype::F32 {
        return Err(refuse(format!("`{INPUT}` is {}, not F32", view.dtype())));
    }
    let values = view.data().chunks_exact(size_of::<f32>());
    let values: Vec<f32> =
        values.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect();
    let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
    Ok(Tensor::f_from_slice(&values)?.f_view(shape.as_slice())?)
}

fn write_logits(path: &Path, logits: &Tensor, names: &[String]) -> Result<()> {
    let values = Vec::<f32>::try_from(logits.f_flatten(0, -1)?)?;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = logits.size().iter().map(|size| *size as usize).collect();
    let broken = |error: safetensors::SafeTensorError| Error::internal(error.to_string());
    let view = TensorView::new(Dtype::F32, shape, &bytes).map_err(broken)?;
    let metadata = (!names.is_empty())
        .then(|| HashMap::from([("files".to_owned(), json!(names).to_string())]));
    let file = safetensors::serialize([(LOGITS, view)], metadata).map_err(broken)?;
    write_atomically(path, &file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_listed_by_folder_then_name() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["a", "a-b"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
        }
        for file in ["a/2.png", "a/10.PNG", "a-b/1.jpg", "0.webp", "a/notes.txt", ".hidden.png"] {
            std::fs::write(root.path().join(file), "").unwrap();
        }
        let names = list_images(root.path()).unwrap().into_iter().map(|sample| sample.name);
        assert_eq!(names.collect::<Vec<_>>(), ["0.webp", "a/10.PNG", "a/2.png", "a-b/1.jpg"]);
    }

    #[test]
    fn a_tensor_file_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        std::fs::write(&path, "no").unwrap();
        assert!(read_input(&path).unwrap_err().to_string().contains("not a safetensors file"));
        let data = [0u8; 8];
        for (name, dtype, reason) in
            [("x", Dtype::F32, "holds no tensor"), (INPUT, Dtype::I32, "not F32")]
        {
            let view = TensorView::new(dtype, vec![2], &data).unwrap();
            std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
            assert!(read_input(&path).unwrap_err().to_string().contains(reason));
        }
    }
}
