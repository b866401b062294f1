use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::super::PortState;
use super::*;
use crate::error::Error;

const V1: Option<GidKind> = Some(GidKind::RoceV1);
const V2: Option<GidKind> = Some(GidKind::RoceV2);

fn raw(text: &str) -> [u8; 16] {
    match text.parse().unwrap() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn gids(list: &[(u32, Option<GidKind>, &str)]) -> Vec<Gid> {
    let gid = |(index, kind, text): &(u32, Option<GidKind>, &str)| Gid {
        index: *index,
        raw: raw(text),
        kind: *kind,
        netdev: Some("eth1".to_owned()),
    };
    list.iter().map(gid).collect()
}

fn port(link_layer: LinkLayer, gids: Result<Vec<Gid>, Error>) -> PortDetails {
    PortDetails {
        state: PortState::Active,
        link_layer,
        max_mtu: Some(4096),
        active_mtu: Some(1024),
        max_msg_sz: 1 << 30,
        lid: 0,
        pkeys: 1,
        grh_required: link_layer == LinkLayer::Ethernet,
        mbps: Some(100_000),
        gids,
    }
}

fn roce(list: &[(u32, Option<GidKind>, &str)]) -> PortDetails {
    port(LinkLayer::Ethernet, Ok(gids(list)))
}

/// Routes by destination, and the subnets of this side, from tables.
#[derive(Default)]
struct Known {
    sources: HashMap<IpAddr, IpAddr>,
    prefixes: HashMap<IpAddr, u32>,
}

impl Known {
    fn of(sources: &[(&str, &str)], prefixes: &[(&str, u32)]) -> Self {
        let ip = |text: &str| text.parse().unwrap();
        Self {
            sources: sources
                .iter()
                .map(|(to, from)| (ip(to), ip(from)))
                .collect(),
            prefixes: prefixes.iter().map(|(at, bits)| (ip(at), *bits)).collect(),
        }
    }

    fn choose(
        &self,
        port: &PortDetails,
        asked: Option<u32>,
        peer: &[[u8; 16]],
    ) -> Result<GidChoice, GidFault> {
        let network = Network {
            source_towards: &|to| self.sources.get(&to).copied(),
            prefix: &|at| self.prefixes.get(&at).copied(),
        };
        choose(port, asked, peer, &network)
    }

    fn told(&self, port: &PortDetails, peer: &[&str]) -> (u32, String) {
        let peer: Vec<_> = peer.iter().map(|text| raw(text)).collect();
        let choice = self.choose(port, None, &peer).unwrap();
        (choice.index, choice.reason)
    }
}

/// What a NIC with an IPv4 and an IPv6 address has.
const USUAL: &[(u32, Option<GidKind>, &str)] = &[
    (0, V1, "fe80::1"),
    (1, V2, "fe80::1"),
    (2, V1, "10.7.0.1"),
    (3, V2, "10.7.0.1"),
    (4, V1, "2001:db8::1"),
    (5, V2, "2001:db8::1"),
];

#[test]
fn the_best_by_rule_is_taken_and_the_reason_is_told() {
    let nothing = Known::default();
    let usual = roce(USUAL);
    let subnets = Known::of(
        &[],
        &[("10.7.0.1", 24), ("2001:db8::1", 64), ("fe80::1", 64)],
    );
    let routed = Known::of(
        &[("10.9.0.2", "10.7.0.1"), ("2001:db8:5::2", "2001:db8::1")],
        &[],
    );
    for (known, peer, index, word) in [
        (&nothing, &[][..], 3, "IPv4"),
        (&nothing, &["10.8.0.9"], 3, "IPv4"),
        (&nothing, &["fe80::9", "2001:db8:5::2"], 5, "IPv6"),
        (&nothing, &["fe80::9"], 1, "nothing else works"),
        (&nothing, &["fe80::9", "10.8.0.9"], 3, "IPv4"),
        (&subnets, &["10.7.0.200"], 3, "on the subnet of 10.7.0.200"),
        // No route is known, and the subnet of IPv6 is shared while that of IPv4 is not.
        (
            &subnets,
            &["10.8.0.2", "2001:db8::2"],
            5,
            "on the subnet of 2001:db8::2",
        ),
        // All link-local addresses are on one subnet, and that says nothing.
        (&subnets, &["fe80::2", "10.8.0.2"], 3, "IPv4"),
        (&routed, &["10.9.0.2"], 3, "source address towards 10.9.0.2"),
        (
            &routed,
            &["10.8.0.2", "2001:db8:5::2"],
            5,
            "towards 2001:db8:5::2",
        ),
    ] {
        let (got, reason) = known.told(&usual, peer);
        assert_eq!(got, index, "{peer:?}: {reason}");
        assert!(reason.contains(word), "{peer:?}: {reason}");
        assert!(reason.starts_with("RoCE v2, "), "{reason}");
    }
}

#[test]
fn a_route_beats_a_subnet_and_the_nearest_of_equals_is_taken() {
    let two = roce(&[
        (0, V2, "10.7.0.1"),
        (1, V2, "10.8.0.1"),
        (2, V2, "10.8.3.1"),
    ]);
    let known = Known::of(
        &[("10.7.0.2", "10.8.0.1")],
        &[("10.7.0.1", 24), ("10.8.0.1", 24)],
    );
    assert_eq!(known.told(&two, &["10.7.0.2"]).0, 1);
    let nothing = Known::default();
    assert_eq!(nothing.told(&two, &["10.8.3.9"]).0, 2);
    assert_eq!(nothing.told(&two, &[]).0, 0);
}

#[test]
fn what_is_no_roce_v2_is_taken_for_want_of_it_alone() {
    let nothing = Known::default();
    let v1 = roce(&[(0, V1, "fe80::1"), (1, V1, "10.7.0.1")]);
    let (index, reason) = nothing.told(&v1, &[]);
    assert_eq!(
        (index, reason.as_str()),
        (1, "RoCE v1 for want of RoCE v2, IPv4")
    );
    // v2 over a link-local address reaches more than v1 does.
    let both = roce(&[(0, V1, "10.7.0.1"), (1, V2, "fe80::1")]);
    assert_eq!(nothing.told(&both, &[]).0, 1);
    // It has to be of the peer's family all the same.
    assert_eq!(nothing.told(&both, &["10.7.0.2"]).0, 0);
    let unknown = roce(&[(0, V1, "10.7.0.1"), (1, None, "10.7.0.1")]);
    let (index, reason) = nothing.told(&unknown, &[]);
    assert_eq!((index, reason.as_str()), (1, "of unknown type, IPv4"));
}

#[test]
fn link_local_addresses_of_ipv4_are_link_local_too() {
    let nothing = Known::default();
    let port = roce(&[(0, V2, "169.254.3.1"), (1, V2, "2001:db8::1")]);
    assert_eq!(nothing.told(&port, &[]).0, 1);
    let (index, reason) = nothing.told(&port, &["10.7.0.2"]);
    assert_eq!(index, 0);
    assert!(reason.contains("another scope"), "{reason}");
}

#[test]
fn an_index_that_is_asked_for_is_taken_or_those_there_are_are_named() {
    let known = Known::default();
    let usual = roce(USUAL);
    let choice = known.choose(&usual, Some(0), &[]).unwrap();
    assert_eq!(
        (choice.index, choice.gid, choice.kind),
        (0, raw("fe80::1"), V1)
    );
    assert_eq!(choice.reason, "asked for");
    assert_eq!(choice.netdev.as_deref(), Some("eth1"));

    let fault = known.choose(&usual, Some(9), &[]).unwrap_err();
    let text = fault.to_string();
    assert!(
        text.starts_with("there is no GID 9: the port has 0 (RoCE v1 fe80::1), 1 "),
        "{text}"
    );
    assert!(text.ends_with(", 5 (RoCE v2 2001:db8::1)"), "{text}");

    // A place that is there and empty has no GID either.
    let hole = roce(&[(0, V2, "10.7.0.1"), (1, None, "::")]);
    let fault = known.choose(&hole, Some(1), &[]).unwrap_err();
    assert_eq!(
        fault.to_string(),
        "there is no GID 1: the port has 0 (RoCE v2 10.7.0.1)"
    );

    // What was asked for cannot reach this peer.
    let fault = known
        .choose(&usual, Some(3), &[raw("2001:db8::2")])
        .unwrap_err();
    let text = fault.to_string();
    assert!(text.contains("the peer has IPv6 addresses alone"), "{text}");
    assert!(
        text.contains("3 (RoCE v2 10.7.0.1)") && !text.contains("2001"),
        "{text}"
    );
}

#[test]
fn ports_without_gids_and_peers_of_another_family_are_faults() {
    let known = Known::default();
    let empty = port(LinkLayer::Ethernet, Ok(Vec::new()));
    assert_eq!(known.choose(&empty, None, &[]), Err(GidFault::Empty));
    assert_eq!(known.choose(&empty, Some(0), &[]), Err(GidFault::Empty));
    assert_eq!(
        known.choose(&roce(&[(0, V2, "::")]), None, &[]),
        Err(GidFault::Empty)
    );

    let failed = Error::Device {
        device: "mlx5_0".to_owned(),
        call: "ibv_query_gid",
        source: io::Error::from_raw_os_error(5),
    };
    let failed = port(LinkLayer::Ethernet, Err(failed));
    let text = known.choose(&failed, None, &[]).unwrap_err().to_string();
    assert!(text.contains("mlx5_0: ibv_query_gid"), "{text}");

    let v6 = roce(&[(0, V2, "fe80::1"), (1, V2, "2001:db8::1")]);
    let fault = known.choose(&v6, None, &[raw("10.7.0.2")]).unwrap_err();
    let text = fault.to_string();
    assert!(text.contains("the peer has IPv4 addresses alone"), "{text}");
    // Zeros are no address of the peer's.
    assert_eq!(known.choose(&v6, None, &[[0; 16]]).unwrap().index, 1);
}

#[test]
fn infiniband_takes_the_first_whatever_the_peer_has() {
    let known = Known::default();
    let ib = Some(GidKind::InfiniBand);
    let list = gids(&[(1, ib, "fe80::2:1"), (0, ib, "fe80::2:c903:1")]);
    let port = port(LinkLayer::InfiniBand, Ok(list));
    assert_eq!(
        known.choose(&port, None, &[raw("10.7.0.2")]).unwrap().index,
        0
    );
    assert_eq!(known.choose(&port, Some(1), &[]).unwrap().index, 1);
    assert!(known.choose(&port, Some(2), &[]).is_err());
}

/// The kernel of the machine that runs this.
#[test]
fn the_kernel_tells_the_source_and_the_subnet_of_loopback() {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    assert_eq!(source_towards(loopback), Some(loopback));
    assert_eq!(prefix(loopback), Some(8));
    // An address for documents, which no interface has.
    assert_eq!(prefix("192.0.2.77".parse().unwrap()), None);
}

fn kind() -> impl Strategy<Value = Option<GidKind>> {
    prop::sample::select(vec![
        V1,
        V2,
        None,
        Some(GidKind::InfiniBand),
        Some(GidKind::Other(9)),
    ])
}

/// Few values, so that addresses meet.
fn some_address() -> impl Strategy<Value = [u8; 16]> {
    let texts = ["::", "fe80::1", "fe80::2", "2001:db8::1", "2001:db8::2"];
    let more = [
        "2001:db8:1::1",
        "10.7.0.1",
        "10.7.0.2",
        "10.8.0.1",
        "169.254.0.1",
    ];
    prop::sample::select([texts, more].concat()).prop_map(raw)
}

proptest! {
    #[test]
    fn any_choice_is_in_the_table_and_no_better_one_is_left(
        table in prop::collection::vec((kind(), some_address()), 0..8),
        peer in prop::collection::vec(some_address(), 0..4),
        asked in prop::option::of(0_u32..9),
        route in prop::option::of((some_address(), some_address())),
    ) {
        let list: Vec<Gid> = (0..).zip(&table).map(|(index, (kind, raw))| Gid {
            index,
            raw: *raw,
            kind: *kind,
            netdev: None,
        }).collect();
        let mut known = Known::default();
        if let Some((to, from)) = route {
            known.sources.insert(address(to), address(from));
        }
        let port = port(LinkLayer::Ethernet, Ok(list.clone()));
        let peers: Vec<IpAddr> = peer.iter().filter(|p| **p != [0; 16]).map(|p| address(*p)).collect();
        let fits = |gid: &&Gid| gid.raw != [0; 16]
            && asked.is_none_or(|a| a == gid.index)
            && (peers.is_empty() || peers.iter().any(|p| p.is_ipv4() == gid.address().is_ipv4()));
        let able: Vec<&Gid> = list.iter().filter(fits).collect();
        match known.choose(&port, asked, &peer) {
            Err(_) => prop_assert!(able.is_empty()),
            Ok(choice) => {
                let gid = list.iter().find(|g| g.index == choice.index).unwrap();
                prop_assert_eq!((gid.raw, gid.kind), (choice.gid, choice.kind));
                prop_assert!(able.contains(&gid));
                prop_assert!(!choice.reason.is_empty());
                let v2: Vec<_> = able.iter().filter(|g| g.kind == V2).collect();
                prop_assert!(v2.is_empty() || gid.kind == V2);
                // Link-local only where nothing else of that type would reach the peer.
                let local = is_link_local(gid.address());
                let global = |g: &&&Gid| g.kind == gid.kind && !is_link_local(g.address())
                    && (peers.is_empty() || peers.iter().any(|p|
                        is_family(*p, g.address()) && !is_link_local(*p)));
                // Unless the kernel itself sends from it.
                let by_route = known.sources.values().any(|s| *s == gid.address());
                if local && !by_route {
                    prop_assert!(!able.iter().any(|g| global(&g)));
                }
            }
        }
    }

    /// The one side chooses from what the other has, and the other for what was chosen.
    #[test]
    fn two_sides_agree_on_a_family(
        here in prop::collection::vec(some_address(), 1..6),
        there in prop::collection::vec(some_address(), 1..6),
    ) {
        let table = |raws: &[[u8; 16]]| {
            let gid = |(index, raw): (u32, &[u8; 16])| Gid { index, raw: *raw, kind: V2, netdev: None };
            port(LinkLayer::Ethernet, Ok((0..).zip(raws).map(gid).collect()))
        };
        let known = Known::default();
        if let Ok(ours) = known.choose(&table(&here), None, &there)
            && there.iter().any(|raw| *raw != [0; 16])
        {
            let theirs = known.choose(&table(&there), None, &[ours.gid]);
            let theirs = theirs.expect("it has one of the family");
            prop_assert!(is_family(address(ours.gid), address(theirs.gid)));
        }
    }
}
