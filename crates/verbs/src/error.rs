//! What can go wrong, one variant an operation.

use std::io;
use std::path::{Path, PathBuf};

use crate::memory::{MemoryKind, NoDmaBuf};
use crate::qp::{QpState, SoftPath};
use crate::rdma::{GidFault, PortState, Transport};

/// Why a call on a device failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("{op}: {source}")]
    Os {
        /// The call.
        op: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The memory is empty, or wraps around the address space.
    #[error("cannot register {len} bytes at {addr:#x}: not a span that this device reaches")]
    RegisterSpan {
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The memory is of a kind that the device cannot reach.
    #[error("{device} cannot register {len} bytes of {kind}: it does not reach those")]
    RegisterKind {
        /// The device.
        device: String,
        /// Where the memory lives.
        kind: MemoryKind,
        /// Bytes.
        len: u64,
    },
    /// Remote write without local write.
    #[error("cannot register with remote write and without local write: add Access::LOCAL_WRITE")]
    RegisterAccess,
    /// The memory's file could be truncated under a peer's mapping.
    #[error("memory file has seals {seals:#x}: seal it with F_SEAL_SHRINK | F_SEAL_GROW (0x6)")]
    Unsealed {
        /// The seals it has.
        seals: i32,
    },
    /// The file is smaller than the span it is said to back.
    #[error("memory file has {size} bytes, the span needs {offset} + {len}")]
    FileTooSmall {
        /// Size of the file.
        size: u64,
        /// Where the span starts in it.
        offset: u64,
        /// Bytes of the span.
        len: u64,
    },
    /// Memory that is to be shared with peers on the host has no file that they may map for reading.
    #[error(
        "memory {index} has no file that peers may map to read it: an arena has, registered for remote reading"
    )]
    NotShared {
        /// Which of the regions.
        index: usize,
    },
    /// The device's key table is full.
    #[error("no free memory key: all {max} are in use")]
    TooManyRegions {
        /// The device's limit.
        max: u32,
    },
    /// Holes can be punched into a file of reserved huge pages, and a copy that meets one where no
    /// page is free dies of SIGBUS.
    #[error(
        "huge-page file has seals {seals:#x}: seal it with F_SEAL_FUTURE_WRITE (0x10) or F_SEAL_WRITE (0x8) as well"
    )]
    Punchable {
        /// The seals it has.
        seals: i32,
    },
    /// A capability is zero or over the device's limit.
    #[error("{what} {asked} is out of range: this device takes 1 to {max}")]
    Limit {
        /// The capability.
        what: &'static str,
        /// The value asked for.
        asked: u64,
        /// The device's limit.
        max: u64,
    },
    /// Two handles of different contexts were mixed.
    #[error("{what} belongs to another context")]
    ForeignHandle {
        /// The handle.
        what: &'static str,
    },
    /// A queue pair cannot go from one state to the next with these attributes.
    #[error("queue pair {qpn:#x} cannot go from {from} to {to}: {fault}")]
    Transition {
        /// The queue pair.
        qpn: u32,
        /// The state it is in.
        from: QpState,
        /// The state asked for.
        to: QpState,
        /// Which attribute is at fault, and how.
        fault: StateFault,
    },
    /// The peer cannot be reached by this path.
    #[error("no {path} path to {peer}: {fault}")]
    Path {
        /// The path tried.
        path: SoftPath,
        /// The peer's socket name.
        peer: String,
        /// Why not.
        fault: PathFault,
    },
    /// This machine has no RDMA that could be used.
    #[error("no RDMA: {0}")]
    NoRdma(#[source] NoRdma),
    /// An RDMA device's file cannot be opened.
    #[error("{device}: {} cannot be opened ({source}): it must be readable and writable here, in a container too", path.display())]
    DeviceNode {
        /// The device.
        device: String,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A call on an RDMA device failed.
    #[error("{device}: {call}: {source}")]
    Device {
        /// The device.
        device: String,
        /// The call.
        call: &'static str,
        /// The driver's answer.
        source: io::Error,
    },
    /// There is no RDMA device of that name.
    #[error("no RDMA device {device}: there are {}", devices.join(", "))]
    NoSuchDevice {
        /// The name.
        device: String,
        /// Those that there are.
        devices: Vec<String>,
    },
    /// The device speaks a transport whose queue pairs cannot be brought up by an exchange of
    /// addresses.
    #[error(
        "{device} speaks {transport}: only InfiniBand and RoCE devices can be used, take another or a path of the software device"
    )]
    Transport {
        /// The device.
        device: String,
        /// What it speaks.
        transport: Transport,
    },
    /// The device has no port of that number.
    #[error("{device} has no port {port}, its ports are {ports:?}")]
    NoSuchPort {
        /// The device.
        device: String,
        /// The number.
        port: u8,
        /// Those that it has.
        ports: Vec<u8>,
    },
    /// The port is not in use: it has no link, or its subnet has not set it up.
    #[error("{device} port {port} is {state}: {}", port_fix(*state))]
    PortNotActive {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// Its state.
        state: PortState,
    },
    /// An RDMA device does not register memory.
    #[error("{device} does not register {len} bytes at {addr:#x} ({source}){}", locked(*memlock, *len))]
    Register {
        /// The device.
        device: String,
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
        /// The limit on locked memory, where that may be what has refused it.
        memlock: Option<u64>,
        /// The driver's answer.
        source: io::Error,
    },
    /// An RDMA device registers memory of a GPU in none of the ways that there are.
    #[error(
        "{device} does not register {len} bytes of {kind} at {addr:#x}. As a dma-buf: {dma_buf}. By its address: {address}. \
         Either the NIC's driver registers dma-bufs (Linux 5.12, rdma-core 34) and the GPU's exports them, or the GPU's driver \
         gives NICs its memory by address (CUDA: modprobe nvidia_peermem); else copy through host memory"
    )]
    RegisterDevice {
        /// The device.
        device: String,
        /// Where the memory lives.
        kind: MemoryKind,
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
        /// Why not as a dma-buf.
        dma_buf: Box<DmaBufFault>,
        /// The driver's answer to its address, which it takes where the GPU's driver lends a hand.
        #[source]
        address: io::Error,
    },
    /// A port of an RDMA device has no GID that could be used.
    #[error("{device} port {port}: {fault}")]
    Gid {
        /// The device.
        device: String,
        /// The port's number.
        port: u8,
        /// Why not.
        fault: GidFault,
    },
    /// The peer did not answer in time.
    #[error("{peer} did not answer the {path} dial before the deadline")]
    DialDeadline {
        /// The path.
        path: SoftPath,
        /// The peer's socket name.
        peer: String,
    },
}

