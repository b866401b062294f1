//! Every message, by properties.
use kvxfer::ids::{Generation, Nonce, Rank, RequestId};
use kvxfer::rails::RailSet;
use kvxfer::session::{Closed, Event};
use kvxfer::time::Time;
use kvxfer::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::pair::*;

fn text() -> impl Strategy<Value = String> {
    vec(
        prop_oneof![prop::char::range(' ', '~'), Just('é'), Just('漢')],
        0..20,
    )
    .prop_map(|c| c.into_iter().collect())
}

fn blob() -> impl Strategy<Value = Blob> {
    vec(any::<u8>(), 0..300).prop_map(Blob)
}

fn span() -> impl Strategy<Value = RemoteSpan> {
    (any::<u64>(), 1u64.., any::<u32>()).prop_map(|(a, len, rkey)| RemoteSpan {
        addr: a.min(u64::MAX - len),
        len,
        rkey,
    })
}

fn rank() -> impl Strategy<Value = Rank> {
    any::<(u32, u32, u32)>().prop_map(|(dp, pp, tp)| Rank { dp, pp, tp })
}

fn path() -> impl Strategy<Value = PathKind> {
    use PathKind::*;
    prop::sample::select(vec![Arena, ProcessVm, Tcp, Rdma, Ipc, Staged])
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    vec((path(), prop::option::of(text())), 0..6).prop_map(|v| {
        v.into_iter()
            .map(|(path, why_not)| Candidate { path, why_not })
            .collect()
    })
}

fn describe() -> impl Strategy<Value = Describe> {
    let kv_role = prop::sample::select(vec![KvRole::Producer, KvRole::Consumer, KvRole::Both]);
    let facts = (any::<[u32; 4]>(), any::<u64>(), any::<bool>(), any::<u16>()).prop_map(
        |([a, b, c, d], max_msg_bytes, enable_notification, listen_port)| ConfigFacts {
            qp_per_transfer: a,
            max_send_wr: b,
            max_msg_sge: c,
            max_msg_bytes,
            enable_notification,
            num_worker_threads: d,
            listen_port,
        },
    );
    let gpu = prop::option::of(
        (vec(blob(), 0..4), any::<u64>(), prop::option::of(text())).prop_map(
            |(handles, staged, unregistered)| GpuDesc {
                handles,
                staged,
                unregistered,
            },
        ),
    );
    (
        (
            text(),
            any::<[u8; 16]>(),
            rank(),
            kv_role,
            prop::option::of(text()),
            any::<[u8; 32]>(),
        ),
        (blob(), blob(), vec(rail_desc(), 0..4)),
        (
            facts,
            any::<bool>(),
            gpu,
            prop::option::of(vec(any::<u8>(), 0..=limits::TOKEN)),
        ),
    )
        .prop_map(
            |((engine, g, rank, kv_role, wanted, f), (format, placement, rails), d)| Describe {
                engine: engine.as_str().into(),
                generation: Generation(g),
                rank,
                kv_role,
                wanted: wanted.map(|w| w.as_str().into()),
                fingerprint: Fingerprint(f),
                format,
                placement,
                rails,
                facts: d.0,
                fd_backed: d.1,
                gpu: d.2,
                shared: d.3.map(Blob),
            },
        )
}

fn rail_desc() -> impl Strategy<Value = RailDesc> {
    (
        any::<u16>(),
        blob(),
        vec(span(), 0..5),
        prop::option::of(span()),
        [prop::option::of(span()), prop::option::of(span())],
    )
        .prop_map(
            |(place, device, memories, leases, [scratch, staging])| RailDesc {
                place,
                device,
                memories,
                leases,
                scratch,
                staging,
            },
        )
}

