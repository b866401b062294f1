//! The choice of a NIC and its port: which can be used, and which come first.

use std::cmp::Ordering;
use std::path::Path;

use super::gid::{self, GidChoice, GidFault, Network};
use super::{LinkLayer, PortDetails, PortState, RdmaDevice, Transport, sysfs};
use crate::error::Error;

/// Where a device is plugged in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The way down from the PCI root (`pci0000:40`) over bridges and switches to the device itself;
    /// empty where it is on no such bus.
    pub pci_path: Vec<String>,
    /// The NUMA node; `None` where the kernel knows none.
    pub numa_node: Option<u32>,
}

impl Place {
    /// Where the PCI device with an address such as `0000:41:00.0` is plugged in; `None` where this
    /// machine has none of that address.
    #[must_use]
    pub fn of_pci(address: &str) -> Option<Self> {
        sysfs::pci_place(Path::new("/sys"), address)
    }

    /// On a NUMA node, of which nothing else is known.
    #[must_use]
    pub fn on_node(node: u32) -> Self {
        Self {
            pci_path: Vec::new(),
            numa_node: Some(node),
        }
    }

    /// The PCI address.
    #[must_use]
    pub fn pci(&self) -> Option<&str> {
        self.pci_path.last().map(String::as_str)
    }

    /// Steps from the root that both ways have in common; 0 for two that meet in a processor, or are
    /// on no PCI bus.
    fn shared(&self, other: &Self) -> usize {
        let pairs = self.pci_path.iter().zip(&other.pci_path);
        pairs.take_while(|(a, b)| a == b).count()
    }
}

/// What ports are ranked by.
pub struct PortWish<'a> {
    /// The place of a device of this name among those that may be used, the smallest first; `None`
    /// where it may not be used.
    pub order: &'a dyn Fn(&str) -> Option<usize>,
    /// What the device ought to be near to: the memory, or the GPU.
    pub near: Option<&'a Place>,
    /// The index of the GID to use.
    pub gid_index: Option<u32>,
    /// The peer's GIDs, as [`choose_gid`](super::choose_gid) takes them.
    pub peer: &'a [[u8; 16]],
}

/// Every port, and every device that has none that could be told of.
#[derive(Debug)]
#[non_exhaustive]
pub struct PortRanking<'a> {
    /// Those that can be used, the best first.
    pub usable: Vec<UsablePort<'a>>,
    /// The others, as they were listed.
    pub unusable: Vec<UnusablePort<'a>>,
}

/// A port that can be used.
#[derive(Debug)]
#[non_exhaustive]
pub struct UsablePort<'a> {
    /// Its device.
    pub device: &'a RdmaDevice,
    /// Its number.
    pub number: u8,
    /// What it is.
    pub details: &'a PortDetails,
    /// The GID to use; `None` where InfiniBand goes without.
    pub gid: Option<GidChoice>,
    /// What puts it before the next one, or behind the one before, in a few words.
    pub reason: String,
}

/// A port, or a whole device, that cannot be used.
#[derive(Debug)]
#[non_exhaustive]
pub struct UnusablePort<'a> {
    /// The device.
    pub device: &'a RdmaDevice,
    /// The port; `None` where it is the device.
    pub number: Option<u8>,
    /// Why not.
    pub fault: PortFault<'a>,
}

