//! GPUs through the public API: on the stand-in, or on the runtime that KVXFER_TEST_GPU names (`cuda`, `hip`),
//! where a test fails if there is no GPU. What only a GPU has is ignored unless it is asked for:
//! `KVXFER_TEST_GPU=cuda gpu-… --include-ignored`.

mod code;
mod gather;
mod gather_ends;
mod gather_ipc;
mod ipc;
mod links;
mod memory;
mod nic;
mod on_gpu;
mod peer_host;
mod pieces;
mod post;
mod regions;
mod streams;

use std::time::{Duration, Instant};

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gpu::{Gpu, GpuFault, GpuRuntime, RuntimeChoice, RuntimeKind};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// The runtime that the tests are to run on.
fn runtime() -> GpuRuntime {
    let name = std::env::var("KVXFER_TEST_GPU").unwrap_or_else(|_| "host".to_owned());
    let choice: RuntimeChoice = name.parse().expect("KVXFER_TEST_GPU names a runtime");
    GpuRuntime::open(choice).unwrap_or_else(|e| panic!("KVXFER_TEST_GPU={name}: {e}"))
}

fn gpu() -> Gpu {
    runtime().gpu(0).expect("a device").clone()
}

fn on_host() -> bool {
    runtime().kind() == RuntimeKind::Host
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// What a GPU refused.
#[track_caller]
fn fault<T>(result: Result<T, Error>) -> GpuFault {
    match result.map(drop) {
        Err(Error::Gpu(fault)) => *fault,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("nothing was refused"),
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |i: usize| (i.wrapping_mul(167) >> 3) as u8 ^ seed;
    (0..len).map(byte).collect()
}
