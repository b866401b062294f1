//! Tickets as bytes and as JSON, and what is none.

use std::time::Duration;

use kvxfer::blocks::GroupBlocks;
use kvxfer::ids::{EngineId, Generation, Nonce, Rank, RequestId};
use kvxfer::ticket::{LeaseRef, MAX_BLOCKS, Ticket, TicketError, TicketKind};
use proptest::prelude::*;

use crate::group;

fn ticket() -> impl Strategy<Value = Ticket> {
    let blocks = prop::collection::hash_set(any::<u32>(), 0..40)
        .prop_map(|set| set.into_iter().collect::<Vec<u32>>());
    // Runs too, up to the last id.
    let runs = (any::<u32>(), 0..200u32)
        .prop_map(|(first, n)| (first..=first.saturating_add(n)).collect::<Vec<u32>>());
    let groups = prop::collection::vec(prop_oneof![blocks, runs], 0..4).prop_map(|lists| {
        (0..)
            .zip(lists)
            .map(|(group, blocks)| GroupBlocks { group, blocks })
            .collect::<Vec<_>>()
    });
    let names = ("[a-z0-9 \u{e9}\"-]{1,40}", "\\PC{1,40}");
    let bytes = (any::<[u8; 16]>(), any::<[u8; 32]>());
    let rank = (any::<u32>(), any::<u32>(), any::<u32>());
    let numbers = (any::<u64>(), any::<u32>(), any::<u64>());
    (
        any::<bool>(),
        names,
        bytes,
        rank,
        numbers,
        groups,
        1..65_537u32,
        0..604_800_000u64,
    )
        .prop_map(
            |(
                offer,
                names,
                (generation, format),
                rank,
                (nonce, slot, word),
                groups,
                parties,
                ttl,
            )| {
                Ticket {
                    kind: if offer {
                        TicketKind::Offer
                    } else {
                        TicketKind::Expect
                    },
                    engine: EngineId::from(names.0.as_str()),
                    generation: Generation(generation),
                    rank: Rank {
                        dp: rank.0,
                        pp: rank.1,
                        tp: rank.2,
                    },
                    addr: Some("[fe80::1]:7301".into()),
                    request: RequestId::from(names.1),
                    nonce: Nonce(nonce),
                    groups,
                    lease: offer.then_some(LeaseRef { slot, word }),
                    format,
                    parties,
                    ttl: Duration::from_millis(ttl),
                }
            },
        )
}

type Changes = Vec<(prop::sample::Index, u8)>;

fn changes() -> impl Strategy<Value = Changes> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
}

proptest! {
    #[test]
    fn tickets_come_back_as_they_were(ticket in ticket()) {
        let bytes = ticket.to_bytes().expect("in bounds");
        prop_assert_eq!(&Ticket::from_bytes(&bytes).expect("decodes"), &ticket);
        let json = ticket.to_json().expect("in bounds");
        prop_assert_eq!(&Ticket::from_json(&json).expect("decodes"), &ticket);
        // A router that keeps every number as a double does no harm.
        let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        let relayed = as_doubles(value).to_string();
        prop_assert_eq!(&Ticket::from_json(&relayed).expect("decodes"), &ticket);
    }

    #[test]
    fn hostile_bytes_are_refused_or_make_a_sound_ticket(
        ticket in ticket(), changes in changes(), cut in any::<prop::sample::Index>()
    ) {
        let mut bytes = ticket.to_bytes().expect("in bounds");
        let mut json = ticket.to_json().expect("in bounds").into_bytes();
        for (at, byte) in changes {
            let (in_bytes, in_json) = (at.index(bytes.len()), at.index(json.len()));
            bytes[in_bytes] = byte;
            json[in_json] = byte;
        }
        if let Ok(ticket) = Ticket::from_bytes(&bytes) {
            ticket.check().expect("what decodes is within bounds");
        }
        if let Ok(Ok(ticket)) = std::str::from_utf8(&json).map(Ticket::from_json) {
            ticket.check().expect("what decodes is within bounds");
        }
        let whole = ticket.to_bytes().expect("in bounds");
        prop_assert!(Ticket::from_bytes(&whole[..cut.index(whole.len())]).is_err());
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Ticket::from_bytes(&bytes).is_err());
    }
}

/// The value after a relay that holds every number as a double, as JavaScript does.
fn as_doubles(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        // Whole numbers are written without a point.
        Value::Number(n) => Value::Number((n.as_f64().expect("a number") as u64).into()),
        Value::Array(items) => items.into_iter().map(as_doubles).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, as_doubles(v))).collect(),
        other => other,
    }
}