/// Why memory was not registered as a dma-buf.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaBufFault {
    /// There is no dma-buf of it.
    #[error("{0}")]
    NoDmaBuf(#[source] NoDmaBuf),
    /// The library is older than dma-bufs.
    #[error("{} has no ibv_reg_dmabuf_mr, which rdma-core has from 34 on", library.display())]
    NoFunction {
        /// The file of the library.
        library: PathBuf,
    },
    /// The memory is not where in a page its dma-buf says that it is: the NIC would reach other bytes.
    #[error(
        "it begins at {offset:#x} of the file, which is another place in a page of {page} bytes than its address"
    )]
    Offset {
        /// Where in the file the memory begins.
        offset: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The driver refuses it.
    #[error("ibv_reg_dmabuf_mr: {0}")]
    Refused(#[source] io::Error),
}

fn port_fix(state: PortState) -> &'static str {
    match state {
        PortState::Down => "see that its network interface is up, and its cable in",
        PortState::Init => "see that the fabric has a subnet manager (opensm)",
        _ => "see ibv_devinfo and the kernel's log",
    }
}

fn locked(limit: Option<u64>, len: u64) -> String {
    match limit {
        Some(limit) => format!(
            ": this process may lock {limit} bytes of memory, registration needs {len} and what is \
             registered already; raise it (ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd \
             unit, --ulimit memlock=-1 for a container) or grant CAP_IPC_LOCK"
        ),
        None => String::new(),
    }
}

/// Why there is no RDMA device at all. Four answers, for each has another remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoRdma {
    /// libibverbs cannot be loaded.
    #[error(
        "libibverbs cannot be loaded ({}): install rdma-core (Debian: libibverbs1, ibverbs-providers)",
        loader(name, why)
    )]
    Library {
        /// The name that the loader was given.
        name: PathBuf,
        /// The loader's words.
        why: String,
    },
    /// The library is there and too old, or is something else.
    #[error("{} has no {symbol}@{version}: it is older than rdma-core, or another library of that name: install rdma-core, and look at LD_LIBRARY_PATH", library.display())]
    Symbol {
        /// The function.
        symbol: &'static str,
        /// The version of its symbol.
        version: &'static str,
        /// The file of the library.
        library: PathBuf,
    },
    /// The library is there, and the kernel has no RDMA for it.
    #[error("{fault}")]
    Kernel {
        /// What the kernel lacks.
        fault: KernelFault,
    },
    /// Library and kernel are there, and no device.
    #[error("{}", no_device(kernel))]
    Device {
        /// Devices that the kernel has and libibverbs does not give.
        kernel: Vec<String>,
    },
}

