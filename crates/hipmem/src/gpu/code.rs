//! What a GPU runtime answers with: a number, and its own words for it.

use std::fmt;

use super::runtime::RuntimeKind;
use super::sys::cuda_types as cuda;

/// A GPU runtime's error code with its name and words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuCode {
    /// Whose code it is.
    pub runtime: RuntimeKind,
    /// The number. HIP and CUDA number what they have in common alike.
    pub number: u32,
    /// Its name, such as `hipErrorOutOfMemory`; empty where the runtime has none.
    pub name: String,
    /// The runtime's words.
    pub words: String,
}

impl fmt::Display for GpuCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name.is_empty() {
            true => write!(f, "code {}", self.number)?,
            false => write!(f, "{} ({})", self.name, self.number)?,
        }
        // HIP's words are at times the name once more.
        match self.words.is_empty() || self.words == self.name {
            true => Ok(()),
            false => write!(f, ", {:?}", self.words),
        }
    }
}

/// A call that a runtime has refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {code}{}", fix(code))]
pub struct Refused {
    /// The function.
    pub call: &'static str,
    /// Its answer.
    pub code: GpuCode,
}

// Numbers that HIP and CUDA share, and that the host stand-in uses.
pub(super) const INVALID_VALUE: u32 = cuda::CUDA_ERROR_INVALID_VALUE.0;
pub(super) const OUT_OF_MEMORY: u32 = cuda::CUDA_ERROR_OUT_OF_MEMORY.0;
pub(super) const INVALID_DEVICE_POINTER: u32 =
    super::sys::hip_types::hipErrorInvalidDevicePointer.0;
pub(super) const NO_DEVICE: u32 = cuda::CUDA_ERROR_NO_DEVICE.0;
pub(super) const INVALID_DEVICE: u32 = cuda::CUDA_ERROR_INVALID_DEVICE.0;
pub(super) const INVALID_IMAGE: u32 = cuda::CUDA_ERROR_INVALID_IMAGE.0;
pub(super) const NO_BINARY: u32 = cuda::CUDA_ERROR_NO_BINARY_FOR_GPU.0;
pub(super) const PEER_UNSUPPORTED: u32 = cuda::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED.0;
pub(super) const UNSUPPORTED_PTX: u32 = cuda::CUDA_ERROR_UNSUPPORTED_PTX_VERSION.0;
pub(super) const INVALID_HANDLE: u32 = cuda::CUDA_ERROR_INVALID_HANDLE.0;
pub(super) const NOT_FOUND: u32 = cuda::CUDA_ERROR_NOT_FOUND.0;
pub(super) const NOT_READY: u32 = cuda::CUDA_ERROR_NOT_READY.0;
pub(super) const ILLEGAL_ADDRESS: u32 = cuda::CUDA_ERROR_ILLEGAL_ADDRESS.0;
pub(super) const PEER_ALREADY: u32 = cuda::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED.0;
pub(super) const ALREADY_REGISTERED: u32 = cuda::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED.0;
pub(super) const NOT_PERMITTED: u32 = cuda::CUDA_ERROR_NOT_PERMITTED.0;
pub(super) const NOT_SUPPORTED: u32 = cuda::CUDA_ERROR_NOT_SUPPORTED.0;
const SYSTEM_NOT_READY: u32 = cuda::CUDA_ERROR_SYSTEM_NOT_READY.0;
const DRIVER_MISMATCH: u32 = cuda::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH.0;
const NO_COMPAT: u32 = cuda::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE.0;

/// What to do about a code, where that is known.
pub(super) fn fix(code: &GpuCode) -> &'static str {
    match code.number {
        OUT_OF_MEMORY => {
            ": ask for less, or see who holds the device's memory (rocm-smi, nvidia-smi)"
        }
        INVALID_DEVICE_POINTER => ": the pointer is not, or no longer, memory of this device",
        NO_BINARY => ": the code has no part for this GPU's architecture",
        PEER_UNSUPPORTED => {
            ": these two GPUs have no path to each other's memory: see rocm-smi --showtopo or nvidia-smi topo -p2p r"
        }
        UNSUPPORTED_PTX => ": the driver is older than the PTX: install a newer driver",
        ILLEGAL_ADDRESS => {
            ": a kernel touched memory that is not there; this process's GPU context is lost"
        }
        ALREADY_REGISTERED => ": the engine, or another library, has pinned this memory already",
        SYSTEM_NOT_READY => {
            ": start the service that sets up the links between GPUs (nvidia-fabricmanager)"
        }
        DRIVER_MISMATCH => {
            ": libcuda and the kernel's driver are of different versions: install one of the other's, or restart"
        }
        NO_COMPAT => {
            ": the forward compatibility libcuda does not serve this GPU: take it from LD_LIBRARY_PATH"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::super::sys::hip_types as hip;
    use super::*;

    #[test]
    fn hip_and_cuda_number_alike_what_is_looked_at() {
        for (ours, hip) in [
            (INVALID_VALUE, hip::hipErrorInvalidValue),
            (OUT_OF_MEMORY, hip::hipErrorOutOfMemory),
            (NO_DEVICE, hip::hipErrorNoDevice),
            (INVALID_DEVICE, hip::hipErrorInvalidDevice),
            (INVALID_IMAGE, hip::hipErrorInvalidImage),
            (NO_BINARY, hip::hipErrorNoBinaryForGpu),
            (PEER_UNSUPPORTED, hip::hipErrorPeerAccessUnsupported),
            (INVALID_HANDLE, hip::hipErrorInvalidHandle),
            (NOT_FOUND, hip::hipErrorNotFound),
            (NOT_READY, hip::hipErrorNotReady),
            (ILLEGAL_ADDRESS, hip::hipErrorIllegalAddress),
            (PEER_ALREADY, hip::hipErrorPeerAccessAlreadyEnabled),
            (ALREADY_REGISTERED, hip::hipErrorHostMemoryAlreadyRegistered),
            (NOT_SUPPORTED, hip::hipErrorNotSupported),
        ] {
            assert_eq!(ours, hip.0);
        }
    }

    #[test]
    fn a_code_is_told_with_name_number_words_and_fix_once() {
        let code = |name: &str, words: &str| GpuCode {
            runtime: RuntimeKind::Cuda,
            number: 2,
            name: name.into(),
            words: words.into(),
        };
        let refused = |code| {
            Refused {
                call: "cuMemAlloc",
                code,
            }
            .to_string()
        };
        let text = refused(code("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"));
        let head = "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2), \"out of memory\": ask for less";
        assert!(text.starts_with(head), "{text}");
        let text = refused(code("hipErrorX", "hipErrorX"));
        assert!(text.starts_with("cuMemAlloc: hipErrorX (2): ask"), "{text}");
        assert!(refused(code("", "")).starts_with("cuMemAlloc: code 2: ask"));
    }
}
