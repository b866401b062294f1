//! Reliable-connection verbs for kvxfer: memory tokens, queue pairs, RDMA devices, and a software
//! device that is always there.
//!
//! The types here are the same for every device. [`open_soft`] opens the software device, which
//! moves data between processes of one host (through mapped memory or `process_vm_readv`) and
//! between hosts (through TCP) with the semantics of a reliable connection. [`open_null`] opens a
//! device that completes everything at once and moves nothing, for benchmarks of the code above.
//! [`open_rdma`] opens an RDMA device, and [`rdma_devices`] tells which this machine has, through
//! libibverbs if that is there.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("kvxfer-verbs needs 64-bit Linux");

mod cq;
mod device;
mod error;
mod memory;
pub mod mlx5;
mod null;
mod qp;
mod rdma;
mod region;
mod shared;
mod soft;
mod sync;
mod sys;
mod wr;

pub use cq::Poll;
pub use device::{
    AsyncEvent, CompletionQueue, Context, DeviceAddr, DeviceInfo, DeviceKind, ProtectionDomain,
};
pub use error::{
    DmaBufFault, Error, KernelFault, NoRdma, PathFault, PostCause, PostError, StateFault,
};
pub use memory::{DmaBuf, FdSpan, Memory, MemoryKind, NoDmaBuf, NotPciAddress, PciAddress};
pub use null::open_null;
pub use qp::{
    Init, InitAttr, Link, PortAddr, QpCaps, QpEndpoint, QpState, QueuePair, Reset, Rtr, RtrAttr,
    Rts, RtsAttr, SoftPath,
};
pub use rdma::{
    Gid, GidChoice, GidFault, GidKind, LinkLayer, Place, PortDetails, PortFault, PortRanking,
    PortState, PortWish, RdmaConfig, RdmaDetails, RdmaDevice, RdmaLimits, RdmaPort, Transport,
    UnusablePort, UsablePort, choose_gid, open_rdma, rank_ports, rdma_devices,
};
pub use region::{Access, MemoryRegion, RegionTable};
pub use shared::{PeerMapping, SharedFiles};
pub use soft::{FaultPlan, FaultPlanError, PeerLife, SoftConfig, open_soft, vendor};
#[doc(hidden)]
pub use sys::library_file;
pub use wr::{Completion, Remote, SendChain, SendOp, Sge, WcOpcode, WcStatus, Wr};
