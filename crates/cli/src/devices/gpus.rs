//! GPUs: the runtime, what each GPU is and can, which reach each other, and how near the NICs are.

use serde::Serialize;

use kvxfer_hipmem::gpu::{
    Gpu, GpuInfo, GpuRuntime, HostStep, MemoryClass, NoGpu, NoSuchRuntime, RuntimeChoice,
    visibility,
};
use kvxfer_verbs::{Place, RdmaDevice};

use super::registers::{self, Registers};

/// Names the runtime to look for.
const VARIABLE: &str = "KVXFER_GPU";

/// Whether there is a GPU at all.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Runtime {
    pub(super) missing: Option<&'static str>,
    pub(super) why: Option<String>,
    /// The first two are null where it is missing.
    pub(super) runtime: Option<String>,
    pub(super) library: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct GpuRow {
    pub(super) ordinal: u32,
    pub(super) pci: String,
    pub(super) pci_path: Vec<String>,
    pub(super) numa_node: Option<u32>,
    pub(super) uuid: String,
    pub(super) name: String,
    pub(super) arch: String,
    pub(super) memory: u64,
    pub(super) compute_units: u32,
    pub(super) xccs: Option<u32>,
    pub(super) integrated: bool,
    pub(super) dma_buf: bool,
    pub(super) gpudirect_rdma: Option<bool>,
    pub(super) large_bar: Option<bool>,
    pub(super) host_register: bool,
    pub(super) host_register_read_only: Option<bool>,
    pub(super) mps: bool,
    pub(super) classes: Vec<Class>,
    pub(super) nics: Vec<Nearness>,
    /// Of the NICs that can be used.
    pub(super) registers: Vec<Registers>,
}

/// A kind of memory that the GPU may read, and what has to happen before, when a NIC has written to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Class {
    pub(super) class: &'static str,
    pub(super) step: &'static str,
    pub(super) acquire: bool,
}

/// How near a NIC is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Nearness {
    pub(super) device: String,
    /// Steps from the PCI root that both have in common; 0: they meet in a processor.
    pub(super) shared: usize,
    pub(super) same_numa: Option<bool>,
}

/// Whether one GPU reaches the memory of another, of this process or of another one.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Reach {
    /// By their ordinals.
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) p2p: bool,
    pub(super) ipc: bool,
    pub(super) why_not: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Gpus {
    pub(super) runtime: Runtime,
    pub(super) gpus: Vec<GpuRow>,
    pub(super) pairs: Vec<Reach>,
}

/// Which runtime is asked for.
///
/// # Errors
///
/// The variable's value, where it names none.
pub(super) fn choice() -> Result<RuntimeChoice, NoSuchRuntime> {
    match std::env::var(VARIABLE) {
        Ok(name) if !name.is_empty() => name.parse(),
        _ => Ok(RuntimeChoice::Auto),
    }
}

/// Loads the runtime and asks it. A little of each GPU's memory is tried with the NICs that can be used, if there are
/// any; else nothing is allocated, and no GPU is made to do anything.
pub(super) fn look(choice: RuntimeChoice, nics: &[RdmaDevice], usable: &[&str]) -> Gpus {
    let runtime = match GpuRuntime::open(choice) {
        Ok(runtime) => runtime,
        Err(error) => {
            return Gpus {
                runtime: Runtime::missing(&error),
                ..Gpus::default()
            };
        }
    };
    let gpus = runtime.gpus();
    Gpus {
        runtime: Runtime {
            missing: None,
            why: None,
            runtime: Some(runtime.kind().to_string()),
            library: Some(runtime.library().display().to_string()),
        },
        gpus: gpus
            .iter()
            .map(|gpu| GpuRow::new(gpu, gpus, nics, usable))
            .collect(),
        pairs: gpus
            .iter()
            .flat_map(|from| gpus.iter().map(move |to| (from, to)))
            .filter(|(from, to)| from != to)
            .map(|(from, to)| Reach::new(from, to))
            .collect(),
    }
}

impl Runtime {
    fn missing(error: &kvxfer_hipmem::Error) -> Self {
        let (missing, why) = match error {
            kvxfer_hipmem::Error::NoGpu(why) => (which(why), why.to_string()),
            other => ("other", other.to_string()),
        };
        Self {
            missing: Some(missing),
            why: Some(why),
            ..Self::default()
        }
    }
}

/// Of two runtimes it is the one that came further.
fn which(why: &NoGpu) -> &'static str {
    const STAGES: [&str; 5] = ["other", "library", "symbol", "start", "device"];
    let stage = |why: &NoGpu| match why {
        NoGpu::Library { .. } => 1,
        NoGpu::Symbol { .. } => 2,
        NoGpu::Init { .. } => 3,
        NoGpu::NoDevice { .. } => 4,
        _ => 0,
    };
    match why {
        NoGpu::Neither { hip, cuda } => STAGES[stage(hip).max(stage(cuda))],
        one => STAGES[stage(one)],
    }
}

impl GpuRow {
    fn new(gpu: &Gpu, all: &[Gpu], nics: &[RdmaDevice], usable: &[&str]) -> Self {
        let info = gpu.info();
        let pci = info.pci.to_string();
        // The stand-in is nowhere.
        let real = info.arch != "host";
        let place = Place::of_pci(&pci).filter(|_| real).unwrap_or_default();
        Self {
            ordinal: info.ordinal,
            pci,
            numa_node: place.numa_node,
            uuid: info.uuid.to_string(),
            name: info.name.clone(),
            arch: info.arch.clone(),
            memory: info.memory,
            compute_units: info.compute_units,
            xccs: info.xccs,
            integrated: info.integrated,
            dma_buf: info.dma_buf,
            gpudirect_rdma: info.gpudirect_rdma,
            large_bar: info.large_bar,
            host_register: info.host_register,
            host_register_read_only: info.host_register_read_only,
            mps: info.mps,
            classes: classes(info, all.iter().map(Gpu::info))
                .map(|class| Class::new(class, gpu))
                .collect(),
            nics: nics
                .iter()
                .filter(|_| real)
                .map(|nic| Nearness::new(&nic.name, &place, &nic.place))
                .collect(),
            pci_path: place.pci_path,
            registers: registers::of(gpu, usable),
        }
    }
}

