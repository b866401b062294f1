//! What has to happen between "the network says that the bytes have come" and "a GPU reads them".

use kvxfer_verbs::PciAddress;

use super::api::Grain;
use super::device::Uuid;

/// How memory lies to the GPU that is going to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryClass {
    /// The reader's own, as it is allocated ordinarily.
    Local,
    /// The reader's own, coherent while kernels run.
    FineGrained,
    /// The reader's own, never in a cache.
    Uncached,
    /// Of another part of the same, divided GPU.
    OtherPartition,
    /// Of another GPU.
    Peer,
    /// Of the host, pinned.
    HostPinned,
}

impl MemoryClass {
    /// The class of device memory: `owner`'s, allocated as `grain` says, read by `reader`.
    #[must_use]
    pub fn of(owner: (PciAddress, Uuid), grain: Grain, reader: (PciAddress, Uuid)) -> Self {
        if owner.0 != reader.0 {
            return Self::Peer;
        }
        if owner.1 != reader.1 {
            return Self::OtherPartition;
        }
        match grain {
            Grain::Coarse => Self::Local,
            Grain::Fine => Self::FineGrained,
            Grain::Uncached => Self::Uncached,
        }
    }
}

/// Who is going to read received memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Consumer {
    /// An AMD GPU.
    Amd,
    /// An NVIDIA GPU.
    Nvidia {
        /// CUDA's attribute 118 of the memory's owner: 100, the owner sees writes in order; 200, all do.
        writes_ordering: u32,
        /// Whether the host can flush (bit 0 of CUDA's attribute 117).
        host_flush: bool,
    },
    /// The host's CPU, or the stand-in.
    Host,
}

/// What the host has to do after a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostStep {
    /// Nothing: the bytes are there.
    Native,
    /// [`Gpu::flush_writes`](super::Gpu::flush_writes) on the memory's device.
    HostFlush,
    /// A small READ of the memory through the same NIC: it comes back after the writes before it.
    LoopbackRead,
}

/// What has to happen before the bytes may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Visibility {
    /// First, by the host.
    pub step: HostStep,
    /// Then, on the reader's stream: whether an acquire fence of system scope has to run, because
    /// old bytes may stand in the GPU's caches.
    pub acquire: bool,
}

/// What has to happen after a completion for memory of `class` before `consumer` may read it.
///
/// For AMD this follows from how its memory types are documented; it has not been tried on an AMD GPU.
#[must_use]
pub fn visibility(class: MemoryClass, consumer: Consumer) -> Visibility {
    use MemoryClass::{FineGrained, HostPinned, Local, OtherPartition, Peer, Uncached};
    let (step, acquire) = match (consumer, class) {
        (Consumer::Host, _) => (HostStep::Native, false),
        // Completion and bytes go to the same memory. What the GPU keeps of the host's memory may be old.
        (Consumer::Amd, HostPinned) => (HostStep::Native, true),
        (Consumer::Amd, Uncached) => (HostStep::LoopbackRead, false),
        // An ordinary launch acquires for the device alone, which leaves lines of other partitions and
        // GPUs in its caches. For its own memory MI300X has probes; others have not.
        (Consumer::Amd, Local | FineGrained | OtherPartition | Peer) => {
            (HostStep::LoopbackRead, true)
        }
        (Consumer::Nvidia { .. }, HostPinned) => (HostStep::Native, false),
        (
            Consumer::Nvidia {
                writes_ordering,
                host_flush,
            },
            _,
        ) => {
            let enough = match class {
                OtherPartition | Peer => 200,
                _ => 100,
            };
            let step = match (writes_ordering >= enough, host_flush) {
                (true, _) => HostStep::Native,
                (false, true) => HostStep::HostFlush,
                (false, false) => HostStep::LoopbackRead,
            };
            (step, false)
        }
    };
    Visibility { step, acquire }
}

#[cfg(test)]
mod tests {
    use super::HostStep::{HostFlush, LoopbackRead, Native};
    use super::MemoryClass::{FineGrained, HostPinned, Local, OtherPartition, Peer, Uncached};
    use super::*;

    const ALL: [MemoryClass; 6] = [
        Local,
        FineGrained,
        Uncached,
        OtherPartition,
        Peer,
        HostPinned,
    ];

    fn rows(consumer: Consumer) -> [(HostStep, bool); 6] {
        ALL.map(|class| {
            let Visibility { step, acquire } = visibility(class, consumer);
            (step, acquire)
        })
    }

    #[test]
    fn amd_reads_back_through_the_nic_and_acquires_what_may_stand_in_a_cache() {
        assert_eq!(
            rows(Consumer::Amd),
            [
                (LoopbackRead, true),
                (LoopbackRead, true),
                (LoopbackRead, false),
                (LoopbackRead, true),
                (LoopbackRead, true),
                (Native, true),
            ]
        );
    }

    #[test]
    fn nvidia_orders_writes_for_the_owner_at_100_and_for_all_at_200() {
        let nvidia = |writes_ordering, host_flush| {
            rows(Consumer::Nvidia {
                writes_ordering,
                host_flush,
            })
        };
        let own = |own, other| {
            let (own, other) = ((own, false), (other, false));
            [own, own, own, other, other, (Native, false)]
        };
        for host_flush in [true, false] {
            let flush = if host_flush { HostFlush } else { LoopbackRead };
            for (ordering, expected) in [
                (0, own(flush, flush)),
                (99, own(flush, flush)),
                (100, own(Native, flush)),
                (199, own(Native, flush)),
                (200, own(Native, Native)),
            ] {
                assert_eq!(nvidia(ordering, host_flush), expected, "{ordering}");
            }
        }
    }

    #[test]
    fn the_host_sees_all() {
        assert_eq!(rows(Consumer::Host), [(Native, false); 6]);
    }

    #[test]
    fn the_class_follows_from_places_and_numbers_that_all_processes_share() {
        let at = |bus| PciAddress {
            domain: 0,
            bus,
            device: 0,
            function: 0,
        };
        let (one, two) = (Uuid([1; 16]), Uuid([2; 16]));
        for (grain, own) in [
            (Grain::Coarse, Local),
            (Grain::Fine, FineGrained),
            (Grain::Uncached, Uncached),
        ] {
            let owner = (at(5), one);
            assert_eq!(MemoryClass::of(owner, grain, owner), own);
            assert_eq!(MemoryClass::of(owner, grain, (at(5), two)), OtherPartition);
            assert_eq!(MemoryClass::of(owner, grain, (at(6), one)), Peer);
            assert_eq!(MemoryClass::of(owner, grain, (at(6), two)), Peer);
        }
    }
}
