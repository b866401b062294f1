//! Blocks by their places, looked up on the device and posted as a WQE for each of their pieces.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvxfer_hipmem::HostMemory;
use kvxfer_hipmem::kernels::queue::{
    ALL, ALL_TENSORS, DIRECT, EACH, GET, LOCAL_PLACE, Move, POSTED, PUT, PUT_IMM, REMOTE_PLACE,
    ticket_number,
};
use kvxfer_hipmem::post::{Place, RegionLayer, RegionPiece, RegionSide, Status, region_table};
use kvxfer_verbs::mlx5::model::{Carried, Hca, KeyTable, Region, Sink};
use kvxfer_verbs::mlx5::{Gather, Operation, SendWqe, Syndrome};

use crate::wqe::Bench;
use crate::{LONG, Memory, Noise, Post, SHORT, ends, run, shipped};

const LKEY: u32 = 0x11;
const RKEY: u32 = 0x22;
/// Bytes that nobody may touch.
const ELSE: u8 = 0xe5;

/// What carries WQEs out by copying bytes.
#[derive(Debug)]
struct Mover {
    local: HostMemory,
    remote: HostMemory,
    /// Remote addresses and bytes, in their order.
    done: Vec<(u64, u64)>,
}

impl Sink for Mover {
    fn execute(&mut self, _: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        let Some((remote, Gather::One(one))) = operation.sides() else {
            return Err(Syndrome::LOCAL_QP_OPERATION);
        };
        let here = one.addr() - self.local.addr();
        let there = remote.addr - self.remote.addr();
        let mut bytes = vec![0; one.len() as usize];
        if matches!(operation, Operation::Read { .. }) {
            self.remote
                .read(there, &mut bytes)
                .expect("the keys say so");
            self.local.write(here, &bytes).expect("the keys say so");
        } else {
            self.local.read(here, &mut bytes).expect("the keys say so");
            self.remote.write(there, &bytes).expect("the keys say so");
        }
        self.done.push((remote.addr, one.len().into()));
        Ok(Carried::Done(one.len()))
    }
}

/// Two memories, and blocks in them: group 0 has layers 1 and 3 of two tensors in several pieces each, group 2 a
/// layer 0 of one piece.
struct World {
    layers: Vec<RegionLayer>,
    local: HostMemory,
    remote: HostMemory,
    bench: Bench<Mover>,
    _memory: Memory,
}

const LOCAL_BLOCKS: u32 = 24;
const REMOTE_BLOCKS: u32 = 40;
/// Bytes from one block to the next, on both sides.
const STRIDES: (u64, u64) = (512, 640);

/// A layer whose blocks begin at these offsets, with pieces at (offset here, offset there, bytes).
fn layer(
    (group, layer): (u8, u16),
    (local, remote): (u64, u64),
    tensors: &[&[(u64, u64, u64)]],
) -> RegionLayer {
    let side = |addr, stride, key| RegionSide { addr, stride, key };
    let mut n = 0;
    let tensors = tensors.iter().map(|pieces| {
        let (here, there) = (
            local + n * STRIDES.0 * u64::from(LOCAL_BLOCKS),
            remote + n * STRIDES.1 * u64::from(REMOTE_BLOCKS),
        );
        n += 1;
        let piece = |(src, dst, len): &(u64, u64, u64)| RegionPiece {
            local: side(here + src, STRIDES.0, LKEY),
            remote: side(there + dst, STRIDES.1, RKEY),
            len: *len,
        };
        pieces.iter().map(piece).collect()
    });
    RegionLayer {
        group,
        layer,
        local_blocks: LOCAL_BLOCKS,
        remote_blocks: REMOTE_BLOCKS,
        tensors: tensors.collect(),
    }
}

