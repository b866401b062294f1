use super::*;
use crate::devices::gpus::{Class, GpuRow, Gpus, Nearness, Reach, Runtime};
use crate::devices::registers::Registers;
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
    Report::of(config, rdma, devices, order, software(), without_gpus())
}

fn without_gpus() -> Gpus {
    Gpus {
        runtime: Runtime {
            missing: Some("library"),
            why: Some("no GPU runtime library can be loaded".to_owned()),
            ..Runtime::default()
        },
        ..Gpus::default()
    }
}

const NO_GPU: &str = "\
GPUs: none; no GPU runtime library can be loaded
";

/// With a NIC that can be used, and without.
fn host_moves(rdma: &str) -> String {
    format!(
        "\
host to host over arena       same host
host to host over process-vm  no, see above
host to host over rdma        {rdma}
"
    )
}

const GPU_MOVES: &str = "\
GPU to GPU over ipc           no GPU
GPU to host over ipc          no GPU
GPU to GPU over staged        no GPU
GPU to host over staged       no GPU
GPU to GPU over rdma          no GPU
GPU to host over rdma         no GPU
";

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
    let moves = host_moves("any host");
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
{NO_GPU}
{moves}{GPU_MOVES}
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
    let moves = host_moves("no, see above");
    let wanted = format!(
        "no RDMA: libibverbs cannot be loaded: install rdma-core\n\n{SOFTWARE}\n{NO_GPU}\n{moves}{GPU_MOVES}"
    );
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

fn gpu(ordinal: u32, pci: &str) -> GpuRow {
    let class = |class, step, acquire| Class {
        class,
        step,
        acquire,
    };
    let nic = |device: &str, shared, same_numa| Nearness {
        device: device.to_owned(),
        shared,
        same_numa,
    };
    GpuRow {
        ordinal,
        pci: pci.to_owned(),
        pci_path: Vec::new(),
        numa_node: Some(0),
        uuid: "00112233-4455-6677-8899-aabbccddeeff".to_owned(),
        name: "AMD Instinct MI300X".to_owned(),
        arch: "gfx942".to_owned(),
        memory: 192 << 30,
        compute_units: 304,
        xccs: Some(8),
        integrated: false,
        dma_buf: true,
        gpudirect_rdma: None,
        large_bar: Some(true),
        host_register: true,
        host_register_read_only: None,
        mps: false,
        classes: vec![
            class("local", "loopback-read", true),
            class("uncached", "loopback-read", false),
            class("peer", "host-flush", false),
            class("host-pinned", "native", false),
        ],
        nics: vec![
            nic("mlx5_0", 3, Some(true)),
            nic("mlx5_1", 1, Some(true)),
            nic("mlx5_2", 0, Some(true)),
            nic("mlx5_3", 0, Some(false)),
            nic("rxe0", 0, None),
        ],
        registers: vec![
            Registers {
                device: "mlx5_0".to_owned(),
                usable: true,
                why_not: None,
            },
            Registers {
                device: "rxe0".to_owned(),
                usable: false,
                why_not: Some("rxe0 does not register it".to_owned()),
            },
        ],
    }
}

#[test]
fn gpus_are_told_with_what_they_reach_and_what_must_be_done_before_they_read() {
    let reach = |from, to, why_not: Option<&str>| Reach {
        from,
        to,
        p2p: why_not.is_none(),
        ipc: why_not.is_none(),
        why_not: why_not.map(str::to_owned),
    };
    let gpus = Gpus {
        runtime: Runtime {
            runtime: Some("HIP".to_owned()),
            library: Some("libamdhip64.so.7".to_owned()),
            ..Runtime::default()
        },
        gpus: vec![
            gpu(0, "0000:1b:00.0"),
            GpuRow {
                mps: true,
                ..gpu(1, "0000:1c:00.0")
            },
        ],
        pairs: vec![reach(0, 1, None), reach(1, 0, Some("no link"))],
    };
    let (asked, rdma) = (Asked::default(), Rdma::default());
    let told = text(&Report::of(asked, rdma, vec![], vec![], software(), gpus));
    let nics = "  to NICs  dma-buf export: yes; GPUDirect RDMA: not told
  after a NIC's write  local: READ back through the NIC and acquire fence; uncached: READ back through the NIC; peer: flush by the host; host-pinned: nothing
  mlx5_0  behind the same PCI bridge
  mlx5_1  on the same PCI root
  mlx5_2  on the same NUMA node
  mlx5_3  on another NUMA node
  rxe0  at an unknown distance
  registered with mlx5_0  yes
  registered with rxe0  no: rxe0 does not register it
";
    let head = |n, pci| {
        format!(
            "GPU {n}  AMD Instinct MI300X, gfx942, 192.0 GiB, 304 compute units, 8 XCCs, PCI {pci}, NUMA node 0, UUID 00112233-4455-6677-8899-aabbccddeeff, by HIP (libamdhip64.so.7)\n"
        )
    };
    let (first, second) = (head(0, "0000:1b:00.0"), head(1, "0000:1c:00.0"));
    let server = "  through CUDA's MPS server: kernels here write no peer's blocks themselves\n  mlx5_0  behind";
    let served = nics.replace("  mlx5_0  behind", server);
    let moves = host_moves("no, see above");
    let wanted = format!(
        "{SOFTWARE}
{first}{nics}  to GPU 1  P2P, IPC
{second}{served}  to GPU 0  no P2P, no IPC: no link

{moves}GPU to GPU over ipc           same host
GPU to host over ipc          same host
GPU to GPU over staged        any host
GPU to host over staged       any host
GPU to GPU over rdma          no, see above
GPU to host over rdma         no, see above
"
    );
    assert_eq!(told, wanted);
}
