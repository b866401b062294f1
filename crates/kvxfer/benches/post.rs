//! What posting costs above the device, and what submitting costs the engine's thread.
//!
//! `post/…` drives the scheduler, the translation into work requests and `post`/`poll` of a device
//! that completes at once: credits, slots and all, 80 layers × 1250 scattered blocks.
//! `submit/…` is one call of [`kvxfer::Peer::pull`] of the same size on a real session.

#![expect(missing_docs, reason = "criterion_group makes a function without any")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

use kvxfer::bench::{BenchMemory, BenchShape, BenchSide, scattered_pairs};
use kvxfer::blocks::{GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole};
use kvxfer::engine::{Engine, Instance, PullOptions};
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, KvPlacement, Packing, Side, Topology};
use kvxfer::plan::{Compiled, LayerScope, OpSource, Part, PlanLimits, Role};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{
    Batch, Direction, Job, JobId, LaneId, LaneLimits, PeerKey, Scheduler, SchedulerConfig,
    TransferId,
};
use kvxfer_verbs::{
    Access, InitAttr, Link, QpCaps, QueuePair, RegionTable, Remote, RtrAttr, Rts, RtsAttr,
    SendChain, SendOp, Sge, WcStatus, open_null,
};

const LAYERS: u32 = 80;
const BLOCKS: u32 = 1250;
const LANES: usize = 4;

fn pairs() -> Vec<GroupPairs> {
    vec![GroupPairs {
        group: 0,
        pairs: scattered_pairs(1, BLOCKS),
    }]
}

/// The loop of a worker, without its thread.
struct Rig {
    scheduler: Scheduler,
    lanes: Vec<(LaneId, QueuePair<Rts>)>,
    cq: kvxfer_verbs::CompletionQueue,
    table: Arc<RegionTable>,
    source: Arc<dyn OpSource>,
    batch: Batch,
    chain: SendChain,
    next_job: u64,
}

fn rig() -> Rig {
    let format = KvFormat::opaque(64, LAYERS).expect("a format");
    let shape = KvPlacement::uniform(
        &format,
        Topology::single(&format),
        &[BLOCKS],
        Packing::OneMemory,
        64,
    )
    .expect("a placement");
    let memory = kvxfer::mem::HostArena::new(shape.memory_bytes()[0]).expect("memory");
    let desc = shape.describe(&format).expect("a description");
    let side = Side {
        format: &format,
        placement: &desc,
    };
    let compiled =
        Compiled::compile(&side, &side, Role::Pull, Part::Common).expect("equal layouts");
    let limits = PlanLimits {
        max_msg_bytes: 1 << 30,
        max_sge: 1,
    };
    let plan = compiled
        .plan(&pairs(), LayerScope::All, limits)
        .expect("a plan");
    assert_eq!(
        plan.ops(),
        u64::from(LAYERS) * u64::from(BLOCKS),
        "nothing merges"
    );

    let context = open_null();
    let pd = context.alloc_pd().expect("a protection domain");
    let cq = context.create_cq(1 << 14).expect("a completion queue");
    let region = pd
        .register(memory.as_memory(), Access::LOCAL_WRITE)
        .expect("a region");
    let caps = QpCaps {
        max_send_wr: 1024,
        ..QpCaps::default()
    };
    let mut scheduler = Scheduler::new(SchedulerConfig::default());
    let lanes = (0..LANES)
        .map(|_| {
            let qp = pd.create_qp(caps, &cq, &cq).expect("a queue pair");
            let qp = qp.init(InitAttr::new(Access::NONE)).expect("INIT");
            let remote = qp.endpoint();
            let link = Link::SoftAwait {
                path: kvxfer_verbs::SoftPath::Arena,
            };
            let qp = qp
                .rtr(RtrAttr {
                    remote,
                    link,
                    min_rnr_timer: 12,
                })
                .expect("RTR");
            let qp = qp.rts(RtsAttr::default()).expect("RTS");
            (
                scheduler.add_lane(
                    PeerKey(1),
                    LaneLimits {
                        send_wr: 1024,
                        pair: 0,
                        rebuilt: false,
                    },
                ),
                qp,
            )
        })
        .collect();
    Rig {
        scheduler,
        lanes,
        cq,
        table: Arc::new(RegionTable::new(vec![region])),
        source: Arc::new(plan),
        batch: Batch::new(),
        chain: SendChain::new(),
        next_job: 0,
    }
}

