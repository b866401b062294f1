//! The runtime: which one there is, and its devices.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use kvxfer_verbs::PciAddress;

use super::api::Api;
use super::code::{INVALID_DEVICE, NO_DEVICE, Refused};
use super::cuda::CudaApi;
use super::device::Gpu;
use super::error::{GpuFault, NoGpu};
use super::hip::HipApi;
use super::host::HostApi;
use super::ipc::IpcHandle;
use super::later::{LONGEST, Later};
use crate::error::Error;

/// Whose runtime it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RuntimeKind {
    /// AMD's, by libamdhip64.
    Hip,
    /// NVIDIA's, by libcuda.
    Cuda,
    /// The stand-in, over ordinary memory.
    Host,
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hip => "HIP",
            Self::Cuda => "CUDA",
            Self::Host => "host stand-in",
        })
    }
}

/// Which runtime is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RuntimeChoice {
    /// HIP, and if that has no device CUDA. Never the stand-in: who asks for a GPU does not want to be
    /// served without one unawares.
    #[default]
    Auto,
    /// This one.
    Only(RuntimeKind),
}

/// A text that names no runtime.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no GPU runtime: there are auto, hip, cuda and host")]
pub struct NoSuchRuntime(pub String);

impl FromStr for RuntimeChoice {
    type Err = NoSuchRuntime;

    fn from_str(text: &str) -> Result<Self, NoSuchRuntime> {
        Ok(match text {
            "auto" => Self::Auto,
            "hip" => Self::Only(RuntimeKind::Hip),
            "cuda" => Self::Only(RuntimeKind::Cuda),
            "host" => Self::Only(RuntimeKind::Host),
            _ => return Err(NoSuchRuntime(text.to_owned())),
        })
    }
}

/// A GPU runtime with at least one device. Clones are the same; a process has one of each kind.
#[derive(Clone)]
pub struct GpuRuntime(Arc<Loaded>);

struct Loaded {
    api: Arc<Api>,
    gpus: Vec<Gpu>,
}

impl GpuRuntime {
    /// The runtime of this process. What is not there is looked for again the next time.
    ///
    /// # Errors
    ///
    /// [`Error::NoGpu`] says what is missing; [`Error::Gpu`] if a device does not answer.
    pub fn open(choice: RuntimeChoice) -> Result<Self, Error> {
        let kind = match choice {
            RuntimeChoice::Only(kind) => kind,
            RuntimeChoice::Auto => {
                let hip = match Self::open(RuntimeChoice::Only(RuntimeKind::Hip)) {
                    Err(Error::NoGpu(why)) => why,
                    other => return other,
                };
                return match Self::open(RuntimeChoice::Only(RuntimeKind::Cuda)) {
                    Err(Error::NoGpu(cuda)) => Err(Error::NoGpu(NoGpu::Neither {
                        hip: Box::new(hip),
                        cuda: Box::new(cuda),
                    })),
                    other => other,
                };
            }
        };
        static HIP: OnceLock<GpuRuntime> = OnceLock::new();
        static CUDA: OnceLock<GpuRuntime> = OnceLock::new();
        static HOST: OnceLock<GpuRuntime> = OnceLock::new();
        let place = match kind {
            RuntimeKind::Hip => &HIP,
            RuntimeKind::Cuda => &CUDA,
            RuntimeKind::Host => &HOST,
        };
        if let Some(runtime) = place.get() {
            return Ok(runtime.clone());
        }
        let api = match kind {
            RuntimeKind::Hip => Api::Hip(HipApi::load()?),
            RuntimeKind::Cuda => Api::Cuda(CudaApi::load()?),
            RuntimeKind::Host => Api::Host(HostApi::new()),
        };
        let runtime = Self::with(api)?;
        Ok(place.get_or_init(|| runtime).clone())
    }

    pub(super) fn with(api: Api) -> Result<Self, Error> {
        let api = Arc::new(api);
        let none = |refused| NoGpu::NoDevice {
            runtime: api.kind(),
            library: api.path().into(),
            refused,
        };
        let count = match api.device_count() {
            Ok(0) => return Err(none(None).into()),
            Ok(count) => count,
            Err(refused) => {
                return Err(NoGpu::starting(api.kind(), api.path(), refused).into());
            }
        };
        let mut gpus = Vec::new();
        let later = Later::new(LONGEST);
        for ordinal in 0..count {
            let info = api.info(ordinal).map_err(GpuFault::Call)?;
            gpus.push(Gpu::new(Arc::clone(&api), info, Arc::clone(&later)));
        }
        Ok(Self(Arc::new(Loaded { api, gpus })))
    }

    /// Whose it is.
    #[must_use]
    pub fn kind(&self) -> RuntimeKind {
        self.0.api.kind()
    }

    /// The file of its library.
    #[must_use]
    pub fn library(&self) -> &Path {
        self.0.api.path()
    }

    /// The devices that this process sees, in the order that it sees them.
    #[must_use]
    pub fn gpus(&self) -> &[Gpu] {
        &self.0.gpus
    }

    /// A device by its place in this process's order.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NoSuchDevice`].
    pub fn gpu(&self, ordinal: u32) -> Result<&Gpu, Error> {
        let gpu = self.0.gpus.get(ordinal as usize);
        gpu.ok_or_else(|| self.no_such(ordinal.to_string()))
    }

    /// A device by its PCI address, which is the same in every process. Of the parts of a divided GPU,
    /// which share one, it is the first.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NoSuchDevice`].
    pub fn gpu_at(&self, pci: PciAddress) -> Result<&Gpu, Error> {
        let gpu = self.0.gpus.iter().find(|gpu| gpu.info().pci == pci);
        gpu.ok_or_else(|| self.no_such(pci.to_string()))
    }

    /// The device whose memory a handle names, if this process sees it.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NoSuchDevice`].
    pub fn gpu_of(&self, handle: &IpcHandle) -> Result<&Gpu, Error> {
        let uuid = handle.uuid();
        let gpu = self.0.gpus.iter().find(|gpu| gpu.info().uuid == uuid);
        gpu.ok_or_else(|| self.no_such(handle.pci().to_string()))
    }

    fn no_such(&self, asked: String) -> Error {
        let seen = self.0.gpus.iter().map(|gpu| gpu.info().pci.to_string());
        let seen = seen.collect();
        GpuFault::NoSuchDevice { asked, seen }.into()
    }
}

impl fmt::Debug for GpuRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path) = (self.kind(), self.library().display());
        write!(f, "{kind} by {path} with {} devices", self.0.gpus.len())
    }
}

impl NoGpu {
    /// What it means that a runtime did not start.
    pub(super) fn starting(runtime: RuntimeKind, library: &Path, refused: Refused) -> Self {
        let library = library.into();
        match refused.code.number {
            // HIP 5 says that 0 is no device, where it means that there is none.
            NO_DEVICE | INVALID_DEVICE => Self::NoDevice {
                runtime,
                library,
                refused: Some(refused),
            },
            _ => Self::Init { library, refused },
        }
    }
}
