//! Blocks by their places: kernels look them up in a table and write a WQE for each piece, to a model of an mlx5
//! device that copies the bytes. (`tests/post_host` has the host build alone, with real threads and planted faults.)

use std::collections::HashMap;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use kvxfer_hipmem::gpu::{GpuFault, PinnedMemory, Stream};
use kvxfer_hipmem::kernels::queue::{
    ALL, ALL_TENSORS, EACH, LOCAL_PLACE, Move, PUT, REMOTE_PLACE, ticket_number,
};
use kvxfer_hipmem::post::device::{
    Bell, DeviceQueue, PostBy, PostKernels, PosterReport, Posts, RegionTable, WqeMemory, WqeQueue,
    WqeQueueConfig, WqeSlots,
};
use kvxfer_hipmem::post::{Place, RegionLayer, RegionPiece, RegionSide, Status};
use kvxfer_hipmem::{Error, HostMemory};
use kvxfer_verbs::mlx5::model::{Carried, Hca, HcaSetup, KeyTable, Queues, Region, Sink};
use kvxfer_verbs::mlx5::{
    CqDepth, Gather, Operation, Qpn, QueueMemory, QueueNotReached, SqDepth, Syndrome,
};

use crate::nic::{Library, Made};
use crate::{Outcome, gpu, soon};

const LKEY: u32 = 7;
const RKEY: u32 = 8;
const BLOCKS: u32 = 32;
const STRIDE: u64 = 512;
/// Where the peer says that its memory is: nothing of this process is there.
const FAR: u64 = 0x7000_0000_0000;

/// Carries WQEs out by copying bytes.
#[derive(Debug)]
struct Mover {
    local: HostMemory,
    remote: HostMemory,
    wqes: usize,
}

impl Sink for Mover {
    fn execute(&mut self, _: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        let Some((remote, Gather::One(one))) = operation.sides() else {
            return Err(Syndrome::LOCAL_QP_OPERATION);
        };
        let mut bytes = vec![0; one.len() as usize];
        let from = one.addr() - self.local.addr();
        let read = self.local.read(from, &mut bytes);
        read.map_err(|_| Syndrome::LOCAL_PROTECTION)?;
        let written = self.remote.write(remote.addr - FAR, &bytes);
        written.map_err(|_| Syndrome::REMOTE_ACCESS)?;
        self.wqes += 1;
        Ok(Carried::Done(one.len()))
    }
}

/// Layers 0 and 5 of group 1: two tensors, one of two pieces.
fn layers(local: u64) -> Vec<RegionLayer> {
    let side = |addr, key| RegionSide {
        addr,
        stride: STRIDE,
        key,
    };
    let one = |layer: u16, base: u64| RegionLayer {
        group: 1,
        layer,
        local_blocks: BLOCKS,
        remote_blocks: BLOCKS,
        tensors: vec![
            vec![
                RegionPiece {
                    local: side(local + base, LKEY),
                    remote: side(FAR + base + 8, RKEY),
                    len: 40,
                },
                RegionPiece {
                    local: side(local + base + 64, LKEY),
                    remote: side(FAR + base + 128, RKEY),
                    len: 100,
                },
            ],
            vec![RegionPiece {
                local: side(local + base + 200, LKEY),
                remote: side(FAR + base + 300, RKEY),
                len: 17,
            }],
        ],
    };
    vec![one(0, 0), one(5, STRIDE * u64::from(BLOCKS))]
}

