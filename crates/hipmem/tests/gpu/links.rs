//! Puts over GPU links: the kernel that posts copies the block itself, by threads, waves and workgroups, into memory of
//! the same GPU, of another one, or of the host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{GpuMemory, PinnedMemory, Place as At, Stream};
use kvxfer_hipmem::kernels::queue::{
    ALL, ALL_TENSORS, EACH, GET, IDLE, LOCAL_PLACE, LinkRefused, Move, PUT, REMOTE_PLACE,
};
use kvxfer_hipmem::post::device::{
    LinkExpected, LinkLayer, LinkPiece, LinkPut, LinkPuts, LinkQueue, LinkSide, PostBy,
    PostKernels, Posts,
};
use kvxfer_hipmem::post::{Place, RegionFault, Status};
use kvxfer_hipmem::{Error, Operation};

use crate::{Outcome, gpu, pattern, runtime, soon};

/// Where pieces lie in a block here and there, and their bytes: misaligned alike and otherwise, shorter than a vector
/// and than a warp's share, and longer than what is copied between two looks at the abort word.
const PIECES: [(u64, u64, u64); 12] = [
    (0, 0, 16384),
    (16384, 16400, 4096),
    (20481, 20497, 777),
    (22000, 22004, 3000),
    (26001, 26008, 2999),
    (30003, 30000, 5001),
    (36000, 36008, 8),
    (36010, 36021, 1),
    (36012, 36027, 63),
    (36080, 36096, 64),
    (36145, 36162, 65),
    (36224, 36240, 70_001),
];
const STRIDES: (u64, u64) = (106_240, 106_272);
const BLOCKS: (u32, u32) = (7, 9);
/// Where block 0 begins.
const BASES: (u64, u64) = (32, 5);
const ELSE: u8 = 0xe5;

fn place(layer: u16, tensor: u8, block: u32) -> Place {
    Place {
        group: 0,
        tensor,
        layer,
        block,
    }
}

fn put(layer: u16, tensor: u8, (src, dst): (u32, u32)) -> Move {
    let of = match tensor {
        0 => &PIECES[..5],
        1 => &PIECES[5..],
        _ => &PIECES[..],
    };
    Move {
        local: place(layer, tensor, src).to_word(),
        remote: place(layer, tensor, dst).to_word(),
        len: of.iter().map(|(.., len)| len).sum(),
        flags: LOCAL_PLACE | REMOTE_PLACE,
        ..Move::default()
    }
}

/// A layer whose two tensors have these pieces.
fn layer<'a>(local: At<'a>, remote: At<'a>) -> LinkLayer<'a> {
    let by = |place: At<'a>, by: u64| match place {
        At::Gpu(memory, at) => At::Gpu(memory, at + by),
        At::Pinned(memory, at) => At::Pinned(memory, at + by),
        At::PeerHost(memory, at) => At::PeerHost(memory, at + by),
    };
    let piece = |(src, dst, len): &(u64, u64, u64)| LinkPiece {
        local: LinkSide {
            place: by(local, *src),
            stride: STRIDES.0,
        },
        remote: LinkSide {
            place: by(remote, *dst),
            stride: STRIDES.1,
        },
        len: *len,
    };
    let (one, two) = PIECES.split_at(5);
    LinkLayer {
        group: 0,
        layer: 3,
        local_blocks: BLOCKS.0,
        remote_blocks: BLOCKS.1,
        tensors: vec![
            one.iter().map(piece).collect(),
            two.iter().map(piece).collect(),
        ],
    }
}

/// What the destination holds after these puts.
fn wanted(source: &[u8], len: u64, moves: &[Move]) -> Vec<u8> {
    let mut bytes = vec![ELSE; len as usize];
    for one in moves {
        let (src, dst) = (Place::from_word(one.local), Place::from_word(one.remote));
        let of = match src.tensor {
            0 => &PIECES[..5],
            1 => &PIECES[5..],
            _ => &PIECES[..],
        };
        for (from, to, len) in of {
            let from = (BASES.0 + STRIDES.0 * u64::from(src.block) + from) as usize;
            let to = (BASES.1 + STRIDES.1 * u64::from(dst.block) + to) as usize;
            let len = *len as usize;
            bytes[to..to + len].copy_from_slice(&source[from..from + len]);
        }
    }
    bytes
}

const SIZES: (u64, u64) = (
    BASES.0 + STRIDES.0 * BLOCKS.0 as u64,
    BASES.1 + STRIDES.1 * BLOCKS.1 as u64,
);

