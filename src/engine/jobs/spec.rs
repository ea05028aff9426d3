//! What jobs are asked to do; as JSON, what makes two requests equal.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::calib::task::QuantizeSpec;
use crate::digest::sha256_hex;
use crate::engine::names::ModelId;
use crate::engine::resources::ResourceKind;
use crate::error::{Error, Result};

/// The kinds of jobs.
const KINDS: [&str; 2] = ["quantize", "evaluate"];

/// What a job does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum JobSpec {
    /// Calibrate a checkpoint and store the result.
    Quantize(QuantizeJob),
    /// Measure a model on a data set.
    Evaluate(EvaluateJob),
}

/// A quantization to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuantizeJob {
    /// Id of the new model.
    pub model: ModelId,
    /// Name of the checkpoint.
    pub checkpoint: String,
    /// The name under which that checkpoint stays the same, if it is another one: a branch of the
    /// hub moves, a commit does not. Found when the job is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<String>,
    /// Method, options, bits, policy, seed.
    pub request: QuantizeSpec,
    /// Which images calibrate it.
    pub images: ImageChoice,
    /// Labels to keep with the model.
    pub labels: BTreeMap<String, String>,
    /// What happens once the model is stored.
    pub afterwards: Afterwards,
}

/// What happens to a model once it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Afterwards {
    /// Nothing; the first call loads it.
    Keep,
    /// It is loaded on a device.
    Load,
}

/// Which images calibrate a model.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageChoice {
    /// So many images of a data set, drawn by the request's seed.
    Drawn {
        /// Name of the data set.
        dataset: String,
        /// Number of images.
        count: usize,
    },
    /// Exactly these images of a data set.
    Listed {
        /// Name of the data set.
        dataset: String,
        /// Paths relative to its folder.
        files: Vec<String>,
    },
    /// Images that came with the request.
    Inline {
        /// sha256 of each, in order: what identifies the request.
        digests: Vec<String>,
        /// The encoded images; kept apart from the request, until the job ends.
        #[serde(skip)]
        contents: Vec<Bytes>,
    },
}

impl ImageChoice {
    /// Images that came with the request.
    pub fn inline(contents: Vec<Bytes>) -> Self {
        Self::Inline { digests: contents.iter().map(|c| sha256_hex(c)).collect(), contents }
    }
}

/// An evaluation to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvaluateJob {
    /// The model.
    pub model: ModelId,
    /// The alias that was given instead of its id. What that stood for was found when the job was
    /// accepted: it may move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<ModelId>,
    /// Name of the data set.
    pub dataset: String,
    /// Number of images to draw; `None` evaluates all.
    pub limit: Option<usize>,
    /// Seed of the draw.
    pub seed: u64,
}

impl QuantizeJob {
    /// Name of the checkpoint to open.
    pub fn source(&self) -> &str {
        self.pinned.as_deref().unwrap_or(&self.checkpoint)
    }
}

impl JobSpec {
    /// The [`JobSpec::kind`] of that name.
    ///
    /// # Errors
    /// `InvalidArgument` on `kind`.
    pub fn parse_kind(name: &str) -> Result<&'static str> {
        KINDS
            .into_iter()
            .find(|kind| *kind == name)
            .ok_or_else(|| Error::invalid("kind", format!("must be one of {}", KINDS.join(", "))))
    }

    /// `quantize` or `evaluate`.
    pub fn kind(&self) -> &'static str {
        let [quantize, evaluate] = KINDS;
        match self {
            Self::Quantize(_) => quantize,
            Self::Evaluate(_) => evaluate,
        }
    }

    /// The model that the job makes or reads.
    pub fn model(&self) -> &ModelId {
        match self {
            Self::Quantize(job) => &job.model,
            Self::Evaluate(job) => &job.model,
        }
    }

    /// The model id that nobody else may make while this job is under way.
    pub fn target(&self) -> Option<&ModelId> {
        match self {
            Self::Quantize(job) => Some(&job.model),
            Self::Evaluate(_) => None,
        }
    }

    /// Whether the job reads the checkpoint or data set of that name.
    pub fn needs(&self, kind: ResourceKind, name: &str) -> bool {
        let dataset = match self {
            Self::Evaluate(job) => Some(&job.dataset),
            Self::Quantize(job) => match (&job.images, kind) {
                (_, ResourceKind::Checkpoint) => return job.checkpoint == name,
                (ImageChoice::Drawn { dataset, .. }, _)
                | (ImageChoice::Listed { dataset, .. }, _) => Some(dataset),
                (ImageChoice::Inline { .. }, _) => None,
            },
        };
        kind == ResourceKind::Dataset && dataset.is_some_and(|dataset| dataset == name)
    }

    /// Equal for equal requests, whatever the names in them stood for by the time of each.
    ///
    /// # Errors
    /// `Internal` when the request cannot be written as JSON.
    pub fn fingerprint(&self) -> Result<String> {
        fingerprint(&match self {
            Self::Quantize(job) => Self::Quantize(QuantizeJob { pinned: None, ..job.clone() }),
            Self::Evaluate(job) => {
                let model = job.alias.as_ref().unwrap_or(&job.model).clone();
                Self::Evaluate(EvaluateJob { model, alias: None, ..job.clone() })
            }
        })
    }

    /// Equal for requests that one job answers: not for those with an alias that moved in between.
    ///
    /// # Errors
    /// As [`JobSpec::fingerprint`].
    pub fn work_fingerprint(&self) -> Result<String> {
        match self {
            Self::Quantize(_) => self.fingerprint(),
            Self::Evaluate(job) => {
                fingerprint(&Self::Evaluate(EvaluateJob { alias: None, ..job.clone() }))
            }
        }
    }

    /// The images that came with the request.
    pub fn contents(&self) -> &[Bytes] {
        match self {
            Self::Quantize(QuantizeJob {
                images: ImageChoice::Inline { contents, .. }, ..
            }) => contents,
            Self::Quantize(_) | Self::Evaluate(_) => &[],
        }
    }
}

fn fingerprint(spec: &JobSpec) -> Result<String> {
    let json = serde_json::to_vec(spec)
        .map_err(|error| Error::internal(format!("job as JSON: {error}")))?;
    Ok(sha256_hex(&json))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_evaluation_by_an_alias_is_the_request_for_the_alias_and_the_work_of_its_model() {
        let id = |name: &str| ModelId::parse(name, "model").unwrap();
        let job = |model: &str, alias: Option<&str>| {
            let (model, alias) = (id(model), alias.map(id));
            JobSpec::Evaluate(EvaluateJob {
                model,
                alias,
                dataset: "d".into(),
                limit: None,
                seed: 0,
            })
        };
        let prints = |job: JobSpec| (job.fingerprint().unwrap(), job.work_fingerprint().unwrap());
        let (by_alias, work) = prints(job("m", Some("live")));
        assert_eq!(by_alias, prints(job("live", None)).0, "before and after the look at the alias");
        assert_eq!(work, prints(job("m", None)).1);
        assert_eq!(by_alias, prints(job("n", Some("live"))).0);
        assert_ne!(work, prints(job("n", Some("live"))).1);
        assert_eq!(job("m", Some("live")).model(), &id("m"));
    }
}
