//! The choice of a GID: which address of a port a queue pair sends from.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};

use super::{Gid, GidKind, LinkLayer, PortDetails};

/// Where RoCE v2 arrives. The kernel's answer does not depend on it, and none is sent.
const ROCE_V2_PORT: u16 = 4791;

/// The GID that a queue pair takes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GidChoice {
    /// Its place in the port's table.
    pub index: u32,
    /// The address, first byte first.
    pub gid: [u8; 16],
    /// What it is an address of; `None` where nobody tells.
    pub kind: Option<GidKind>,
    /// The network interface that it belongs to.
    pub netdev: Option<String>,
    /// Why this one, in a few words.
    pub reason: String,
}

impl GidChoice {
    /// The address; an IPv4 address where it is the mapping of one.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        address(self.gid)
    }
}

/// Why a port has no GID that could be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GidFault {
    /// The table is empty.
    #[error(
        "the port has no GID: give its network interface an address, and set it up (ip link set DEV up)"
    )]
    Empty,
    /// The device does not tell what is in the table.
    #[error("the port's GIDs cannot be had: {why}")]
    Untold {
        /// Its answer.
        why: String,
    },
    /// The index that was asked for has none.
    #[error("there is no GID {asked}: the port has {}", listed(have))]
    NoSuchIndex {
        /// The index.
        asked: u32,
        /// Those there are.
        have: Vec<Gid>,
    },
    /// Both ends of a connection over RoCE need addresses of one family.
    #[error(
        "the peer has {} addresses alone, and here is {}: give both sides one family",
        families(peer),
        listed(have)
    )]
    Family {
        /// The GIDs that could have been taken.
        have: Vec<Gid>,
        /// The peer's.
        peer: Vec<IpAddr>,
    },
}

/// What the kernel knows of the network.
pub(super) struct Network<'a> {
    /// The address that packets to another one are sent from.
    pub(super) source_towards: &'a dyn Fn(IpAddr) -> Option<IpAddr>,
    /// How many leading bits an address of this machine shares with its subnet.
    pub(super) prefix: &'a dyn Fn(IpAddr) -> Option<u32>,
}

impl Network<'_> {
    /// This machine's.
    pub(super) fn kernel() -> Self {
        Self {
            source_towards: &source_towards,
            prefix: &prefix,
        }
    }
}

/// The GID to use on this port: the one at `asked`, or the best by rule. `peer` are the GIDs that the
/// peer's port has, or the one that it has chosen; empty where they are not known.
///
/// On Ethernet an address of the peer's family, RoCE v2 before v1, and in this order: the one that
/// the kernel sends from towards the peer, one on the peer's subnet, IPv4, IPv6, link-local. On
/// InfiniBand the first. The kernel is asked for its routes; no packet is sent.
///
/// # Errors
///
/// No GID of the port can be used.
pub fn choose_gid(
    port: &PortDetails,
    asked: Option<u32>,
    peer: &[[u8; 16]],
) -> Result<GidChoice, GidFault> {
    choose(port, asked, peer, &Network::kernel())
}

pub(super) fn choose(
    port: &PortDetails,
    asked: Option<u32>,
    peer: &[[u8; 16]],
    network: &Network<'_>,
) -> Result<GidChoice, GidFault> {
    let gids: Vec<&Gid> = match &port.gids {
        Ok(gids) => gids.iter().filter(|gid| gid.raw != [0; 16]).collect(),
        Err(e) => return Err(GidFault::Untold { why: e.to_string() }),
    };
    if gids.is_empty() {
        return Err(GidFault::Empty);
    }
    let ethernet = port.link_layer == LinkLayer::Ethernet;
    let gids = match asked {
        None => gids,
        Some(asked) => match gids.iter().find(|gid| gid.index == asked) {
            Some(gid) => vec![*gid],
            None => {
                let have = gids.into_iter().cloned().collect();
                return Err(GidFault::NoSuchIndex { asked, have });
            }
        },
    };
    let peer: Vec<IpAddr> = match ethernet {
        // Its GIDs are of the same subnet manager, and say nothing about ours.
        false => Vec::new(),
        true => peer
            .iter()
            .filter(|raw| **raw != [0; 16])
            .map(|raw| address(*raw))
            .collect(),
    };
    let of_family: Vec<&Gid> = gids
        .iter()
        .copied()
        .filter(|gid| peer.is_empty() || peer.iter().any(|p| is_family(*p, gid.address())))
        .collect();
    let chosen = match (asked, ethernet) {
        (Some(_), _) => of_family.first().map(|gid| (*gid, "asked for".to_owned())),
        (None, false) => of_family
            .iter()
            .min_by_key(|gid| gid.index)
            .map(|gid| (*gid, "the first of InfiniBand".to_owned())),
        (None, true) => best(&of_family, &peer, network),
    };
    let Some((gid, reason)) = chosen else {
        let have = gids.into_iter().cloned().collect();
        return Err(GidFault::Family { have, peer });
    };
    Ok(GidChoice {
        index: gid.index,
        gid: gid.raw,
        kind: gid.kind,
        netdev: gid.netdev.clone(),
        reason,
    })
}

/// How well an address suits; the smallest is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// The kernel sends from it towards the peer.
    Routed,
    /// On the peer's subnet.
    Subnet,
    V4,
    V6,
    /// Link-local, as is an address of the peer.
    LinkLocal,
    /// One of two is link-local, and the other is not.
    Mixed,
}

