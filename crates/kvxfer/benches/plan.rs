//! What a request of 1,250 blocks over 80 layers costs to plan and to work out.

#![expect(missing_docs, reason = "criterion_group makes a function without any")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::claims::{Claimant, Claims, Purpose};
use kvxfer::ids::RequestId;
use kvxfer::layout::{DType, KvFormat, KvPlacement, Packing, Side, Topology, models};
use kvxfer::plan::{Compiled, Cover, LayerScope, OpSource, Part, PlanLimits, Role};

const BLOCKS: u32 = 1250;
const LIMITS: PlanLimits = PlanLimits {
    max_msg_bytes: 1 << 30,
    max_sge: 4,
};

fn compiled(format: &KvFormat) -> Compiled {
    let topology = Topology::tensor_parallel(format, 0, 8);
    let placement = KvPlacement::uniform(format, topology, &[8192], Packing::PerTensor, 4096)
        .and_then(|uniform| uniform.describe(format))
        .expect("a valid placement");
    let side = Side {
        format,
        placement: &placement,
    };
    Compiled::compile(&side, &side, Role::Pull, Part::Common).expect("equal sides match")
}

/// Pairs of which no two touch, in an order that is no help to a sort.
fn scattered() -> Vec<GroupPairs> {
    let pairs = (0..BLOCKS).map(|i| BlockPair {
        src: i * 1237 % 4096 * 2,
        dst: i * 2741 % 4096 * 2,
    });
    vec![GroupPairs {
        group: 0,
        pairs: pairs.collect(),
    }]
}

fn consecutive() -> Vec<GroupPairs> {
    let pairs = (0..BLOCKS).map(|i| BlockPair {
        src: i,
        dst: i + 100,
    });
    vec![GroupPairs {
        group: 0,
        pairs: pairs.collect(),
    }]
}

/// Claiming the blocks of a request and letting go of them, among those of another.
fn claim(c: &mut Criterion) {
    let claims = Claims::new(vec![Some(0)]);
    let lists = |from: u32| {
        let blocks = scattered()[0].pairs.iter().map(|p| p.dst + from).collect();
        vec![GroupBlocks { group: 0, blocks }]
    };
    let (request, purpose) = (RequestId::from("r"), Purpose::Expect);
    let who = Claimant {
        request: &request,
        purpose,
    };
    let _other = claims.claim(who, lists(1)).expect("free");
    let mut group = c.benchmark_group("claim");
    group.throughput(Throughput::Elements(BLOCKS.into()));
    let wanted = lists(0);
    group.bench_function("scattered", |b| {
        b.iter(|| drop(black_box(claims.claim(who, wanted.clone()))));
    });
    group.finish();
}

fn plan(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    // K and V of 80 layers; and one latent of 61.
    for model in ["llama-3.1-70b", "deepseek-v3"] {
        let format = models::builtin(model, 16, DType::Bf16).expect("built in");
        let compiled = compiled(&format);
        for (name, pairs) in [("scattered", scattered()), ("consecutive", consecutive())] {
            let id = BenchmarkId::new(model, name);
            group.bench_with_input(id, &pairs, |b, pairs| {
                b.iter(|| compiled.plan(black_box(pairs), LayerScope::All, LIMITS));
            });
        }
    }
    group.finish();
}

fn emit(c: &mut Criterion) {
    let format = models::builtin("llama-3.1-70b", 16, DType::Bf16).expect("built in");
    let plan = compiled(&format)
        .plan(&scattered(), LayerScope::All, LIMITS)
        .expect("valid pairs");
    let mut group = c.benchmark_group("emit");
    group.throughput(Throughput::Elements(plan.ops()));
    for batch in [16, 256] {
        group.bench_function(BenchmarkId::new("batch", batch), |b| {
            b.iter(|| {
                let mut sum = 0_u64;
                let mut at = 0;
                while at < plan.ops() {
                    plan.emit(at..at + batch, &mut |op| {
                        sum = sum.wrapping_add(op.remote_offset ^ op.local[0].offset);
                    });
                    at += batch;
                }
                black_box(sum)
            });
        });
    }
    group.finish();
}

/// Whether 8 ranks of which each gives an eighth of the heads give all of 160 tensors: once a request.
fn cover(c: &mut Criterion) {
    let format = models::builtin("llama-3.1-70b", 16, DType::Bf16).expect("built in");
    let placed = |topology| {
        KvPlacement::uniform(&format, topology, &[64], Packing::PerTensor, 4096)
            .and_then(|uniform| uniform.describe(&format))
            .expect("a valid placement")
    };
    let whole = placed(Topology::single(&format));
    let consumer = Side {
        format: &format,
        placement: &whole,
    };
    let ranks: Vec<Compiled> = (0..8)
        .map(|rank| {
            let part = placed(Topology::tensor_parallel(&format, rank, 8));
            let producer = Side {
                format: &format,
                placement: &part,
            };
            Compiled::compile(&producer, &consumer, Role::Pull, Part::Share).expect("a share")
        })
        .collect();
    let covers: Vec<&Cover> = ranks.iter().map(Compiled::cover).collect();
    c.bench_function("cover", |b| {
        b.iter(|| Cover::missing(&consumer, black_box(&covers)));
    });
}

criterion_group!(benches, claim, plan, emit, cover);
criterion_main!(benches);
