//! The functions of libamdhip64 that are called. tests/abi reads this file and lets a C compiler compare every
//! prototype with the headers.

use libc::{c_char, c_int, c_uint, c_ulonglong, c_void, size_t};

use super::functions;
use super::hip_types::{
    hipDevice_t, hipDeviceAttribute_t, hipDeviceptr_t, hipError_t, hipEvent_t,
    hipFunction_attribute, hipFunction_t, hipIpcMemHandle_t, hipMemRangeHandleType, hipMemcpyKind,
    hipModule_t, hipPointerAttribute_t, hipStream_t, hipUUID,
};

functions! {
    /// What libamdhip64 exports, by the names of C. Each is called as its manual page says.
    Hip
    required {
        fn hipInit(flags: c_uint) -> hipError_t;
        fn hipGetErrorName(error: hipError_t) -> *const c_char;
        fn hipGetErrorString(error: hipError_t) -> *const c_char;
        fn hipGetLastError() -> hipError_t;
        fn hipGetDeviceCount(count: *mut c_int) -> hipError_t;
        fn hipGetDevice(device: *mut c_int) -> hipError_t;
        fn hipSetDevice(device: c_int) -> hipError_t;
        fn hipDeviceGet(device: *mut hipDevice_t, ordinal: c_int) -> hipError_t;
        fn hipDeviceGetName(name: *mut c_char, len: c_int, device: hipDevice_t) -> hipError_t;
        fn hipDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: c_int) -> hipError_t;
        fn hipDeviceTotalMem(bytes: *mut size_t, device: hipDevice_t) -> hipError_t;
        fn hipDeviceGetAttribute(value: *mut c_int, attribute: hipDeviceAttribute_t, device: c_int) -> hipError_t;
        fn hipDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) -> hipError_t;
        fn hipDeviceEnablePeerAccess(peer: c_int, flags: c_uint) -> hipError_t;
        fn hipMemGetInfo(free: *mut size_t, total: *mut size_t) -> hipError_t;
        fn hipMalloc(pointer: *mut *mut c_void, size: size_t) -> hipError_t;
        fn hipExtMallocWithFlags(pointer: *mut *mut c_void, size: size_t, flags: c_uint) -> hipError_t;
        fn hipFree(pointer: *mut c_void) -> hipError_t;
        fn hipHostMalloc(pointer: *mut *mut c_void, size: size_t, flags: c_uint) -> hipError_t;
        fn hipHostFree(pointer: *mut c_void) -> hipError_t;
        fn hipHostRegister(pointer: *mut c_void, size: size_t, flags: c_uint) -> hipError_t;
        fn hipHostUnregister(pointer: *mut c_void) -> hipError_t;
        fn hipHostGetDevicePointer(device: *mut *mut c_void, host: *mut c_void, flags: c_uint) -> hipError_t;
        fn hipMemGetAddressRange(base: *mut hipDeviceptr_t, size: *mut size_t, pointer: hipDeviceptr_t) -> hipError_t;
        fn hipPointerGetAttributes(attributes: *mut hipPointerAttribute_t, pointer: *const c_void) -> hipError_t;
        fn hipMemcpyAsync(dst: *mut c_void, src: *const c_void, size: size_t, kind: hipMemcpyKind, stream: hipStream_t) -> hipError_t;
        fn hipMemsetAsync(dst: *mut c_void, value: c_int, size: size_t, stream: hipStream_t) -> hipError_t;
        fn hipStreamCreateWithPriority(stream: *mut hipStream_t, flags: c_uint, priority: c_int) -> hipError_t;
        fn hipStreamDestroy(stream: hipStream_t) -> hipError_t;
        fn hipStreamSynchronize(stream: hipStream_t) -> hipError_t;
        fn hipStreamQuery(stream: hipStream_t) -> hipError_t;
        fn hipStreamWaitEvent(stream: hipStream_t, event: hipEvent_t, flags: c_uint) -> hipError_t;
        fn hipEventCreateWithFlags(event: *mut hipEvent_t, flags: c_uint) -> hipError_t;
        fn hipEventDestroy(event: hipEvent_t) -> hipError_t;
        fn hipEventRecord(event: hipEvent_t, stream: hipStream_t) -> hipError_t;
        fn hipEventQuery(event: hipEvent_t) -> hipError_t;
        fn hipEventElapsedTime(ms: *mut f32, start: hipEvent_t, stop: hipEvent_t) -> hipError_t;
        fn hipModuleLoadData(module: *mut hipModule_t, image: *const c_void) -> hipError_t;
        fn hipModuleUnload(module: hipModule_t) -> hipError_t;
        fn hipModuleGetFunction(function: *mut hipFunction_t, module: hipModule_t, name: *const c_char) -> hipError_t;
        fn hipModuleLaunchKernel(f: hipFunction_t, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: hipStream_t, params: *mut *mut c_void, extra: *mut *mut c_void) -> hipError_t;
        fn hipIpcGetMemHandle(handle: *mut hipIpcMemHandle_t, pointer: *mut c_void) -> hipError_t;
        fn hipIpcOpenMemHandle(pointer: *mut *mut c_void, handle: hipIpcMemHandle_t, flags: c_uint) -> hipError_t;
        fn hipIpcCloseMemHandle(pointer: *mut c_void) -> hipError_t;
    }
    optional {
        fn hipFuncGetAttribute(value: *mut c_int, attribute: hipFunction_attribute, function: hipFunction_t) -> hipError_t;
        fn hipDeviceGetUuid(uuid: *mut hipUUID, device: hipDevice_t) -> hipError_t;
        fn hipMemGetHandleForAddressRange(handle: *mut c_void, pointer: hipDeviceptr_t, size: size_t, kind: hipMemRangeHandleType, flags: c_ulonglong) -> hipError_t;
    }
}