/// Why a port cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PortFault<'a> {
    /// The settings leave the device out.
    #[error("rdma_devices leaves it out")]
    Excluded,
    /// It does not speak InfiniBand's transport.
    #[error("{}", foreign(*speaks))]
    Transport {
        /// What it speaks.
        speaks: Transport,
    },
    /// The device cannot be opened, or does not answer.
    #[error("{0}")]
    Device(&'a Error),
    /// The device has no port.
    #[error("it has no port")]
    NoPort,
    /// The device does not tell about the port.
    #[error("{0}")]
    Port(&'a Error),
    /// The port has no link.
    #[error("the port is {state}: {}", not_active(*state))]
    NotActive {
        /// The state it is in.
        state: PortState,
    },
    /// The port has no address that could be used.
    #[error("{0}")]
    Gid(GidFault),
}

fn foreign(transport: Transport) -> String {
    match transport {
        Transport::Iwarp => {
            "it speaks iWARP, whose connections rdma_cm must make, and kvxfer makes its own: use a NIC \
             with RoCE or InfiniBand, or --path tcp"
                .to_owned()
        }
        other => format!("it speaks {other}, and kvxfer InfiniBand's transport alone"),
    }
}

fn not_active(state: PortState) -> &'static str {
    match state {
        PortState::Down => {
            "look at the cable and the other end; on Ethernet, ip link set DEV up for its interface"
        }
        PortState::Init | PortState::Armed => {
            "no subnet manager has set it up: look at opensm, or at the switch that runs it"
        }
        _ => "it has to be ACTIVE",
    }
}

/// All ports by whether they can be used, and the usable ones in order: as `order` says, then the
/// nearest on PCI, those on the same NUMA node, the fastest, by name.
///
/// The kernel is asked for its routes; no packet is sent.
#[must_use]
pub fn rank_ports<'a>(devices: &'a [RdmaDevice], wish: &PortWish<'_>) -> PortRanking<'a> {
    rank(devices, wish, &Network::kernel())
}

fn rank<'a>(
    devices: &'a [RdmaDevice],
    wish: &PortWish<'_>,
    network: &Network<'_>,
) -> PortRanking<'a> {
    let mut rated = Vec::new();
    let mut unusable = Vec::new();
    for device in devices {
        let (order, ports) = match usable(device, wish) {
            Ok(found) => found,
            Err(fault) => {
                unusable.push(UnusablePort {
                    device,
                    number: None,
                    fault,
                });
                continue;
            }
        };
        for port in ports {
            let details = port.details.as_ref().map_err(PortFault::Port);
            let gid = |details| Ok((details, port_gid(details, wish, network)?));
            match details.and_then(gid) {
                Ok((details, gid)) => {
                    let port = UsablePort {
                        device,
                        number: port.number,
                        details,
                        gid,
                        reason: String::new(),
                    };
                    rated.push((Merit::of(&port, order, wish.near), port));
                }
                Err(fault) => unusable.push(UnusablePort {
                    device,
                    number: Some(port.number),
                    fault,
                }),
            }
        }
    }
    rated.sort_by(|(a, _), (b, _)| a.compare(b).0);
    let reasons: Vec<String> = (0..rated.len())
        .map(|at| reason(&rated, at, wish.near))
        .collect();
    let usable = rated
        .into_iter()
        .zip(reasons)
        .map(|((_, port), reason)| UsablePort { reason, ..port });
    PortRanking {
        usable: usable.collect(),
        unusable,
    }
}

/// The device's place in the order, and its ports.
fn usable<'a>(
    device: &'a RdmaDevice,
    wish: &PortWish<'_>,
) -> Result<(usize, &'a [super::RdmaPort]), PortFault<'a>> {
    let order = (wish.order)(&device.name).ok_or(PortFault::Excluded)?;
    if device.transport != Transport::InfiniBand {
        let speaks = device.transport;
        return Err(PortFault::Transport { speaks });
    }
    let details = device.details.as_ref().map_err(PortFault::Device)?;
    match details.ports.as_slice() {
        [] => Err(PortFault::NoPort),
        ports => Ok((order, ports)),
    }
}

fn port_gid<'a>(
    details: &'a PortDetails,
    wish: &PortWish<'_>,
    network: &Network<'_>,
) -> Result<Option<GidChoice>, PortFault<'a>> {
    if !matches!(details.state, PortState::Active | PortState::ActiveDefer) {
        let state = details.state;
        return Err(PortFault::NotActive { state });
    }
    match gid::choose(details, wish.gid_index, wish.peer, network) {
        Ok(choice) => Ok(Some(choice)),
        Err(_)
            if details.link_layer != LinkLayer::Ethernet
                && !details.grh_required
                && wish.gid_index.is_none() =>
        {
            Ok(None)
        }
        Err(fault) => Err(PortFault::Gid(fault)),
    }
}

