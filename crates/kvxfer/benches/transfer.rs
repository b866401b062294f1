//! What the transfer machines cost by themselves: operations a second through credits, slots and
//! batches on a device that completes at once, and the cost of a submission.
//!
//! The load is 80 layers × 1,250 blocks, 100,000 operations of one piece each.

// The functions that criterion's macros make have no place for a comment.
#![allow(missing_docs)]

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use criterion::{BatchSize as Setup, Criterion, Throughput, criterion_group, criterion_main};
use kvxfer::plan::source::{Op, OpSource, Piece};
use kvxfer::time::Time;
use kvxfer::transfer::{
    Batch, Direction, Job, JobId, Kind, LaneId, LaneLimits, Output, PeerKey, Scheduler,
    SchedulerConfig, Spec, TransferId, Transfers, TransfersConfig,
};

const LAYERS: u64 = 80;
const BLOCKS: u64 = 1250;
const BLOCK_BYTES: u32 = 16 << 10;
const PEER: PeerKey = PeerKey(1);

/// Blocks of a request, in the order of a random block table.
struct Request {
    blocks: Vec<(u32, u32)>,
}

impl Request {
    fn new() -> Arc<Self> {
        let block = |i: u64| ((i * 7919) % BLOCKS) as u32;
        Arc::new(Self {
            blocks: (0..BLOCKS).map(|i| (block(i), block(i + 5))).collect(),
        })
    }
}

impl OpSource for Request {
    fn ops(&self) -> u64 {
        LAYERS * BLOCKS
    }

    fn bytes(&self) -> u64 {
        self.ops() * u64::from(BLOCK_BYTES)
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        let layer_bytes = BLOCKS * u64::from(BLOCK_BYTES);
        let (mut layer, mut at) = (range.start / BLOCKS, (range.start % BLOCKS) as usize);
        for _ in range {
            let (src, dst) = self.blocks[at];
            let base = layer * layer_bytes;
            let piece = Piece {
                region: 0,
                len: BLOCK_BYTES,
                offset: base + u64::from(dst) * u64::from(BLOCK_BYTES),
            };
            sink(&Op {
                remote_region: 0,
                remote_offset: base + u64::from(src) * u64::from(BLOCK_BYTES),
                len: u64::from(BLOCK_BYTES),
                local: std::slice::from_ref(&piece),
            });
            at += 1;
            if at == self.blocks.len() {
                (layer, at) = (layer + 1, 0);
            }
        }
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        out.push((0, self.blocks[(op % BLOCKS) as usize].1));
    }
}

fn job(source: &Arc<Request>, n: u64) -> Arc<Job> {
    let source = Arc::clone(source) as Arc<dyn OpSource>;
    let (id, transfer) = (JobId(n), TransferId(n));
    Arc::new(Job::new(id, transfer, 0, PEER, Direction::Read, source, 1))
}

fn scheduler(lanes: u32) -> Scheduler {
    // No cap on bytes: the device completes at once, only the machine is measured.
    let mut scheduler = Scheduler::new(SchedulerConfig {
        peer_bytes: u64::MAX,
        ..SchedulerConfig::default()
    });
    for _ in 0..lanes {
        scheduler.add_lane(
            PEER,
            LaneLimits {
                send_wr: 1024,
                pair: 0,
                rebuilt: false,
            },
        );
    }
    scheduler
}

/// Posts a job to a device that completes at once: fills every lane, then completes every batch.
fn drive(
    scheduler: &mut Scheduler,
    batch: &mut Batch,
    job: Arc<Job>,
    posted: &mut Vec<(LaneId, u64)>,
) -> u64 {
    scheduler.start(job);
    let mut ops = 0;
    loop {
        while let Some(lane) = scheduler.next_lane() {
            if !scheduler.next_batch(lane, batch) {
                continue;
            }
            let mut last = 0;
            // What a worker does to build the device's chain: touch every field of every request.
            for wr in batch.iter() {
                black_box((wr.remote_offset, wr.remote_region, wr.len, wr.pieces));
                last = wr.wr_id;
                ops += 1;
            }
            posted.push((lane, last));
        }
        if posted.is_empty() {
            break;
        }
        for (lane, wr_id) in posted.drain(..) {
            scheduler.complete(lane, wr_id, Ok(()));
        }
    }
    while let Some(report) = scheduler.poll_report() {
        black_box(report);
    }
    ops
}

fn posting(c: &mut Criterion) {
    let source = Request::new();
    let mut group = c.benchmark_group("transfer");
    group.throughput(Throughput::Elements(source.ops()));
    for lanes in [1, 4] {
        let mut scheduler = scheduler(lanes);
        let (mut batch, mut posted, mut n) = (Batch::new(), Vec::new(), 0);
        group.bench_function(format!("post_and_complete/80x1250/{lanes}_lanes"), |b| {
            b.iter(|| {
                n += 1;
                let ops = drive(&mut scheduler, &mut batch, job(&source, n), &mut posted);
                assert_eq!(ops, source.ops());
            });
        });
    }
    group.finish();
}

fn submitting(c: &mut Criterion) {
    let source = Request::new();
    c.bench_function("transfer/submit/80x1250", |b| {
        let mut ledger = Transfers::new(TransfersConfig {
            max_live: usize::MAX,
            jobs_per_peer: usize::MAX,
            ..TransfersConfig::default()
        });
        let mut n = 0;
        b.iter_batched(
            || Arc::clone(&source) as Arc<dyn OpSource>,
            |source| {
                n += 1;
                let kind = Kind::Pull {
                    source,
                    check_lease: true,
                    release: true,
                };
                let spec = Spec {
                    id: TransferId(n),
                    peer: PEER,
                    kind,
                    verify: false,
                    deadline: Time::MAX,
                    workers: 4,
                };
                ledger
                    .submit(Time::ZERO, spec)
                    .expect("a new id under no limit");
                while let Some(output) = ledger.poll_output() {
                    assert!(matches!(output, Output::StartJob(_)));
                    black_box(output);
                }
            },
            Setup::SmallInput,
        );
    });
}

criterion_group!(benches, posting, submitting);
criterion_main!(benches);