/// A ticket as JSON with one field replaced.
fn json_with(field: &str, value: serde_json::Value) -> String {
    let ticket = Ticket {
        kind: TicketKind::Offer,
        engine: EngineId::from("prefill-0"),
        generation: Generation([0xab; 16]),
        rank: Rank::default(),
        addr: Some("10.0.0.3:7301".into()),
        request: RequestId::from("cmpl-1"),
        nonce: Nonce(u64::MAX - 1),
        groups: vec![group(0, &[7, 8, 9, 10, 3])],
        lease: Some(LeaseRef {
            slot: 4,
            word: 1 << 63,
        }),
        format: [0x11; 32],
        parties: 1,
        ttl: Duration::from_secs(480),
    };
    let mut json = serde_json::to_value(&ticket).expect("encodes");
    json.as_object_mut()
        .expect("an object")
        .insert(field.into(), value);
    json.to_string()
}

#[test]
fn a_ticket_in_json_is_readable() {
    use serde_json::json;
    let text = json_with("later_field", json!({"ignored": [1, 2]}));
    Ticket::from_json(&text).expect("unknown fields are skipped");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value["version"], 1);
    assert_eq!(value["kind"], "offer");
    assert_eq!(value["nonce"], "fffffffffffffffe");
    assert_eq!(
        value["lease"],
        json!({"slot": 4, "word": "8000000000000000"})
    );
    assert_eq!(
        value["groups"],
        json!([{"group": 0, "blocks": [[7, 4], 3]}])
    );
    assert_eq!(value["ttl_ms"], 480_000);
}

#[test]
fn faults_are_named() {
    use TicketError as E;
    use serde_json::json;
    let refused = |field: &str, value: serde_json::Value| {
        Ticket::from_json(&json_with(field, value)).expect_err(field)
    };
    let blocks =
        |blocks: serde_json::Value| refused("groups", json!([{ "group": 0, "blocks": blocks }]));
    assert!(matches!(
        refused("version", json!(2)),
        E::Version { got: 2 }
    ));
    assert!(matches!(
        refused("parties", json!(0)),
        E::Parties { parties: 0 }
    ));
    assert!(matches!(
        refused("engine", json!("")),
        E::Name {
            field: "engine",
            len: 0
        }
    ));
    let long = "x".repeat(513);
    assert!(matches!(
        refused("request", json!(long)),
        E::Name {
            field: "request",
            len: 513
        }
    ));
    assert!(matches!(
        refused("addr", json!("nowhere")),
        E::Address { .. }
    ));
    assert!(matches!(
        refused("addr", json!("host:0")),
        E::Address { .. }
    ));
    assert!(matches!(refused("ttl_ms", json!(u64::MAX)), E::Ttl { .. }));
    assert!(matches!(refused("kind", json!("expect")), E::Lease { .. }));
    assert!(matches!(
        refused("nonce", json!("1234567890abcdef0")),
        E::Json(_)
    ));
    assert!(matches!(refused("nonce", json!("+1")), E::Json(_)));
    assert!(matches!(refused("nonce", json!(5)), E::Json(_)));
    assert!(matches!(refused("format", json!("11")), E::Json(_)));
    assert!(matches!(
        refused("format", json!("é".repeat(32))),
        E::Json(_)
    ));
    assert!(matches!(blocks(json!([1, 1])), E::Blocks(_)));
    let twice = json!([{"group": 0, "blocks": []}, {"group": 0, "blocks": []}]);
    assert!(matches!(refused("groups", twice), E::Blocks(_)));
    // A few bytes that would be 16 GiB of block ids, a run past the last id, an id past it.
    assert!(matches!(blocks(json!([[0, u32::MAX]])), E::Json(_)));
    assert!(matches!(blocks(json!([[u32::MAX, 2]])), E::Json(_)));
    assert!(matches!(blocks(json!([1u64 << 32])), E::Json(_)));
    let half = MAX_BLOCKS / 2;
    let halves =
        json!([{"group": 0, "blocks": [[0, half]]}, {"group": 1, "blocks": [[0, half + 1]]}]);
    assert!(matches!(refused("groups", halves), E::Blocks(_)));
    let deep = format!("{{\"version\":1,\"x\":{}", "[".repeat(100_000));
    assert!(Ticket::from_json(&deep).is_err());
    // MessagePack: arrays of one, nested.
    assert!(Ticket::from_bytes(&vec![0x91; 100_000]).is_err());
}
