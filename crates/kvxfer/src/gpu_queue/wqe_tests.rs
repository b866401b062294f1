//! WQEs as a poster in Rust writes them: whole blocks, and everything that is none.

use kvxfer_verbs::mlx5::{
    CqDepth, Cqe, CqeStatus, DoorbellRecord, Qpn, QueueMemory, QueueNotReached, RemoteSpan,
    Segment, SendFlags, SendWqe, SqDepth,
};

use super::*;
use crate::gpu_queue::PostTable;
use crate::layout::{DType, KvFormat, KvPlacement, Packing, Side, Topology, models};
use crate::mem::kernels::queue::ALL_TENSORS;
use crate::mem::post::{Descriptor, End, Place, PostOp};
use crate::mem::{HostBuffer, HostMemory};
use crate::plan::{Compiled, Part, PlanLimits, Role};

const BLOCKS: u32 = 6;
const DEPTH: u32 = 16;
/// Where this rank's memory is said to be.
const HERE: u64 = 0x10_0000_0000;

/// Ranks that keep K and V of all heads, and of the second half of them.
fn ops() -> BlockOps {
    ops_to(Topology::single)
}

/// Of the second half of the heads, to a rank that keeps these.
fn ops_to(consumer: impl Fn(&KvFormat) -> Topology) -> BlockOps {
    let format = models::builtin("llama-3.1-8b", 2, DType::Bf16).expect("built in");
    let placed = |format: &KvFormat, topology| {
        let uniform = KvPlacement::uniform(format, topology, &[BLOCKS], Packing::OneMemory, 64);
        uniform.and_then(|u| u.describe(format)).expect("valid")
    };
    let half = placed(&format, Topology::tensor_parallel(&format, 1, 2));
    let all = placed(&format, consumer(&format));
    let side = |placement| Side {
        format: &format,
        placement,
    };
    let plans = Compiled::compile(&side(&half), &side(&all), Role::Push, Part::Common);
    let limits = PlanLimits {
        max_msg_bytes: 1 << 20,
        max_sge: 4,
    };
    BlockOps::new(&plans.expect("they reshard"), limits).expect("limits")
}

struct Bench {
    ops: BlockOps,
    layers: Vec<RegionLayer>,
    sq: HostMemory,
    record: HostMemory,
    cq: HostMemory,
    taken: HostMemory,
    device: WqeDevice,
    next: u64,
    read: u64,
    /// WQEs of a look.
    most: u64,
    _memory: HostBuffer,
}

impl Bench {
    fn new() -> Self {
        let ops = ops();
        let named = Named::new(&ops, |region| (region == 0).then_some(HERE));
        let named = named.expect("they lie evenly");
        let (sq_depth, cq_depth) = (SqDepth::new(DEPTH), CqDepth::new(2 * DEPTH));
        let (sq_depth, cq_depth) = (sq_depth.expect("a power"), cq_depth.expect("a power"));
        let memory = HostBuffer::new(64 << 10).expect("memory");
        let mut from = 0;
        let mut take = |len: u64| {
            let part = memory.memory().slice(from, len).expect("room");
            from += len.next_multiple_of(64);
            part
        };
        let (sq, cq) = (take(sq_depth.bytes()), take(cq_depth.bytes()));
        let (record, taken, bell) = (take(8), take(8), take(8));
        for n in 0..u64::from(2 * DEPTH) {
            let at = cq_depth.offset(n);
            cq.write(at, &Cqe::unwritten()).expect("inside");
        }
        let queues = Queues {
            sq: WqeMemory::Host(sq.clone()),
            sq_record: WqeMemory::Host(record.clone()),
            cq: WqeMemory::Host(cq.clone()),
            cq_record: WqeMemory::Host(taken.clone()),
            bell: WqeMemory::Host(bell),
        };
        let setup = HcaSetup {
            qpn: Qpn::new(5).expect("24 bits"),
            sq_depth,
            cq_depth,
            first: 0,
            keys: named.keys,
        };
        Self {
            device: WqeDevice::new(queues, setup, named.windows).expect("large enough"),
            ops,
            layers: named.layers,
            sq,
            record,
            cq,
            taken,
            next: 0,
            read: 0,
            most: u64::MAX,
            _memory: memory,
        }
    }

