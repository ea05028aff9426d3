//! Compilation by NVRTC.

use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};

use crate::device;

/// Where NVIDIA's Python packages have NVRTC, seen from libtorch's folder.
const PACKAGE_FOLDER: &str = "../../nvidia/cu13/lib";

/// Its libraries, the one that the other looks for first.
const LIBRARIES: [&str; 2] = ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"];

/// Values of macros by name, as many as any program has; without a name there is none.
pub(super) type Definitions = [(&'static str, i32); 11];

/// No macros.
pub(super) const PLAIN: Definitions = [("", 0); 11];

/// A kernel's source and how it is to be compiled.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// For messages.
    pub(super) name: &'static str,
    /// CUDA C++.
    pub(super) text: &'static str,
    /// Macros.
    pub(super) definitions: Definitions,
    /// Whether a multiplication and an addition may become one operation.
    pub(super) contract: bool,
}

impl Source {
    /// The program for GPUs of that compute capability.
    ///
    /// # Errors
    /// What the compiler says, or that there is none.
    pub(super) fn compile(&self, (major, minor): (i32, i32)) -> Result<Ptx, String> {
        if !is_installed() {
            return Err("NVRTC is not installed".to_owned());
        }
        let mut options =
            vec![format!("--gpu-architecture=compute_{major}{minor}"), "--std=c++17".to_owned()];
        let given = self.definitions.iter().filter(|(name, _)| !name.is_empty());
        options.extend(given.map(|(name, value)| format!("-D{name}={value}")));
        let options = CompileOptions {
            options,
            fmad: Some(self.contract),
            name: Some(format!("{}.cu", self.name)),
            ..CompileOptions::default()
        };
        compile_ptx_with_opts(self.text, options).map_err(|error| {
            if let CompileError::CompileError { log, .. } = &error {
                return log.to_string_lossy().into_owned();
            }
            error.to_string()
        })
    }
}

/// Whether NVRTC can be loaded; it is once asked for.
pub(super) fn is_installed() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // The dynamic linker finds a library that is already open by its name alone.
        if let Some(folder) = device::libtorch_folder() {
            for path in LIBRARIES.map(|name| PathBuf::from(&folder).join(PACKAGE_FOLDER).join(name))
            {
                device::open_for_good(&path);
            }
        }
        #[allow(unsafe_code, reason = "loading a library runs its initialisers")]
        // SAFETY: NVRTC's initialisers touch nothing but NVRTC.
        unsafe {
            cudarc::nvrtc::sys::is_culib_present()
        }
    })
}

/// Bytes of the argument of a kernel in a compiled program: what is handed to it by value must have as many.
#[cfg(test)]
pub(super) fn argument_bytes(program: &str, kernel: &str) -> usize {
    let (_, kernel) = program.split_once(&format!(".entry {kernel}(")).unwrap();
    let (parameter, _) = kernel.split_once(')').unwrap();
    let (_, bytes) = parameter.split_once('[').unwrap();
    bytes.split(']').next().unwrap().parse().unwrap()
}