impl Rig {
    fn transfer(&mut self) -> u64 {
        self.next_job += 1;
        let job = Job::new(
            JobId(self.next_job),
            TransferId(self.next_job),
            0,
            PeerKey(1),
            Direction::Read,
            Arc::clone(&self.source),
            1,
        );
        self.scheduler.start(Arc::new(job));
        let mut done = 0;
        let mut completions = Vec::with_capacity(64);
        while done < self.source.ops() {
            while let Some(lane) = self.scheduler.next_lane() {
                if !self.scheduler.next_batch(lane, &mut self.batch) {
                    continue;
                }
                self.chain.clear();
                for wr in self.batch.iter() {
                    let remote = Remote {
                        addr: 4096 + wr.remote_offset,
                        rkey: 1,
                    };
                    if let [p] = wr.pieces {
                        let sge = Sge {
                            region: p.region,
                            len: p.len,
                            offset: p.offset,
                        };
                        self.chain
                            .push(wr.wr_id, SendOp::Read(remote), wr.signaled, &[sge]);
                    }
                }
                let (_, qp) = self
                    .lanes
                    .iter()
                    .find(|(l, _)| *l == lane)
                    .expect("a known lane");
                qp.post_send(&self.chain, &self.table).expect("posted");
            }
            completions.clear();
            self.cq.poll(&mut completions, 64).expect("polled");
            for completion in &completions {
                assert_eq!(completion.status, WcStatus::Success);
                let of = |(_, qp): &&(LaneId, QueuePair<Rts>)| qp.qp_num() == completion.qp_num;
                let (lane, _) = self.lanes.iter().find(of).expect("a known queue pair");
                self.scheduler.complete(*lane, completion.wr_id, Ok(()));
            }
            while let Some(report) = self.scheduler.poll_report() {
                done += report.ops_done;
            }
        }
        done
    }
}

fn post(c: &mut Criterion) {
    let mut rig = rig();
    let mut group = c.benchmark_group("post");
    group.throughput(Throughput::Elements(u64::from(LAYERS) * u64::from(BLOCKS)));
    group.bench_function("80 layers x 1250 blocks", |b| {
        b.iter(|| black_box(rig.transfer()))
    });
    group.finish();
}

struct Pair {
    // Dropped first: the session closes before its engines go.
    instance: Instance,
    ticket: Ticket,
    _consumer: Engine,
    _producer: Engine,
}

fn session() -> Pair {
    let engine = |role| {
        let format = KvFormat::opaque(64, LAYERS).expect("a format");
        let topology = Topology::single(&format);
        let memory = BenchMemory::Arena;
        let shape = BenchShape {
            format,
            num_blocks: vec![BLOCKS],
            topology,
            memory,
        };
        let side = BenchSide::new(&shape).expect("memory");
        let mut config = Config::default();
        config.kv_role = role;
        Engine::new(config, side.format().clone(), side.placement().clone()).expect("an engine")
    };
    let (producer, consumer) = (engine(KvRole::Producer), engine(KvRole::Consumer));
    let address = producer.listen("127.0.0.1:0").expect("a port").to_string();
    let instance = consumer
        .connect(&address, Duration::from_secs(10))
        .expect("a session");
    let blocks = vec![GroupBlocks {
        group: 0,
        blocks: (0..BLOCKS).collect(),
    }];
    let request = RequestId::from("bench");
    let ticket = producer
        .offer(&request, &blocks, 1, Duration::from_secs(480))
        .expect("an offer");
    Pair {
        instance,
        ticket,
        _consumer: consumer,
        _producer: producer,
    }
}

fn submit(c: &mut Criterion) {
    let pair = session();
    let pairs = pairs();
    let mut group = c.benchmark_group("submit");
    group.bench_function("pull of 80 layers x 1250 blocks", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            for _ in 0..n {
                let options = PullOptions {
                    hold: true,
                    ..PullOptions::default()
                };
                let begun = Instant::now();
                let transfer = pair.instance.pull(&pair.ticket, &pairs, options);
                spent += begun.elapsed();
                let outcome = transfer.expect("taken").wait(Duration::from_secs(30));
                assert!(outcome.is_some_and(|outcome| outcome.is_done()));
            }
            spent
        });
    });
    group.bench_function("plan of 80 layers x 1250 blocks, for comparison", |b| {
        let format = KvFormat::opaque(64, LAYERS).expect("a format");
        let uniform = KvPlacement::uniform(
            &format,
            Topology::single(&format),
            &[BLOCKS],
            Packing::OneMemory,
            64,
        );
        let desc = uniform
            .and_then(|u| u.describe(&format))
            .expect("a placement");
        let side = Side {
            format: &format,
            placement: &desc,
        };
        let compiled =
            Compiled::compile(&side, &side, Role::Pull, Part::Common).expect("equal layouts");
        let limits = PlanLimits {
            max_msg_bytes: 1 << 30,
            max_sge: 4,
        };
        b.iter_batched(
            || (),
            |()| black_box(compiled.plan(&pairs, LayerScope::All, limits)),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, post, submit);
criterion_main!(benches);