impl World {
    fn new(kind: u32, depth: u32, patience: u64) -> Self {
        let mut memory = Memory::new();
        let local = memory.take(8 * STRIDES.0 * u64::from(LOCAL_BLOCKS));
        let remote = memory.take(8 * STRIDES.1 * u64::from(REMOTE_BLOCKS));
        local
            .fill_words(0, local.len(), |i| i * 0x9e37_79b9)
            .expect("room");
        remote.fill(0, remote.len(), ELSE).expect("room");
        let at = |n: u64| {
            (
                local.addr() + n * STRIDES.0 * u64::from(LOCAL_BLOCKS),
                remote.addr() + n * STRIDES.1 * u64::from(REMOTE_BLOCKS),
            )
        };
        let layers = vec![
            layer((2, 0), at(4), &[&[(7, 13, 301)]]),
            layer(
                (0, 1),
                at(0),
                &[
                    &[(0, 0, 64), (128, 100, 32), (200, 300, 1)],
                    &[(0, 0, 100), (256, 512, 100)],
                ],
            ),
            layer((0, 3), at(2), &[&[(1, 2, 3)], &[(0, 0, 500)]]),
        ];
        let region = |memory: &HostMemory| Region {
            addr: memory.addr(),
            len: memory.len(),
            writable: true,
        };
        let keys = KeyTable {
            local: [(LKEY, region(&local))].into(),
            remote: [(RKEY, region(&remote))].into(),
        };
        let mover = Mover {
            local: local.clone(),
            remote: remote.clone(),
            done: Vec::new(),
        };
        let mut bench = Bench::with((kind, depth, 2 * depth), 0, patience, keys, mover);
        let table = memory.take(8192);
        let bytes = region_table(&layers, table.addr()).expect("a table");
        table.write(0, &bytes).expect("room");
        bench.queue.regions = table.addr();
        Self {
            layers,
            local,
            remote,
            bench,
            _memory: memory,
        }
    }

    /// The layer of a group.
    fn layer(&self, group: u8, layer: u16) -> &RegionLayer {
        let mut all = self.layers.iter();
        all.find(|l| (l.group, l.layer) == (group, layer))
            .expect("it is there")
    }

    /// The pieces of a place.
    fn pieces(&self, place: Place) -> Vec<RegionPiece> {
        let layer = self.layer(place.group, place.layer);
        match place.tensor {
            ALL_TENSORS => layer.tensors.concat(),
            n => layer.tensors[usize::from(n)].clone(),
        }
    }

    fn bytes(&self, place: Place) -> u64 {
        self.pieces(place).iter().map(|piece| piece.len).sum()
    }

    fn by_places(&self, src: Place, dst: u32) -> Move {
        let there = Place { block: dst, ..src };
        Move {
            local: src.to_word(),
            remote: there.to_word(),
            len: self.bytes(src),
            flags: LOCAL_PLACE | REMOTE_PLACE,
            imm: 77,
            ..Move::default()
        }
    }

    /// Where a block's pieces are: offsets here, offsets there, and bytes.
    fn spans(&self, src: Place, dst: u32) -> Vec<(u64, u64, u64)> {
        let pieces = self.pieces(src);
        let spans = pieces.iter().map(|piece| {
            (
                piece.local.addr - self.local.addr() + piece.local.stride * u64::from(src.block),
                piece.remote.addr - self.remote.addr() + piece.remote.stride * u64::from(dst),
                piece.len,
            )
        });
        spans.collect()
    }
}

fn place(group: u8, layer: u16, tensor: u8, block: u32) -> Place {
    Place {
        group,
        tensor,
        layer,
        block,
    }
}

/// Serves a device until `over`.
fn serve(hca: &mut Hca<HostMemory, Mover>, over: &AtomicBool) {
    while !over.load(Ordering::Acquire) {
        hca.look(u64::MAX).unwrap_or_else(|e| panic!("{e}"));
        thread::yield_now();
    }
    hca.look(u64::MAX).unwrap_or_else(|e| panic!("{e}"));
}

