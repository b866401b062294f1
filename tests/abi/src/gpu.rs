//! Compares the C declarations of `crates/hipmem` with the installed headers of HIP, and with what bindgen made
//! of cuda.h for cudarc. Prototypes of CUDA are compared by the Rust compiler: if one differs, this does not build.

#[path = "../../../crates/hipmem/src/gpu/sys/cuda_types.rs"]
mod cuda_types;
#[path = "../../../crates/hipmem/src/gpu/sys/hip_types.rs"]
mod hip_types;

use super::{Fact, differences, facts_of, map};

#[allow(clippy::all, reason = "it is generated")]
mod generated {
    use super::{cuda_types, hip_types};

    // hip(), cuda(), cudarc() and the prototypes of CUDA.
    include!(concat!(env!("OUT_DIR"), "/gpu_facts.rs"));
}

unsafe extern "C" {
    static kvxfer_hip_facts: [Fact; 0];
}

#[test]
fn every_declaration_of_hip_is_as_in_the_headers() {
    let (ours, headers) = (
        map(generated::hip()),
        facts_of((&raw const kvxfer_hip_facts).cast()),
    );
    assert_eq!(ours.len(), headers.len());
    let differences = differences(&ours, &headers);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn every_declaration_of_cuda_is_as_in_cudarc() {
    let (ours, cudarc) = (map(generated::cuda()), map(generated::cudarc()));
    assert_eq!(ours.len(), cudarc.len());
    let differences = differences(&ours, &cudarc);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// The comparison compares.
#[test]
fn a_few_facts_of_gpus_are_the_known_ones() {
    let (hip, cuda) = (map(generated::hip()), map(generated::cuda()));
    for (name, value) in [
        ("hipIpcMemHandle_t: size", 64),
        ("hipPointerAttribute_t: size", 32),
        ("hipPointerAttribute_t.devicePointer: offset", 8),
        ("hipErrorNotReady", 600),
        ("hipMalloc: prototype", 1),
        ("hsa_init: prototype", 1),
        ("HIP_LAUNCH_PARAM_END", 3),
    ] {
        assert_eq!(hip.get(name), Some(&value), "{name}");
    }
    for (name, value) in [
        ("CUipcMemHandle: size", 64),
        ("CUdeviceptr: size", 8),
        ("CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING", 118),
        ("CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", 704),
        ("CU_LAUNCH_PARAM_END", 0),
    ] {
        assert_eq!(cuda.get(name), Some(&value), "{name}");
    }
}