#[test]
fn kernels_post_blocks_by_their_places() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let bytes = 2 * STRIDE * u64::from(BLOCKS);
    let local = PinnedMemory::new(&gpu, bytes)?;
    local.host().fill_words(0, bytes, |i| i * 0x1234_5679)?;
    let remote = PinnedMemory::new(&gpu, bytes)?;
    let layers = layers(local.host().addr());
    let place = |layer, tensor, block| Place {
        group: 1,
        tensor,
        layer,
        block,
    };
    let by_places = |layer, tensor: u8, src, dst| Move {
        local: place(layer, tensor, src).to_word(),
        remote: place(layer, tensor, dst).to_word(),
        len: [140, 17, 157][usize::from(tensor).min(2)],
        flags: LOCAL_PLACE | REMOTE_PLACE,
        ..Move::default()
    };
    let mut moves = Vec::new();
    for (layer, block) in (0..BLOCKS).flat_map(|block| [(0, block), (5, block)]) {
        let src = (block * 7 + u32::from(layer)) % BLOCKS;
        match block % 3 {
            0 => moves.extend([0, 1].map(|tensor| by_places(layer, tensor, src, block))),
            _ => moves.push(by_places(layer, ALL_TENSORS, src, block)),
        }
    }
    moves.truncate(moves.len() / 5 * 5);
    let library = Library::new()?;
    let sides: HashMap<_, _> = layers.iter().map(|layer| (layer.layer, layer)).collect();
    let pinned = Some(WqeSlots::Pinned);
    let own = Some(WqeSlots::Gpu);
    for (by, bell, slots) in [
        (PostBy::Threads, Bell::Kernel, pinned),
        (PostBy::Waves, Bell::Cpu, pinned),
        (PostBy::Blocks, Bell::Kernel, pinned),
        (PostBy::Threads, Bell::Cpu, own),
        (PostBy::Waves, Bell::Kernel, own),
        (PostBy::Blocks, Bell::Kernel, own),
        // And queues that somebody else has made.
        (PostBy::Threads, Bell::Kernel, None),
        (PostBy::Waves, Bell::Kernel, None),
        (PostBy::Blocks, Bell::Kernel, None),
    ] {
        remote.host().fill(0, bytes, 0xe5)?;
        let config = WqeQueueConfig {
            bell,
            slots: slots.unwrap_or_default(),
            sq_depth: SqDepth::new(16)?,
            cq_depth: CqDepth::new(32)?,
            qpn: Qpn::new(0x00ab_cdef)?,
            patience: Duration::from_secs(20),
        };
        let table = RegionTable::new(&gpu, &layers)?;
        let (queue, queues) = match slots {
            Some(_) => WqeQueue::new(&gpu, &config, Some(table))?,
            None => {
                let Made { mut nic, device } = library.queue(0, (16, 32), 1)?;
                nic.qpn = config.qpn;
                let queue = WqeQueue::of_nic(&gpu, &nic, config.patience, Some(table))?;
                let host = WqeMemory::Host;
                let queues = Queues {
                    sq: host(device.sq),
                    sq_record: host(device.sq_record),
                    cq: host(device.cq),
                    cq_record: host(device.cq_record),
                    bell: host(device.bell),
                };
                (queue, queues)
            }
        };
        let region = |addr| Region {
            addr,
            len: bytes,
            writable: true,
        };
        let setup = HcaSetup {
            qpn: config.qpn,
            sq_depth: config.sq_depth,
            cq_depth: config.cq_depth,
            first: 0,
            keys: KeyTable {
                local: [(LKEY, region(local.host().addr()))].into(),
                remote: [(RKEY, region(FAR))].into(),
            },
        };
        let mover = Mover {
            local: local.host().clone(),
            remote: remote.host().clone(),
            wqes: 0,
        };
        let mut hca = Hca::new(queues, setup, mover)?;
        let queue = Arc::new(queue);
        let posts = Posts {
            moves: &moves,
            posters: 5,
            by,
            op: PUT,
            until: ALL,
        };
        let posting = kernels.post(&stream, &queue, &posts)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while !posting.is_done()? {
            assert!(Instant::now() < deadline, "the kernel does not end");
            queue.relay()?;
            hca.look(u64::MAX)?;
        }
        let results = posting.wait(soon())?;
        let ok = Status::Ok.number();
        assert!(
            results.iter().all(|r| (r.posted, r.ended) == (ok, ok)),
            "{by:?}: {results:?}"
        );
        let mut wanted = vec![0xe5; usize::try_from(bytes)?];
        let mut pieces = 0;
        for post in &moves {
            let (src, dst) = (Place::from_word(post.local), Place::from_word(post.remote));
            let layer = sides[&src.layer];
            let tensors = match src.tensor {
                ALL_TENSORS => layer.tensors.concat(),
                n => layer.tensors[usize::from(n)].clone(),
            };
            for piece in tensors {
                let from = piece.local.addr - local.host().addr() + STRIDE * u64::from(src.block);
                let to = piece.remote.addr - FAR + STRIDE * u64::from(dst.block);
                let to = usize::try_from(to)?;
                let place = &mut wanted[to..to + usize::try_from(piece.len)?];
                local.host().read(from, place)?;
                pieces += 1;
            }
        }
        let mut found = vec![0; wanted.len()];
        remote.host().read(0, &mut found)?;
        assert!(found == wanted, "{by:?}: bytes");
        assert_eq!(hca.sink().wqes, pieces);
        let last = results.iter().map(|r| ticket_number(r.ticket)).max();
        assert_eq!(last, Some(pieces as u64 - 1));
        let left = PosterReport {
            posted: pieces as u64,
            ended: pieces as u64,
            failed: None,
        };
        assert_eq!(queue.left(soon())?, left);

        // A place that there is not is refused at once, and the queue is as it was.
        let posts = Posts {
            moves: &[
                by_places(1, ALL_TENSORS, 0, 0),
                by_places(0, ALL_TENSORS, 0, BLOCKS),
            ],
            posters: 1,
            by,
            op: PUT,
            until: EACH,
        };
        let results = kernels.post(&stream, &queue, &posts)?.wait(soon())?;
        let posted: Vec<_> = results.iter().map(|r| r.posted).collect();
        let wanted = [Status::BadKey, Status::BadRange].map(Status::number);
        assert_eq!(posted, wanted, "{by:?}");
        assert_eq!(queue.left(soon())?, left);
    }
    Ok(())
}

