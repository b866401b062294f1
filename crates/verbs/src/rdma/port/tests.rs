use std::io;

use proptest::prelude::*;

use super::super::{Gid, GidKind, RdmaDetails, RdmaLimits, RdmaPort};
use super::*;

const NOWHERE: Network<'_> = Network {
    source_towards: &|_| None,
    prefix: &|_| None,
};

fn limits() -> RdmaLimits {
    RdmaLimits {
        firmware: "1.2.3".to_owned(),
        vendor_id: 0x15b3,
        part_id: 4129,
        max_mr_size: u64::MAX,
        max_mr: 1,
        max_pd: 1,
        max_qp: 1,
        max_qp_wr: 1,
        max_sge: 1,
        max_sge_rd: 1,
        max_cq: 1,
        max_cqe: 1,
        max_rd_atomic: 16,
        max_init_rd_atomic: 16,
    }
}

fn port(number: u8) -> RdmaPort {
    let v4 = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 7, 0, 1];
    let gid = Gid {
        index: 3,
        raw: v4,
        kind: Some(GidKind::RoceV2),
        netdev: None,
    };
    let details = PortDetails {
        state: PortState::Active,
        link_layer: LinkLayer::Ethernet,
        max_mtu: Some(4096),
        active_mtu: Some(4096),
        max_msg_sz: 1 << 30,
        lid: 0,
        pkeys: 1,
        grh_required: true,
        mbps: Some(100_000),
        gids: Ok(vec![gid]),
    };
    RdmaPort {
        number,
        details: Ok(details),
    }
}

fn device(name: &str) -> RdmaDevice {
    RdmaDevice {
        name: name.to_owned(),
        guid: 1,
        transport: Transport::InfiniBand,
        driver: None,
        place: Place::default(),
        details: Ok(RdmaDetails {
            limits: limits(),
            ports: vec![port(1)],
        }),
    }
}

fn at(name: &str, pci_path: &[&str], numa_node: u32) -> RdmaDevice {
    RdmaDevice {
        place: Place {
            pci_path: pci_path.iter().map(|part| (*part).to_owned()).collect(),
            numa_node: Some(numa_node),
        },
        ..device(name)
    }
}

fn with(name: &str, change: impl FnOnce(&mut PortDetails)) -> RdmaDevice {
    let mut device = device(name);
    if let Ok(details) = &mut device.details
        && let Some(Ok(port)) = details.ports.first_mut().map(|port| &mut port.details)
    {
        change(port);
    }
    device
}

fn failed(device: &str) -> Error {
    Error::Device {
        device: device.to_owned(),
        call: "ibv_open_device",
        source: io::Error::from_raw_os_error(libc::EACCES),
    }
}

const ANY: PortWish<'_> = PortWish {
    order: &|_| Some(0),
    near: None,
    gid_index: None,
    peer: &[],
};

/// The usable ports in order, with their reasons.
fn ranked(devices: &[RdmaDevice], wish: &PortWish<'_>) -> Vec<(String, String)> {
    let usable = rank(devices, wish, &NOWHERE).usable.into_iter();
    usable
        .map(|port| (format!("{}/{}", port.device.name, port.number), port.reason))
        .collect()
}

