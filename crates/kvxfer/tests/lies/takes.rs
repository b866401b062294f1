//! Blocks to be fetched out of a liar's GPU: that nobody expects, that are not there, too many; and handles of
//! memory that is not what it is said to be.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvxfer::bench::{BenchMemory, BlockMemory};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::mem::gpu::GpuMemory;
use kvxfer::transfer::{Cause, Refusal};
use kvxfer::wire::{
    Blob, Candidate, Describe, ErrorCode, GpuDesc, Message, MessageKind, PushClosed, PushStart,
    QpAnswer, QpOffer, Take, TakeOf, TakeStop, Taken,
};

use crate::liar::{Liar, endpoint, offer_of};
use crate::owner::{Files, Owner, key_table, memfd, size_seals, table_seals};
use crate::support::{LONG, POISON, gpu_memory, groups};
use crate::world::{BLOCK, World};

/// The bytes of a unit: a block of each of two layers.
const UNIT: u64 = 2 * BLOCK;
const WORD: u64 = 0x7777_0000_7777_0000;

/// Memory of a liar's own, as long as its placement says, and filled.
fn memory(liar: &Liar) -> GpuMemory {
    let BenchMemory::Gpu { runtime, ordinal } = gpu_memory(KvRole::Producer) else {
        panic!("not a GPU's");
    };
    let runtime = kvxfer::mem::gpu::GpuRuntime::open(runtime).expect("a runtime");
    let gpu = runtime.gpu(ordinal).expect("a device");
    let memory = GpuMemory::new(gpu, liar.device.span().len).expect("memory");
    let filled = BlockMemory::Gpu(memory.clone());
    filled
        .fill_words(0, memory.len(), |_| WORD)
        .expect("inside");
    memory
}

fn handle(memory: &GpuMemory) -> Blob {
    Blob(memory.export().expect("a handle").to_bytes().to_vec())
}

fn unstaged(handles: Vec<Blob>) -> GpuDesc {
    GpuDesc {
        handles,
        staged: 0,
        unregistered: Some("so it says".to_owned()),
    }
}

/// A liar's description with its memory on a GPU.
fn on_gpu(liar: &Liar, memory: &GpuMemory) -> Describe {
    let mut describe = liar.describe();
    let handles = vec![handle(memory)];
    describe.gpu = Some(unstaged(handles));
    describe.rails[0].memories[0].rkey = 0;
    describe
}

fn liar(world: &World) -> (Liar, GpuMemory) {
    let mut liar = Liar::new(world);
    let memory = memory(&liar);
    let describe = on_gpu(&liar, &memory);
    liar.wire.say(describe);
    liar.hear_describe();
    (liar.join(PathKind::Ipc), memory)
}

fn pairs(pairs: &[(u32, u32)]) -> Vec<TakeOf> {
    let bytes = pairs
        .iter()
        .flat_map(|(src, dst)| [src.to_le_bytes(), dst.to_le_bytes()].concat());
    let pairs = Blob(bytes.collect());
    vec![TakeOf { group: 0, pairs }]
}

fn take(number: u64, request: &RequestId, nonce: Nonce, of: &[(u32, u32)]) -> Take {
    Take {
        number,
        request: request.clone(),
        nonce,
        layer: None,
        of: pairs(of),
        bytes: UNIT * of.len() as u64,
    }
}

/// What the engine answers: why it has not fetched all, or nothing.
fn answer(liar: &mut Liar, number: u64) -> Option<Cause> {
    let Message::Taken(Taken { number: of, failed }) = liar.wire.hear_kind(MessageKind::Taken)
    else {
        unreachable!("that kind");
    };
    assert_eq!(of, number);
    failed.map(|cause| cause.unpack("cause").expect("a cause"))
}

fn refused(reason: Refusal) -> Option<Cause> {
    Some(Cause::Refused { reason })
}