/// Asks until it is there.
fn brought(
    mut ask: impl FnMut() -> Poll<Result<(), QueueNotReached>>,
) -> Result<(), QueueNotReached> {
    loop {
        match ask() {
            Poll::Ready(ended) => return ended,
            Poll::Pending => std::thread::yield_now(),
        }
    }
}

#[test]
fn slots_in_a_gpus_memory_are_there_for_a_nic() -> Outcome {
    let gpu = gpu();
    let queue = |slots| {
        let config = WqeQueueConfig {
            bell: Bell::Kernel,
            slots,
            sq_depth: SqDepth::new(64)?,
            cq_depth: CqDepth::new(64)?,
            qpn: Qpn::new(1)?,
            patience: Duration::from_secs(1),
        };
        let made: Result<_, Box<dyn std::error::Error>> =
            WqeQueue::new(&gpu, &config, None).map_err(Into::into);
        made
    };
    let (pinned, _) = queue(WqeSlots::Pinned)?;
    assert!(pinned.slots().is_none());
    let (own, queues) = queue(WqeSlots::Gpu)?;
    let slots = own.slots().ok_or("they are in the GPU's memory")?;
    assert_eq!((slots.len(), slots.addr()), (4096, own.handle().slots));
    match slots.dma_buf() {
        Ok(exported) => {
            assert!(gpu.info().dma_buf);
            // The file may be of more than the slots, and says where they are.
            assert!(exported.offset.is_multiple_of(64));
        }
        Err(Error::Gpu(fault)) => {
            assert!(!gpu.info().dma_buf, "{fault}");
            assert!(matches!(*fault, GpuFault::NoDmaBuf { .. }), "{fault}");
        }
        Err(other) => return Err(other.into()),
    }

    // What is in them is read by a copy, and what is stored is there behind one.
    let (word, other) = ([1, 2, 3, 4, 5, 6, 7, 8], [9; 8]);
    slots.write(64, &word)?;
    let span = 64..128_u64;
    assert_eq!(queues.sq.load(64)?, [0; 8], "it has not been copied");
    brought(|| queues.sq.fetch(std::slice::from_ref(&span)))?;
    assert_eq!(queues.sq.load(64)?, word);
    queues.sq.store(72, other)?;
    let mut found = [1; 8];
    slots.read(72, &mut found)?;
    assert_eq!(found, [0; 8]);
    brought(|| queues.sq.flush(std::slice::from_ref(&span)))?;
    slots.read(72, &mut found)?;
    assert_eq!(found, other);
    // Beyond them nothing is copied, nor read.
    let beyond = 4096..4160_u64;
    let refused = brought(|| queues.sq.fetch(std::slice::from_ref(&beyond)));
    assert!(refused.is_err());
    assert!(queues.sq.load(4096).is_err());
    Ok(())
}