    /// The WQEs of a block.
    fn block(&self, layer: usize, src: u32, dst: u32) -> Vec<Operation> {
        let pieces = self.layers[layer].tensors.concat();
        let wqe = |piece: RegionPiece| Operation::Write {
            remote: RemoteSpan {
                addr: piece.remote.addr + u64::from(dst) * piece.remote.stride,
                rkey: piece.remote.key,
            },
            local: Gather::One(
                Segment::new(
                    piece.local.addr + u64::from(src) * piece.local.stride,
                    u32::try_from(piece.len).expect("below 2^31"),
                    piece.local.key,
                )
                .expect("a length"),
            ),
        };
        pieces.into_iter().map(wqe).collect()
    }

    /// Posts, and rings when all are there; the last of them tells.
    fn post(&mut self, operations: &[Operation]) {
        self.post_as(operations, 0);
    }

    fn post_as(&mut self, operations: &[Operation], off_by: u16) {
        for (i, operation) in operations.iter().enumerate() {
            let wqe = SendWqe {
                index: (self.next as u16).wrapping_add(off_by),
                qpn: Qpn::new(5).expect("24 bits"),
                flags: SendFlags {
                    signalled: i + 1 == operations.len(),
                    ..SendFlags::default()
                },
                operation: *operation,
            };
            let at = self.next % u64::from(DEPTH) * 64;
            let bytes = wqe.encode().expect("valid");
            self.sq.write(at, &bytes).expect("inside");
            self.next += 1;
        }
        let record = DoorbellRecord::new(self.next).encode();
        self.record.write(4, &record).expect("inside");
    }

    fn look(&mut self) -> (Vec<Block>, Option<Wrong>) {
        let mut blocks = Vec::new();
        let (_, wrong) = self.device.look(self.most, &mut blocks);
        (blocks, wrong)
    }

    /// The completion that comes next: the WQE, and what became of it.
    fn poll(&mut self) -> Option<(u64, Result<(), Syndrome>)> {
        let depth = CqDepth::new(2 * DEPTH).expect("a power");
        let mut bytes = [0; 64];
        let at = depth.offset(self.read);
        self.cq.read(at, &mut bytes).expect("inside");
        let cqe = Cqe::decode(&bytes, self.read, depth).expect("one of ours")?;
        self.read += 1;
        let [_, b, c, d] = (self.read as u32).to_be_bytes();
        let word = [0, b, c, d, 0, 0, 0, 0];
        self.taken.store(0, word).expect("inside");
        Some((
            cqe.counter.into(),
            match cqe.status {
                CqeStatus::Done { .. } => Ok(()),
                CqeStatus::Failed { syndrome, .. } => Err(syndrome),
            },
        ))
    }
}

#[test]
fn the_wqes_of_a_block_are_one_post_in_any_number_of_looks() {
    let mut bench = Bench::new();
    let (at, layer) = bench.ops.find(0, 0).expect("layer 0");
    let bytes: u64 = bench.layers[0].tensors.concat().iter().map(|p| p.len).sum();
    assert_eq!(bytes, layer.bytes);
    let wqes = bench.block(0, 3, 5);
    let count = wqes.len() as u64;
    // K and V, each in halves of tokens.
    assert!((2..=8).contains(&count), "{count}");
    let (first, rest) = wqes.split_at(1);
    bench.post(first);
    assert_eq!(bench.look(), (vec![], None));
    assert!(bench.device.has_begun());
    bench.post(rest);
    let more = bench.block(0, 0, 1);
    bench.post(&more);
    let ticket = |last: u64| (count - 1) << 56 | last;
    let block = |last, src, dst| Block {
        ticket: ticket(last),
        layer: at,
        pair: BlockPair { src, dst },
    };
    let (blocks, wrong) = bench.look();
    assert_eq!(blocks, [block(count - 1, 3, 5), block(2 * count - 1, 0, 1)]);
    assert_eq!(wrong, None);
    assert!(!bench.device.has_begun());
    assert_eq!(bench.device.under_way(), 2 * count);
    // Ends in another order are told in the WQEs'.
    bench
        .device
        .complete(ticket(2 * count - 1), Status::Ok)
        .expect("in order");
    assert_eq!(bench.poll(), None);
    bench
        .device
        .complete(ticket(count - 1), Status::Ok)
        .expect("in order");
    let told: Vec<u64> = std::iter::from_fn(|| bench.poll())
        .map(|(wqe, end)| {
            assert_eq!(end, Ok(()));
            wqe
        })
        .collect();
    // The first one told by itself; of the others the last.
    assert_eq!(told, [0, count - 1, 2 * count - 1]);
    assert_eq!(bench.device.under_way(), 0);
    // Once more says nothing.
    bench
        .device
        .complete(ticket(count - 1), Status::Ok)
        .expect("ignored");
    assert_eq!(bench.poll(), None);
}

