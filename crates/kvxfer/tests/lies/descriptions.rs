//! Lies in what a peer says of itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvxfer::config::{KvRole, PathKind};
use kvxfer::ids::Rank;
use kvxfer::layout::{PlacedTensor, Scaling, TensorFormat};
use kvxfer::wire::{
    Blob, Describe, ErrorCode, Fingerprint, GpuDesc, MessageKind, Refusal, RemoteSpan, limits,
};

use crate::liar::Liar;
use crate::reasons::{forget, logged};
use crate::support::counts::Counts;
use crate::wire::Last;
use crate::world::World;

/// Bytes that no lie may make this process keep. Two engines of it are resident anyway.
const BOUND_KIB: u64 = 256 << 10;

/// A describe that no check of this side's has passed.
fn raw(describe: &Describe) -> Vec<u8> {
    Blob::pack("Describe", describe).expect("an encoding").0
}

/// A placement with other tensors, unchecked: it travels as the list of its fields.
fn placement(liar: &Liar, change: impl FnOnce(&mut Vec<PlacedTensor>)) -> Blob {
    let desc = liar.desc();
    let mut tensors = desc.tensors().to_vec();
    change(&mut tensors);
    let parts = (desc.topology(), tensors, desc.pools(), desc.memory_len());
    Blob::pack("placement", &parts).expect("an encoding")
}

#[test]
fn spans_and_names_out_of_bounds() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let span = |addr, len| RemoteSpan { addr, len, rkey: 1 };
    type Lie = (&'static str, fn(&mut Describe), &'static str);
    let lies: Vec<Lie> = vec![
        (
            "beyond the last address",
            |d| d.rails[0].memories[0].addr = u64::MAX - 1,
            "memory",
        ),
        ("empty", |d| d.rails[0].memories[0].len = 0, "memory"),
        (
            "a lease table beyond it",
            |d| {
                d.rails[0].leases = Some(RemoteSpan {
                    addr: u64::MAX,
                    len: 64,
                    rkey: 1,
                });
            },
            "lease table",
        ),
        (
            "a scratch of nothing",
            |d| {
                d.rails[0].scratch = Some(RemoteSpan {
                    addr: 4096,
                    len: 0,
                    rkey: 1,
                });
            },
            "scratch",
        ),
        (
            "a name too long",
            |d| {
                d.engine = "x".repeat(limits::ENGINE_ID + 1).as_str().into();
            },
            "engine id",
        ),
        (
            "a name with a terminal's orders",
            |d| d.engine = "a\x1b[2J".into(),
            "engine id",
        ),
        (
            "a format too long",
            |d| d.format = Blob(vec![0; limits::FORMAT + 1]),
            "format size",
        ),
        (
            "a placement too long",
            |d| {
                d.placement = Blob(vec![0; limits::PLACEMENT + 1]);
            },
            "placement size",
        ),
        (
            "a device too long",
            |d| d.rails[0].device = Blob(vec![0; limits::DEVICE + 1]),
            "device address",
        ),
    ];
    for (what, lie, words) in lies {
        forget();
        let mut liar = Liar::new(&world);
        let mut describe = liar.describe();
        lie(&mut describe);
        liar.wire.say_raw(MessageKind::Describe, &raw(&describe));
        match liar.wire.last() {
            Last::Reported(ErrorCode::Protocol, text) => assert!(text.contains(words), "{text}"),
            other => panic!("{what}: {other:?}"),
        }
        logged(words);
    }
    let mut liar = Liar::new(&world);
    let mut describe = liar.describe();
    describe.rails[0].memories = vec![span(1, 1); limits::MEMORIES + 1];
    liar.wire.say_raw(MessageKind::Describe, &raw(&describe));
    liar.wire
        .reported(ErrorCode::Protocol, "number of memories");
    liar = Liar::new(&world);
    describe = liar.describe();
    describe.rails = vec![describe.rails[0].clone(); limits::RAILS + 1];
    liar.wire.say_raw(MessageKind::Describe, &raw(&describe));
    liar.wire.reported(ErrorCode::Protocol, "number of rails");
    drop(liar);
    world.works();
    before.settle("after the lies");
}

