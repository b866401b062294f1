//! RDMA devices, through libibverbs: which there are, and what they are and take.

mod context;
mod cq;
mod gid;
#[cfg(test)]
mod gpu_memory_tests;
mod handle;
mod port;
mod qp;
mod quirks;
mod registration;
mod ring;
mod sysfs;
#[cfg(test)]
mod tests;
mod transition;

use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use crate::error::Error;
use crate::sys::Verbs;
use crate::sys::enums::{
    IBV_LINK_LAYER_ETHERNET, IBV_LINK_LAYER_INFINIBAND, IBV_QPF_GRH_REQUIRED, ibv_gid_type,
    ibv_mtu, ibv_port_state, ibv_transport_type,
};
use crate::sys::types::{ibv_device_attr, ibv_port_attr};
pub use context::{RdmaConfig, open_rdma};
pub use gid::{GidChoice, GidFault, choose_gid};
use handle::{DeviceList, OpenDevice, RawGid};
pub use port::{Place, PortFault, PortRanking, PortWish, UnusablePort, UsablePort, rank_ports};

/// An RDMA device.
#[derive(Debug)]
#[non_exhaustive]
pub struct RdmaDevice {
    /// The kernel's name of it.
    pub name: String,
    /// The node's number, as it is printed: first byte first.
    pub guid: u64,
    /// What it speaks.
    pub transport: Transport,
    /// The kernel's driver of it, where the kernel tells.
    pub driver: Option<String>,
    /// Where it is plugged in.
    pub place: Place,
    /// What it takes, and its ports; an error where it cannot be opened.
    pub details: Result<RdmaDetails, Error>,
}

/// What a device says when it is open.
#[derive(Debug)]
#[non_exhaustive]
pub struct RdmaDetails {
    /// What it takes.
    pub limits: RdmaLimits,
    /// Its ports, the first first.
    pub ports: Vec<RdmaPort>,
}

/// What a device speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// InfiniBand's transport, over InfiniBand or Ethernet.
    InfiniBand,
    /// iWARP, over TCP.
    Iwarp,
    /// Anything else, with the number of `enum ibv_transport_type`.
    Other(i32),
}

/// What a device takes at most.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RdmaLimits {
    /// The firmware's version, in the device's words.
    pub firmware: String,
    /// The vendor's number.
    pub vendor_id: u32,
    /// The vendor's number of the part.
    pub part_id: u32,
    /// Bytes of one region.
    pub max_mr_size: u64,
    /// Regions.
    pub max_mr: u32,
    /// Protection domains.
    pub max_pd: u32,
    /// Queue pairs.
    pub max_qp: u32,
    /// Work requests of one queue.
    pub max_qp_wr: u32,
    /// Scatter/gather elements of one work request.
    pub max_sge: u32,
    /// Scatter/gather elements of one READ, on devices that tell them apart; otherwise 0.
    pub max_sge_rd: u32,
    /// Completion queues.
    pub max_cq: u32,
    /// Completions of one completion queue.
    pub max_cqe: u32,
    /// READs and atomics that one queue pair answers at a time.
    pub max_rd_atomic: u32,
    /// READs and atomics that one queue pair has under way at a time.
    pub max_init_rd_atomic: u32,
}

/// A port of a device.
#[derive(Debug)]
#[non_exhaustive]
pub struct RdmaPort {
    /// Its number, from 1.
    pub number: u8,
    /// What it is; an error where the device does not tell.
    pub details: Result<PortDetails, Error>,
}

/// What a device says of a port.
#[derive(Debug)]
#[non_exhaustive]
pub struct PortDetails {
    /// Whether it has a link.
    pub state: PortState,
    /// What it is plugged into.
    pub link_layer: LinkLayer,
    /// Bytes of the longest packet that the port can send, `None` where the device says nothing that
    /// is known.
    pub max_mtu: Option<u32>,
    /// Bytes of the longest packet as the link is now.
    pub active_mtu: Option<u32>,
    /// Bytes of one message.
    pub max_msg_sz: u32,
    /// The local address of InfiniBand; 0 on Ethernet.
    pub lid: u16,
    /// Partition keys that it has room for.
    pub pkeys: u16,
    /// Whether every packet needs a global route header, as always on Ethernet.
    pub grh_required: bool,
    /// Megabits a second of the link, `None` where the device says nothing that is known.
    pub mbps: Option<u32>,
    /// Its addresses, by index; an error where the device does not tell them. A port may have none.
    pub gids: Result<Vec<Gid>, Error>,
}

/// The state of a port; work goes over an active one alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortState {
    /// No link.
    Down,
    /// The link is there, and the subnet's manager has not set the port up.
    Init,
    /// Set up and not yet in use.
    Armed,
    /// In use.
    Active,
    /// In use, with a link that is lost for a moment.
    ActiveDefer,
    /// Anything else, with the number of `enum ibv_port_state`.
    Other(u32),
}