#[test]
fn a_look_takes_no_more_than_it_may_and_the_next_one_goes_on() {
    let mut bench = Bench::new();
    bench.most = 1;
    let one = bench.block(0, 3, 5);
    let count = one.len();
    let other = bench.block(0, 0, 1);
    bench.post(&[one, other].concat());
    let mut found = Vec::new();
    for i in 0..2 * count {
        let (blocks, wrong) = bench.look();
        assert_eq!(wrong, None);
        assert_eq!(bench.device.taken(), i as u64 + 1);
        assert_eq!(bench.device.has_begun(), blocks.is_empty());
        found.extend(blocks.iter().map(|block| block.pair));
    }
    let pair = |src, dst| BlockPair { src, dst };
    assert_eq!(found, [pair(3, 5), pair(0, 1)]);
    assert_eq!(bench.look(), (vec![], None));
}

#[test]
fn memory_that_is_copies_do_not_reach_is_told_apart() {
    let lost = QueueNotReached { step: "a copy" };
    let rule = QueueRule::of(&Violation::NotReached(lost));
    assert_eq!(rule, QueueRule::Reached);
}

/// Two ranks with other heads: all layers are there on both, and nothing of them moves.
#[test]
fn a_layer_of_which_nothing_moves_is_none_to_either_kind_of_queue() {
    let ops = ops_to(|format| Topology::tensor_parallel(format, 0, 2));
    let (_, layer) = ops.find(0, 0).expect("both keep it");
    assert_eq!(layer.bytes, 0);
    let named = Named::new(&ops, |_| Some(HERE)).expect("they lie evenly");
    assert_eq!((named.layers.len(), named.most), (0, 0));
    let table = PostTable::new(&std::sync::Arc::new(ops), &[], false);
    let place = End::Place(Place {
        group: 0,
        tensor: ALL_TENSORS,
        layer: 0,
        block: 1,
    });
    let post = Descriptor {
        ticket: 0,
        op: PostOp::Put,
        local: place,
        remote: place,
        len: 0,
    };
    let fault = table.check(&post).expect_err("there is nothing to post");
    assert_eq!(fault, PostFault::Layer { group: 0, layer: 0 });
    // As kvx_put says of it on a queue of work requests.
    assert_eq!(fault.status(), Status::BadKey);
}

/// What is changed of a WQE: the remote side; the local address, bytes and key.
type Change<'a> = &'a dyn Fn(&mut RemoteSpan, &mut (u64, u32, u32));

