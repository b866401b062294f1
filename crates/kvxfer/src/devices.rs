//! The NICs that an engine would take, and why not the others.

use kvxfer_verbs::{Place, PortRanking, PortWish, RdmaDevice, rank_ports};

use crate::config::Config;

/// The ports of `devices` as the settings `rdma_devices` and `rdma_gid_index` rank them, the best first.
/// `near` is what they ought to be near to; `peer` the peer's GIDs, empty where they are not known.
#[must_use]
pub fn rank<'a>(
    devices: &'a [RdmaDevice],
    config: &Config,
    near: Option<&Place>,
    peer: &[[u8; 16]],
) -> PortRanking<'a> {
    let order = |name: &str| match &config.rdma_devices {
        Some(filter) => filter.place(name),
        None => Some(0),
    };
    rank_ports(
        devices,
        &PortWish {
            order: &order,
            near,
            gid_index: u32::try_from(config.rdma_gid_index).ok(),
            peer,
        },
    )
}