/// A copy that has not ended is asked for again; one that takes too long is given up.
#[test]
fn copies_of_slots_are_not_waited_for() -> Outcome {
    let gpu = gpu();
    let kernels = PostKernels::load(&gpu)?;
    let stream = Stream::new(&gpu)?;
    let config = WqeQueueConfig {
        bell: Bell::Kernel,
        slots: WqeSlots::Gpu,
        sq_depth: SqDepth::new(64)?,
        cq_depth: CqDepth::new(64)?,
        qpn: Qpn::new(1)?,
        patience: Duration::from_secs(1),
    };
    let (long, none) = (Duration::from_secs(3600), Duration::ZERO);
    for late in [long, none] {
        let (queue, queues) = WqeQueue::new(&gpu, &config, None)?;
        let slots = queue.slots().ok_or("they are in the GPU's memory")?;
        slots.write(0, &[7; 8])?;
        // A kernel that waits for an end that never comes, until it is stopped.
        let (held, _consumer) = DeviceQueue::new(&gpu, 1, long)?;
        let held = Arc::new(held);
        let posts = Posts {
            moves: &[Move::default()],
            posters: 1,
            by: PostBy::Waves,
            op: PUT,
            until: ALL,
        };
        let posting = kernels.post(&stream, &held, &posts)?;
        queue.hold_slots(posting.event(), late)?;
        let span = 0..64_u64;
        let fetch = || queues.sq.fetch(std::slice::from_ref(&span));
        let first = fetch();
        if late == long {
            assert_eq!(first, Poll::Pending);
            assert!(queue.is_copying());
            assert_eq!(fetch(), Poll::Pending, "nothing new was begun");
            assert_eq!(queues.sq.load(0)?, [0; 8]);
        } else {
            let step = "a copy from the GPU";
            assert_eq!(brought(fetch), Err(QueueNotReached { step }));
            assert!(!queue.is_copying());
        }
        held.stop()?;
        posting.wait(soon())?;
        // Any copy takes longer than no time.
        queue.hold_slots(posting.event(), long)?;
        brought(fetch)?;
        assert_eq!(queues.sq.load(0)?, [7; 8]);
    }
    Ok(())
}

#[test]
fn tables_and_queues_that_do_not_fit_are_refused() -> Outcome {
    let gpu = gpu();
    let mut twice = layers(0x1000);
    twice[1].layer = 0;
    let refused = RegionTable::new(&gpu, &twice);
    assert!(matches!(refused, Err(Error::Regions(_))), "{refused:?}");
    let config = WqeQueueConfig {
        bell: Bell::Kernel,
        slots: WqeSlots::Pinned,
        sq_depth: SqDepth::new(16)?,
        cq_depth: CqDepth::new(8)?,
        qpn: Qpn::new(1)?,
        patience: Duration::from_secs(1),
    };
    let refused = WqeQueue::new(&gpu, &config, None);
    assert!(matches!(refused, Err(Error::Depth { depth: 8 })));
    Ok(())
}
