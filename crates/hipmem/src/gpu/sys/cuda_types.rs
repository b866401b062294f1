//! Types and constants of the CUDA driver API, by the names of cuda.h (documented at
//! docs.nvidia.com/cuda/cuda-driver-api). tests/abi compares them with what bindgen made of cuda.h
//! for the crate cudarc.

use libc::{c_char, c_int, c_uint, c_void};

/// An error code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub(crate) struct CUresult(pub(crate) c_uint);

pub(crate) const CUDA_SUCCESS: CUresult = CUresult(0);
pub(crate) const CUDA_ERROR_INVALID_VALUE: CUresult = CUresult(1);
pub(crate) const CUDA_ERROR_OUT_OF_MEMORY: CUresult = CUresult(2);
pub(crate) const CUDA_ERROR_NO_DEVICE: CUresult = CUresult(100);
pub(crate) const CUDA_ERROR_INVALID_DEVICE: CUresult = CUresult(101);
pub(crate) const CUDA_ERROR_INVALID_IMAGE: CUresult = CUresult(200);
pub(crate) const CUDA_ERROR_NO_BINARY_FOR_GPU: CUresult = CUresult(209);
pub(crate) const CUDA_ERROR_PEER_ACCESS_UNSUPPORTED: CUresult = CUresult(217);
pub(crate) const CUDA_ERROR_INVALID_PTX: CUresult = CUresult(218);
pub(crate) const CUDA_ERROR_UNSUPPORTED_PTX_VERSION: CUresult = CUresult(222);
pub(crate) const CUDA_ERROR_INVALID_HANDLE: CUresult = CUresult(400);
pub(crate) const CUDA_ERROR_NOT_FOUND: CUresult = CUresult(500);
pub(crate) const CUDA_ERROR_NOT_READY: CUresult = CUresult(600);
pub(crate) const CUDA_ERROR_ILLEGAL_ADDRESS: CUresult = CUresult(700);
pub(crate) const CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED: CUresult = CUresult(704);
pub(crate) const CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED: CUresult = CUresult(712);
pub(crate) const CUDA_ERROR_NOT_PERMITTED: CUresult = CUresult(800);
pub(crate) const CUDA_ERROR_NOT_SUPPORTED: CUresult = CUresult(801);
pub(crate) const CUDA_ERROR_SYSTEM_NOT_READY: CUresult = CUresult(802);
pub(crate) const CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: CUresult = CUresult(803);
pub(crate) const CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: CUresult = CUresult(804);

/// What a device can be asked for.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUdevice_attribute(pub(crate) c_uint);

pub(crate) const CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: CUdevice_attribute =
    CUdevice_attribute(16);
pub(crate) const CU_DEVICE_ATTRIBUTE_INTEGRATED: CUdevice_attribute = CUdevice_attribute(18);
pub(crate) const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: CUdevice_attribute =
    CUdevice_attribute(75);
pub(crate) const CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: CUdevice_attribute =
    CUdevice_attribute(76);
pub(crate) const CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: CUdevice_attribute =
    CUdevice_attribute(99);
pub(crate) const CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED: CUdevice_attribute =
    CUdevice_attribute(113);
pub(crate) const CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED: CUdevice_attribute =
    CUdevice_attribute(116);
pub(crate) const CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS: CUdevice_attribute =
    CUdevice_attribute(117);
pub(crate) const CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING: CUdevice_attribute =
    CUdevice_attribute(118);
pub(crate) const CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: CUdevice_attribute =
    CUdevice_attribute(124);
/// Newer than the others: older drivers refuse it.
pub(crate) const CU_DEVICE_ATTRIBUTE_MPS_ENABLED: CUdevice_attribute = CUdevice_attribute(133);

/// What a pointer can be asked for.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUpointer_attribute(pub(crate) c_uint);

pub(crate) const CU_POINTER_ATTRIBUTE_MEMORY_TYPE: CUpointer_attribute = CUpointer_attribute(2);
pub(crate) const CU_POINTER_ATTRIBUTE_IS_MANAGED: CUpointer_attribute = CUpointer_attribute(8);
pub(crate) const CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: CUpointer_attribute = CUpointer_attribute(9);
pub(crate) const CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: CUpointer_attribute =
    CUpointer_attribute(10);