#[test]
fn kernels_copy_blocks_into_the_peers_memory() -> Outcome {
    let gpu = gpu();
    let gpus = runtime();
    let far = gpus.gpu(1).unwrap_or(&gpu);
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let source = pattern(SIZES.0 as usize, 7);
    let local = GpuMemory::new(&gpu, SIZES.0)?;
    local.write(0, &source)?;
    let there = GpuMemory::new(far, SIZES.1)?;
    let host = PinnedMemory::new(&gpu, SIZES.1)?;
    let moves: Vec<_> = [
        put(3, ALL_TENSORS, (6, 0)),
        put(3, 0, (0, 8)),
        put(3, 1, (1, 8)),
        put(3, ALL_TENSORS, (2, 1)),
        put(3, 1, (6, 3)),
        put(3, ALL_TENSORS, (6, 5)),
    ]
    .into();
    for into_gpu in [true, false] {
        let remote = match into_gpu {
            true => At::Gpu(&there, BASES.1),
            false => At::Pinned(&host, BASES.1),
        };
        let layers = [layer(At::Gpu(&local, BASES.0), remote)];
        let queue = Arc::new(LinkQueue::new(&gpu, &layers)?);
        let fill = || match into_gpu {
            true => there.fill(0, SIZES.1, ELSE),
            false => host.host().fill(0, SIZES.1, ELSE),
        };
        let check = |what: &str| -> Outcome {
            let mut found = vec![0; SIZES.1 as usize];
            match into_gpu {
                true => there.read(0, &mut found)?,
                false => host.host().read(0, &mut found)?,
            }
            let wanted = wanted(&source, SIZES.1, &moves);
            let first = found.iter().zip(&wanted).position(|(a, b)| a != b);
            assert_eq!(first, None, "{what}: the first byte that is wrong");
            Ok(())
        };
        for (by, posters, until) in [
            (PostBy::Threads, 3, ALL),
            (PostBy::Waves, 6, EACH),
            (PostBy::Blocks, 2, IDLE),
        ] {
            fill()?;
            let posts = Posts {
                moves: &moves,
                posters,
                by,
                op: PUT,
                until,
            };
            let results = kernels.post(&stream, &queue, &posts)?.wait(soon())?;
            let good = results.iter().all(|r| (r.posted, r.ended) == (0, 0));
            assert!(good, "{by:?}: {results:?}");
            check(&format!("{by:?}, into a GPU: {into_gpu}"))?;
        }
        for workgroups in [1, 4, 100] {
            fill()?;
            let push = kernels.prepare_push(&stream, &moves)?;
            let results = kernels
                .push(&stream, &queue, &push, workgroups)?
                .wait(soon())?;
            assert_eq!(results.len(), moves.len());
            assert!(results.iter().all(|r| (r.posted, r.ended) == (0, 0)));
            check(&format!("{workgroups} workgroups, into a GPU: {into_gpu}"))?;
        }
    }
    Ok(())
}

#[test]
fn what_is_no_put_of_a_block_copies_nothing() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let local = GpuMemory::new(&gpu, SIZES.0)?;
    let remote = PinnedMemory::new(&gpu, SIZES.1)?;
    remote.host().fill(0, SIZES.1, ELSE)?;
    let layers = [layer(
        At::Gpu(&local, BASES.0),
        At::Pinned(&remote, BASES.1),
    )];
    let queue = Arc::new(LinkQueue::new(&gpu, &layers)?);
    let good = put(3, ALL_TENSORS, (0, 0));
    let by_address = Move {
        local: local.addr(),
        remote: remote.device_addr(),
        flags: 0,
        ..good
    };
    let cases = [
        (PUT, by_address, Status::BadOp),
        (
            PUT,
            Move {
                flags: LOCAL_PLACE,
                ..good
            },
            Status::BadOp,
        ),
        (GET, good, Status::BadOp),
        (PUT, put(2, ALL_TENSORS, (0, 0)), Status::BadKey),
        (PUT, put(3, 7, (0, 0)), Status::BadRange),
        (PUT, put(3, ALL_TENSORS, (BLOCKS.0, 0)), Status::BadRange),
        (PUT, put(3, ALL_TENSORS, (0, BLOCKS.1)), Status::BadRange),
        (
            PUT,
            Move {
                len: good.len + 1,
                ..good
            },
            Status::BadLength,
        ),
    ];
    for by in [PostBy::Threads, PostBy::Waves, PostBy::Blocks] {
        for (op, bad, wanted) in cases {
            let posts = Posts {
                moves: &[bad],
                posters: 1,
                by,
                op,
                until: ALL,
            };
            let results = kernels.post(&stream, &queue, &posts)?.wait(soon())?;
            assert_eq!(results[0].posted, wanted.number(), "{by:?} {op} {bad:x?}");
        }
    }
    // A queue that is stopped copies nothing either.
    queue.stop()?;
    let begun = Instant::now();
    for by in [PostBy::Threads, PostBy::Waves, PostBy::Blocks] {
        let posts = Posts {
            moves: &[good],
            posters: 1,
            by,
            op: PUT,
            until: ALL,
        };
        let post = || -> Result<u32, Box<dyn std::error::Error>> {
            let results = kernels.post(&stream, &queue, &posts)?.wait(soon())?;
            Ok(results[0].posted)
        };
        loop {
            let posted = post()?;
            // The word is set by a copy on a stream of its own. What came before it was put, and what was under way in
            // part.
            remote.host().fill(0, SIZES.1, ELSE)?;
            if posted == Status::Stopped.number() {
                break;
            }
            assert_eq!(posted, Status::Ok.number());
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "it is never stopped"
            );
        }
        assert_eq!(post()?, Status::Stopped.number());
    }
    let mut found = vec![0; SIZES.1 as usize];
    remote.host().read(0, &mut found)?;
    assert!(found.iter().all(|byte| *byte == ELSE));
    Ok(())
}