#[test]
fn what_may_not_be_fetched_is_refused_and_nothing_is_written() {
    let world = World::new(PathKind::Ipc);
    let engine = &world.target.engine;
    let (mut liar, _memory) = liar(&world);
    let request = RequestId::from("w");
    let ticket = engine
        .expect(&request, &groups(32..36), 1, LONG)
        .expect("room");
    let nonce = ticket.nonce;
    // Before it is a sender.
    liar.wire.say(take(1, &request, nonce, &[(0, 32)]));
    assert_eq!(answer(&mut liar, 1), refused(Refusal::Late));
    liar.wire.say(PushStart {
        request: request.clone(),
        nonce: Some(nonce),
    });
    liar.wire.hear_kind(MessageKind::Announce);
    let good = take(2, &request, nonce, &[(0, 32), (1, 33)]);
    let lies: Vec<(Take, Refusal)> = vec![
        (
            take(2, &RequestId::from("x"), nonce, &[(0, 32)]),
            Refusal::Late,
        ),
        (
            take(2, &request, Nonce(nonce.0 ^ 1), &[(0, 32)]),
            Refusal::Late,
        ),
        // A block that is another's, one that is not there, one twice, one that the liar does not have.
        (
            take(2, &request, nonce, &[(0, 32), (1, 31)]),
            Refusal::OutOfRange,
        ),
        (
            take(2, &request, nonce, &[(0, u32::MAX)]),
            Refusal::OutOfRange,
        ),
        (
            take(2, &request, nonce, &[(0, 32), (1, 32)]),
            Refusal::OutOfRange,
        ),
        (take(2, &request, nonce, &[(4000, 32)]), Refusal::OutOfRange),
        (
            Take {
                layer: Some(9),
                ..good.clone()
            },
            Refusal::OutOfRange,
        ),
        (
            Take {
                of: vec![TakeOf {
                    group: 7,
                    ..good.of[0].clone()
                }],
                ..good.clone()
            },
            Refusal::OutOfRange,
        ),
        // A plan that comes to other bytes is not the same plan.
        (
            Take {
                bytes: good.bytes - 1,
                ..good.clone()
            },
            Refusal::FormatMismatch,
        ),
        (
            Take {
                layer: Some(0),
                ..good.clone()
            },
            Refusal::FormatMismatch,
        ),
    ];
    for (lie, reason) in lies {
        liar.wire.say(lie.clone());
        assert_eq!(answer(&mut liar, 2), refused(reason), "{lie:?}");
    }
    world.target.assert_blocks(32..36, POISON);
    // Nor does it hurt to stop what is not there.
    liar.wire.say(TakeStop { number: 77 });
    liar.wire.say(good);
    assert_eq!(answer(&mut liar, 2), None);
    world.target.assert_blocks(32..34, WORD);
    world.target.assert_blocks(34..36, POISON);
    // Whoever has closed may not go on.
    liar.wire.say(PushClosed {
        request: request.clone(),
        nonce,
        sender: liar.name.rank,
        cause: Blob(Vec::new()),
    });
    world.log.borrow_mut().wait("the failure", |e| {
        matches!(e, Event::Failed { request: r, memory: MemoryState::Released, .. } if *r == request)
    });
    liar.wire.say(take(3, &request, nonce, &[(2, 34)]));
    assert_eq!(answer(&mut liar, 3), refused(Refusal::Late));
    world.target.assert_blocks(34..36, POISON);
    world.target.fill_blocks(32..36, POISON);
    world.works();
}

#[test]
fn a_take_over_another_path_is_a_lie() {
    let world = World::new(PathKind::Arena);
    let mut liar = Liar::established(&world, KvRole::Both, PathKind::Arena);
    liar.wire
        .say(take(1, &RequestId::from("w"), Nonce(1), &[(0, 0)]));
    world.was_cut_off(&liar.name, ErrorCode::Lie);
    world.works();
}

#[test]
fn handles_that_are_not_of_the_memory_lead_nowhere() {
    let world = World::new(PathKind::Ipc);
    let refused = |change: &dyn Fn(&mut Describe, &GpuMemory)| {
        let mut liar = Liar::new(&world);
        let memory = memory(&liar);
        let mut describe = on_gpu(&liar, &memory);
        change(&mut describe, &memory);
        liar.wire.say(describe);
        liar.hear_describe();
        let qp = liar.device.queue_pair();
        liar.wire.say(offer_of(PathKind::Ipc, vec![endpoint(&qp)]));
        let Message::QpAnswer(answer) = liar.wire.hear_kind(MessageKind::QpAnswer) else {
            unreachable!("that kind");
        };
        assert_eq!(answer.path, None);
    };
    let set = |describe: &mut Describe, handles| describe.gpu = Some(unstaged(handles));
    refused(&|describe, _| set(describe, Vec::new()));
    refused(&|describe, memory| set(describe, vec![handle(memory), handle(memory)]));
    refused(&|describe, _| set(describe, vec![Blob(vec![7; 100])]));
    refused(&|describe, _| set(describe, vec![Blob(Vec::new())]));
    // Of a part, and of memory that is gone.
    refused(&|describe, memory| {
        let part = memory.slice(0, memory.len() - 8).expect("inside");
        set(describe, vec![handle(&part)]);
    });
    refused(&|describe, memory| {
        let other = GpuMemory::new(memory.gpu(), memory.len()).expect("memory");
        let gone = handle(&other);
        drop(other);
        set(describe, vec![gone]);
    });
    // And of the host, over the same path: without a token, and with some that are none.
    refused(&|describe, _| describe.gpu = None);
    for len in [0, 15, 16] {
        refused(&|describe, _| {
            describe.gpu = None;
            describe.shared = Some(Blob(vec![7; len]));
        });
    }
    world.works();
}

