//! Devices: names, and the one `dlopen` that makes CUDA visible to libtorch.
//!
//! The binary is linked against libtorch's CPU side only, so that it starts on any machine. Where
//! libtorch_cuda.so lies beside it and loads, opening it registers the CUDA backend.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
use tch::{Cuda, Device};

use crate::error::{Error, Result};

/// The request field or flag that names devices.
const FIELD: &str = "device";

/// The library that every build of libtorch has, and the one that brings CUDA.
const CPU_LIBRARY: &str = "libtorch_cpu.so";
const CUDA_LIBRARY: &str = "libtorch_cuda.so";
/// What NVIDIA's driver shows where it is loaded.
const DRIVER: &str = "/proc/driver/nvidia/version";

/// What [`open_cuda_libraries`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CudaLibraries {
    /// libtorch has its CUDA side; whether there is a GPU is another question.
    Opened,
    /// It is there, and needs libraries that this machine lacks.
    Unusable,
    /// There is none.
    Missing,
}

/// Opens libtorch's CUDA side if it is installed, for the life of the process. To be called once,
/// before any other use of libtorch, which remembers for good which backends it saw first.
///
/// A CPU-only installation has the file without the libraries that it needs; that, like no file
/// at all, is logged at debug level and means CPU only.
pub fn open_cuda_libraries() -> CudaLibraries {
    let Some(path) = libtorch_folder().map(|folder| folder.join(CUDA_LIBRARY)) else {
        tracing::debug!("{CPU_LIBRARY} is not among the mapped files, so only the CPU is used");
        return CudaLibraries::Missing;
    };
    if !path.exists() {
        tracing::debug!(path = %path.display(), "no CUDA side of libtorch, so only the CPU is used");
        return CudaLibraries::Missing;
    }
    match open(&path) {
        Ok(library) => {
            // Closing it would unmap registered kernels: it stays until the process ends.
            mem::forget(library);
            tracing::debug!(path = %path.display(), "opened libtorch's CUDA side");
            CudaLibraries::Opened
        }
        Err(error) => {
            tracing::debug!(%error, "libtorch's CUDA side does not load, so only the CPU is used");
            CudaLibraries::Unusable
        }
    }
}

/// Says in the log that a process computes on the CPU although its installation is one for GPUs and
/// nobody named the CPU: otherwise only its slowness would tell.
pub fn warn_without_gpu(devices: &str, libraries: CudaLibraries) {
    let has_driver = Path::new(DRIVER).exists();
    if let Some(reason) = why_no_gpu(devices, libraries, cuda_devices(), has_driver) {
        tracing::warn!(
            devices,
            reason,
            "models run on the CPU; `--device cpu` if that is meant, `--device cuda:0` to refuse it"
        );
    }
}

fn why_no_gpu(
    devices: &str,
    libraries: CudaLibraries,
    cuda_devices: usize,
    has_driver: bool,
) -> Option<&'static str> {
    let is_auto = devices.split(',').any(|device| device.trim() == "auto");
    if !is_auto || cuda_devices > 0 {
        return None;
    }
    match libraries {
        CudaLibraries::Opened => {
            Some("libtorch sees no CUDA device: is there a driver, and a GPU?")
        }
        // Without a driver, an installation for CPUs, as scripts/setup.sh makes it.
        CudaLibraries::Unusable => has_driver
            .then_some("libtorch's CUDA side does not load: NVIDIA's libraries are missing"),
        CudaLibraries::Missing => None,
    }
}

/// Opens a library of NVIDIA's for the life of the process, if it is there.
pub(crate) fn open_for_good(path: &Path) {
    match open(path) {
        Ok(library) => mem::forget(library),
        Err(error) => tracing::debug!(%error, "a library is not there"),
    }
}

#[allow(unsafe_code, reason = "loading a library runs its initialisers")]
fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: the file is the sibling, from the same build, of the libtorch that is already
    // loaded, or belongs to NVIDIA's packages that it needs; initialisers of the former only register
    // backends with that one and expect to run this way, the latter have none of consequence.
    unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_GLOBAL) }
}

/// Where the loaded libtorch lies.
pub(crate) fn libtorch_folder() -> Option<PathBuf> {
    folder_of(CPU_LIBRARY, &fs::read_to_string("/proc/self/maps").ok()?)
}

/// The folder of a library in the text of /proc/self/maps, whose lines end with a path.
fn folder_of(library: &str, maps: &str) -> Option<PathBuf> {
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    path.filter(|path| path.file_name().is_some_and(|name| name == library))
        .find_map(|path| path.parent().map(Path::to_path_buf))
}

/// The device of `cpu`, `cuda:N` or `auto` (the first CUDA device, or else the CPU).
///
/// # Errors
/// `InvalidArgument` on `device` for any other text and for a GPU that is not there.
pub fn parse(text: &str) -> Result<Device> {
    resolve(text, cuda_devices())
}

/// The devices of a comma-separated list, in its order.
///
/// # Errors
/// As [`parse`]; also for a device that is named twice.
pub fn parse_list(text: &str) -> Result<Vec<Device>> {
    resolve_list(text, cuda_devices())
}

/// `cpu` or `cuda:N`; what [`parse`] reads.
pub fn name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Mps => "mps".to_owned(),
        Device::Vulkan => "vulkan".to_owned(),
    }
}