fn names(devices: &[RdmaDevice], wish: &PortWish<'_>) -> Vec<String> {
    ranked(devices, wish)
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn the_list_comes_before_all_else_then_speed_and_names_by_number() {
    let devices = [
        device("mlx5_10"),
        device("mlx5_2"),
        with("mlx5_11", |port| port.mbps = Some(400_000)),
        with("mlx5_1", |port| port.mbps = None),
    ];
    let all = ranked(&devices, &ANY);
    let order: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(order, ["mlx5_11/1", "mlx5_2/1", "mlx5_10/1", "mlx5_1/1"]);
    assert_eq!(all[0].1, "the fastest: 400 Gb/s");
    assert_eq!(all[1].1, "slower than mlx5_11 port 1");
    assert_eq!(all[2].1, "equal to mlx5_2 port 1, and after it by name");

    let list = ["mlx5_1", "mlx5_10"];
    let order = |name: &str| list.iter().position(|listed| *listed == name);
    let wish = PortWish {
        order: &order,
        ..ANY
    };
    let listed = ranked(&devices, &wish);
    assert_eq!(listed[0].0, "mlx5_1/1");
    assert_eq!(listed[0].1, "the first of rdma_devices that can be used");
    assert_eq!(listed[1].1, "later in rdma_devices than mlx5_1 port 1");
    let ranking = rank(&devices, &wish, &NOWHERE);
    assert_eq!((ranking.usable.len(), ranking.unusable.len()), (2, 2));
    for left in ranking.unusable {
        assert!(matches!(left.fault, PortFault::Excluded));
        assert_eq!(left.fault.to_string(), "rdma_devices leaves it out");
    }
}

#[test]
fn the_same_switch_is_nearer_than_the_same_root_and_that_than_the_node() {
    let gpu = Place {
        pci_path: ["pci0000:40", "0000:40:01.0", "0000:41:00.0", "0000:42:00.0"]
            .map(str::to_owned)
            .to_vec(),
        numa_node: Some(1),
    };
    let devices = [
        at("a", &["pci0000:00", "0000:00:01.0", "0000:01:00.0"], 0),
        at("b", &["pci0000:60", "0000:60:01.0", "0000:61:00.0"], 1),
        at("c", &["pci0000:40", "0000:40:02.0", "0000:43:00.0"], 1),
        at(
            "d",
            &["pci0000:40", "0000:40:01.0", "0000:41:00.0", "0000:42:01.0"],
            1,
        ),
    ];
    let near = |place| PortWish {
        near: Some(place),
        ..ANY
    };
    let all = ranked(&devices, &near(&gpu));
    let order: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(order, ["d/1", "c/1", "b/1", "a/1"]);
    assert_eq!(all[0].1, "the nearest to 0000:42:00.0 on PCI");
    assert_eq!(all[1].1, "farther from 0000:42:00.0 than d port 1");
    assert_eq!(all[3].1, "not on NUMA node 1, as b port 1 is");

    let node = Place::on_node(0);
    let all = ranked(&devices, &near(&node));
    assert_eq!(
        (all[0].0.as_str(), all[0].1.as_str()),
        ("a/1", "on NUMA node 0")
    );
    // Of a node that nobody knows, all are as far.
    let unknown = Place::default();
    assert_eq!(names(&devices, &near(&unknown))[0], "a/1");
    assert_eq!(
        names(&[device("x"), device("w")], &near(&node)),
        ["w/1", "x/1"]
    );
}

#[test]
fn what_cannot_be_used_is_told_with_the_reason() {
    let closed = RdmaDevice {
        details: Err(failed("closed")),
        ..device("closed")
    };
    let speaks = |name, transport| RdmaDevice {
        transport,
        ..device(name)
    };
    let mut portless = device("portless");
    if let Ok(details) = &mut portless.details {
        details.ports.clear();
    }
    let mut half = device("half");
    if let Ok(details) = &mut half.details {
        details.ports.push(port(2));
        details.ports.push(RdmaPort {
            number: 3,
            details: Err(failed("half")),
        });
    }
    let devices = [
        closed,
        speaks("siw0", Transport::Iwarp),
        speaks("usnic_0", Transport::Other(3)),
        portless,
        half,
        with("down", |port| port.state = PortState::Down),
        with("init", |port| port.state = PortState::Init),
        with("bare", |port| port.gids = Ok(Vec::new())),
        with("flapping", |port| port.state = PortState::ActiveDefer),
    ];
    let ranking = rank(&devices, &ANY, &NOWHERE);
    let usable: Vec<_> = ranking
        .usable
        .iter()
        .map(|p| (p.device.name.as_str(), p.number))
        .collect();
    assert_eq!(usable, [("flapping", 1), ("half", 1), ("half", 2)]);
    let told: Vec<_> = ranking
        .unusable
        .iter()
        .map(|left| {
            (
                left.device.name.as_str(),
                left.number,
                left.fault.to_string(),
            )
        })
        .collect();
    for (at, (name, number, word)) in [
        ("closed", None, "ibv_open_device: Permission denied"),
        ("siw0", None, "rdma_cm"),
        ("usnic_0", None, "transport 3"),
        ("portless", None, "it has no port"),
        ("half", Some(3), "Permission denied"),
        ("down", Some(1), "the port is DOWN: look at the cable"),
        ("init", Some(1), "opensm"),
        ("bare", Some(1), "the port has no GID"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!((told[at].0, told[at].1), (name, number));
        assert!(told[at].2.contains(word), "{name}: {}", told[at].2);
    }
    assert_eq!(told.len(), 8);
    assert_eq!(
        ranked(&[device("one")], &ANY)[0].1,
        "the only one that can be used"
    );
    let two = ranking.usable.last().expect("half port 2");
    assert_eq!(two.reason, "equal to half port 1, and after it by name");
}

#[test]
fn the_gid_is_chosen_with_the_port() {
    let ib = |gids| {
        with("ib", |port| {
            port.link_layer = LinkLayer::InfiniBand;
            port.grh_required = false;
            port.gids = gids;
        })
    };
    let devices = [device("roce"), ib(Ok(Vec::new()))];
    let ranking = rank(&devices, &ANY, &NOWHERE);
    let gids: Vec<_> = ranking
        .usable
        .iter()
        .map(|p| p.gid.as_ref().map(|g| g.index))
        .collect();
    // InfiniBand goes by local addresses, and may have no GID.
    assert_eq!(gids, [None, Some(3)]);

    let asked = PortWish {
        gid_index: Some(7),
        ..ANY
    };
    let ranking = rank(&devices, &asked, &NOWHERE);
    assert!(ranking.usable.is_empty());
    let fault = ranking.unusable[0].fault.to_string();
    assert_eq!(
        fault,
        "there is no GID 7: the port has 3 (RoCE v2 10.7.0.1)"
    );

    let v6 = [[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]];
    let wish = PortWish { peer: &v6, ..ANY };
    assert_eq!(names(&devices, &wish), ["ib/1"]);
}

proptest! {
    /// The order depends on what the devices are, and not on how they are listed.
    #[test]
    fn the_order_is_one(
        seeds in prop::collection::vec((0_u8..3, 0_u32..3, 0_u32..3, any::<bool>()), 0..7),
        turn in any::<prop::sample::Index>(),
        node in 0_u32..3,
    ) {
        let build = || -> Vec<RdmaDevice> {
            seeds.iter().enumerate().map(|(at, (root, numa, speed, down))| {
                let mut device = with(&format!("n{at}"), |port| {
                    port.mbps = Some(speed * 100_000);
                    if *down { port.state = PortState::Down; }
                });
                device.place = Place {
                    pci_path: vec![format!("pci0000:{root:02x}"), format!("0000:{root:02x}:00.0")],
                    numa_node: Some(*numa),
                };
                device
            }).collect()
        };
        let place = Place::on_node(node);
        let wish = PortWish { near: Some(&place), ..ANY };
        let listed = build();
        let mut turned = build();
        if !turned.is_empty() {
            let by = turn.index(turned.len());
            turned.rotate_left(by);
        }
        let ranking = rank(&listed, &wish, &NOWHERE);
        prop_assert_eq!(ranking.usable.len() + ranking.unusable.len(), listed.len());
        prop_assert_eq!(names(&listed, &wish), names(&turned, &wish));
        for pair in ranking.usable.windows(2) {
            let on = |port: &UsablePort<'_>| port.device.place.numa_node == Some(node);
            let speed = |port: &UsablePort<'_>| port.details.mbps;
            prop_assert!(on(&pair[0]) >= on(&pair[1]));
            if on(&pair[0]) == on(&pair[1]) {
                prop_assert!(speed(&pair[0]) >= speed(&pair[1]));
            }
        }
    }

    #[test]
    fn any_name_has_an_order(name in "\\PC{0,40}") {
        prop_assert_eq!(natural(&name).cmp(&natural(&name)), Ordering::Equal);
    }
}