/// What a port is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet.
    Ethernet,
    /// Anything else, with its number.
    Other(u8),
}

/// An address of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gid {
    /// Its place in the port's table, which a queue pair names.
    pub index: u32,
    /// The address, first byte first.
    pub raw: [u8; 16],
    /// What it is an address of; `None` where nobody tells.
    pub kind: Option<GidKind>,
    /// The network interface it belongs to.
    pub netdev: Option<String>,
}

/// What a GID is an address of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet frames: it reaches one Ethernet network.
    RoceV1,
    /// UDP packets: it reaches what IP reaches.
    RoceV2,
    /// Anything else, with the number of `enum ibv_gid_type`.
    Other(u32),
}

/// All RDMA devices of this machine, as libibverbs orders them. Each is opened for a moment; no memory
/// is registered, and `ibv_fork_init`, which is for the whole process, is not called.
///
/// # Errors
///
/// [`Error::NoRdma`] says what is missing where there is no device; [`Error::Os`].
pub fn rdma_devices() -> Result<Vec<RdmaDevice>, Error> {
    let verbs = Verbs::get().map_err(Error::NoRdma)?;
    list(verbs, Path::new("/sys"))
}

/// `sys` is where sysfs is mounted.
fn list(verbs: &'static Verbs, sys: &Path) -> Result<Vec<RdmaDevice>, Error> {
    let list = DeviceList::get(verbs, sys)?;
    let devices = list.devices().map(|device| RdmaDevice {
        name: device.name(),
        guid: device.guid(),
        transport: device.transport().into(),
        driver: sysfs::driver(sys, &device.name()),
        place: sysfs::rdma_place(sys, &device.name()),
        details: device.open().and_then(|device| details(&device, sys)),
    });
    Ok(devices.collect())
}

fn details(device: &OpenDevice, sys: &Path) -> Result<RdmaDetails, Error> {
    let attr = device.attr()?;
    let ports: Vec<_> = (1..=attr.phys_port_cnt)
        .map(|number| (number, device.port(number)))
        .collect();
    let known = ports.iter().filter_map(|(_, port)| port.as_ref().ok());
    let mut table = match device.gid_table(known.map(gids_of)) {
        Some(Ok(table)) => Some(table),
        Some(Err(e)) => {
            // More GIDs than the ports say, perhaps. What is wrong with a port, that port will say.
            tracing::debug!("asking each port for its GIDs: {e}");
            None
        }
        None => None,
    };
    let port = |(number, port): (u8, Result<ibv_port_attr, Error>)| RdmaPort {
        number,
        details: port.map(|port| {
            let raw: Result<Vec<_>, _> = match &mut table {
                Some(table) => Ok(table
                    .extract_if(.., |gid| gid.port == u32::from(number))
                    .collect()),
                None => device.gids(number, gids_of(&port)),
            };
            let gids = raw.map(|raw| {
                let read = |gid: &RawGid| gid.read(device.name(), port.link_layer, sys);
                let mut gids: Vec<_> = raw.iter().map(read).collect();
                gids.sort_by_key(|gid| gid.index);
                gids
            });
            PortDetails::new(&port, gids)
        }),
    };
    Ok(RdmaDetails {
        limits: RdmaLimits::new(&attr),
        ports: ports.into_iter().map(port).collect(),
    })
}

/// How many GIDs a port says it has room for.
fn gids_of(port: &ibv_port_attr) -> u32 {
    u32::try_from(port.gid_tbl_len).unwrap_or(0)
}

impl RawGid {
    fn read(&self, device: &str, link_layer: u8, sys: &Path) -> Gid {
        let port = self.port;
        let kind = match self.kind {
            // Where only sysfs tells, it has one word for the other two.
            None => match sysfs::is_roce_v2(sys, device, port, self.index) {
                Some(true) => Some(GidKind::RoceV2),
                _ if link_layer != IBV_LINK_LAYER_ETHERNET => Some(GidKind::InfiniBand),
                Some(false) => Some(GidKind::RoceV1),
                None => None,
            },
            Some(ibv_gid_type::IBV_GID_TYPE_IB) => Some(GidKind::InfiniBand),
            Some(ibv_gid_type::IBV_GID_TYPE_ROCE_V1) => Some(GidKind::RoceV1),
            Some(ibv_gid_type::IBV_GID_TYPE_ROCE_V2) => Some(GidKind::RoceV2),
            Some(ibv_gid_type(other)) => Some(GidKind::Other(other)),
        };
        Gid {
            index: self.index,
            raw: self.raw,
            kind,
            netdev: sysfs::gid_netdev(sys, device, port, self.index),
        }
    }
}