/// The best of RoCE.
fn best<'a>(gids: &[&'a Gid], peer: &[IpAddr], network: &Network<'_>) -> Option<(&'a Gid, String)> {
    let sources: Vec<(IpAddr, IpAddr)> = peer
        .iter()
        .filter(|p| !is_link_local(**p))
        .filter_map(|p| Some((*p, (network.source_towards)(*p)?)))
        .collect();
    let rated = gids.iter().map(|gid| {
        let (fit, near) = fit(gid.address(), peer, &sources, network);
        ((roce(gid.kind), fit, 128 - near, gid.index), *gid)
    });
    let ((_, fit, _, _), gid) = rated.min_by_key(|(key, _)| *key)?;
    Some((gid, reason(gid, fit, peer, &sources)))
}

/// RoCE v2 reaches what IP reaches; v1 reaches one Ethernet network, and only a peer that has nothing
/// better speaks it.
fn roce(kind: Option<GidKind>) -> u8 {
    match kind {
        Some(GidKind::RoceV2) => 0,
        None => 1,
        Some(GidKind::RoceV1) => 2,
        Some(GidKind::InfiniBand | GidKind::Other(_)) => 3,
    }
}

/// How well an address suits the peer, and how many leading bits it shares with one of the peer's.
fn fit(
    address: IpAddr,
    peer: &[IpAddr],
    sources: &[(IpAddr, IpAddr)],
    network: &Network<'_>,
) -> (Fit, u32) {
    let family = || peer.iter().filter(|p| is_family(**p, address));
    let near = family().map(|p| common(*p, address)).max().unwrap_or(0);
    let local = is_link_local(address);
    let fit = if sources.iter().any(|(_, source)| *source == address) {
        Fit::Routed
    } else if !peer.is_empty() && !family().any(|p| is_link_local(*p) == local) {
        Fit::Mixed
    } else if local {
        Fit::LinkLocal
    } else if (network.prefix)(address).is_some_and(|bits| near >= bits.max(1)) {
        Fit::Subnet
    } else if address.is_ipv4() {
        Fit::V4
    } else {
        Fit::V6
    };
    (fit, near)
}

fn reason(gid: &Gid, fit: Fit, peer: &[IpAddr], sources: &[(IpAddr, IpAddr)]) -> String {
    let address = gid.address();
    let near = || {
        let family = peer.iter().filter(|p| is_family(**p, address));
        family.max_by_key(|p| common(**p, address))
    };
    let how = match fit {
        Fit::Routed => match sources.iter().find(|(_, source)| *source == address) {
            Some((to, _)) => format!("the kernel's source address towards {to}"),
            None => "the kernel's source address".to_owned(),
        },
        Fit::Subnet => match near() {
            Some(to) => format!("on the subnet of {to}"),
            None => "on the peer's subnet".to_owned(),
        },
        Fit::V4 => "IPv4".to_owned(),
        Fit::V6 => "IPv6".to_owned(),
        Fit::LinkLocal => "link-local: nothing else works".to_owned(),
        Fit::Mixed => "of the peer's family, and of another scope".to_owned(),
    };
    match gid.kind {
        Some(GidKind::RoceV2) => format!("RoCE v2, {how}"),
        Some(kind) => format!("{kind} for want of RoCE v2, {how}"),
        None => format!("of unknown type, {how}"),
    }
}

/// An IPv4 address where it is the mapping of one.
pub(super) fn address(raw: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(raw);
    v6.to_ipv4_mapped().map_or(v6.into(), IpAddr::from)
}

fn is_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Leading bits in which two addresses of one family agree.
fn common(a: IpAddr, b: IpAddr) -> u32 {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => 0,
    }
}

/// The address that the kernel's routing sends from. Connecting a UDP socket sends nothing.
fn source_towards(to: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr = match to {
        IpAddr::V4(_) => ([0; 4], 0).into(),
        IpAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect((to, ROCE_V2_PORT)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Leading bits of the subnet of an address of this machine.
fn prefix(address: IpAddr) -> Option<u32> {
    let mut interfaces = nix::ifaddrs::getifaddrs().ok()?;
    interfaces.find_map(|interface| {
        let ip = |socket: Option<nix::sys::socket::SockaddrStorage>| {
            let socket = socket?;
            let v4 = socket.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| socket.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        };
        if ip(interface.address) != Some(address) {
            return None;
        }
        Some(match ip(interface.netmask)? {
            IpAddr::V4(mask) => mask.to_bits().leading_ones(),
            IpAddr::V6(mask) => mask.to_bits().leading_ones(),
        })
    })
}

/// `0 (RoCE v1 fe80::1), 1 (RoCE v2 10.7.0.1)`.
fn listed(gids: &[Gid]) -> String {
    let one = |gid: &Gid| match gid.kind {
        Some(kind) => format!("{} ({kind} {})", gid.index, gid.address()),
        None => format!("{} ({})", gid.index, gid.address()),
    };
    gids.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn families(peer: &[IpAddr]) -> &'static str {
    match peer.first() {
        Some(IpAddr::V4(_)) => "IPv4",
        _ => "IPv6",
    }
}

#[cfg(test)]
mod tests;
