//! Types and constants of HIP, from hip/hip_runtime_api.h of ROCm 5.2 (MIT licence), which tests/abi
//! compares them with. What is newer says so.
//!
//! `hipDeviceProp_t` is not here, for its layout changed under one symbol (use attributes);
//! `hipMemoryType` has no constants here, for they were renumbered (5.2: device 1; 6.2: device 2).

use libc::{c_char, c_int, c_uint, c_void};

/// An error code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub(crate) struct hipError_t(pub(crate) c_uint);

pub(crate) const hipSuccess: hipError_t = hipError_t(0);
pub(crate) const hipErrorInvalidValue: hipError_t = hipError_t(1);
pub(crate) const hipErrorOutOfMemory: hipError_t = hipError_t(2);
pub(crate) const hipErrorInvalidDevicePointer: hipError_t = hipError_t(17);
pub(crate) const hipErrorNoDevice: hipError_t = hipError_t(100);
pub(crate) const hipErrorInvalidDevice: hipError_t = hipError_t(101);
pub(crate) const hipErrorInvalidImage: hipError_t = hipError_t(200);
pub(crate) const hipErrorNoBinaryForGpu: hipError_t = hipError_t(209);
pub(crate) const hipErrorPeerAccessUnsupported: hipError_t = hipError_t(217);
pub(crate) const hipErrorInvalidHandle: hipError_t = hipError_t(400);
pub(crate) const hipErrorNotFound: hipError_t = hipError_t(500);
pub(crate) const hipErrorNotReady: hipError_t = hipError_t(600);
pub(crate) const hipErrorIllegalAddress: hipError_t = hipError_t(700);
pub(crate) const hipErrorPeerAccessAlreadyEnabled: hipError_t = hipError_t(704);
pub(crate) const hipErrorHostMemoryAlreadyRegistered: hipError_t = hipError_t(712);
pub(crate) const hipErrorNotSupported: hipError_t = hipError_t(801);

/// What a device can be asked for.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct hipDeviceAttribute_t(pub(crate) c_uint);

pub(crate) const hipDeviceAttributeIntegrated: hipDeviceAttribute_t = hipDeviceAttribute_t(16);
pub(crate) const hipDeviceAttributeMultiprocessorCount: hipDeviceAttribute_t =
    hipDeviceAttribute_t(63);
pub(crate) const hipDeviceAttributeFineGrainSupport: hipDeviceAttribute_t =
    hipDeviceAttribute_t(10016);
pub(crate) const hipDeviceAttributeIsLargeBar: hipDeviceAttribute_t = hipDeviceAttribute_t(10011);

/// What a function can be asked for.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct hipFunction_attribute(pub(crate) c_uint);

pub(crate) const HIP_FUNC_ATTRIBUTE_NUM_REGS: hipFunction_attribute = hipFunction_attribute(4);

/// The direction of a copy.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct hipMemcpyKind(pub(crate) c_uint);

pub(crate) const hipMemcpyHostToDevice: hipMemcpyKind = hipMemcpyKind(1);
pub(crate) const hipMemcpyDeviceToHost: hipMemcpyKind = hipMemcpyKind(2);
pub(crate) const hipMemcpyDeviceToDevice: hipMemcpyKind = hipMemcpyKind(3);

pub(crate) const hipHostMallocPortable: c_uint = 1;
pub(crate) const hipHostMallocMapped: c_uint = 2;
pub(crate) const hipHostMallocCoherent: c_uint = 0x4000_0000;
pub(crate) const hipHostRegisterPortable: c_uint = 1;
pub(crate) const hipHostRegisterMapped: c_uint = 2;
/// "Not supported", as the header has it.
pub(crate) const hipHostRegisterIoMemory: c_uint = 4;
pub(crate) const hipDeviceMallocFinegrained: c_uint = 1;
/// ROCm 6: "Memory represents an uncached memory".
pub(crate) const hipDeviceMallocUncached: c_uint = 3;
pub(crate) const hipStreamNonBlocking: c_uint = 1;
pub(crate) const hipEventDefault: c_uint = 0;
pub(crate) const hipEventDisableTiming: c_uint = 2;
pub(crate) const HIP_IPC_HANDLE_SIZE: usize = 64;
/// ROCm 5.7 and later, whose hipIpcOpenMemHandle takes no other flags; it was 0 before.
pub(crate) const hipIpcMemLazyEnablePeerAccess: c_uint = 1;
/// Words of hipModuleLaunchKernel's `extra`.
pub(crate) const HIP_LAUNCH_PARAM_BUFFER_POINTER: usize = 1;
pub(crate) const HIP_LAUNCH_PARAM_BUFFER_SIZE: usize = 2;
pub(crate) const HIP_LAUNCH_PARAM_END: usize = 3;

pub(crate) type hipDevice_t = c_int;
pub(crate) type hipDeviceptr_t = *mut c_void;
pub(crate) type hipStream_t = *mut c_void;
pub(crate) type hipEvent_t = *mut c_void;
pub(crate) type hipModule_t = *mut c_void;
pub(crate) type hipFunction_t = *mut c_void;

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct hipIpcMemHandle_t {
    pub(crate) reserved: [c_char; HIP_IPC_HANDLE_SIZE],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct hipUUID {
    pub(crate) bytes: [c_char; 16],
}

/// ROCm 6 calls the first field `type`. `memoryType` is an enumeration, an integer here.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct hipPointerAttribute_t {
    pub(crate) memoryType: c_uint,
    pub(crate) device: c_int,
    pub(crate) devicePointer: *mut c_void,
    pub(crate) hostPointer: *mut c_void,
    pub(crate) isManaged: c_int,
    pub(crate) allocationFlags: c_uint,
}

/// ROCm 7: what kind of handle a range is exported as.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct hipMemRangeHandleType(pub(crate) c_uint);

pub(crate) const hipMemRangeHandleTypeDmaBufFd: hipMemRangeHandleType = hipMemRangeHandleType(1);