/// What the kernel lacks that libibverbs needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelFault {
    /// The kernel's interface for RDMA is not there.
    #[error(
        "this kernel has no RDMA interface, {} is not there: modprobe ib_uverbs, or in a container share the host's /sys and /dev/infiniband",
        path.display()
    )]
    NoInterface {
        /// Where it would be.
        path: PathBuf,
    },
    /// The kernel's interface has a version that the library does not speak.
    #[error("the kernel's RDMA interface has version {version}, which {} does not speak: install an rdma-core that fits the kernel", library.display())]
    Version {
        /// The kernel's version, in its words.
        version: String,
        /// The file of the library.
        library: PathBuf,
    },
}

fn loader(name: &Path, why: &str) -> String {
    // The loader names the file first, most of the time.
    let name = name.display().to_string();
    match why.strip_prefix(&name) {
        Some(_) => why.to_owned(),
        None => format!("{name}: {why}"),
    }
}

fn no_device(kernel: &[String]) -> String {
    if kernel.is_empty() {
        return "this machine has no RDMA device: load the driver of its NIC (lspci -k names it), or for \
                soft-RoCE modprobe rdma_rxe and rdma link add rxe0 type rxe netdev DEV"
            .to_owned();
    }
    format!(
        "the kernel has {}, and libibverbs gives no device: install its driver (Debian: ibverbs-providers), and see that /dev/infiniband is there and may be opened",
        kernel.join(", ")
    )
}

/// Which attribute of a state transition is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateFault {
    /// The queue pair is not in the state that the transition starts from.
    #[error("it is in {0}")]
    State(QpState),
    /// The remote endpoint's queue pair number or token is all zero.
    #[error("the remote endpoint is empty: exchange endpoint() of both sides first")]
    EmptyEndpoint,
    /// The link is of another device.
    #[error("this device has no {0} links")]
    LinkKind(&'static str),
    /// The stream that the peer opened names another endpoint than `remote`.
    #[error(
        "the peer's stream is bound to queue pair {got:#x}, the remote endpoint says {want:#x}"
    )]
    EndpointMismatch {
        /// The endpoint's number.
        want: u32,
        /// The number in the stream's opening.
        got: u32,
    },
    /// The peer opened the streams for another path.
    #[error("the peer dialled the {got} path, this side awaits {want}")]
    PathMismatch {
        /// The path awaited.
        want: SoftPath,
        /// The path dialled.
        got: SoftPath,
    },
    /// An attribute is over what the field holds.
    #[error("{attribute} {value} is over {max}")]
    Range {
        /// The attribute.
        attribute: &'static str,
        /// Its value.
        value: u32,
        /// The largest value.
        max: u32,
    },
    /// The remote endpoint is one of a device that is not on an RDMA network.
    #[error("the remote endpoint is of a device without an RDMA port")]
    NoPort,
    /// One side's port is on Ethernet and the other's on InfiniBand.
    #[error("one port is on Ethernet, the other on InfiniBand")]
    LinkLayer,
    /// The two sides' GIDs are of different versions of RoCE, whose packets do not meet.
    #[error(
        "this side's GID is of RoCE v{here}, the peer's of v{there}: take GIDs of one version (rdma_gid_index, -x)"
    )]
    RoceVersion {
        /// This side's.
        here: u8,
        /// The peer's.
        there: u8,
    },
    /// A side takes no READ at a time: none could ever be posted.
    #[error("the remote endpoint takes no READs")]
    NoReads,
    /// The remote endpoint's MTU is none that a port can have.
    #[error("the remote endpoint has an MTU of {0} bytes: it is 256, 512, 1024, 2048 or 4096")]
    Mtu(u32),
    /// The device refuses the transition.
    #[error("the device refuses it (errno {errno}): {meaning}. It was told: {told}")]
    Device {
        /// The driver's answer.
        errno: i32,
        /// What it means.
        meaning: &'static str,
        /// The attributes.
        told: String,
    },
    /// A TCP stream could not be prepared.
    #[error("the {0} stream could not be prepared")]
    Stream(&'static str),
}