/// What a port is ranked by.
struct Merit {
    order: usize,
    shared: usize,
    same_node: bool,
    mbps: u32,
    name: Vec<(String, u64)>,
    number: u8,
}

/// What tells two ports apart.
#[derive(Clone, Copy)]
enum Difference {
    Order,
    Pci,
    Node,
    Speed,
    Name,
    Number,
}

impl Merit {
    fn of(port: &UsablePort<'_>, order: usize, near: Option<&Place>) -> Self {
        let place = &port.device.place;
        Self {
            order,
            shared: near.map_or(0, |near| near.shared(place)),
            same_node: near
                .is_some_and(|near| near.numa_node.is_some() && near.numa_node == place.numa_node),
            mbps: port.details.mbps.unwrap_or(0),
            name: natural(&port.device.name),
            number: port.number,
        }
    }

    /// The better one is less. The second is what decided.
    fn compare(&self, other: &Self) -> (Ordering, Difference) {
        let steps = [
            (self.order.cmp(&other.order), Difference::Order),
            (other.shared.cmp(&self.shared), Difference::Pci),
            (other.same_node.cmp(&self.same_node), Difference::Node),
            (other.mbps.cmp(&self.mbps), Difference::Speed),
            (self.name.cmp(&other.name), Difference::Name),
        ];
        let decided = steps.into_iter().find(|(order, _)| order.is_ne());
        decided.unwrap_or((self.number.cmp(&other.number), Difference::Number))
    }
}

/// A name whose numbers count as numbers: `mlx5_2` before `mlx5_10`.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = vec![(String::new(), 0_u64)];
    let mut in_number = false;
    for c in name.chars() {
        let digit = c.to_digit(10).map(u64::from);
        if digit.is_none() && in_number {
            parts.push((String::new(), 0));
        }
        in_number = digit.is_some();
        if let Some((text, number)) = parts.last_mut() {
            match digit {
                Some(digit) => *number = number.saturating_mul(10).saturating_add(digit),
                None => text.push(c),
            }
        }
    }
    parts
}

/// Why the port is at its place: the first against the next, the others against the one before.
fn reason(rated: &[(Merit, UsablePort<'_>)], at: usize, near: Option<&Place>) -> String {
    let pci = || near.and_then(Place::pci).unwrap_or("the memory");
    let node = || match near.and_then(|near| near.numa_node) {
        Some(node) => format!("NUMA node {node}"),
        None => "its NUMA node".to_owned(),
    };
    let before = at.checked_sub(1).and_then(|before| rated.get(before));
    match (rated.get(at), before, rated.get(at + 1)) {
        (Some((merit, port)), None, Some((next, _))) => match merit.compare(next).1 {
            Difference::Order => "the first of rdma_devices that can be used".to_owned(),
            Difference::Pci => format!("the nearest to {} on PCI", pci()),
            Difference::Node => format!("on {}", node()),
            Difference::Speed => match port.details.mbps {
                Some(mbps) => format!("the fastest: {} Gb/s", f64::from(mbps) / 1e3),
                None => "the fastest".to_owned(),
            },
            Difference::Name => "the first by name of equals".to_owned(),
            Difference::Number => "the first port of its device".to_owned(),
        },
        (Some((merit, _)), Some((better, port)), _) => {
            let better_one = format!("{} port {}", port.device.name, port.number);
            match merit.compare(better).1 {
                Difference::Order => format!("later in rdma_devices than {better_one}"),
                Difference::Pci => format!("farther from {} than {better_one}", pci()),
                Difference::Node => {
                    format!("not on {}, as {better_one} is", node())
                }
                Difference::Speed => format!("slower than {better_one}"),
                Difference::Name | Difference::Number => {
                    format!("equal to {better_one}, and after it by name")
                }
            }
        }
        _ => "the only one that can be used".to_owned(),
    }
}

#[cfg(test)]
mod tests;