/// Posts while the device looks; the device comes back with what it has done.
fn served(
    mut world: World,
    post: &Post<'_>,
    moves: &[Move],
    (posters, op, until): (u32, u32, u32),
) -> (World, Vec<(Status, Status)>) {
    let over = AtomicBool::new(false);
    let hca = &mut world.bench.hca;
    let (around, queue) = (&world.bench.around, world.bench.queue);
    let results = thread::scope(|scope| {
        let device = scope.spawn(|| {
            let _end = around.end_with_me();
            serve(hca, &over);
        });
        let results = run(post, queue, moves, posters, op, until);
        over.store(true, Ordering::Release);
        device.join().expect("no rule was broken");
        results
    });
    (world, ends(&results))
}

/// A block of five pieces, waited for: for tests with planted faults.
pub(crate) fn told(post: &Post<'_>, patience: u64) -> Vec<(Status, Status)> {
    let world = World::new(DIRECT, 8, patience);
    let block = world.by_places(place(0, 1, ALL_TENSORS, 3), 9);
    served(world, post, &[block], (1, PUT, EACH)).1
}

#[test]
fn blocks_that_kernels_name_are_moved_piece_by_piece() {
    for (op, until) in [(PUT, ALL), (PUT_IMM, EACH), (GET, ALL)] {
        let world = World::new(DIRECT, 16, LONG);
        let mut noise = Noise(7);
        // Each destination block once, so that there is one answer.
        let mut posts = Vec::new();
        for (group, number) in [(0, 1), (0, 3), (2, 0)] {
            let blocks = if op == GET {
                LOCAL_BLOCKS
            } else {
                REMOTE_BLOCKS
            };
            for to in 0..blocks {
                let from = noise.below(LOCAL_BLOCKS as usize) as u32;
                let (src, dst) = if op == GET { (to, from) } else { (from, to) };
                let tensors = world.layer(group, number).tensors.len() as u8;
                if noise.below(3) == 0 {
                    posts.extend((0..tensors).map(|t| (place(group, number, t, src), dst)));
                } else {
                    posts.push((place(group, number, ALL_TENSORS, src), dst));
                }
            }
        }
        posts.truncate(posts.len() / 4 * 4);
        let moves: Vec<_> = posts
            .iter()
            .map(|(src, dst)| world.by_places(*src, *dst))
            .collect();
        let mut before = (
            vec![0; world.local.len() as usize],
            vec![0; world.remote.len() as usize],
        );
        world.local.read(0, &mut before.0).expect("inside");
        world.remote.read(0, &mut before.1).expect("inside");
        let (world, ends) = served(world, &shipped, &moves, (4, op, until));
        assert!(
            ends.iter().all(|end| *end == (Status::Ok, Status::Ok)),
            "{op}"
        );
        let (mut here, mut there) = before;
        let mut pieces = 0;
        for (src, dst) in &posts {
            for (from, to, len) in world.spans(*src, *dst) {
                let (a, b) = (
                    from as usize..(from + len) as usize,
                    to as usize..(to + len) as usize,
                );
                if op == GET {
                    here[a].copy_from_slice(&there[b]);
                } else {
                    there[b].copy_from_slice(&here[a]);
                }
                pieces += 1;
            }
        }
        let mut found = (vec![0; here.len()], vec![0; there.len()]);
        world.local.read(0, &mut found.0).expect("inside");
        world.remote.read(0, &mut found.1).expect("inside");
        assert!(found.0 == here, "{op}: this side");
        assert!(found.1 == there, "{op}: the other side");
        assert_eq!(world.bench.hca.consumed(), pieces, "a WQE for each piece");
        // Of all of them only the last of each post tells of its end.
        let taken = world.bench.around.state.load_u64(32).expect("inside");
        assert_eq!(taken, moves.len() as u64);
    }
}