fn rail_endpoint() -> impl Strategy<Value = RailEndpoint> {
    let rail = || 0..limits::RAILS as u16;
    (rail(), rail(), blob()).prop_map(|(rail, peer_rail, endpoint)| RailEndpoint {
        rail,
        peer_rail,
        endpoint,
    })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        text().prop_map(|detail| Refusal::FormatMismatch { detail }),
        (text(), text()).prop_map(|(here, wanted)| Refusal::WrongEngine { here, wanted }),
        Just(Refusal::SameRole {
            role: KvRole::Producer
        }),
        Just(Refusal::RoleNotServed { role: Role::Bench }),
        Just(Refusal::GenerationRetired),
        text().prop_map(|detail| Refusal::NoPath { detail }),
        text().prop_map(|detail| Refusal::BadDescription { detail }),
        (text(), any::<u64>()).prop_map(|(what, limit)| Refusal::Full { what, limit }),
    ]
}

fn take_of() -> impl Strategy<Value = TakeOf> {
    let pairs = vec(any::<[u8; 8]>(), 1..9);
    (any::<u32>(), pairs).prop_map(|(group, pairs)| TakeOf {
        group,
        pairs: Blob(pairs.concat()),
    })
}

fn sums_of() -> impl Strategy<Value = SumsOf> {
    let units = vec(any::<u32>(), 1..9);
    (any::<u32>(), prop::option::of(any::<u32>()), units).prop_map(|(group, layer, units)| SumsOf {
        group,
        layer,
        units,
    })
}

fn sums() -> impl Strategy<Value = Blob> {
    vec(any::<[u8; 8]>(), 0..9).prop_map(|sums| Blob(sums.concat()))
}

fn request() -> impl Strategy<Value = (RequestId, Nonce)> {
    (text(), any::<u64>()).prop_map(|(r, n)| (r.into(), Nonce(n)))
}