/// A queue of a push: what is not expected is not written, and what was put is known afterwards.
#[test]
fn what_the_peer_does_not_expect_is_not_put_and_what_was_put_is_known() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let source = pattern(SIZES.0 as usize, 9);
    let local = GpuMemory::new(&gpu, SIZES.0)?;
    local.write(0, &source)?;
    let remote = GpuMemory::new(&gpu, SIZES.1)?;
    let other = LinkLayer {
        layer: 5,
        ..layer(At::Gpu(&local, BASES.0), At::Gpu(&remote, BASES.1))
    };
    let layers = [
        layer(At::Gpu(&local, BASES.0), At::Gpu(&remote, BASES.1)),
        other,
    ];
    let expected = |blocks| [LinkExpected { group: 0, blocks }];
    let refused = LinkQueue::among(&gpu, &layers, &expected(&[BLOCKS.1]));
    assert!(matches!(refused, Err(Error::OutOfBounds { .. })));
    for by in [PostBy::Threads, PostBy::Waves, PostBy::Blocks] {
        remote.fill(0, SIZES.1, ELSE)?;
        let queue = Arc::new(LinkQueue::among(&gpu, &layers, &expected(&[8, 0, 5]))?);
        assert_eq!(queue.puts(soon())?, LinkPuts::default());
        let cases = [
            (put(3, ALL_TENSORS, (6, 0)), Status::Ok),
            (put(3, ALL_TENSORS, (6, 1)), Status::BadRights),
            (put(3, 0, (1, 8)), Status::BadRange),
            (put(3, ALL_TENSORS, (0, BLOCKS.1)), Status::BadRange),
            (put(5, ALL_TENSORS, (0, 4)), Status::BadRights),
            // Twice: as it was put last.
            (put(3, ALL_TENSORS, (0, 8)), Status::Ok),
            (put(3, ALL_TENSORS, (2, 8)), Status::Ok),
            (put(5, ALL_TENSORS, (3, 5)), Status::Ok),
        ];
        let moves: Vec<_> = cases.iter().map(|(of, _)| *of).collect();
        let posts = Posts {
            moves: &moves,
            posters: 1,
            by,
            op: PUT,
            until: EACH,
        };
        let results = kernels.post(&stream, &queue, &posts)?.wait(soon())?;
        let statuses: Vec<_> = results.iter().map(|r| r.posted).collect();
        let all: Vec<_> = cases.iter().map(|(_, status)| status.number()).collect();
        assert_eq!(statuses, all, "{by:?}");
        let good = cases.iter().filter(|(_, status)| *status == Status::Ok);
        let good: Vec<_> = good.map(|(of, _)| *of).collect();
        let mut found = vec![0; SIZES.1 as usize];
        remote.read(0, &mut found)?;
        let same = found == wanted(&source, SIZES.1, &good);
        assert!(same, "{by:?}: other bytes were written");
        let of = |layer, src, dst| LinkPut {
            group: 0,
            layer,
            src,
            dst,
        };
        let mut puts = queue.puts(soon())?;
        puts.puts.sort_unstable();
        assert_eq!(puts.begun, 0);
        assert_eq!(puts.puts, [of(3, 2, 8), of(3, 6, 0), of(5, 3, 5)]);
        let first = put(3, ALL_TENSORS, (6, 1));
        let first = LinkRefused {
            status: Status::BadRights.number().into(),
            local: first.local,
            remote: first.remote,
            len: first.len,
            flags: first.flags.into(),
            op: PUT.into(),
        };
        assert_eq!(puts.refused, Some(first), "{by:?}");
    }
    Ok(())
}