#[test]
fn the_pieces_of_a_post_are_wqes_in_order_and_the_last_one_tells() {
    let world = World::new(DIRECT, 8, LONG);
    let block = world.by_places(place(0, 1, ALL_TENSORS, 5), 6);
    let results = run(&shipped, world.bench.queue, &[block], 1, PUT_IMM, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Ok);
    assert_eq!(ticket_number(results[0].ticket), 4);
    let spans = world.spans(place(0, 1, ALL_TENSORS, 5), 6);
    for (i, (from, to, len)) in spans.iter().enumerate() {
        let mut bytes = [0; 64];
        world
            .bench
            .sq
            .read(64 * i as u64, &mut bytes)
            .expect("inside");
        let wqe = SendWqe::decode(&bytes).expect("a WQE");
        assert_eq!(usize::from(wqe.index), i);
        assert_eq!(wqe.flags.signalled, i == 4);
        let imm = matches!(wqe.operation, Operation::WriteImm { imm: 77, .. });
        assert_eq!(imm, i == 4, "the notice comes with the last piece");
        let Some((remote, Gather::One(one))) = wqe.operation.sides() else {
            panic!("{wqe:?}");
        };
        assert_eq!((remote.addr, remote.rkey), (world.remote.addr() + to, RKEY));
        let local = (one.addr(), one.lkey(), u64::from(one.len()));
        assert_eq!(local, (world.local.addr() + from, LKEY, *len));
    }
}

#[test]
fn places_that_there_are_not_are_refused_and_nothing_is_posted() {
    let world = World::new(DIRECT, 16, SHORT);
    let good = world.by_places(place(0, 1, ALL_TENSORS, 3), 9);
    let of = |src: Place, dst: Place| Move {
        local: src.to_word(),
        remote: dst.to_word(),
        ..good
    };
    let same = |p: Place| of(p, p);
    let all = ALL_TENSORS;
    let cases = [
        // Groups and layers that there are not, in between and behind.
        (same(place(3, 1, all, 3)), Status::BadKey),
        (same(place(255, 1, all, 3)), Status::BadKey),
        (same(place(1, 0, all, 3)), Status::BadKey),
        (same(place(0, 0, all, 3)), Status::BadKey),
        (same(place(0, 2, all, 3)), Status::BadKey),
        (same(place(0, 4, all, 3)), Status::BadKey),
        (same(place(0, 0xffff, all, 3)), Status::BadKey),
        // Tensors.
        (same(place(0, 1, 2, 3)), Status::BadRange),
        (same(place(0, 1, 254, 3)), Status::BadRange),
        // Blocks, here and there.
        (
            of(place(0, 1, all, LOCAL_BLOCKS), place(0, 1, all, 0)),
            Status::BadRange,
        ),
        (
            of(place(0, 1, all, 0), place(0, 1, all, REMOTE_BLOCKS)),
            Status::BadRange,
        ),
        (
            of(place(0, 1, all, u32::MAX), place(0, 1, all, 0)),
            Status::BadRange,
        ),
        // Two sides that are not the same place.
        (
            of(place(0, 1, all, 3), place(0, 3, all, 3)),
            Status::BadRange,
        ),
        (
            of(place(0, 1, all, 3), place(2, 1, all, 3)),
            Status::BadRange,
        ),
        (of(place(0, 1, all, 3), place(0, 1, 0, 3)), Status::BadRange),
        // Other bytes than the block's.
        (
            Move {
                len: good.len - 1,
                ..good
            },
            Status::BadLength,
        ),
        (
            Move {
                len: good.len + 1,
                ..good
            },
            Status::BadLength,
        ),
        (Move { len: 0, ..good }, Status::BadLength),
        (
            Move {
                len: good.len | 1 << 40,
                ..good
            },
            Status::BadLength,
        ),
        // One side by an address, and flags that there are not.
        (
            Move {
                flags: LOCAL_PLACE,
                ..good
            },
            Status::BadOp,
        ),
        (
            Move {
                flags: REMOTE_PLACE,
                ..good
            },
            Status::BadOp,
        ),
        (Move { flags: 7, ..good }, Status::BadOp),
        (
            Move {
                flags: 1 << 31 | 3,
                ..good
            },
            Status::BadOp,
        ),
    ];
    for (bad, wanted) in cases {
        let results = run(&shipped, world.bench.queue, &[bad], 1, PUT, EACH);
        assert_eq!(ends(&results), [(wanted, wanted)], "{bad:x?}");
        assert_eq!(world.bench.around.next(), 0, "{bad:x?}");
    }
    // A queue that has no table.
    let queue = kvxfer_hipmem::kernels::queue::Queue {
        regions: 0,
        ..world.bench.queue
    };
    let results = run(&shipped, queue, &[good], 1, PUT, EACH);
    assert_eq!(ends(&results)[0].0, Status::BadOp);
    let mut world = world;
    assert_eq!(
        world.bench.hca.look(u64::MAX),
        Ok(0),
        "the device was told of nothing"
    );
    // And the queue is as good as ever.
    let (_, ends) = served(world, &shipped, &[good], (1, PUT, EACH));
    assert_eq!(ends, [(Status::Ok, Status::Ok)]);
}