/// What is wrong with a WQE, as the push is told, and as the kernel is.
#[test]
fn what_is_no_stretch_of_a_block_is_refused_by_name() {
    let bench = Bench::new();
    let good = bench.block(0, 1, 2);
    let change = |of: &Operation, change: Change<'_>| {
        let Operation::Write {
            mut remote,
            local: Gather::One(one),
        } = *of
        else {
            panic!("{of:?}");
        };
        let mut near = (one.addr(), one.len(), one.lkey());
        change(&mut remote, &mut near);
        let local = Gather::One(Segment::new(near.0, near.1, near.2).expect("a length"));
        Operation::Write { remote, local }
    };
    let of = |f: Change<'_>| vec![change(&good[0], f)];
    let Operation::Write { remote, local } = good[0] else {
        panic!("a WRITE");
    };
    let (key, access) = (Syndrome::LOCAL_PROTECTION, Syndrome::REMOTE_ACCESS);
    let no = Syndrome::LOCAL_QP_OPERATION;
    let cases: Vec<(Vec<Operation>, PostFault, Syndrome)> = vec![
        (of(&|_, near| near.2 = 7), PostFault::Key, key),
        (of(&|far, _| far.rkey = 7), PostFault::Key, access),
        (of(&|far, _| far.addr -= 1 << 30), PostFault::Key, access),
        (of(&|_, near| near.0 += 1 << 30), PostFault::Key, key),
        (of(&|far, _| far.addr += 16), PostFault::Stretch, access),
        (of(&|_, near| near.0 += 16), PostFault::Stretch, access),
        (of(&|_, near| near.1 /= 2), PostFault::Stretch, access),
        // Reads need the right to write here.
        (vec![Operation::Read { remote, local }], PostFault::Key, key),
        (
            vec![Operation::WriteImm {
                remote,
                local,
                imm: 1,
            }],
            PostFault::Operation,
            no,
        ),
        (vec![Operation::Nop], PostFault::Operation, no),
        // Not from its first stretch on; the same one twice; another block's.
        (vec![good[1]], PostFault::Places, no),
        (vec![good[0], good[0]], PostFault::Places, no),
        (
            vec![good[0], bench.block(0, 1, 3)[1]],
            PostFault::Places,
            no,
        ),
        (
            vec![good[0], bench.block(1, 1, 2)[1]],
            PostFault::Places,
            no,
        ),
    ];
    for (operations, fault, syndrome) in cases {
        let mut bench = Bench::new();
        bench.post(&operations);
        bench.post(&good);
        let last = operations.len() as u64 - 1;
        let (blocks, wrong) = bench.look();
        assert_eq!(blocks, [], "{operations:?}");
        assert_eq!(wrong, Some(Wrong { wqe: last, fault }), "{operations:?}");
        assert_eq!(bench.look(), (vec![], None), "it is said once");
        // The engine gives the push up, and all else with it.
        bench
            .device
            .fail(Status::Late)
            .expect("a queue that goes on");
        let ends: Vec<_> = std::iter::from_fn(|| bench.poll()).collect();
        let failed: Vec<_> = ends.iter().filter(|(_, end)| end.is_err()).collect();
        match operations.len() {
            1 => assert_eq!(failed[0], &(0, Err(syndrome)), "{operations:?}"),
            // What began well before it is given up first.
            _ => assert_eq!(failed[0].0, 0, "{operations:?}"),
        }
        let flushed = &failed[1..];
        let is_flushed = |(_, end): &&(u64, Result<(), Syndrome>)| *end == Err(Syndrome::FLUSHED);
        assert!(flushed.iter().all(is_flushed), "{ends:?}");
        assert_eq!(bench.device.under_way(), 0);
    }
}

#[test]
fn broken_rules_are_named_and_end_the_queue() {
    let broken = |break_it: &dyn Fn(&mut Bench)| {
        let mut bench = Bench::new();
        let block = bench.block(0, 0, 0);
        bench.post(&block);
        assert_eq!(bench.look().1, None);
        break_it(&mut bench);
        let (blocks, wrong) = bench.look();
        assert_eq!(blocks, []);
        assert_eq!(bench.look(), (vec![], None));
        assert_eq!(bench.device.under_way(), 0, "nobody waits for it");
        bench
            .device
            .fail(Status::Closed)
            .expect("nothing more is told");
        match wrong.expect("a rule").fault {
            PostFault::Rule { rule } => rule,
            fault => panic!("{fault}"),
        }
    };
    let operation = Bench::new().block(0, 1, 1);
    assert_eq!(
        broken(&|bench| bench.post_as(&operation, 1)),
        QueueRule::WorkRequest
    );
    assert_eq!(
        // A record that tells of what was never written.
        broken(&|bench| {
            let record = DoorbellRecord::new(bench.next + 1).encode();
            bench.record.write(4, &record).expect("inside");
        }),
        QueueRule::WorkRequest
    );
    assert_eq!(
        broken(&|bench| {
            let record = DoorbellRecord::new(bench.next - 1).encode();
            bench.record.write(4, &record).expect("inside");
        }),
        QueueRule::Record
    );
}

#[test]
fn a_queue_that_is_closed_tells_so_and_takes_nothing() {
    let mut bench = Bench::new();
    let block = bench.block(0, 1, 1);
    bench.device.close(Status::Closed);
    bench.post(&block);
    assert_eq!(bench.look(), (vec![], None));
    let first = bench.poll().expect("told at once");
    assert_eq!(first, (0, Err(Syndrome::REMOTE_ABORTED)));
    assert_eq!(bench.device.under_way(), 0);
}

#[test]
fn memory_beyond_the_models_addresses_has_no_windows() {
    assert!(Named::new(&ops(), |_| None).is_none());
    assert!(Named::new(&ops(), |_| Some(u64::MAX - 64)).is_none());
}
