//! What `kvxfer devices` has found, as it is printed.

use std::net::IpAddr;

use serde::Serialize;

use super::gpus::{GpuRow, Gpus, Reach, Runtime};
use super::moves::{Move, moves};
use kvxfer_verbs::{
    Gid, GidChoice, GidKind, PortRanking, RdmaDevice, RdmaPort, UnusablePort, UsablePort,
};

const SCHEMA: &str = "kvxfer.devices/1";

#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    schema: &'static str,
    pub(super) config: Asked,
    pub(super) rdma: Rdma,
    pub(super) devices: Vec<Device>,
    /// The ports that can be used, the best first.
    pub(super) order: Vec<Chosen>,
    pub(super) soft: Soft,
    pub(super) gpu: Runtime,
    pub(super) gpus: Vec<GpuRow>,
    pub(super) gpu_pairs: Vec<Reach>,
    pub(super) moves: Vec<Move>,
}

/// What the choice was made by.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Asked {
    pub(super) version: &'static str,
    pub(super) rdma_devices: Option<String>,
    pub(super) rdma_gid_index: Option<u32>,
    pub(super) near: Option<String>,
    pub(super) peer: Option<String>,
    pub(super) peer_addresses: Vec<IpAddr>,
}

/// Whether there is RDMA at all.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Rdma {
    pub(super) missing: Option<&'static str>,
    pub(super) why: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) driver: Option<String>,
    pub(super) pci: Option<String>,
    pub(super) pci_path: Vec<String>,
    pub(super) numa_node: Option<u32>,
    pub(super) transport: String,
    pub(super) node_guid: String,
    pub(super) why_not: Option<String>,
    pub(super) limits: Option<Limits>,
    pub(super) ports: Vec<Port>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Limits {
    pub(super) firmware: String,
    pub(super) vendor_id: u32,
    pub(super) part_id: u32,
    pub(super) max_mr_size: u64,
    pub(super) max_mr: u32,
    pub(super) max_pd: u32,
    pub(super) max_qp: u32,
    pub(super) max_qp_wr: u32,
    pub(super) max_sge: u32,
    pub(super) max_sge_rd: u32,
    pub(super) max_cq: u32,
    pub(super) max_cqe: u32,
    pub(super) max_rd_atomic: u32,
    pub(super) max_init_rd_atomic: u32,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Port {
    pub(super) port: u8,
    pub(super) usable: bool,
    pub(super) why_not: Option<String>,
    /// None where the device does not tell.
    pub(super) link: Option<Link>,
    pub(super) gids: Vec<GidRow>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Link {
    pub(super) state: String,
    pub(super) link_layer: String,
    pub(super) mbps: Option<u32>,
    pub(super) active_mtu: Option<u32>,
    pub(super) max_mtu: Option<u32>,
    pub(super) max_msg_sz: u32,
    pub(super) lid: u16,
    pub(super) pkeys: u16,
    pub(super) grh_required: bool,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct GidRow {
    pub(super) index: u32,
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) address: String,
    pub(super) netdev: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Chosen {
    pub(super) device: String,
    pub(super) port: u8,
    pub(super) reason: String,
    pub(super) gid: Option<ChosenGid>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ChosenGid {
    #[serde(flatten)]
    pub(super) row: GidRow,
    pub(super) reason: String,
}

/// The software device.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Soft {
    pub(super) device: &'static str,
    pub(super) why_not: Option<String>,
    pub(super) limits: Option<SoftLimits>,
    pub(super) paths: Vec<SoftPath>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct SoftLimits {
    pub(super) max_mr: u32,
    pub(super) max_qp_wr: u32,
    pub(super) max_sge: u32,
    pub(super) max_cqe: u32,
    pub(super) max_msg_sz: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct SoftPath {
    pub(super) path: &'static str,
    pub(super) usable: bool,
    pub(super) why_not: Option<String>,
    pub(super) note: String,
}

impl Report {
    pub(super) fn new(
        config: Asked,
        rdma: Rdma,
        found: &[RdmaDevice],
        ranking: &PortRanking<'_>,
        soft: Soft,
        gpus: Gpus,
    ) -> Self {
        let devices = found.iter().map(|d| Device::new(d, ranking)).collect();
        let order = ranking.usable.iter().map(Chosen::new).collect();
        Self::of(config, rdma, devices, order, soft, gpus)
    }

    /// Of devices that need be no machine's.
    pub(super) fn of(
        config: Asked,
        rdma: Rdma,
        devices: Vec<Device>,
        order: Vec<Chosen>,
        soft: Soft,
        gpus: Gpus,
    ) -> Self {
        Self {
            schema: SCHEMA,
            moves: moves(&soft, &rdma, &order, &gpus),
            config,
            rdma,
            devices,
            order,
            soft,
            gpu: gpus.runtime,
            gpus: gpus.gpus,
            gpu_pairs: gpus.pairs,
        }
    }
}

impl Device {
    fn new(device: &RdmaDevice, ranking: &PortRanking<'_>) -> Self {
        let of_it = |left: &&UnusablePort<'_>| std::ptr::eq(left.device, device);
        let unusable: Vec<_> = ranking.unusable.iter().filter(of_it).collect();
        let fault = |number| {
            let left = unusable.iter().find(|left| left.number == number);
            left.map(|left| left.fault.to_string())
        };
        let why_not = fault(None);
        let details = device.details.as_ref().ok();
        let port = |port: &RdmaPort| {
            let why_not = why_not.clone().or_else(|| fault(Some(port.number)));
            Port::new(port, why_not)
        };
        Self {
            name: device.name.clone(),
            driver: device.driver.clone(),
            pci: device.place.pci().map(str::to_owned),
            pci_path: device.place.pci_path.clone(),
            numa_node: device.place.numa_node,
            transport: device.transport.to_string(),
            node_guid: guid(device.guid),
            limits: details.map(|details| {
                let limits = &details.limits;
                Limits {
                    firmware: limits.firmware.clone(),
                    vendor_id: limits.vendor_id,
                    part_id: limits.part_id,
                    max_mr_size: limits.max_mr_size,
                    max_mr: limits.max_mr,
                    max_pd: limits.max_pd,
                    max_qp: limits.max_qp,
                    max_qp_wr: limits.max_qp_wr,
                    max_sge: limits.max_sge,
                    max_sge_rd: limits.max_sge_rd,
                    max_cq: limits.max_cq,
                    max_cqe: limits.max_cqe,
                    max_rd_atomic: limits.max_rd_atomic,
                    max_init_rd_atomic: limits.max_init_rd_atomic,
                }
            }),
            ports: details
                .map(|details| details.ports.iter().map(port).collect())
                .unwrap_or_default(),
            why_not,
        }
    }
}

impl Port {
    fn new(port: &RdmaPort, why_not: Option<String>) -> Self {
        let details = port.details.as_ref().ok();
        let gids = details.and_then(|details| details.gids.as_ref().ok());
        Self {
            port: port.number,
            usable: why_not.is_none(),
            why_not,
            link: details.map(|details| Link {
                state: details.state.to_string(),
                link_layer: details.link_layer.to_string(),
                mbps: details.mbps,
                active_mtu: details.active_mtu,
                max_mtu: details.max_mtu,
                max_msg_sz: details.max_msg_sz,
                lid: details.lid,
                pkeys: details.pkeys,
                grh_required: details.grh_required,
            }),
            gids: gids
                .map(|gids| gids.iter().map(GidRow::of).collect())
                .unwrap_or_default(),
        }
    }
}

impl GidRow {
    fn of(gid: &Gid) -> Self {
        Self::new(gid.index, gid.kind, &gid.address(), gid.netdev.as_ref())
    }

    fn new(index: u32, kind: Option<GidKind>, address: &IpAddr, netdev: Option<&String>) -> Self {
        Self {
            index,
            kind: kind.map(|kind| kind.to_string()),
            address: address.to_string(),
            netdev: netdev.cloned(),
        }
    }
}

impl Chosen {
    fn new(port: &UsablePort<'_>) -> Self {
        let gid = |gid: &GidChoice| ChosenGid {
            row: GidRow::new(gid.index, gid.kind, &gid.address(), gid.netdev.as_ref()),
            reason: gid.reason.clone(),
        };
        Self {
            device: port.device.name.clone(),
            port: port.number,
            reason: port.reason.clone(),
            gid: port.gid.as_ref().map(gid),
        }
    }
}

/// As ibv_devinfo writes it: `acec:feff:fe70:1a9d`.
fn guid(guid: u64) -> String {
    let quarter = |shift: u32| format!("{:04x}", (guid >> shift) & 0xffff);
    [48, 32, 16, 0].map(quarter).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_written_as_ibv_devinfo_does() {
        assert_eq!(guid(0xacec_feff_fe70_001d), "acec:feff:fe70:001d");
    }
}