/// What a post by places is told, by the table's rows alone.
fn told_of(layers: &[RegionLayer], of: &Move) -> Status {
    if of.flags != LOCAL_PLACE | REMOTE_PLACE {
        return Status::BadOp;
    }
    let (src, dst) = (Place::from_word(of.local), Place::from_word(of.remote));
    if (src.group, src.layer, src.tensor) != (dst.group, dst.layer, dst.tensor) {
        return Status::BadRange;
    }
    let mut rows = layers.iter();
    let row = rows.find(|row| (row.group, row.layer) == (src.group, src.layer));
    let Some(row) = row else {
        return Status::BadKey;
    };
    let pieces = match src.tensor {
        ALL_TENSORS => row.tensors.concat(),
        n => match row.tensors.get(usize::from(n)) {
            Some(pieces) => pieces.clone(),
            None => return Status::BadRange,
        },
    };
    if pieces.iter().map(|piece| piece.len).sum::<u64>() != of.len {
        return Status::BadLength;
    }
    match src.block < row.local_blocks && dst.block < row.remote_blocks {
        true => Status::Ok,
        false => Status::BadRange,
    }
}

#[test]
fn any_words_of_a_move_are_taken_or_refused_as_the_table_says() {
    let world = World::new(DIRECT, 16, LONG);
    let mut noise = Noise(0x1234_5678_9abc_def1);
    let mut any = |of: &[u64]| match noise.below(of.len() + 1) {
        n if n == of.len() => (noise.below(1 << 20) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        n => of[n],
    };
    let moves: Vec<_> = (0..60_000)
        .map(|_| {
            let src = place(
                any(&[0, 0, 0, 2, 1]) as u8,
                any(&[1, 3, 0, 2]) as u16,
                any(&[0xff, 0xff, 0, 1, 2]) as u8,
                any(&[0, 1, 23, 24]) as u32,
            );
            let mut dst = Place {
                block: any(&[0, 39, 40]) as u32,
                ..src
            };
            if any(&[0, 0, 0, 1]) == 1 {
                dst.layer = any(&[1, 3]) as u16;
            }
            let mut known = world.layers.iter();
            let known = known.find(|row| (row.group, row.layer) == (src.group, src.layer));
            let bytes = known.map_or(0, |row| match row.tensors.get(usize::from(src.tensor)) {
                Some(one) => one.iter().map(|piece| piece.len).sum(),
                None => row.tensors.iter().flatten().map(|piece| piece.len).sum(),
            });
            Move {
                local: src.to_word(),
                remote: dst.to_word(),
                len: any(&[bytes, bytes, bytes, bytes]),
                flags: any(&[3, 3, 3, 3, 3, 0x8000_0003, 1]) as u32,
                ..Move::default()
            }
        })
        .filter(|of| of.flags != 0)
        .collect();
    let wanted: Vec<_> = moves.iter().map(|of| told_of(&world.layers, of)).collect();
    let good: usize = moves
        .iter()
        .zip(&wanted)
        .filter(|(_, told)| **told == Status::Ok)
        .map(|(of, _)| world.pieces(Place::from_word(of.local)).len())
        .sum();
    for status in [
        Status::Ok,
        Status::BadOp,
        Status::BadKey,
        Status::BadRange,
        Status::BadLength,
    ] {
        let n = wanted.iter().filter(|told| **told == status).count();
        assert!(
            n > 500,
            "{status:?} comes {n} times: the cases are one-sided"
        );
    }
    let (world, ends) = served(world, &shipped, &moves, (1, PUT, EACH));
    for ((of, wanted), (posted, ended)) in moves.iter().zip(&wanted).zip(ends) {
        assert_eq!((posted, ended), (*wanted, *wanted), "{of:x?}");
    }
    assert_eq!(world.bench.hca.consumed(), good as u64, "and nothing else");
}

#[test]
fn a_block_of_more_pieces_than_the_queue_has_room_for() {
    // Five pieces: four slots never hold them, and eight do when they are free.
    let world = World::new(DIRECT, 4, SHORT);
    let block = world.by_places(place(0, 1, ALL_TENSORS, 3), 9);
    let results = run(&shipped, world.bench.queue, &[block], 1, PUT, EACH);
    assert_eq!(ends(&results)[0].0, Status::BadLength);
    let mut world = World::new(DIRECT, 8, SHORT);
    let queue = world.bench.queue;
    let results = run(&shipped, queue, &[block, block], 1, PUT, POSTED);
    let posted: Vec<_> = ends(&results).iter().map(|(posted, _)| *posted).collect();
    assert_eq!(posted, [Status::Ok, Status::Timeout]);
    assert_eq!(world.bench.around.next(), 5, "and has taken none");
    assert_eq!(world.bench.hca.look(u64::MAX), Ok(5));
    let block = world.by_places(place(0, 1, ALL_TENSORS, 3), 9);
    let results = run(&shipped, queue, &[block], 1, PUT, POSTED);
    assert_eq!(ends(&results)[0].0, Status::Ok);
    assert_eq!(ticket_number(results[0].ticket), 9);
}

#[test]
fn a_piece_that_fails_is_the_posts_status_and_flushes_what_follows() {
    let mut world = World::new(DIRECT, 16, LONG);
    // The second tensor's second piece has a key that the peer does not know.
    let mut layers = world.layers.clone();
    layers[1].tensors[1][1].remote.key = 9;
    let mut memory = Memory::new();
    let table = memory.take(8192);
    let bytes = region_table(&layers, table.addr()).expect("a table");
    table.write(0, &bytes).expect("room");
    world.bench.queue.regions = table.addr();
    let bad = world.by_places(place(0, 1, ALL_TENSORS, 3), 9);
    let good = world.by_places(place(2, 0, ALL_TENSORS, 1), 1);
    let over = AtomicBool::new(false);
    let (hca, around) = (&mut world.bench.hca, &world.bench.around);
    let queue = world.bench.queue;
    let results = thread::scope(|scope| {
        let device = scope.spawn(|| {
            let _end = around.end_with_me();
            // All seven have their numbers before anything fails.
            while around.next() != 7 {
                thread::yield_now();
            }
            serve(hca, &over);
        });
        let results = run(&shipped, queue, &[good, bad, good], 1, PUT, ALL);
        over.store(true, Ordering::Release);
        device.join().expect("no rule was broken");
        results
    });
    let wanted = [Status::Ok, Status::BadRange, Status::Flushed];
    assert_eq!(ends(&results), wanted.map(|ended| (Status::Ok, ended)));
    let done = world.bench.hca.sink().done.len();
    assert_eq!(done, 5, "what was before it has been carried out");
}
