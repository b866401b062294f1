//! The functions of libcuda that are called, by the names of its symbols. tests/abi reads this file and
//! compares every prototype with what bindgen made of cuda.h.

use libc::{c_char, c_int, c_uint, c_ulonglong, c_void, size_t};

use super::cuda_types::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUflushGPUDirectRDMAWritesScope,
    CUflushGPUDirectRDMAWritesTarget, CUfunction, CUfunction_attribute, CUipcMemHandle,
    CUjit_option, CUmemRangeHandleType, CUmemcpyAttributes, CUmodule, CUpointer_attribute,
    CUresult, CUstream, CUuuid,
};
use super::functions;

functions! {
    /// What libcuda exports, by the names of C. Each is called as its manual page says.
    Cuda
    required {
        fn cuInit(flags: c_uint) -> CUresult;
        fn cuGetErrorName(error: CUresult, name: *mut *const c_char) -> CUresult;
        fn cuGetErrorString(error: CUresult, words: *mut *const c_char) -> CUresult;
        fn cuDeviceGetCount(count: *mut c_int) -> CUresult;
        fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) -> CUresult;
        fn cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice) -> CUresult;
        fn cuDeviceGetUuid(uuid: *mut CUuuid, device: CUdevice) -> CUresult;
        fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: CUdevice) -> CUresult;
        fn cuDeviceTotalMem_v2(bytes: *mut size_t, device: CUdevice) -> CUresult;
        fn cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice) -> CUresult;
        fn cuDeviceCanAccessPeer(can: *mut c_int, device: CUdevice, peer: CUdevice) -> CUresult;
        fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice) -> CUresult;
        fn cuCtxEnablePeerAccess(peer: CUcontext, flags: c_uint) -> CUresult;
        fn cuCtxPushCurrent_v2(context: CUcontext) -> CUresult;
        fn cuCtxPopCurrent_v2(context: *mut CUcontext) -> CUresult;
        fn cuMemGetInfo_v2(free: *mut size_t, total: *mut size_t) -> CUresult;
        fn cuMemAlloc_v2(pointer: *mut CUdeviceptr, size: size_t) -> CUresult;
        fn cuMemFree_v2(pointer: CUdeviceptr) -> CUresult;
        fn cuMemHostAlloc(pointer: *mut *mut c_void, size: size_t, flags: c_uint) -> CUresult;
        fn cuMemFreeHost(pointer: *mut c_void) -> CUresult;
        fn cuMemHostRegister_v2(pointer: *mut c_void, size: size_t, flags: c_uint) -> CUresult;
        fn cuMemHostUnregister(pointer: *mut c_void) -> CUresult;
        fn cuMemHostGetDevicePointer_v2(device: *mut CUdeviceptr, host: *mut c_void, flags: c_uint) -> CUresult;
        fn cuMemGetAddressRange_v2(base: *mut CUdeviceptr, size: *mut size_t, pointer: CUdeviceptr) -> CUresult;
        fn cuPointerGetAttribute(value: *mut c_void, attribute: CUpointer_attribute, pointer: CUdeviceptr) -> CUresult;
        fn cuMemcpyHtoDAsync_v2(dst: CUdeviceptr, src: *const c_void, size: size_t, stream: CUstream) -> CUresult;
        fn cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: CUdeviceptr, size: size_t, stream: CUstream) -> CUresult;
        fn cuMemcpyDtoDAsync_v2(dst: CUdeviceptr, src: CUdeviceptr, size: size_t, stream: CUstream) -> CUresult;
        fn cuMemsetD8Async(dst: CUdeviceptr, value: u8, size: size_t, stream: CUstream) -> CUresult;
        fn cuStreamCreateWithPriority(stream: *mut CUstream, flags: c_uint, priority: c_int) -> CUresult;
        fn cuStreamDestroy_v2(stream: CUstream) -> CUresult;
        fn cuStreamSynchronize(stream: CUstream) -> CUresult;
        fn cuStreamQuery(stream: CUstream) -> CUresult;
        fn cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint) -> CUresult;
        fn cuEventCreate(event: *mut CUevent, flags: c_uint) -> CUresult;
        fn cuEventDestroy_v2(event: CUevent) -> CUresult;
        fn cuEventRecord(event: CUevent, stream: CUstream) -> CUresult;
        fn cuEventQuery(event: CUevent) -> CUresult;
        fn cuEventElapsedTime(ms: *mut f32, start: CUevent, stop: CUevent) -> CUresult;
        fn cuModuleLoadDataEx(module: *mut CUmodule, image: *const c_void, options: c_uint, names: *mut CUjit_option, values: *mut *mut c_void) -> CUresult;
        fn cuModuleUnload(module: CUmodule) -> CUresult;
        fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) -> CUresult;
        fn cuLaunchKernel(f: CUfunction, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: CUstream, params: *mut *mut c_void, extra: *mut *mut c_void) -> CUresult;
        fn cuIpcGetMemHandle(handle: *mut CUipcMemHandle, pointer: CUdeviceptr) -> CUresult;
        fn cuIpcOpenMemHandle_v2(pointer: *mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint) -> CUresult;
        fn cuIpcCloseMemHandle(pointer: CUdeviceptr) -> CUresult;
    }
    optional {
        fn cuFuncGetAttribute(value: *mut c_int, attribute: CUfunction_attribute, function: CUfunction) -> CUresult;
        fn cuDeviceGetUuid_v2(uuid: *mut CUuuid, device: CUdevice) -> CUresult;
        fn cuMemGetHandleForAddressRange(handle: *mut c_void, pointer: CUdeviceptr, size: size_t, kind: CUmemRangeHandleType, flags: c_ulonglong) -> CUresult;
        fn cuMemcpyBatchAsync(dsts: *mut CUdeviceptr, srcs: *mut CUdeviceptr, sizes: *mut size_t, count: size_t, attrs: *mut CUmemcpyAttributes, attrs_indices: *mut size_t, attrs_len: size_t, failed: *mut size_t, stream: CUstream) -> CUresult;
        fn cuFlushGPUDirectRDMAWrites(target: CUflushGPUDirectRDMAWritesTarget, scope: CUflushGPUDirectRDMAWritesScope) -> CUresult;
    }
}
