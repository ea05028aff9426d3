//! A GPU with its compiled kernels.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg,
};
use tch::{Device, Kind, Tensor};

use super::check;
use super::compile::{Definitions, Source, is_installed};
use super::quantize;
use crate::device;
use crate::error::{Error, Result};
use crate::telemetry::metrics;

/// GPUs of one process, at most.
const MAX_GPUS: usize = 64;

/// The first compute capability with asynchronous copies and integer products as the kernels use them.
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// Constants that are kept at once; a calibration that tries grids has some thousands.
const MAX_CONSTANTS: usize = 1024;

/// Threads of a warp.
pub(super) const WARP: i64 = 32;

/// Shared memory that a block may use without asking.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

/// Lets kernels take structures by value.
macro_rules! by_value {
    ($($name:ident),*) => {
        $(
            #[allow(unsafe_code, reason = "a kernel takes it by value")]
            // SAFETY: plain numbers in C's layout.
            unsafe impl cudarc::driver::DeviceRepr for $name {}
        )*
    };
}
pub(super) use by_value;

/// Where a tensor's values are; 0 for none.
pub(super) fn address(x: Option<&Tensor>) -> u64 {
    x.map_or(0, |x| x.data_ptr() as u64)
}

pub(super) fn to_i32(n: i64) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::internal(format!("{n} is too large for a kernel")))
}

pub(super) fn to_u32(n: i64) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::internal(format!("{n} is too large for a kernel")))
}

/// How many parts of that size cover `n`.
pub(super) fn parts(n: i64, size: i64) -> i64 {
    (n + size - 1) / size
}

/// A GPU whose kernels compile and compute what they should.
pub struct Gpu {
    device: Device,
    stream: Arc<CudaStream>,
    capability: (i32, i32),
    takes_tokens: bool,
    takes_steps: bool,
    kernels: Mutex<Kernels>,
    constants: Mutex<HashMap<Vec<u32>, Tensor>>,
}

/// What has been compiled, by name and macros.
#[derive(Default)]
struct Kernels {
    programs: HashMap<(&'static str, Definitions), Arc<CudaModule>>,
    functions: HashMap<(&'static str, Definitions), CudaFunction>,
}

/// Where and how a kernel runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    /// Blocks.
    pub(super) grid: (u32, u32, u32),
    /// Threads of a block.
    pub(super) threads: u32,
    /// Shared memory of a block in bytes.
    pub(super) shared: u32,
}

impl Gpu {
    /// The kernels of the device where `x` is; `None` on the CPU, and where there are none.
    pub fn of(x: &Tensor) -> Option<&'static Self> {
        Self::on(x.device())
    }

