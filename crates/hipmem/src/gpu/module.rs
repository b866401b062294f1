//! Code for a GPU: loading it, and launching its kernels.

use std::ffi::CString;
use std::fmt;
use std::sync::Arc;

use super::api::Launch;
use super::device::{Gpu, same};
use super::error::GpuFault;
use super::stream::{Pending, Stream};
use crate::error::Error;

/// Threads of a workgroup that every GPU takes.
const MAX_BLOCK: u32 = 1024;

/// Code that is loaded on a GPU: a code object (AMD), PTX or a cubin (NVIDIA), a shared object (the
/// stand-in). Clones are the same.
#[derive(Clone)]
pub struct Module(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    raw: u64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let unloaded = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was loaded for this value, and whoever launched its kernels held it until they
            // had ended.
            Ok(unsafe { self.gpu.api().module_unload(self.raw) }?)
        });
        if let Err(error) = unloaded {
            tracing::warn!(%error, "code stays loaded");
        }
    }
}

/// A kernel of a module, which it keeps loaded.
///
/// A kernel takes one parameter: a structure, by value. On the stand-in it is a function
/// `void name(const void *args, uint32_t grid, uint32_t block)`, which does the work of all threads.
#[derive(Clone)]
pub struct Kernel {
    module: Module,
    raw: u64,
    name: Arc<str>,
}

impl Module {
    /// Loads code.
    ///
    /// # Safety
    ///
    /// The bytes come from a compiler for this kind of device (or are PTX text): loaders do not check them
    /// whole. On the stand-in they are a shared object, whose initialisers run.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Module`], with what the compiler of PTX said.
    pub unsafe fn load(gpu: &Gpu, image: &[u8]) -> Result<Self, Error> {
        let _current = gpu.enter()?;
        // SAFETY: the caller knows where the bytes are from.
        let loaded = unsafe { gpu.api().module_load(image) };
        let raw = loaded.map_err(|fault| GpuFault::Module {
            arch: gpu.info().arch.clone(),
            refused: fault.refused,
            log: fault.log,
        })?;
        let gpu = gpu.clone();
        Ok(Self(Arc::new(Inner { gpu, raw })))
    }

    /// One of its kernels.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NoKernel`].
    pub fn kernel(&self, name: &str) -> Result<Kernel, Error> {
        let gpu = &self.0.gpu;
        let _current = gpu.enter()?;
        // No kernel's name has a zero byte: what comes after one is not looked for.
        let bytes: Vec<u8> = name.bytes().take_while(|b| *b != 0).collect();
        let c = CString::new(bytes).unwrap_or_default();
        // SAFETY: the module is held.
        let found = unsafe { gpu.api().module_function(self.0.raw, &c) };
        let raw = found.map_err(|refused| GpuFault::NoKernel {
            name: name.to_owned(),
            refused,
        })?;
        Ok(Kernel {
            module: self.clone(),
            raw,
            name: name.into(),
        })
    }

    /// The device that it is loaded on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }
}

impl Kernel {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its module.
    #[must_use]
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// Registers that the driver gives each of its threads; `None` where it does not say.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn registers(&self) -> Result<Option<u32>, Error> {
        let gpu = self.module.gpu();
        let _current = gpu.enter()?;
        // SAFETY: the function is of the module, which is held.
        Ok(unsafe { gpu.api().function_registers(self.raw) }?)
    }

    /// Puts a launch of `grid` workgroups of `block` threads on a stream. The kernel's code stays loaded until it
    /// has ended.
    ///
    /// # Safety
    ///
    /// - `args` has the bytes of the one parameter that the kernel takes, all of them;
    /// - until the kernel has ended, all memory that it touches is there, reachable by the device, and not
    ///   covered by a Rust reference;
    /// - the kernel ends.
    ///
    /// # Errors
    ///
    /// [`GpuFault::LaunchSize`], [`GpuFault::OtherStreamDevice`]; [`Error::Gpu`].
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        grid: u32,
        block: u32,
        args: &[u8],
    ) -> Result<Pending, Error> {
        same("the kernel", self.module.gpu(), stream.gpu())?;
        if grid == 0 || block == 0 || block > MAX_BLOCK {
            return Err(GpuFault::LaunchSize { grid, block }.into());
        }
        let keep = vec![Arc::clone(&self.module.0) as Arc<dyn std::any::Any + Send + Sync>];
        stream.put(keep, |raw| {
            // SAFETY: `keep` has the module; of the rest the caller takes care.
            unsafe { self.put(raw, grid, block, args) }
        })
    }

    /// A launch as part of what [`Stream::put`] puts there. The device is current.
    ///
    /// # Safety
    ///
    /// As for [`launch`](Self::launch), and the module is held until the kernel has ended.
    pub(super) unsafe fn put(
        &self,
        stream: u64,
        grid: u32,
        block: u32,
        args: &[u8],
    ) -> Result<(), Error> {
        let launch = Launch {
            function: self.raw,
            grid,
            block,
            stream,
            args,
        };
        // SAFETY: the function is of the module, which is held; of the rest the caller takes care.
        Ok(unsafe { self.module.gpu().api().launch(&launch) }?)
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "code on {:?}", self.0.gpu)
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {} on {:?}", self.name, self.module.0.gpu)
    }
}
