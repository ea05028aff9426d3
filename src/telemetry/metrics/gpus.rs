//! What NVIDIA's management library (NVML) tells of the machine's GPUs.

use std::ffi::OsStr;
use std::sync::OnceLock;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::samples::Samples;
use super::table;

/// The library as the driver installs it; the name without a number comes with the toolkit only.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// Memory and utilization of every GPU that the driver shows this process; nothing where there is no
/// driver. Takes milliseconds: not for a thread that others wait for.
pub fn sample() -> Samples {
    let mut samples = Samples::default();
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    let Some(nvml) = NVML.get_or_init(|| {
        let opened = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init();
        opened.inspect_err(|error| tracing::debug!(%error, "no figures of GPUs")).ok()
    }) else {
        return samples;
    };
    for index in 0..nvml.device_count().unwrap_or(0) {
        if let Err(error) = sample_one(nvml, index, &mut samples) {
            tracing::debug!(index, %error, "no figures of a GPU");
        }
    }
    samples
}

fn sample_one(nvml: &Nvml, index: u32, samples: &mut Samples) -> Result<(), NvmlError> {
    let gpu = nvml.device_by_index(index)?;
    let (uuid, memory) = (gpu.uuid()?, gpu.memory_info()?);
    samples.add(&table::GPU_MEMORY_USED, &[&uuid], memory.used as f64);
    samples.add(&table::GPU_MEMORY_TOTAL, &[&uuid], memory.total as f64);
    // Not told of a GPU that is partitioned (MIG).
    if let Ok(share) = gpu.utilization_rates() {
        samples.add(&table::GPU_UTILIZATION, &[&uuid], f64::from(share.gpu) / 100.0);
    }
    Ok(())
}
