//! Models ready to run on a device: quantized ones from an artifact alone, float ones from a
//! checkpoint.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::artifact::Artifact;
use crate::device;
use crate::error::{Error, Result};
use crate::exec::{
    Backend, Cpu, Cuda, Float, Integer, IntegerOnGpu, IntegerSites, Kernels, Packer, Simulated,
    SiteCounts, WeightSource,
};
use crate::kernels::Workers;
use crate::kernels::cuda::Gpu;
use crate::model::{Checkpoint, Model, ModelSpec};
use crate::nn::{Operand, WeightEdits, Weights};
use crate::quant::QuantPlan;

/// A quantized model: weights, restored quantizers, the backend's executor.
#[derive(Debug)]
pub struct QuantizedModel {
    model: Model,
    plan: QuantPlan,
    arithmetic: Arithmetic,
    device: Device,
    resident_bytes: u64,
}

/// A model of which several threads run forwards.
struct Shared<'a>(&'a Model, &'a QuantPlan);

#[allow(unsafe_code, reason = "tch does not say that several threads may read a tensor")]
// SAFETY: a forward only reads what units and quantizers hold, as their traits demand, and libtorch's
// tensors may be read by several threads: it counts the references to them atomically.
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// The whole: closures would capture its parts.
    fn get(&self) -> &Self {
        self
    }
}

/// What a forward computes with.
#[derive(Debug)]
enum Arithmetic {
    Float,
    Simulated,
    /// The model has no float weights where these are packed.
    Integer(IntegerSites<Cpu>),
    /// The same on a GPU.
    IntegerOnGpu(&'static Gpu, IntegerSites<Cuda>),
}

impl QuantizedModel {
    /// Builds the model of an artifact on a device.
    ///
    /// `Backend::Float` runs the stored weights with float activations ("weights only").
    /// `Backend::Integer` needs kernels for the device; without them the model is simulated, with a
    /// warning.
    ///
    /// # Errors
    /// `CorruptArtifact` when the artifact contradicts itself; `Device` when memory is short.
    pub fn load(artifact: &Artifact, device: Device, backend: Backend) -> Result<Self> {
        let spec = Arc::new(artifact.header.model.clone());
        let weights = artifact.weights()?.to_device(device)?;
        // The digest was right, so a misfit is a damaged or foreign header, not the caller's fault.
        let model =
            Model::build(&spec, &weights).map_err(|e| Error::corrupt("artifact", e.to_string()))?;
        let plan = artifact.plan(&model, device)?;
        let arithmetic = match backend {
            Backend::Float => Arithmetic::Float,
            Backend::Integer => match (device, Gpu::on(device)) {
                (Device::Cpu, _) => {
                    return Self::pack(model, (plan, weights), device, Arithmetic::Integer);
                }
                (_, Some(gpu)) => {
                    let arithmetic = |sites| Arithmetic::IntegerOnGpu(gpu, sites);
                    return Self::pack(model, (plan, weights), device, arithmetic);
                }
                (_, None) => {
                    let device = device::name(device);
                    tracing::warn!(%device, "no integer kernels for this device: models are simulated");
                    Arithmetic::Simulated
                }
            },
            Backend::Simulated => Arithmetic::Simulated,
        };
        Ok(Self { model, plan, arithmetic, device, resident_bytes: bytes_of(&weights) })
    }

    /// Packs the weights of `model` and builds it anew without their float values.
    fn pack<K: Kernels>(
        model: Model,
        (plan, weights): (QuantPlan, Weights),
        device: Device,
        arithmetic: impl FnOnce(IntegerSites<K>) -> Arithmetic,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let side = model.spec.preprocessing.image_size;
        // Only which forms there are is looked at, which no pixel changes.
        let image = Tensor::f_zeros([1, 3, side, side], (Kind::Float, device))?;
        let mut packer = Packer::<K>::new(&plan);
        let _logits = model.forward(&mut packer, &image)?;
        let sites = packer.finish();
        let absent = Tensor::f_full([1], f64::NAN, (Kind::Float, device))?;
        let mut edits = WeightEdits::new();
        for site in model.sites.iter().filter(|site| sites.is_packed(site)) {
            let name = format!("{}.weight", site.path);
            let weight =
                weights.find(&name).ok_or_else(|| Error::internal(format!("{name} is missing")))?;
            // The shape of the weight, and one value behind it.
            edits.insert(name, absent.f_expand(weight.size(), false)?);
        }
        let kept: u64 = weights
            .iter()
            .filter(|(name, _)| !edits.contains_key(*name))
            .map(|(_, x)| size(x))
            .sum();
        let model = Model::build(&model.spec, &weights.with(&edits))?;
        let resident_bytes = kept + sites.packed_bytes();
        Ok(Self { model, plan, arithmetic: arithmetic(sites), device, resident_bytes })
    }