/// One strategy a kind; the match fails to compile when a kind is added without one.
fn message_of(kind: MessageKind) -> BoxedStrategy<Message> {
    use GoodbyeReason::*;
    match kind {
        MessageKind::Describe => describe().prop_map(Message::from).boxed(),
        MessageKind::Refuse => refusal()
            .prop_map(|reason| Refuse { reason }.into())
            .boxed(),
        MessageKind::QpOffer => (
            any::<u32>(),
            any::<Option<u16>>(),
            path(),
            candidates(),
            vec(rail_endpoint(), 0..5),
        )
            .prop_map(|(offer, replaces, path, candidates, endpoints)| {
                QpOffer {
                    offer,
                    replaces,
                    path,
                    candidates,
                    endpoints,
                }
                .into()
            })
            .boxed(),
        MessageKind::QpAnswer => (
            any::<u32>(),
            prop::option::of(path()),
            candidates(),
            vec(rail_endpoint(), 0..5),
        )
            .prop_map(|(offer, path, candidates, endpoints)| {
                QpAnswer {
                    offer,
                    path,
                    candidates,
                    endpoints,
                }
                .into()
            })
            .boxed(),
        MessageKind::QpReset => (vec(any::<u16>(), 0..5), blob())
            .prop_map(|(lanes, cause)| QpReset { lanes, cause }.into())
            .boxed(),
        MessageKind::Ready => Just(Ready {}.into()).boxed(),
        MessageKind::Ping => any::<(u64, u64)>()
            .prop_map(|(sequence, echo)| Ping { sequence, echo }.into())
            .boxed(),
        MessageKind::Pong => any::<(u64, u64)>()
            .prop_map(|(sequence, echo)| Pong { sequence, echo }.into())
            .boxed(),
        MessageKind::Release => request()
            .prop_map(|(request, nonce)| Release { request, nonce }.into())
            .boxed(),
        MessageKind::PushStart => (request(), any::<bool>())
            .prop_map(|((request, nonce), known)| {
                PushStart {
                    request,
                    nonce: known.then_some(nonce),
                }
                .into()
            })
            .boxed(),
        MessageKind::Announce => blob().prop_map(|ticket| Announce { ticket }.into()).boxed(),
        MessageKind::SumsWanted => (any::<u64>(), request(), any::<bool>(), vec(sums_of(), 0..4))
            .prop_map(|(id, (request, nonce), share, of)| {
                SumsWanted {
                    id,
                    request,
                    nonce,
                    share,
                    of,
                }
                .into()
            })
            .boxed(),
        MessageKind::Sums => (any::<[u64; 2]>(), prop::option::of(blob()), sums())
            .prop_map(|([id, first], refused, sums)| {
                Sums {
                    id,
                    refused,
                    first,
                    sums,
                }
                .into()
            })
            .boxed(),
        MessageKind::PushSums => (request(), sums_of(), vec(any::<[u8; 8]>(), 1..4))
            .prop_map(|((request, nonce), of, some)| {
                // As many for each unit.
                let sums = Blob(some.repeat(of.units.len()).concat());
                PushSums {
                    request,
                    nonce,
                    of,
                    sums,
                }
                .into()
            })
            .boxed(),
        MessageKind::Take => (
            (any::<[u64; 2]>(), request()),
            (any::<Option<u32>>(), vec(take_of(), 0..4)),
        )
            .prop_map(|(([number, bytes], (request, nonce)), (layer, of))| {
                Take {
                    number,
                    request,
                    nonce,
                    layer,
                    of,
                    bytes,
                }
                .into()
            })
            .boxed(),
        MessageKind::PushTold => (request(), vec(any::<u32>(), 0..5))
            .prop_map(|((request, nonce), immediates)| {
                PushTold {
                    request,
                    nonce,
                    immediates,
                }
                .into()
            })
            .boxed(),
        MessageKind::TakeStop => any::<u64>()
            .prop_map(|number| TakeStop { number }.into())
            .boxed(),
        MessageKind::Taken => (any::<u64>(), prop::option::of(blob()))
            .prop_map(|(number, failed)| Taken { number, failed }.into())
            .boxed(),
        MessageKind::Stage => (any::<u64>(), vec(any::<[u8; 16]>(), 1..5))
            .prop_map(|(number, mut of)| {
                for stretch in &mut of {
                    // Not of no bytes.
                    stretch[4] |= 1;
                }
                let of = Blob(of.concat());
                Stage { number, of }.into()
            })
            .boxed(),
        MessageKind::Staged => (any::<[u64; 4]>(), prop::option::of(blob()))
            .prop_map(|([number, offset, stamp, word], failed)| {
                Staged {
                    number,
                    offset,
                    stamp,
                    word,
                    failed,
                }
                .into()
            })
            .boxed(),
        MessageKind::LinksWanted => request()
            .prop_map(|(request, nonce)| LinksWanted { request, nonce }.into())
            .boxed(),
        MessageKind::LinksAnswer => (request(), 0..4usize)
            .prop_map(|((request, nonce), why)| {
                let all = [
                    LinksRefused::NotAllowed,
                    LinksRefused::Unseen,
                    LinksRefused::Late,
                ];
                LinksAnswer {
                    request,
                    nonce,
                    refused: all.get(why).copied(),
                }
                .into()
            })
            .boxed(),
        MessageKind::StageFree => any::<u64>()
            .prop_map(|number| StageFree { number }.into())
            .boxed(),
        MessageKind::PushDone => (request(), rank(), any::<[u64; 2]>(), [0..16_u16, 0..16])
            .prop_map(|((request, nonce), sender, [bytes, sums], [rail, other])| {
                PushDone {
                    request,
                    nonce,
                    sender,
                    bytes,
                    sums,
                    rails: RailSet::only(rail) | RailSet::only(other),
                    rail,
                }
                .into()
            })
            .boxed(),
        MessageKind::PushAborted => (request(), rank(), blob())
            .prop_map(|((request, nonce), sender, cause)| {
                PushAborted {
                    request,
                    nonce,
                    sender,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::PushClosed => (request(), rank(), blob())
            .prop_map(|((request, nonce), sender, cause)| {
                PushClosed {
                    request,
                    nonce,
                    sender,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::Revoke => (request(), blob())
            .prop_map(|((request, nonce), cause)| {
                Revoke {
                    request,
                    nonce,
                    cause,
                }
                .into()
            })
            .boxed(),
        MessageKind::Retracted => request()
            .prop_map(|(request, nonce)| Retracted { request, nonce }.into())
            .boxed(),
        MessageKind::Bench => blob().prop_map(|payload| Bench { payload }.into()).boxed(),
        MessageKind::Goodbye => prop::sample::select(vec![ShuttingDown, Finished, Replaced])
            .prop_map(|reason| Goodbye { reason }.into())
            .boxed(),
        MessageKind::ErrorReport => text()
            .prop_map(|t| ErrorReport::new(ErrorCode::Lie, &t).into())
            .boxed(),
        other => panic!("no strategy for {other}"),
    }
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    prop::sample::select(MessageKind::ALL.to_vec()).prop_flat_map(message_of)
}

proptest! {
    #[test]
    fn messages_round_trip(message in message()) {
        let bytes = message.encode().unwrap();
        let code = message.kind() as u8;
        prop_assert_eq!(MessageKind::from_code(code), Some(message.kind()));
        prop_assert_eq!(&Message::decode(code, &bytes).unwrap(), &message);
        let longer = [bytes.as_slice(), &[0xc0]].concat();
        let is_trailing = matches!(Message::decode(code, &longer), Err(WireError::Trailing { extra: 1, .. }));
        prop_assert!(is_trailing);
        for cut in 0..bytes.len() {
            prop_assert!(Message::decode(code, &bytes[..cut]).is_err(), "cut at {}", cut);
        }
    }

    #[test]
    fn altered_messages_are_decoded_or_refused_but_what_is_decoded_is_in_bounds(
        message in message(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        code in any::<u8>(),
    ) {
        let mut bytes = message.encode().unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for code in [message.kind() as u8, code] {
            if let Ok(other) = Message::decode(code, &bytes) {
                prop_assert!(other.encode().is_ok(), "{:?}", other);
            }
        }
    }

    #[test]
    fn any_split_of_the_stream_gives_the_same_frames(
        payloads in vec(vec(any::<u8>(), 0..2000), 1..8),
        cuts in vec(1usize..700, 1..50),
        sealed in any::<bool>(),
    ) {
        let keys = Transcript::new().keys(None);
        let (mut writer, mut reader) = (FrameWriter::new(), FrameReader::new(1 << 16));
        if sealed {
            writer.seal(keys.frames_from(Side::Client));
            reader.unseal(keys.frames_from(Side::Client), 1 << 16);
        }
        let mut bytes = Vec::new();
        for (i, p) in payloads.iter().enumerate() {
            writer.write(i as u8, p, 1 << 16, &mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        let mut got = Vec::new();
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            reader.push(now);
            while let Some(frame) = reader.next_frame().unwrap() {
                got.push(frame);
            }
            rest = later;
            if rest.is_empty() { break; }
        }
        prop_assert_eq!(reader.buffered(), 0);
        prop_assert_eq!(got.len(), payloads.len());
        for (i, frame) in got.iter().enumerate() {
            prop_assert_eq!((frame.kind, frame.sequence), (i as u8, i as u64));
            prop_assert_eq!(&frame.payload, &payloads[i]);
        }
    }

    #[test]
    fn garbage_never_panics_and_never_authenticates(
        bytes in vec(any::<u8>(), 0..500),
        after_preamble in any::<bool>(),
        client in any::<bool>(),
    ) {
        let mut s = if client { client_of(config(None)) } else { server_of(config(None)) };
        s.start(Time(0));
        if after_preamble {
            s.on_bytes(Time(0), &Preamble { kind: ConnectionKind::Control }.encode());
        }
        s.on_bytes(Time(0), &bytes);
        s.on_eof(Time(0));
        let events = drain(&mut s);
        prop_assert!(matches!(events.as_slice(), [Event::Closed(Closed::Failed(_))]));
    }
}

#[test]
fn fields_out_of_bounds_are_refused_on_both_ways() {
    fn span(addr: u64, len: u64) -> RemoteSpan {
        RemoteSpan { addr, len, rkey: 1 }
    }
    let good = plain_describe("engine");
    let rail = |change: fn(&mut RailDesc)| {
        let mut rail = plain_describe("engine").rails.remove(0);
        change(&mut rail);
        rail
    };
    let cases: Vec<(&str, Describe)> = vec![
        (
            "memory",
            Describe {
                rails: vec![rail(|r| r.memories = vec![span(u64::MAX, 1)])],
                ..good.clone()
            },
        ),
        (
            "memory",
            Describe {
                rails: vec![rail(|r| r.memories = vec![span(4096, 0)])],
                ..good.clone()
            },
        ),
        (
            "lease table",
            Describe {
                rails: vec![rail(|r| r.leases = Some(span(u64::MAX - 9, 10)))],
                ..good.clone()
            },
        ),
        (
            "scratch",
            Describe {
                rails: vec![rail(|r| r.scratch = Some(span(1, u64::MAX)))],
                ..good.clone()
            },
        ),
        (
            "engine id",
            Describe {
                engine: "x".repeat(limits::ENGINE_ID + 1).as_str().into(),
                ..good.clone()
            },
        ),
        (
            "engine id",
            Describe {
                engine: "a\x1b[2Jb".into(),
                ..good.clone()
            },
        ),
        (
            "number of memories",
            Describe {
                rails: vec![rail(|r| {
                    r.memories = vec![span(0, 1); limits::MEMORIES + 1]
                })],
                ..good.clone()
            },
        ),
        (
            "number of rails",
            Describe {
                rails: vec![rail(|_| {}); limits::RAILS + 1],
                ..good.clone()
            },
        ),
        (
            "size of a token",
            Describe {
                shared: Some(Blob(vec![0; limits::TOKEN + 1])),
                ..good.clone()
            },
        ),
        (
            "format size",
            Describe {
                format: Blob(vec![0; limits::FORMAT + 1]),
                ..good.clone()
            },
        ),
    ];
    for (what, bad) in cases {
        let raw = Blob::pack("raw", &bad).unwrap().0;
        let decoded = Message::decode(MessageKind::Describe as u8, &raw).unwrap_err();
        assert!(decoded.to_string().contains(what), "{decoded}");
        assert_eq!(Message::from(bad).encode(), Err(decoded));
    }
    for (rail, peer_rail) in [(limits::RAILS as u16, 0), (0, u16::MAX)] {
        let offer = QpOffer {
            offer: 1,
            replaces: None,
            path: PathKind::Rdma,
            candidates: vec![],
            endpoints: vec![RailEndpoint {
                rail,
                peer_rail,
                endpoint: Blob(vec![1]),
            }],
        };
        let raw = Blob::pack("raw", &offer).unwrap().0;
        let decoded = Message::decode(MessageKind::QpOffer as u8, &raw).unwrap_err();
        assert!(decoded.to_string().contains("rail"), "{decoded}");
        assert_eq!(Message::from(offer).encode(), Err(decoded));
    }
    let huge = vec![0; MessageKind::Ping.max_len() + 1];
    let error = Message::decode(MessageKind::Ping as u8, &huge).unwrap_err();
    assert!(matches!(error, WireError::OutOfBounds { what: "Ping", .. }));
    assert_eq!(
        Message::decode(0x7f, &[]),
        Err(WireError::UnknownFrame { code: 0x7f })
    );
}