#[test]
fn blocks_that_are_not_inside_their_memory_are_refused() -> Outcome {
    let gpu = gpu();
    let local = GpuMemory::new(&gpu, SIZES.0)?;
    let remote = GpuMemory::new(&gpu, SIZES.1)?;
    let of = |blocks: (u32, u32)| LinkLayer {
        local_blocks: blocks.0,
        remote_blocks: blocks.1,
        ..layer(At::Gpu(&local, BASES.0), At::Gpu(&remote, BASES.1))
    };
    LinkQueue::new(&gpu, &[of(BLOCKS)])?;
    let refused = LinkQueue::new(&gpu, &[of((BLOCKS.0 + 1, BLOCKS.1))]);
    let wanted = Operation::CopySource;
    assert!(matches!(refused, Err(Error::OutOfBounds { operation, .. }) if operation == wanted));
    let refused = LinkQueue::new(&gpu, &[of((BLOCKS.0, BLOCKS.1 + 1))]);
    let wanted = Operation::CopyDestination;
    assert!(matches!(refused, Err(Error::OutOfBounds { operation, .. }) if operation == wanted));
    let refused = LinkQueue::new(&gpu, &[of((BLOCKS.0, u32::MAX))]);
    assert!(matches!(refused, Err(Error::OutOfBounds { .. })));
    let mut wide = of(BLOCKS);
    wide.tensors[0][0].remote.stride = u64::MAX / 2;
    let refused = LinkQueue::new(&gpu, &[wide]);
    assert!(matches!(refused, Err(Error::OutOfBounds { .. })));
    let refused = LinkQueue::new(&gpu, &[of(BLOCKS), of(BLOCKS)]);
    let twice = RegionFault::Twice { group: 0, layer: 3 };
    assert!(matches!(refused, Err(Error::Regions(fault)) if fault == twice));
    Ok(())
}

/// Far more than is copied before the word is there.
#[test]
fn puts_that_are_stopped_in_the_middle_end_and_nothing_is_written_after() -> Outcome {
    const MIB: u64 = 1 << 20;
    const PUTS: usize = 4096;
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let (local, remote) = (GpuMemory::new(&gpu, MIB)?, GpuMemory::new(&gpu, MIB)?);
    let side = |memory| LinkSide {
        place: At::Gpu(memory, 0),
        stride: 0,
    };
    let layer = LinkLayer {
        group: 0,
        layer: 0,
        local_blocks: 1,
        remote_blocks: 1,
        tensors: vec![vec![LinkPiece {
            local: side(&local),
            remote: side(&remote),
            len: MIB,
        }]],
    };
    let expected = LinkExpected {
        group: 0,
        blocks: &[0],
    };
    let queue = Arc::new(LinkQueue::among(&gpu, &[layer], &[expected])?);
    let one = Move {
        len: MIB,
        ..put(0, ALL_TENSORS, (0, 0))
    };
    let push = kernels.prepare_push(&stream, &vec![one; PUTS])?;
    let posting = kernels.push(&stream, &queue, &push, 1)?;
    queue.stop()?;
    let results = posting.wait(soon())?;
    let (ok, stopped) = (Status::Ok.number(), Status::Stopped.number());
    let done = results.iter().take_while(|r| r.posted == ok).count();
    assert!(done < PUTS, "the word came too late to be seen");
    assert!(
        results[done..]
            .iter()
            .all(|r| r.posted == stopped && r.ended == stopped)
    );
    // Its block is in part what it was before, and not counted as put, however often it was.
    let puts = queue.puts(soon())?;
    assert_eq!((puts.puts.len(), puts.begun), (0, 1));
    // The kernel has ended: what is written now stays.
    remote.fill(0, MIB, ELSE)?;
    let mut found = vec![0; MIB as usize];
    remote.read(0, &mut found)?;
    assert!(found.iter().all(|byte| *byte == ELSE));
    Ok(())
}