#[test]
fn parts_that_do_not_agree() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    type Lie = (fn(&Liar, &mut Describe), &'static str);
    let lies: Vec<Lie> = vec![
        (|_, d| d.fingerprint = Fingerprint([9; 32]), "fingerprint"),
        (
            |_, d| {
                d.rank = Rank {
                    dp: 0,
                    pp: 0,
                    tp: 3,
                }
            },
            "rank",
        ),
        (|_, d| d.rails[0].memories[0].len += 1, "lengths"),
        (|_, d| d.rails[0].memories.extend_from_within(..), "lengths"),
        (|_, d| d.rails[0].memories.clear(), "lengths"),
        (|_, d| d.rails.clear(), "no device"),
        (
            |_, d| {
                let mut second = d.rails[0].clone();
                second.place = 1;
                second.memories[0].len += 1;
                d.rails.push(second);
            },
            "lengths",
        ),
        (
            |_, d| d.rails.extend_from_within(..),
            "two devices at place 0",
        ),
        (
            |_, d| {
                let inside = RemoteSpan {
                    len: 64,
                    ..d.rails[0].memories[0]
                };
                d.rails[0].leases = Some(inside);
            },
            "share",
        ),
        (
            |_, d| {
                let last = d.rails[0].memories[0].addr + d.rails[0].memories[0].len - 1;
                d.rails[0].leases = Some(RemoteSpan {
                    addr: last,
                    len: 64,
                    rkey: 1,
                });
            },
            "share",
        ),
        // The software device registers no memory of a GPU.
        (
            |_, d| {
                d.gpu = Some(GpuDesc {
                    handles: vec![Blob(vec![7; 9])],
                    staged: 0,
                    unregistered: None,
                });
            },
            "which is no RDMA device",
        ),
        // It is the host's, or a GPU's.
        (
            |_, d| {
                d.shared = Some(Blob(vec![7; 16]));
                d.gpu = Some(GpuDesc {
                    handles: vec![Blob(vec![7; 9])],
                    staged: 0,
                    unregistered: Some("soft".to_owned()),
                });
            },
            "beside memory of a GPU",
        ),
        (|_, d| d.format = Blob(vec![0xc1]), "format"),
        (|_, d| d.placement = Blob(vec![0xff; 64]), "placement"),
        (|_, d| d.rails[0].device = Blob(vec![0x93, 1, 2]), "device"),
        // Absurd counts and places of a tensor.
        (
            |l, d| d.placement = placement(l, |t| t[0].num_blocks = u32::MAX),
            "blocks",
        ),
        (
            |l, d| {
                d.placement = placement(l, |t| t.iter_mut().for_each(|t| t.num_blocks = u32::MAX));
            },
            "memory",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[0].offset = u64::MAX),
            "overflows",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[0].offset += 1),
            "overlap",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[0].block_stride = u64::MAX),
            "overflows",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[0].block_stride = 1),
            "stride",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[0].strides = vec![u64::MAX; 8]),
            "strides",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[0].memory = u32::MAX),
            "memory",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[1].layer = u32::MAX),
            "not placed",
        ),
        (
            |l, d| d.placement = placement(l, |t| t[1].offset = t[0].offset),
            "the same memory",
        ),
        (
            |l, d| {
                d.placement = placement(l, |t| {
                    let one = t[0].clone();
                    t.resize(100_000, one);
                })
            },
            "tensors",
        ),
        (
            |l, d| {
                let desc = l.desc();
                let pools = vec![0u32; 1 << 20];
                let parts = (desc.topology(), desc.tensors(), pools, desc.memory_len());
                d.placement = Blob::pack("placement", &parts).expect("an encoding");
            },
            "pools",
        ),
        // Every tensor is scaled by the last one of a layer that is far too long.
        (
            |l, d| {
                let format = &l.device.side.format();
                let mut groups = format.groups().to_vec();
                let tensors = &mut groups[0].layers[0].tensors;
                let mut one = tensors[0].clone();
                one.scaling = Some(Scaling::Tensor { name: "s".into() });
                tensors.splice(
                    ..,
                    (0..60_000).map(|n| TensorFormat {
                        name: n.to_string(),
                        ..one.clone()
                    }),
                );
                let parts = (format.model(), groups);
                d.format = Blob::pack("format", &parts).expect("an encoding");
                assert!(d.format.len() < limits::FORMAT);
            },
            "60000 is more than the",
        ),
    ];
    for (at, (lie, words)) in lies.into_iter().enumerate() {
        forget();
        let mut liar = Liar::new(&world);
        let mut describe = liar.describe();
        lie(&liar, &mut describe);
        liar.wire.say(describe);
        match liar.wire.last() {
            Last::Refused(Refusal::BadDescription { detail }) => {
                assert!(detail.contains(words), "lie {at} ({words}): {detail}");
                logged(words);
            }
            other => panic!("lie {at} ({words}): {other:?}"),
        }
        assert!(world.target.engine.peer_of(&liar.name).is_none());
    }
    world.works();
    before.settle("after the lies");
}

