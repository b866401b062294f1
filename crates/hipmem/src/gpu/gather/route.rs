//! How many workgroups which way takes, and which runs the copy engine takes.
//!
//! The figures are of two H200s over NVLink (132 multiprocessors; docs/measurements/2026-11-h200.md). Nothing
//! has been measured on AMD, where the same numbers stand until it is.

use super::super::class::MemoryClass;
use super::super::runtime::RuntimeKind;
use super::super::stream::Place;
use crate::gpu::Gpu;
use crate::kernels::MAX_THREADS;

/// Pulling, 16 workgroups reach 0.94 of the copy engine at every block size; 32 to 64 reach less, and only all
/// units as much again.
const PULL_WORKGROUPS: u32 = 16;

/// Pushing needs more stores under way than 64 units have (0.91): with one workgroup on each unit it is 0.93.
/// Half a unit's threads are enough then, and leave the engine's kernels the other half.
const PUSH_THREADS: u32 = 512;

/// Inside one memory, on all units: 0.94 of the copy engine at 16 KiB. 256 threads have 0.95 there and 0.89 at 4 KiB.
const LOCAL_THREADS: u32 = 512;

/// A bus to the host has a seventh of NVLink's speed: 4 workgroups fill it as well as 264 do (0.92 from the host, 0.95
/// to it). Twice as many, for smaller blocks.
const HOST_WORKGROUPS: u32 = 8;

/// Between memories of two GPUs the copy engine takes runs of these bytes and more, where the runtime takes copies in
/// batches: by four of them side by side 4 MiB have 0.98 of one large copy, the kernel 0.935 to 0.945 always.
const PEER_RUNS: u64 = 4 << 20;

/// And copy by copy: beginning one costs 3 to 4 us, so 4 MiB have 0.73 (pull) and 0.80 (push), 16 MiB 0.92.
const PEER_RUNS_ALONE: u64 = 32 << 20;

/// To and from the host, in batches: at 1 MiB 0.97, the kernel 0.92 to 0.95.
const HOST_RUNS: u64 = 1 << 20;

/// And copy by copy: 4 MiB have 0.96.
const HOST_RUNS_ALONE: u64 = 4 << 20;

/// Which way blocks go, seen from the GPU whose kernel moves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Route {
    /// Inside its own memory.
    Local,
    /// From another GPU's memory into its own.
    Pull,
    /// From its own memory, or another's, into another's.
    Push,
    /// From or to host memory.
    Host,
}

/// The most that a launch takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) workgroups: u32,
    /// Of one workgroup.
    pub(super) threads: u32,
}

impl Route {
    pub(super) fn of(gpu: &Gpu, src: Place<'_>, dst: Place<'_>) -> Self {
        let near = |place: Place<'_>| match place {
            Place::Pinned(..) | Place::PeerHost(..) => None,
            Place::Gpu(memory, _) => Some(!matches!(
                memory.class_for(gpu),
                MemoryClass::Peer | MemoryClass::OtherPartition
            )),
        };
        match (near(src), near(dst)) {
            (None, _) | (_, None) => Self::Host,
            (Some(true), Some(true)) => Self::Local,
            (Some(false), Some(true)) => Self::Pull,
            (Some(_), Some(false)) => Self::Push,
        }
    }

    pub(super) fn grid(self, gpu: &Gpu, warp: u32) -> Grid {
        let units = gpu.info().compute_units.max(1);
        let (workgroups, threads) = match (gpu.runtime(), self) {
            // A workgroup of the host's build is one warp, and its stream one thread.
            (RuntimeKind::Host, _) => (units, warp),
            (_, Self::Local) => (units, LOCAL_THREADS),
            (_, Self::Pull) => (PULL_WORKGROUPS.min(units), MAX_THREADS),
            (_, Self::Push) => (units, PUSH_THREADS),
            (_, Self::Host) => (HOST_WORKGROUPS.min(units), MAX_THREADS),
        };
        Grid {
            workgroups,
            threads,
        }
    }

    /// From how many bytes on a run is the copy engine's.
    pub(super) fn copy_engine_from(self, gpu: &Gpu) -> Option<u64> {
        let batches = gpu.api().has_batches();
        match (gpu.runtime(), self) {
            // Nobody has measured AMD's.
            (RuntimeKind::Hip, _) | (_, Self::Local) => None,
            (_, Self::Pull | Self::Push) if batches => Some(PEER_RUNS),
            (_, Self::Pull | Self::Push) => Some(PEER_RUNS_ALONE),
            (_, Self::Host) if batches => Some(HOST_RUNS),
            (_, Self::Host) => Some(HOST_RUNS_ALONE),
        }
    }
}