pub(crate) const CU_MEMORYTYPE_DEVICE: c_uint = 2;

/// What a function can be asked for.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUfunction_attribute(pub(crate) c_uint);

pub(crate) const CU_FUNC_ATTRIBUTE_NUM_REGS: CUfunction_attribute = CUfunction_attribute(4);

/// What a compiler of PTX can be told.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUjit_option(pub(crate) c_uint);

pub(crate) const CU_JIT_ERROR_LOG_BUFFER: CUjit_option = CUjit_option(5);
pub(crate) const CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES: CUjit_option = CUjit_option(6);

/// What kind of handle a range is exported as.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUmemRangeHandleType(pub(crate) c_uint);

pub(crate) const CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD: CUmemRangeHandleType =
    CUmemRangeHandleType(1);

/// When the copies of a batch read their sources.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUmemcpySrcAccessOrder(pub(crate) c_uint);

pub(crate) const CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: CUmemcpySrcAccessOrder =
    CUmemcpySrcAccessOrder(1);

/// What kind of place managed memory prefers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUmemLocationType(pub(crate) c_uint);

pub(crate) const CU_MEM_LOCATION_TYPE_INVALID: CUmemLocationType = CUmemLocationType(0);

/// Whose writes are flushed.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUflushGPUDirectRDMAWritesTarget(pub(crate) c_uint);

pub(crate) const CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX:
    CUflushGPUDirectRDMAWritesTarget = CUflushGPUDirectRDMAWritesTarget(0);

/// Who sees them then.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct CUflushGPUDirectRDMAWritesScope(pub(crate) c_uint);

pub(crate) const CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER: CUflushGPUDirectRDMAWritesScope =
    CUflushGPUDirectRDMAWritesScope(100);
pub(crate) const CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES: CUflushGPUDirectRDMAWritesScope =
    CUflushGPUDirectRDMAWritesScope(200);

pub(crate) const CU_MEMHOSTALLOC_PORTABLE: c_uint = 1;
pub(crate) const CU_MEMHOSTALLOC_DEVICEMAP: c_uint = 2;
pub(crate) const CU_MEMHOSTREGISTER_PORTABLE: c_uint = 1;
pub(crate) const CU_MEMHOSTREGISTER_DEVICEMAP: c_uint = 2;
pub(crate) const CU_MEMHOSTREGISTER_IOMEMORY: c_uint = 4;
pub(crate) const CU_MEMHOSTREGISTER_READ_ONLY: c_uint = 8;
pub(crate) const CU_STREAM_NON_BLOCKING: c_uint = 1;
pub(crate) const CU_EVENT_DEFAULT: c_uint = 0;
pub(crate) const CU_EVENT_DISABLE_TIMING: c_uint = 2;
pub(crate) const CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
pub(crate) const CU_IPC_HANDLE_SIZE: usize = 64;
/// Words of cuLaunchKernel's `extra`.
pub(crate) const CU_LAUNCH_PARAM_END: usize = 0;
pub(crate) const CU_LAUNCH_PARAM_BUFFER_POINTER: usize = 1;
pub(crate) const CU_LAUNCH_PARAM_BUFFER_SIZE: usize = 2;

pub(crate) type CUdevice = c_int;
pub(crate) type CUdeviceptr = u64;
pub(crate) type CUcontext = *mut c_void;
pub(crate) type CUstream = *mut c_void;
pub(crate) type CUevent = *mut c_void;
pub(crate) type CUmodule = *mut c_void;
pub(crate) type CUfunction = *mut c_void;

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CUipcMemHandle {
    pub(crate) reserved: [c_char; CU_IPC_HANDLE_SIZE],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CUmemLocation {
    pub(crate) type_: CUmemLocationType,
    pub(crate) id: c_int,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CUmemcpyAttributes {
    pub(crate) srcAccessOrder: CUmemcpySrcAccessOrder,
    pub(crate) srcLocHint: CUmemLocation,
    pub(crate) dstLocHint: CUmemLocation,
    pub(crate) flags: c_uint,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CUuuid {
    pub(crate) bytes: [c_char; 16],
}