/// Says that a list or a string is as long as can be, and sends none of it.
#[test]
fn counts_without_content() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let peak = Peak::begin();
    let head = |liar: &Liar| {
        // The fields before the rails, as they are.
        let mut short = liar.describe();
        short.rails.clear();
        let d = &short;
        let parts = (
            &d.engine,
            &d.generation,
            &d.rank,
            &d.kv_role,
            &d.wanted,
            &d.fingerprint,
            &d.format,
            &d.placement,
        );
        let mut bytes = Blob::pack("head", &parts).expect("an encoding").0;
        // A list of eight becomes the first eight of eleven.
        assert_eq!(bytes[0], 0x98);
        bytes[0] = 0x9b;
        bytes
    };
    let tails: [&[u8]; 4] = [
        // array 32, bin 32, str 32, map 32 of 2^32 - 1.
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0xc6, 0xff, 0xff, 0xff, 0xff],
        &[0xdb, 0xff, 0xff, 0xff, 0xff],
        &[0xdf, 0xff, 0xff, 0xff, 0xff],
    ];
    for tail in tails {
        let mut liar = Liar::new(&world);
        let mut bytes = head(&liar);
        bytes.extend_from_slice(tail);
        liar.wire.say_raw(MessageKind::Describe, &bytes);
        liar.wire.reported(ErrorCode::Protocol, "Describe");
        // The same for the fields that are packed inside.
        for field in 0..3 {
            let mut liar = Liar::new(&world);
            let mut describe = liar.describe();
            let lie = Blob([&[0x94], tail].concat());
            match field {
                0 => describe.format = lie,
                1 => describe.placement = lie,
                _ => describe.rails[0].device = lie,
            }
            liar.wire.say(describe);
            liar.wire.refused_as_bad("");
        }
    }
    // Nesting deeper than any stack.
    let mut liar = Liar::new(&world);
    liar.wire
        .say_raw(MessageKind::Describe, &vec![0x91; 1 << 20]);
    liar.wire.reported(ErrorCode::Protocol, "Describe");
    liar = Liar::new(&world);
    let mut describe = liar.describe();
    describe.format = Blob(vec![0x91; limits::FORMAT]);
    liar.wire.say(describe);
    liar.wire.refused_as_bad("format");
    drop(liar);
    peak.assert_below(BOUND_KIB);
    world.works();
    before.settle("after the lies");
}

/// The largest that the format allows, filled with what takes the most memory once decoded.
#[test]
fn descriptions_of_the_largest_size() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let peak = Peak::begin();
    // 8 MiB of pools, of lengths and of strides, each a byte that becomes four or eight.
    let most = limits::PLACEMENT - (64 << 10);
    for which in 0..4 {
        let mut liar = Liar::new(&world);
        let mut describe = liar.describe();
        let desc = liar.desc();
        let many = vec![1u64; most];
        let parts = match which {
            0 => Blob::pack(
                "p",
                &(desc.topology(), desc.tensors(), &many, desc.memory_len()),
            ),
            1 => Blob::pack("p", &(desc.topology(), desc.tensors(), desc.pools(), &many)),
            2 => {
                let mut tensors = desc.tensors().to_vec();
                tensors[0].strides = many;
                Blob::pack(
                    "p",
                    &(desc.topology(), tensors, desc.pools(), desc.memory_len()),
                )
            }
            _ => {
                let one = (0u8, 0u8, 0u8, 0u8, 0u8, 0u8, 1u8, [0u8; 0], None::<u8>);
                let tensors = vec![one; most / 12];
                Blob::pack(
                    "p",
                    &(desc.topology(), tensors, desc.pools(), desc.memory_len()),
                )
            }
        };
        describe.placement = parts.expect("an encoding");
        assert!(describe.placement.len() > limits::PLACEMENT / 2);
        liar.wire.say(describe);
        liar.wire.refused_as_bad("");
    }
    // 4 MiB of scales beside 8 MiB of strides.
    let mut liar = Liar::new(&world);
    let mut describe = liar.describe();
    let format = liar.device.side.format();
    let mut groups = format.groups().to_vec();
    groups[0].layers[0].tensors[0].scaling = Some(Scaling::Constant {
        axes: Vec::new(),
        bits: vec![1; limits::FORMAT - (64 << 10)],
    });
    describe.format = Blob::pack("f", &(format.model(), groups)).expect("an encoding");
    assert!(describe.format.len() > limits::FORMAT / 2);
    describe.placement = placement(&liar, |tensors| tensors[0].strides = vec![1; most]);
    liar.wire.say(describe);
    liar.wire.refused_as_bad("scaling");
    drop(liar);
    peak.assert_below(BOUND_KIB + (64 << 10));

    // A frame that is announced and does not come is not waited for with all its memory.
    let peak = Peak::begin();
    let mut idle: Vec<Liar> = (0..16).map(|_| Liar::new(&world)).collect();
    for liar in &mut idle {
        let mut bytes = liar
            .wire
            .sealed(MessageKind::Describe as u8, &vec![0; 16 << 20]);
        bytes.truncate(64 << 10);
        liar.wire.say_bytes(&bytes);
    }
    world.works();
    peak.assert_below(64 << 10);
    drop(idle);

    // More than was agreed is refused when its first four bytes are here.
    let mut liar = Liar::new(&world);
    liar.wire.say_bytes(&u32::MAX.to_be_bytes());
    liar.wire.reported(ErrorCode::Protocol, "4294967295");
    drop(liar);
    world.works();
    before.settle("after the lies");
}