/// Why a path to a peer cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathFault {
    /// The peer runs on another host (or the host was restarted).
    #[error("the peer is on another host (boot id {peer}, here {here})")]
    OtherHost {
        /// The peer's boot id.
        peer: String,
        /// Ours.
        here: String,
    },
    /// Its socket did not take a connection.
    #[error("its socket refuses ({0}): it is gone, or in another network namespace")]
    Connect(#[source] io::Error),
    /// The process behind the socket is another user's.
    #[error("its process is of user {peer}, this one of user {here}")]
    OtherUser {
        /// The peer's user id.
        peer: u32,
        /// Ours.
        here: u32,
    },
    /// The process behind the socket cannot be seen from here.
    #[error("its process has no id here: it is in another pid namespace")]
    NoPid,
    /// `process_vm_readv` is not allowed.
    #[error("process_vm_readv is refused ({0}): look at kernel.yama.ptrace_scope and capabilities")]
    ProcessVm(#[source] io::Error),
    /// The peer cannot read this process.
    #[error(
        "the peer may not read this process ({0}): look at kernel.yama.ptrace_scope and capabilities"
    )]
    Unreadable(#[source] io::Error),
    /// Under Yama a process lets one other read it, and this one lets another.
    #[error(
        "this process lets process {reader} read it, and may name one only: set kernel.yama.ptrace_scope to 0, or use arena or tcp"
    )]
    ReaderTaken {
        /// The process that may, as this one numbers it.
        reader: u32,
    },
    /// Under Yama a process lets one other read it, and the peer lets another.
    #[error(
        "the peer lets process {reader} read it, and may name one only: set kernel.yama.ptrace_scope to 0, or use arena or tcp"
    )]
    PeerReaderTaken {
        /// The process that may, as the peer numbers it.
        reader: u32,
    },
    /// The process behind the socket is not the peer that was meant.
    #[error("the process behind the socket is not the peer that was meant")]
    Identity,
    /// The peer does not know the queue pair's token.
    #[error("the peer has no queue pair with this token: it is gone, or the endpoint is stale")]
    Token,
    /// The peer shares no memory by this token.
    #[error("the peer shares no such memory (any more)")]
    NotShared,
    /// The peer answered something that is not this protocol.
    #[error("the peer speaks another protocol or version")]
    Protocol,
    /// The peer closed the stream before it answered.
    #[error("the peer closed the stream before it answered ({0})")]
    Closed(#[source] io::Error),
    /// The device has no such path at all.
    #[error("this device has no such path")]
    NoSuchPath,
}

/// Why a chain was not posted, or only its head.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("posted {posted}, then: {cause}")]
pub struct PostError {
    /// How many work requests, from the chain's first, were posted.
    pub posted: usize,
    /// Why the next one was not.
    pub cause: PostCause,
}

/// Why a work request was not posted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostCause {
    /// The send or receive queue is full; poll and post again.
    #[error("the work queue is full")]
    QueueFull,
    /// The completion queue could overflow; poll and post again.
    #[error("the completion queue has no room for another completion")]
    CqFull,
    /// Too many scatter/gather elements.
    #[error("{sges} scatter/gather elements, the queue pair takes {max}")]
    TooManySges {
        /// In the work request.
        sges: u32,
        /// The queue pair's limit.
        max: u32,
    },
    /// The message is too long.
    #[error("message of {len} bytes, the device takes {max}")]
    TooLong {
        /// Bytes of the message.
        len: u64,
        /// The device's limit.
        max: u64,
    },
    /// A scatter/gather element names a region that is not in the table.
    #[error("region {region} is not in the table of {regions}")]
    NoSuchRegion {
        /// The index.
        region: u32,
        /// Length of the table.
        regions: u32,
    },
    /// The driver refuses the work request.
    #[error("the driver refuses it: {}", io::Error::from_raw_os_error(*errno))]
    Device {
        /// Its answer.
        errno: i32,
    },
    /// The queue pair is not ready for this.
    #[error("the queue pair is in {0}")]
    State(QpState),
}

pub(crate) fn os(op: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Os { op, source }
}

pub(crate) fn last_os(op: &'static str) -> Error {
    Error::Os {
        op,
        source: io::Error::last_os_error(),
    }
}
