use super::*;
use crate::devices::report::{Asked, ChosenGid, Rdma, SoftLimits, SoftPath};

fn gid(index: u32, kind: Option<&str>, address: &str) -> GidRow {
    GidRow {
        index,
        kind: kind.map(str::to_owned),
        address: address.to_owned(),
        netdev: Some("eth0".to_owned()),
    }
}

fn link(state: &str) -> Link {
    Link {
        state: state.to_owned(),
        link_layer: "Ethernet".to_owned(),
        mbps: Some(400_000),
        active_mtu: Some(1024),
        max_mtu: None,
        max_msg_sz: 1 << 30,
        lid: 0,
        pkeys: 1,
        grh_required: true,
    }
}

fn limits() -> Limits {
    Limits {
        firmware: "28.39\u{1b}[2J".to_owned(),
        vendor_id: 0x2c9,
        part_id: 4129,
        max_mr_size: 1 << 40,
        max_mr: 100,
        max_pd: 50,
        max_qp: 1000,
        max_qp_wr: 32_768,
        max_sge: 30,
        max_sge_rd: 0,
        max_cq: 2000,
        max_cqe: 4_194_303,
        max_rd_atomic: 16,
        max_init_rd_atomic: 15,
    }
}

fn card() -> Device {
    Device {
        name: "mlx5_0".to_owned(),
        driver: Some("mlx5_core".to_owned()),
        pci: Some("0000:41:00.0".to_owned()),
        pci_path: vec!["pci0000:40".to_owned(), "0000:41:00.0".to_owned()],
        numa_node: Some(1),
        transport: "InfiniBand".to_owned(),
        node_guid: "acec:feff:fe70:1a9d".to_owned(),
        why_not: None,
        limits: Some(limits()),
        ports: vec![
            Port {
                port: 1,
                usable: true,
                why_not: None,
                link: Some(link("ACTIVE")),
                gids: vec![
                    gid(0, Some("RoCE v1"), "fe80::1"),
                    gid(10, None, "10.7.0.1"),
                ],
            },
            Port {
                port: 2,
                usable: false,
                why_not: Some("the port is DOWN: look at the cable".to_owned()),
                link: Some(link("DOWN")),
                gids: Vec::new(),
            },
        ],
    }
}

fn closed() -> Device {
    Device {
        name: "siw0".to_owned(),
        driver: None,
        pci: None,
        pci_path: Vec::new(),
        numa_node: None,
        transport: "iWARP".to_owned(),
        node_guid: "0000:0000:0000:0001".to_owned(),
        why_not: Some("it speaks iWARP".to_owned()),
        limits: None,
        ports: vec![Port {
            port: 1,
            usable: false,
            why_not: Some("it speaks iWARP".to_owned()),
            link: None,
            gids: Vec::new(),
        }],
    }
}

fn software() -> Soft {
    let path = |path, why_not: Option<&str>| SoftPath {
        path,
        usable: why_not.is_none(),
        why_not: why_not.map(str::to_owned),
        note: "same host".to_owned(),
    };
    Soft {
        device: "soft",
        why_not: None,
        limits: Some(SoftLimits {
            max_mr: 4096,
            max_qp_wr: 32_768,
            max_sge: 32,
            max_cqe: 1 << 20,
            max_msg_sz: 1 << 30,
        }),
        paths: vec![path("arena", None), path("process-vm", Some("EPERM"))],
    }
}

fn report(devices: Vec<Device>, order: Vec<Chosen>, config: Asked, rdma: Rdma) -> Report {
    Report::made_up(config, rdma, devices, order, software())
}

const SOFTWARE: &str = "\
soft  the software device, in every process
  limits  queues of 32768 WRs, 32 SGEs a WR, CQs of 1048576 CQEs, 4096 MRs, messages up to 1G
  arena       same host
  process-vm  cannot be used: EPERM; same host
";