/// A liar whose memory is the host's, and whose device passes these files; and what counts how often it was asked.
fn with_files(world: &World, segment: File, copies: usize) -> (Liar, Arc<AtomicU32>) {
    let mut liar = Liar::new(world);
    let files = Files {
        keys: Arc::new(key_table(BLOCK, 0, table_seals())),
        segment: Arc::new(segment),
        copies,
    };
    let owner = Owner::new(&liar.device.context.address(), &files);
    let mut describe = liar.describe();
    describe.shared = Some(Blob(vec![7; 16]));
    describe.rails[0].device = Blob::pack("device", &owner.device).expect("an address");
    liar.wire.say(describe);
    liar.hear_describe();
    (liar, owner.asked)
}

/// Offers queue pairs over the path; what is answered of it.
fn offered(liar: &mut Liar, endpoints: Vec<Blob>) -> QpAnswer {
    let candidate = Candidate {
        path: PathKind::Ipc,
        why_not: None,
    };
    liar.wire.say(QpOffer {
        candidates: vec![candidate],
        ..offer_of(PathKind::Ipc, endpoints)
    });
    let Message::QpAnswer(answer) = liar.wire.hear_kind(MessageKind::QpAnswer) else {
        unreachable!("that kind");
    };
    answer
}

fn why_not(answer: &QpAnswer) -> &str {
    assert_eq!(answer.path, None);
    answer.candidates[0].why_not.as_deref().expect("a reason")
}

/// What a file is said to hold is pinned only if its owner has paid for it, and no more of it.
#[test]
fn a_file_that_is_mostly_holes_is_not_filled() {
    let world = World::new(PathKind::Ipc);
    let (size, len) = (1 << 40, Liar::new(&world).device.span().len);
    let allocated = |file: &File| file.metadata().expect("its size").blocks() * 512;
    let try_with = |content: &[u8]| {
        let segment = memfd(size, content, size_seals());
        let file = segment.try_clone().expect("a descriptor");
        let (mut liar, asked) = with_files(&world, segment, 1);
        let qp = liar.device.queue_pair();
        let answer = offered(&mut liar, vec![endpoint(&qp)]);
        assert!(asked.load(Ordering::Acquire) > 0, "nobody asked");
        let there = (content.len() as u64).next_multiple_of(2 << 20);
        assert!(allocated(&file) <= there, "{} bytes", allocated(&file));
        answer
    };
    let answer = try_with(&[0x42; 4096]);
    let why = why_not(&answer);
    assert!(why.contains("are allocated"), "{why}");
    let answer = try_with(&vec![0x42; len as usize]);
    assert_eq!(answer.path, Some(PathKind::Ipc), "{answer:?}");
    world.works();
}

/// What takes long is tried once a session, and when nothing else is wrong.
#[test]
fn the_files_of_a_peer_are_asked_for_once() {
    let world = World::new(PathKind::Ipc);
    let segment = memfd(BLOCK, &[], size_seals());
    // It passes none.
    let (mut liar, asked) = with_files(&world, segment, 0);
    let count = || asked.load(Ordering::Acquire);
    let qp = liar.device.queue_pair();
    assert_eq!(offered(&mut liar, Vec::new()).path, None);
    assert_eq!(count(), 0);
    assert_eq!(offered(&mut liar, vec![endpoint(&qp)]).path, None);
    assert_eq!(count(), 1);
    for _ in 0..3 {
        let answer = offered(&mut liar, vec![endpoint(&qp)]);
        let why = why_not(&answer);
        assert!(why.contains("has tried"), "{why}");
    }
    assert_eq!(count(), 1);
    world.works();
}

#[test]
fn an_answer_that_nobody_waits_for_means_nothing() {
    let world = World::new(PathKind::Ipc);
    let (mut liar, _memory) = liar(&world);
    for number in [0, 1, 1 << 48, u64::MAX] {
        liar.wire.say(Taken {
            number,
            failed: None,
        });
        liar.wire.say(Taken {
            number,
            failed: Some(Blob(vec![0xc1])),
        });
    }
    world.works();
    assert!(world.target.engine.peer_of(&liar.name).is_some());
}