impl RdmaLimits {
    fn new(attr: &ibv_device_attr) -> Self {
        let firmware: Vec<u8> = attr.fw_ver.iter().flat_map(|c| c.to_ne_bytes()).collect();
        let firmware = firmware.split(|b| *b == 0).next().unwrap_or_default();
        // A limit that is no number is none.
        let limit = |v: i32| u32::try_from(v).unwrap_or(0);
        Self {
            firmware: String::from_utf8_lossy(firmware).into_owned(),
            vendor_id: attr.vendor_id,
            part_id: attr.vendor_part_id,
            max_mr_size: attr.max_mr_size,
            max_mr: limit(attr.max_mr),
            max_pd: limit(attr.max_pd),
            max_qp: limit(attr.max_qp),
            max_qp_wr: limit(attr.max_qp_wr),
            max_sge: limit(attr.max_sge),
            max_sge_rd: limit(attr.max_sge_rd),
            max_cq: limit(attr.max_cq),
            max_cqe: limit(attr.max_cqe),
            max_rd_atomic: limit(attr.max_qp_rd_atom),
            max_init_rd_atomic: limit(attr.max_qp_init_rd_atom),
        }
    }
}

impl PortDetails {
    fn new(attr: &ibv_port_attr, gids: Result<Vec<Gid>, Error>) -> Self {
        Self {
            state: match attr.state {
                ibv_port_state::IBV_PORT_DOWN => PortState::Down,
                ibv_port_state::IBV_PORT_INIT => PortState::Init,
                ibv_port_state::IBV_PORT_ARMED => PortState::Armed,
                ibv_port_state::IBV_PORT_ACTIVE => PortState::Active,
                ibv_port_state::IBV_PORT_ACTIVE_DEFER => PortState::ActiveDefer,
                ibv_port_state(other) => PortState::Other(other),
            },
            link_layer: match attr.link_layer {
                IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
                IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
                other => LinkLayer::Other(other),
            },
            max_mtu: bytes(attr.max_mtu),
            active_mtu: bytes(attr.active_mtu),
            max_msg_sz: attr.max_msg_sz,
            lid: attr.lid,
            pkeys: attr.pkey_tbl_len,
            grh_required: attr.flags & IBV_QPF_GRH_REQUIRED != 0
                || attr.link_layer == IBV_LINK_LAYER_ETHERNET,
            mbps: mbps(attr.active_width, attr.active_speed),
            gids,
        }
    }
}

impl Gid {
    /// The address; an IPv4 address where it is the mapping of one.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        gid::address(self.raw)
    }
}

impl From<ibv_transport_type> for Transport {
    fn from(transport: ibv_transport_type) -> Self {
        match transport {
            ibv_transport_type::IBV_TRANSPORT_IB => Self::InfiniBand,
            ibv_transport_type::IBV_TRANSPORT_IWARP => Self::Iwarp,
            ibv_transport_type(other) => Self::Other(other),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InfiniBand => f.write_str("InfiniBand"),
            Self::Iwarp => f.write_str("iWARP"),
            Self::Other(v) => write!(f, "transport {v}"),
        }
    }
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "DOWN",
            Self::Init => "INIT",
            Self::Armed => "ARMED",
            Self::Active => "ACTIVE",
            Self::ActiveDefer => "ACTIVE_DEFER",
            Self::Other(v) => return write!(f, "state {v}"),
        })
    }
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InfiniBand => f.write_str("InfiniBand"),
            Self::Ethernet => f.write_str("Ethernet"),
            Self::Other(v) => write!(f, "link layer {v}"),
        }
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InfiniBand => f.write_str("IB"),
            Self::RoceV1 => f.write_str("RoCE v1"),
            Self::RoceV2 => f.write_str("RoCE v2"),
            Self::Other(v) => write!(f, "GID type {v}"),
        }
    }
}

fn bytes(mtu: ibv_mtu) -> Option<u32> {
    match mtu {
        ibv_mtu::IBV_MTU_256 => Some(256),
        ibv_mtu::IBV_MTU_512 => Some(512),
        ibv_mtu::IBV_MTU_1024 => Some(1024),
        ibv_mtu::IBV_MTU_2048 => Some(2048),
        ibv_mtu::IBV_MTU_4096 => Some(4096),
        _ => None,
    }
}

/// The code of an MTU; `None` for a number of bytes that none has.
fn mtu_code(mtu: u32) -> Option<u32> {
    let codes = [1, 2, 3, 4, 5];
    codes
        .into_iter()
        .find(|code| bytes(ibv_mtu(*code)) == Some(mtu))
}

/// From the codes of InfiniBand's PortInfo: lanes, and the speed of one.
fn mbps(width: u8, speed: u8) -> Option<u32> {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => return None,
    };
    let lane = match speed {
        1 => 2_500,
        2 => 5_000,
        4 | 8 => 10_000,
        16 => 14_000,
        32 => 25_000,
        64 => 50_000,
        128 => 100_000,
        _ => return None,
    };
    Some(lanes * lane)
}