/// The kinds of memory that there are for a GPU, among all of them.
fn classes<'a>(
    info: &GpuInfo,
    all: impl Iterator<Item = &'a GpuInfo> + Clone,
) -> impl Iterator<Item = MemoryClass> {
    let part = |other: &GpuInfo| other.pci == info.pci && other.uuid != info.uuid;
    let peer = |other: &GpuInfo| other.pci != info.pci;
    [
        (MemoryClass::Local, true),
        (MemoryClass::FineGrained, info.fine_grained),
        (MemoryClass::Uncached, info.fine_grained),
        (MemoryClass::OtherPartition, all.clone().any(part)),
        (MemoryClass::Peer, all.clone().any(peer)),
        (MemoryClass::HostPinned, true),
    ]
    .into_iter()
    .filter_map(|(class, has)| has.then_some(class))
}

impl Class {
    fn new(class: MemoryClass, gpu: &Gpu) -> Self {
        let needs = visibility(class, gpu.consumer());
        Self {
            class: match class {
                MemoryClass::Local => "local",
                MemoryClass::FineGrained => "fine-grained",
                MemoryClass::Uncached => "uncached",
                MemoryClass::OtherPartition => "other-partition",
                MemoryClass::Peer => "peer",
                MemoryClass::HostPinned => "host-pinned",
                _ => "other",
            },
            step: match needs.step {
                HostStep::Native => "native",
                HostStep::HostFlush => "host-flush",
                HostStep::LoopbackRead => "loopback-read",
            },
            acquire: needs.acquire,
        }
    }
}

impl Nearness {
    fn new(device: &str, gpu: &Place, nic: &Place) -> Self {
        let pairs = gpu.pci_path.iter().zip(&nic.pci_path);
        let nodes = gpu.numa_node.zip(nic.numa_node);
        Self {
            device: device.to_owned(),
            shared: pairs.take_while(|(a, b)| a == b).count(),
            same_numa: nodes.map(|(a, b)| a == b),
        }
    }
}

impl Reach {
    fn new(from: &Gpu, to: &Gpu) -> Self {
        let (p2p, why_not) = match from.can_access(to) {
            Ok(true) => (true, None),
            Ok(false) => {
                let why = "the runtime says that it cannot: no link between them, or P2P is turned off (IOMMU, ACS, a container without both)";
                (false, Some(why.to_owned()))
            }
            Err(error) => (false, Some(error.to_string())),
        };
        Self {
            from: from.info().ordinal,
            to: to.info().ordinal,
            p2p,
            // A handle is opened on the GPU that reads, which has to reach the owner.
            ipc: p2p,
            why_not,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kvxfer_hipmem::gpu::RuntimeKind;

    use super::*;

    fn place(path: &[&str], numa_node: Option<u32>) -> Place {
        let mut place = Place::default();
        place.pci_path = path.iter().map(|step| (*step).to_owned()).collect();
        place.numa_node = numa_node;
        place
    }

    #[test]
    fn a_nic_behind_the_same_bridge_shares_more_than_one_of_another_socket() {
        let gpu = place(&["pci0000:40", "0000:40:01.0", "0000:41:00.0"], Some(0));
        let near = place(&["pci0000:40", "0000:40:01.0", "0000:42:00.0"], Some(0));
        let far = place(&["pci0000:c0", "0000:c1:00.0"], Some(1));
        let soft = place(&[], None);
        let of = |nic| {
            let near = Nearness::new("x", &gpu, nic);
            (near.shared, near.same_numa)
        };
        assert_eq!(of(&near), (2, Some(true)));
        assert_eq!(of(&far), (0, Some(false)));
        assert_eq!(of(&soft), (0, None));
    }

    #[test]
    fn the_stand_in_is_a_gpu_that_needs_nothing_and_is_nowhere() {
        let gpus = look(RuntimeChoice::Only(RuntimeKind::Host), &[], &[]);
        assert_eq!(gpus.runtime.runtime.as_deref(), Some("host stand-in"));
        let [gpu] = gpus.gpus.as_slice() else {
            panic!("{gpus:?}");
        };
        let classes: Vec<_> = gpu.classes.iter().map(|class| class.class).collect();
        assert_eq!(classes, ["local", "host-pinned"]);
        assert!(
            gpu.classes
                .iter()
                .all(|class| class.step == "native" && !class.acquire)
        );
        assert_eq!((gpu.numa_node, gpu.pci_path.len()), (None, 0));
        assert!(gpus.pairs.is_empty());
    }

    /// What of two came further is what there is to mend.
    #[test]
    fn of_two_runtimes_that_are_missing_the_one_that_came_further_is_told() {
        let library = || Box::new(NoGpu::Library { tried: Vec::new() });
        let symbol = Box::new(NoGpu::Symbol {
            symbol: "cuInit",
            library: Path::new("libcuda.so.1").into(),
        });
        let neither = |hip, cuda| which(&NoGpu::Neither { hip, cuda });
        assert_eq!(neither(library(), library()), "library");
        assert_eq!(neither(library(), symbol), "symbol");
    }
}