/// How many CUDA devices libtorch sees.
fn cuda_devices() -> usize {
    usize::try_from(Cuda::device_count()).unwrap_or(0)
}

fn resolve_list(text: &str, cuda_devices: usize) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for part in text.split(',') {
        let device = resolve(part.trim(), cuda_devices)?;
        if devices.contains(&device) {
            return Err(Error::invalid(FIELD, format!("{} is named twice", name(device))));
        }
        devices.push(device);
    }
    Ok(devices)
}

fn resolve(text: &str, cuda_devices: usize) -> Result<Device> {
    match text {
        "cpu" => return Ok(Device::Cpu),
        "auto" if cuda_devices == 0 => return Ok(Device::Cpu),
        "auto" => return Ok(Device::Cuda(0)),
        _ => {}
    }
    // Only plain digits: `usize` would also read a sign.
    let digits = text.strip_prefix("cuda:").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
    let Some(index) = digits.and_then(|digits| digits.parse::<usize>().ok()) else {
        let reason = format!("`{text}` is none of cpu, cuda:N, auto");
        return Err(Error::invalid(FIELD, reason));
    };
    if index >= cuda_devices {
        let mut reason = format!("cuda:{index} is not there: libtorch sees ");
        let _ = match cuda_devices {
            0 => write!(reason, "no CUDA device"),
            1 => write!(reason, "only cuda:0"),
            n => write!(reason, "cuda:0 to cuda:{}", n - 1),
        };
        return Err(Error::invalid(FIELD, reason));
    }
    Ok(Device::Cuda(index))
}

/// The version of CUDA that libtorch runs on, as `13.0`; `none` without a GPU.
pub fn cuda_version() -> String {
    // libtorch panics when it is asked for the version of what it does not have.
    if !Cuda::is_available() {
        return "none".to_owned();
    }
    let version = tch::utils::version_cudart();
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(result: Result<impl std::fmt::Debug>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn names_resolve_against_the_devices_that_are_there() {
        assert_eq!(resolve("cpu", 2).unwrap(), Device::Cpu);
        assert_eq!(resolve("auto", 0).unwrap(), Device::Cpu);
        assert_eq!(resolve("auto", 2).unwrap(), Device::Cuda(0));
        assert_eq!(resolve("cuda:1", 2).unwrap(), Device::Cuda(1));
        assert_eq!(parse("cpu").unwrap(), Device::Cpu);
    }

    #[test]
    fn a_cpu_that_nobody_named_is_told_of_where_there_could_be_a_gpu() {
        use CudaLibraries::{Missing, Opened, Unusable};
        let why = |devices, libraries, seen| why_no_gpu(devices, libraries, seen, true);
        assert!(why("auto", Opened, 0).is_some_and(|why| why.contains("no CUDA device")));
        assert!(why("auto", Unusable, 0).is_some_and(|why| why.contains("does not load")));
        assert_eq!(why_no_gpu("auto", Unusable, 0, false), None, "nor could there be one");
        for (devices, libraries, seen) in
            [("auto", Missing, 0), ("auto", Opened, 1), ("cpu", Opened, 0), ("cuda:0", Unusable, 0)]
        {
            assert_eq!(why(devices, libraries, seen), None, "{devices}");
        }
    }

    #[test]
    fn lists_keep_their_order_and_refuse_repetition() {
        let devices = resolve_list("cuda:1, cpu,cuda:0", 2).unwrap();
        assert_eq!(devices, [Device::Cuda(1), Device::Cpu, Device::Cuda(0)]);
        assert_eq!(
            devices.iter().map(|d| name(*d)).collect::<Vec<_>>().join(","),
            "cuda:1,cpu,cuda:0"
        );
        assert_eq!(reason(resolve_list("auto,cpu", 0)), "device: cpu is named twice");
    }

    #[test]
    fn other_names_and_absent_devices_are_refused_on_their_field() {
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:+1", "cuda:1x", "CPU", "cpu "] {
            let expected = format!("device: `{text}` is none of cpu, cuda:N, auto");
            assert_eq!(reason(resolve(text, 4)), expected);
        }
        assert_eq!(
            reason(resolve("cuda:0", 0)),
            "device: cuda:0 is not there: libtorch sees no CUDA device"
        );
        assert_eq!(
            reason(resolve("cuda:4", 4)),
            "device: cuda:4 is not there: libtorch sees cuda:0 to cuda:3"
        );
        assert!(resolve_list("", 1).is_err() && resolve_list("cpu,", 1).is_err());
    }

    #[test]
    fn the_folder_of_a_library_is_read_from_the_maps() {
        let maps = "7f00-7f01 r--p 00000000 fe:00 12   /opt/with space/lib/libtorch_cpu.so\n\
                    7f02-7f03 r--p 00000000 fe:00 13   /opt/other/libtorch_cpu.so.1\n\
                    7f04-7f05 rw-p 00000000 00:00 0    [heap]\n";
        let folder = folder_of("libtorch_cpu.so", maps).unwrap();
        assert_eq!(folder, Path::new("/opt/with space/lib"));
        assert_eq!(folder_of("libtorch_cuda.so", maps), None);
    }

    #[test]
    fn opening_cuda_is_harmless_and_finds_this_libtorch() {
        assert!(libtorch_folder().unwrap().join(CPU_LIBRARY).exists());
        let opened = open_cuda_libraries();
        assert!(opened == CudaLibraries::Opened || Cuda::device_count() <= 0);
    }
}