    /// The kernels of a device, compiled and checked at the first call.
    pub fn on(device: Device) -> Option<&'static Self> {
        static GPUS: [OnceLock<Option<Gpu>>; MAX_GPUS] = [const { OnceLock::new() }; MAX_GPUS];
        let Device::Cuda(index) = device else { return None };
        let slot = GPUS.get(index)?;
        slot.get_or_init(|| {
            Self::open(index)
                .inspect_err(|reason| {
                    let device = device::name(device);
                    tracing::warn!(%device, %reason, "no kernels for this GPU: libtorch computes");
                    metrics::gpu_fallback();
                })
                .ok()
        })
        .as_ref()
    }

    fn open(index: usize) -> Result<Self, String> {
        #[allow(unsafe_code, reason = "loading a library runs its initialisers")]
        // SAFETY: the driver's library is open already where libtorch sees a GPU.
        let has_driver = unsafe { cudarc::driver::sys::is_culib_present() };
        if !has_driver {
            return Err("the CUDA driver is not installed".to_owned());
        }
        if !is_installed() {
            return Err("NVRTC is not installed".to_owned());
        }
        let failed = |error: DriverError| error.to_string();
        let context = CudaContext::new(index).map_err(failed)?;
        let capability = context.compute_capability().map_err(failed)?;
        if capability < MIN_CAPABILITY {
            let ((major, minor), (least, _)) = (capability, MIN_CAPABILITY);
            return Err(format!("its compute capability is {major}.{minor}, {least}.0 is needed"));
        }
        let mut gpu = Self {
            device: Device::Cuda(index),
            stream: context.default_stream(),
            capability,
            takes_tokens: false,
            takes_steps: false,
            kernels: Mutex::default(),
            constants: Mutex::default(),
        };
        check::run(&gpu).map_err(|error| error.to_string())?;
        // Without these the others still do.
        gpu.takes_tokens = gpu.passes("attention of tokens", check::tokens::run);
        gpu.takes_steps = gpu.passes("softmax on stairs", check::stepped::run);
        Ok(gpu)
    }

    /// Whether a check succeeds of kernels for what goes step by step without them.
    fn passes(&self, what: &str, check: impl FnOnce(&Self) -> Result<()>) -> bool {
        let checked = check(self).inspect_err(|reason| {
            let device = device::name(self.device);
            tracing::warn!(%device, %reason, what, "no kernels for this on this GPU: it goes step by step");
            metrics::gpu_fallback();
        });
        checked.is_ok()
    }

    /// Whether its kernels for an attention on grids of tokens ([`Gpu::token_codes`], [`Gpu::round_heads`]) compile
    /// and compute what they should.
    pub fn takes_tokens(&self) -> bool {
        self.takes_tokens
    }

    /// Whether [`Gpu::stepped_softmax`] compiles and gives the bits that it should.
    pub fn takes_steps(&self) -> bool {
        self.takes_steps
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether a tensor, if there is one, has so many values of that kind on this GPU.
    pub(super) fn fits(&self, x: Option<&Tensor>, kind: Kind, count: i64) -> bool {
        x.is_none_or(|x| x.numel() as i64 == count && x.kind() == kind && x.device() == self.device)
    }

    /// A function of a program that is compiled when it is first asked for; its blocks may use `shared`
    /// bytes of memory.
    pub(super) fn function(
        &self,
        source: &Source,
        name: &'static str,
        shared: u32,
    ) -> Result<CudaFunction> {
        let key = (name, source.definitions);
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = kernels.functions.get(&key) {
            return Ok(function.clone());
        }
        let failed = |reason: String| Error::internal(format!("kernel {key:?}: {reason}"));
        let program = (source.name, source.definitions);
        let module = match kernels.programs.get(&program) {
            Some(module) => Arc::clone(module),
            None => {
                let compiled = source.compile(self.capability).map_err(failed)?;
                let module = self.stream.context().load_module(compiled);
                let module = module.map_err(|error| failed(error.to_string()))?;
                kernels.programs.insert(program, Arc::clone(&module));
                module
            }
        };
        let load = || -> Result<CudaFunction, DriverError> {
            let function = module.load_function(name)?;
            if shared > PLAIN_SHARED_BYTES {
                let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                function.set_attribute(attribute, i32::try_from(shared).unwrap_or(i32::MAX))?;
            }
            Ok(function)
        };
        let function = load().map_err(|error| failed(error.to_string()))?;
        kernels.functions.insert(key, function.clone());
        Ok(function)
    }

    /// Runs a kernel behind whatever libtorch has queued.
    ///
    /// # Safety
    /// `arguments` must be what the kernel takes, its pointers those of live tensors on this GPU of the
    /// sizes that it expects.
    #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
    pub(super) unsafe fn launch<A: DeviceRepr>(
        &self,
        function: &CudaFunction,
        launch: Launch,
        arguments: &A,
    ) -> Result<()> {
        let Launch { grid, threads, shared } = launch;
        let config =
            LaunchConfig { grid_dim: grid, block_dim: (threads, 1, 1), shared_mem_bytes: shared };
        // SAFETY: the caller's promise. Memory that libtorch frees meanwhile is only given to work that
        // comes later on the same stream.
        unsafe { self.stream.launch_builder(function).arg(arguments).launch(config) }
            .map_err(|error| Error::internal(format!("a kernel did not start: {error}")))?;
        Ok(())
    }

    /// Values that many calls need, kept on the GPU for a while.
    pub(super) fn constant<T: quantize::Constant>(&self, values: &[T]) -> Result<Tensor> {
        let mut constants = self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = std::iter::once(T::WIDTH);
        let key: Vec<u32> = kind.chain(values.iter().map(T::bits)).collect();
        if let Some(tensor) = constants.get(&key) {
            return Ok(tensor.shallow_clone());
        }
        let tensor = Tensor::f_from_slice(values)?.f_to_device(self.device)?;
        if constants.len() >= MAX_CONSTANTS {
            // Whoever uses one has a reference to it.
            constants.clear();
        }
        constants.insert(key, tensor.shallow_clone());
        Ok(tensor)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).finish_non_exhaustive()
    }
}