    /// Logits float32 [n, classes] of normalised images float32 [n, 3, h, w] (any device).
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let images = images.f_to_device(self.device)?;
        match &self.arithmetic {
            Arithmetic::Float => self.model.forward(&mut Float, &images),
            Arithmetic::Simulated => {
                self.model.forward(&mut Simulated::new(&self.plan, WeightSource::Decoded), &images)
            }
            Arithmetic::Integer(sites) => self.forward_in_integers(sites, &images),
            Arithmetic::IntegerOnGpu(gpu, sites) => {
                self.model.forward(&mut IntegerOnGpu::new(gpu, &self.plan, sites), &images)
            }
        }
    }

    /// Each thread takes some of the images whenever it is done with others: what it computes stays in its
    /// caches, and none waits for another within a forward. Threads beyond the images share the work of one.
    fn forward_in_integers(&self, sites: &IntegerSites<Cpu>, images: &Tensor) -> Result<Tensor> {
        let workers = Workers::shared();
        let count = images.size().first().copied().unwrap_or(0);
        let parts = images.f_split_with_sizes(part_sizes(count, workers.threads()), 0)?;
        let shared = Shared(&self.model, &self.plan);
        let logits = workers.divide(parts, |images| {
            let _guard = tch::no_grad_guard(); // of each thread
            let Shared(model, plan) = *shared.get();
            model.forward(&mut Integer::new(plan, sites), &images)
        });
        Ok(Tensor::f_cat(&logits.into_iter().collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// How many products are computed in which arithmetic.
    pub fn site_counts(&self) -> SiteCounts {
        match &self.arithmetic {
            Arithmetic::Integer(sites) => return sites.counts(),
            Arithmetic::IntegerOnGpu(_, sites) => return sites.counts(),
            Arithmetic::Float | Arithmetic::Simulated => {}
        }
        let mut counts = SiteCounts::default();
        for site in &self.model.sites {
            let quantized = |operand| self.plan.get(site.id, operand).is_some();
            let rounded = match self.arithmetic {
                // Stored weights are rounded, activations are not.
                Arithmetic::Float => !site.role.is_matmul() && quantized(Operand::Rhs),
                Arithmetic::Simulated | Arithmetic::Integer(_) | Arithmetic::IntegerOnGpu(..) => {
                    quantized(Operand::Lhs) || quantized(Operand::Rhs)
                }
            };
            let count = if rounded { &mut counts.simulated } else { &mut counts.float };
            *count += 1;
        }
        counts
    }

    /// The architecture over the decoded weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The restored quantizers.
    pub fn plan(&self) -> &QuantPlan {
        &self.plan
    }

    /// Bytes of parameters held on the device.
    pub fn resident_bytes(&self) -> u64 {
        self.resident_bytes
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.model.spec
    }
}

/// A checkpoint executed in float32: the reference of every comparison.
#[derive(Debug)]
pub struct FloatModel {
    model: Model,
    device: Device,
}

impl FloatModel {
    /// Builds a checkpoint's model on a device.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub fn load(checkpoint: &Checkpoint, device: Device) -> Result<Self> {
        let weights = checkpoint.weights.to_device(device)?;
        Ok(Self { model: Model::build(&checkpoint.spec, &weights)?, device })
    }

    /// Logits float32 [n, classes] of normalised images float32 [n, 3, h, w] (any device).
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        self.model.forward(&mut Float, &images.f_to_device(self.device)?)
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The architecture over its weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.model.spec
    }
}

/// How many of `count` images each part has that threads take one after the other: two for each thread,
/// because processors that others use, too, are not equally fast. Larger ones come first, so that all threads
/// end together where they are.
fn part_sizes(count: i64, threads: usize) -> Vec<i64> {
    let parts = (2 * i64::try_from(threads).unwrap_or(1)).min(count).max(1);
    (0..parts).map(|part| count / parts + i64::from(part < count % parts)).collect()
}

fn bytes_of(weights: &Weights) -> u64 {
    weights.iter().map(|(_, tensor)| size(tensor)).sum()
}

fn size(tensor: &Tensor) -> u64 {
    (tensor.numel() * if tensor.kind() == Kind::Float { 4 } else { 1 }) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time until all parts are done if an image takes 1 on every thread.
    fn end(sizes: &[i64], threads: usize) -> i64 {
        let mut free = vec![0; threads];
        for size in sizes {
            let first = free.iter_mut().min().unwrap();
            *first += size;
        }
        free.into_iter().max().unwrap()
    }

    #[test]
    fn parts_end_together_on_equal_threads() {
        for threads in [1, 2, 3, 4, 16] {
            for count in 1..=100 {
                let sizes = part_sizes(count, threads);
                assert_eq!(sizes.iter().sum::<i64>(), count);
                assert!(sizes.iter().all(|size| *size > 0) && sizes.len() <= 2 * threads);
                let least = (count as usize).div_ceil(threads) as i64;
                assert_eq!(end(&sizes, threads), least, "{count} on {threads}: {sizes:?}");
            }
        }
        assert_eq!(part_sizes(0, 2), [0]);
    }
}