#[test]
fn who_it_is() {
    let world = World::new(PathKind::Arena);
    // Another engine than the one that is here.
    let mut liar = Liar::new(&world);
    let mut describe = liar.describe();
    describe.wanted = Some("somebody else".into());
    liar.wire.say(describe);
    let last = liar.wire.last();
    assert!(
        matches!(last, Last::Refused(Refusal::WrongEngine { .. })),
        "{last:?}"
    );

    // Twice.
    liar = Liar::described(&world);
    let mut second = liar.describe();
    second.engine = "another".into();
    liar.wire.say(second);
    liar.wire.reported(ErrorCode::UnexpectedMessage, "Describe");

    // A life of its own that is over.
    let mut old = Liar::described(&world);
    let (name, generation) = (old.name.clone(), old.generation);
    // Whose offer is answered has been met.
    let meets = |liar: &mut Liar| {
        let offer = crate::liar::offer_of(PathKind::Arena, Vec::new());
        liar.wire.say(offer);
        liar.wire.hear_kind(MessageKind::QpAnswer);
    };
    meets(&mut old);
    let mut new = Liar::new(&world);
    new.name = name.clone();
    let describe = new.describe();
    new.wire.say(describe);
    new.hear_describe();
    meets(&mut new);
    let mut late = Liar::new(&world);
    (late.name, late.generation) = (name, generation);
    let describe = late.describe();
    late.wire.say(describe);
    let last = late.wire.last();
    assert_eq!(last, Last::Refused(Refusal::GenerationRetired));

    // The wrong role for this engine, and a bandwidth test that it does not serve.
    let mut bench = crate::wire::Wire::dial(
        world.address.get(),
        Some(&world.secret),
        kvxfer::wire::Role::Bench,
    );
    let last = bench.last();
    assert!(
        matches!(last, Last::Refused(Refusal::RoleNotServed { .. })),
        "{last:?}"
    );
    let consumer = world.another(KvRole::Consumer, PathKind::Arena);
    let address = consumer.engine.listen("127.0.0.1:0").expect("a port");
    let mut wire =
        crate::wire::Wire::dial(address, Some(&world.secret), kvxfer::wire::Role::Engine);
    let mut describe = Liar::new(&world).describe();
    describe.kv_role = KvRole::Consumer;
    wire.say(describe);
    let last = wire.last();
    assert!(
        matches!(last, Last::Refused(Refusal::SameRole { .. })),
        "{last:?}"
    );
    world.works();
}

/// The most memory that this process has had since a moment.
pub(crate) struct Peak {
    base: Counts,
    most: Arc<std::sync::atomic::AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Peak {
    pub(crate) fn begin() -> Self {
        let base = Counts::now();
        let most = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let (seen, end) = (Arc::clone(&most), Arc::clone(&over));
        std::thread::spawn(move || {
            while !end.load(Ordering::Acquire) {
                seen.fetch_max(base.grown_kib(), Ordering::AcqRel);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { base, most, over }
    }

    #[track_caller]
    pub(crate) fn assert_below(self, kib: u64) {
        let most = self.most.load(Ordering::Acquire).max(self.base.grown_kib());
        assert!(most < kib, "{most} KiB more than before");
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}