#[test]
fn cards_are_told_with_their_ports_and_the_choice() {
    let chosen = Chosen {
        device: "mlx5_0".to_owned(),
        port: 1,
        reason: "the fastest: 400 Gb/s".to_owned(),
        gid: Some(ChosenGid {
            row: gid(10, None, "10.7.0.1"),
            reason: "of unknown type, IPv4".to_owned(),
        }),
    };
    let later = Chosen {
        device: "ib0".to_owned(),
        port: 2,
        reason: "slower than mlx5_0 port 1".to_owned(),
        gid: None,
    };
    let asked = Asked {
        peer: Some("node7".to_owned()),
        peer_addresses: vec!["10.7.0.9".parse().expect("an address")],
        near: Some("0000:42:00.0".to_owned()),
        ..Asked::default()
    };
    let report = report(
        vec![card(), closed()],
        vec![chosen, later],
        asked,
        Rdma::default(),
    );
    // A terminal would take the firmware's ESC for a command.
    let wanted = format!(
        "\
mlx5_0  transport InfiniBand, driver mlx5_core, PCI 0000:41:00.0, NUMA node 1, GUID acec:feff:fe70:1a9d, firmware 28.39\u{fffd}[2J, vendor 0x02c9 part 4129
  limits  1000 QPs of 32768 WRs, 30 SGEs a WR, 2000 CQs of 4194303 CQEs, 100 MRs of up to 1T, 50 PDs, READs under way 15 out and 16 in
  port 1  ACTIVE, Ethernet, 400 Gb/s, MTU 1024 of ?, messages up to 1G
    GID  0  RoCE v1  fe80::1   eth0
  * GID 10  unknown  10.7.0.1  eth0
  port 2  DOWN, Ethernet, 400 Gb/s, MTU 1024 of ?, messages up to 1G
    cannot be used: the port is DOWN: look at the cable

siw0  transport iWARP, GUID 0000:0000:0000:0001
  cannot be used: it speaks iWARP
  port 1  unknown

{SOFTWARE}
chosen towards node7 (10.7.0.9) near PCI device 0000:42:00.0: mlx5_0 port 1, the fastest: 400 Gb/s; GID 10 10.7.0.1: of unknown type, IPv4
then: ib0 port 2, slower than mlx5_0 port 1
an engine stands on it where rdma_devices names it or path is rdma, otherwise on soft
"
    );
    assert_eq!(text(&report), wanted);
}

#[test]
fn where_there_is_no_rdma_the_reason_comes_first() {
    let rdma = Rdma {
        missing: Some("library"),
        why: Some("libibverbs cannot be loaded: install rdma-core".to_owned()),
    };
    let without = report(Vec::new(), Vec::new(), Asked::default(), rdma);
    let wanted = format!("no RDMA: libibverbs cannot be loaded: install rdma-core\n\n{SOFTWARE}");
    assert_eq!(text(&without), wanted);
}

#[test]
fn where_no_nic_can_be_used_it_is_said() {
    let asked = Asked {
        peer: Some("10.7.0.9".to_owned()),
        peer_addresses: vec!["10.7.0.9".parse().expect("an address")],
        near: Some("1".to_owned()),
        ..Asked::default()
    };
    let none = report(vec![closed()], Vec::new(), asked, Rdma::default());
    let told = text(&none);
    let last = told.lines().last().unwrap_or_default();
    let wanted = "chosen towards 10.7.0.9 near NUMA node 1: no NIC can be used";
    assert_eq!(last, wanted);
}

#[test]
fn the_schema_comes_first_in_json() {
    let none = report(vec![card()], Vec::new(), Asked::default(), Rdma::default());
    let line = crate::output::line(&none).expect("its types allow it");
    assert!(
        line.starts_with("{\"schema\":\"kvxfer.devices/1\",\"config\":{"),
        "{line}"
    );
    assert_eq!(line.matches('\n').count(), 1, "{line}");
    let json: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    let gid = &json["devices"][0]["ports"][0]["gids"][1];
    assert_eq!(
        (&gid["index"], &gid["type"]),
        (&10.into(), &serde_json::Value::Null)
    );
}
