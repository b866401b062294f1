//! What a way over RDMA devices is: what perftest prints of one, and RDMA operators look for.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use kvxfer_verbs::{Context, GidChoice, PortAddr, QpEndpoint};

/// Two ports that a peer's queue pairs go between, as this side sees them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RdmaLink {
    /// This side's device.
    pub device: String,
    /// Its port, from 1.
    pub port: u8,
    /// What the port is plugged into.
    pub link_layer: String,
    /// Bytes of the longest packet, the smaller of both sides'.
    pub mtu: u32,
    /// This side's GID: its place in the port's table, its address, its type, and why this one.
    pub gid_index: u32,
    /// See `gid_index`.
    pub gid: IpAddr,
    /// See `gid_index`; nothing where nobody tells.
    pub gid_type: Option<String>,
    /// See `gid_index`.
    pub gid_reason: String,
    /// The peer's GID.
    pub peer_gid: IpAddr,
    /// The queue pairs.
    pub queue_pairs: Vec<QueuePairs>,
}

/// A queue pair and the peer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePairs {
    /// This side's number.
    pub qpn: u32,
    /// The number of the first packet that it sends.
    pub psn: u32,
    /// The peer's number.
    pub peer_qpn: u32,
    /// The number of the first packet that the peer's sends.
    pub peer_psn: u32,
}

impl RdmaLink {
    /// `None` where they are not of RDMA devices.
    pub(crate) fn new(
        context: &Context,
        gid: Option<&GidChoice>,
        pairs: &[(QpEndpoint, QpEndpoint)],
    ) -> Option<Self> {
        let (gid, port) = (gid?, context.rdma_port()?);
        let (own, peer) = pairs.first()?;
        let (own, peer): (PortAddr, PortAddr) = (own.port?, peer.port?);
        Some(Self {
            device: context.device().name.clone(),
            port: context.device().port,
            link_layer: port.link_layer.to_string(),
            mtu: own.mtu.min(peer.mtu),
            gid_index: gid.index,
            gid: address(own.gid),
            gid_type: gid.kind.map(|kind| kind.to_string()),
            gid_reason: gid.reason.clone(),
            peer_gid: address(peer.gid),
            queue_pairs: pairs
                .iter()
                .map(|(own, peer)| QueuePairs {
                    qpn: own.qpn,
                    psn: own.psn,
                    peer_qpn: peer.qpn,
                    peer_psn: peer.psn,
                })
                .collect(),
        })
    }
}

fn address(gid: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(gid);
    v6.to_ipv4_mapped().map_or(v6.into(), IpAddr::from)
}

impl fmt::Display for RdmaLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The reason begins with the type.
        write!(
            f,
            "{} port {}, {}, MTU {}, GID {} {} ({}), peer {}",
            self.device,
            self.port,
            self.link_layer,
            self.mtu,
            self.gid_index,
            self.gid,
            self.gid_reason,
            self.peer_gid
        )
    }
}
