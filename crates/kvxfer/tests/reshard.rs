//! Engines that are cut into ranks differently, or into blocks of other sizes: every consumer rank gets
//! exactly what it keeps, whoever has it, in one transfer with one outcome.

mod support;

use std::ops::Range;

use kvxfer::Error;
use kvxfer::bench::BenchMemory;
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, PullOptions, PushOptions};
use kvxfer::event::{Event, ReleaseReason};
use kvxfer::ids::RequestId;
use kvxfer::layout::reshard::{Parallel, sources, takers};
use kvxfer::layout::{
    Axis, AxisKind, CacheGroup, DType, GroupKind, KvFormat, LayerFormat, ModelIdentity,
    TensorFormat, TensorRole,
};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, Refusal};
use support::meaning::{Cluster, Cut, cut};
use support::{LONG, Log, groups, recipe};

const SEED: u64 = 11;
/// Tokens of a request: whole blocks of every size that is tried.
const TOKENS: u64 = 192;
/// Tokens that every rank has room for.
const ROOM: u32 = 384;

/// Blocks of a request in no order.
fn table(tokens: u32, stride: u32) -> Vec<GroupBlocks> {
    let blocks = ROOM / tokens;
    let count = u32::try_from(TOKENS).expect("small") / tokens;
    groups((0..count).map(|i| (i * stride + 3) % blocks))
}

struct Pair {
    producers: Cluster,
    consumers: Cluster,
    src: Vec<GroupBlocks>,
    dst: Vec<GroupBlocks>,
}

fn pair(producer: Cut, consumer: Cut) -> Pair {
    pair_over(PathKind::Arena.into(), producer, consumer)
}

/// A path, and who has its blocks in the host's memory all the same, where others have theirs on a GPU.
#[derive(Debug, Clone, Copy)]
struct Way {
    path: PathKind,
    on_host: Option<KvRole>,
}

impl From<PathKind> for Way {
    fn from(path: PathKind) -> Self {
        let on_host = None;
        Self { path, on_host }
    }
}

fn pair_over(way: Way, producer: Cut, consumer: Cut) -> Pair {
    let cluster = |name: &str, role, cut: Cut| {
        let blocks = ROOM / cut.tokens;
        Cluster::over(way.path, name, role, cut, blocks, |recipe| {
            recipe.config.staging_slot_bytes.0 = 64 << 10;
            if way.on_host == Some(role) {
                recipe.memory = BenchMemory::Arena;
            }
        })
    };
    let producers = cluster("prefill", KvRole::Producer, producer);
    let consumers = cluster("decode", KvRole::Consumer, consumer);
    let src = table(producer.tokens, 5);
    let dst = table(consumer.tokens, 7);
    producers.fill(SEED, &src);
    Pair {
        producers,
        consumers,
        src,
        dst,
    }
}

impl Pair {
    fn connect(&self, consumer: usize) -> Instance {
        let engine = &self.consumers.nodes[consumer].engine;
        engine
            .connect_ranks(&self.producers.addresses, LONG)
            .expect("sessions with all ranks")
    }

    /// Offers of the ranks that have something for somebody, for as many readers as that is.
    fn offers(&self, request: &str) -> Vec<Ticket> {
        let cut = self.consumers.cut;
        let to = Parallel {
            tp: cut.tp,
            pp: cut.pp,
            dp: 0,
        };
        let offer = |node: &support::Node| {
            let topology = node.side.placement().desc().topology();
            let to = (self.consumers.nodes[0].side.format(), to);
            let takers = takers((node.side.format(), topology), to).expect("even heads");
            let readers = u32::try_from(takers.len()).expect("few");
            let offer = || {
                let request = RequestId::from(request);
                node.engine.offer(&request, &self.src, readers, LONG)
            };
            (readers > 0).then(|| offer().expect("an offer"))
        };
        self.producers.nodes.iter().filter_map(offer).collect()
    }
}

/// Every consumer rank pulls from all producer ranks; then all offers are free.
fn pulls(producer: Cut, consumer: Cut, tokens: Option<Range<u64>>) {
    pulls_over(PathKind::Arena.into(), producer, consumer, tokens);
}

fn pulls_over(way: Way, producer: Cut, consumer: Cut, tokens: Option<Range<u64>>) {
    let pair = pair_over(way, producer, consumer);
    let tickets = pair.offers("r");
    let offered = |node: &&support::Node| tickets.iter().any(|t| t.rank == node.engine.rank());
    let offerers = pair.producers.nodes.iter().filter(offered);
    let mut logs: Vec<Log> = offerers.map(|node| Log::new(&node.engine)).collect();
    for at in 0..pair.consumers.nodes.len() {
        let mut log = Log::new(&pair.consumers.nodes[at].engine);
        let instance = pair.connect(at);
        let options = PullOptions {
            tag: 9,
            verify: Some(at % 2 == 0),
            ..PullOptions::default()
        };
        let pull = instance
            .pull_ranks(&tickets, &pair.dst, tokens.clone(), options)
            .expect("a pull");
        assert_eq!(pull.wait(LONG), Some(Outcome::Done));
        pair.consumers
            .verify(at, SEED, &pair.dst, tokens.clone().unwrap_or(0..TOKENS));
        assert!(pull.report().bytes > 0);
        let received = |e: &Event| matches!(e, Event::Received { tag: 9, .. });
        log.wait("the outcome", received);
        assert_eq!(log.count(received), 1);
        log.assert_told_once();
    }
    for log in &mut logs {
        log.wait("the release of the offer", |e| {
            matches!(
                e,
                Event::Released {
                    reason: ReleaseReason::AllRead,
                    ..
                }
            )
        });
    }
}

/// Every producer rank pushes to all consumer ranks, layer by layer.
fn pushes(producer: Cut, consumer: Cut, senders: u32) {
    pushes_over(PathKind::Arena.into(), producer, consumer, senders);
}

fn pushes_over(way: Way, producer: Cut, consumer: Cut, senders: u32) {
    let pair = pair_over(way, producer, consumer);
    let request = RequestId::from("w");
    let mut logs: Vec<Log> = pair
        .consumers
        .nodes
        .iter()
        .map(|n| Log::new(&n.engine))
        .collect();
    let parallel = Parallel {
        tp: producer.tp,
        pp: producer.pp,
        dp: 0,
    };
    for node in &pair.consumers.nodes {
        let topology = node.side.placement().desc().topology();
        let producer = (pair.producers.nodes[0].side.format(), parallel);
        let of = sources(producer, (node.side.format(), topology)).expect("even heads");
        assert_eq!(of.len(), senders as usize, "{of:?}");
        node.engine
            .expect(&request, &pair.dst, senders, LONG)
            .expect("expected");
    }
    for (at, node) in pair.producers.nodes.iter().enumerate() {
        let mut log = Log::new(&node.engine);
        let instance = node
            .engine
            .connect_ranks(&pair.consumers.addresses, LONG)
            .expect("sessions with all ranks");
        let options = PushOptions {
            verify: Some(at % 2 == 0),
            ..PushOptions::default()
        };
        let push = match instance.begin_push_ranks(&request, &[], &options) {
            Ok(push) => push,
            Err(Error::NothingToPush { .. }) => continue,
            Err(error) => panic!("{error}"),
        };
        let window = node.side.placement().desc().topology().layers;
        for layer in window.first..window.end {
            push.layer(layer, &pair.src, None, None).expect("planned");
        }
        let push = push.commit().expect("committed");
        assert_eq!(push.wait(LONG), Some(Outcome::Done));
        log.wait("the outcome", |e| matches!(e, Event::Sent { .. }));
        log.assert_told_once();
    }
    for (at, log) in logs.iter_mut().enumerate() {
        log.wait("the outcome", |e| matches!(e, Event::Received { .. }));
        log.assert_told_once();
        pair.consumers.verify(at, SEED, &pair.dst, 0..TOKENS);
    }
}

#[test]
fn more_consumer_ranks_than_producer_ranks() {
    pulls(cut(3, 1, 16), cut(6, 1, 16), None);
    pushes(cut(3, 1, 16), cut(6, 1, 16), 1);
}

/// The latent, which both have, comes from one of them.
#[test]
fn fewer_consumer_ranks_than_producer_ranks() {
    pulls(cut(6, 1, 16), cut(2, 1, 16), None);
    pushes(cut(6, 1, 16), cut(2, 1, 16), 3);
}

/// A rank that has one group whole can be read for that, whatever it lacks of another.
#[test]
fn a_group_that_one_rank_has_whole() {
    let group = |name: &str, layer| CacheGroup {
        name: name.into(),
        kind: GroupKind::Full,
        block_tokens: 16,
        layers: vec![LayerFormat {
            layer,
            draft: false,
            tensors: vec![TensorFormat {
                name: "latent".into(),
                role: TensorRole::Latent,
                dtype: DType::Bf16,
                axes: vec![
                    Axis::new(AxisKind::Token, 16),
                    Axis::new(AxisKind::Latent, 32),
                ],
                sharded: None,
                scaling: None,
            }],
        }],
    };
    let groups = vec![group("first", 0), group("second", 1)];
    let format = KvFormat::new(ModelIdentity::new("two groups", None), groups).expect("a format");
    let of = |role| {
        let mut recipe = recipe(role, PathKind::Arena, 64, 8);
        recipe.format = format.clone();
        recipe
    };
    let producer = of(KvRole::Producer).stage(0, 2).node();
    let consumer = of(KvRole::Consumer).node();
    let address = producer.engine.listen("127.0.0.1:0").expect("a free port");
    let instance = consumer.engine.connect(&address.to_string(), LONG);
    let instance = instance.expect("a session");
    let request = RequestId::from("r");
    let offered = [GroupBlocks {
        group: 0,
        blocks: vec![3, 5],
    }];
    let ticket = producer
        .engine
        .offer(&request, &offered, 2, LONG)
        .expect("room");
    let pair = |src, dst| BlockPair { src, dst };
    let wanted = |group| GroupPairs {
        group,
        pairs: vec![pair(3, 1), pair(5, 2)],
    };
    let options = || PullOptions {
        verify: Some(true),
        hold: true,
        ..PullOptions::default()
    };
    let pull = instance
        .pull(&ticket, &[wanted(0)], options())
        .expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    for both in [vec![wanted(1)], vec![wanted(0), wanted(1)]] {
        let refused = instance
            .pull(&ticket, &both, options())
            .expect_err("half of it");
        let Error::MissingPart { part, .. } = refused else {
            panic!("{refused}");
        };
        assert_eq!((part.group, part.layers), (1, vec![1]));
    }
}

/// Where the parts of two ranks are put elsewhere than they say, the whole fails.
#[test]
fn a_part_that_went_astray() {
    let (one, two) = (cut(2, 1, 16), cut(1, 1, 16));
    let producers = Cluster::new("prefill", KvRole::Producer, one, ROOM / 16);
    let consumers = Cluster::with("decode", KvRole::Consumer, two, ROOM / 16, |config| {
        config.faults = Some("seed=5,stray=0.3".parse().expect("a plan"));
    });
    // Below the first block there is nothing to stray to.
    let (src, dst) = (groups((0..12).map(|i| 2 * i + 1)), table(16, 7));
    producers.fill(SEED, &src);
    let pair = Pair {
        producers,
        consumers,
        src,
        dst,
    };
    let tickets = pair.offers("r");
    let mut log = Log::new(&pair.consumers.nodes[0].engine);
    let options = PullOptions {
        verify: Some(true),
        ..PullOptions::default()
    };
    let instance = pair.connect(0);
    let pull = instance.pull_ranks(&tickets, &pair.dst, None, options);
    let outcome = pull.expect("a pull").wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert!(
        matches!(failure.first_cause, Cause::Corrupt(_)),
        "{}",
        failure.first_cause
    );
    assert!(!failure.invalid_blocks.is_empty());
    log.wait("the outcome", |e| matches!(e, Event::Failed { .. }));
    log.assert_told_once();
}

#[test]
fn heads_that_several_ranks_keep() {
    pulls(cut(12, 1, 16), cut(3, 1, 16), None);
    pulls(cut(3, 1, 16), cut(12, 1, 16), None);
}

#[test]
fn pipelines_of_other_lengths() {
    pulls(cut(1, 2, 16), cut(1, 1, 16), None);
    pulls(cut(1, 1, 16), cut(1, 2, 16), None);
    pushes(cut(2, 2, 16), cut(1, 1, 16), 4);
}

#[test]
fn blocks_of_other_sizes() {
    pulls(cut(1, 1, 16), cut(1, 1, 64), None);
    pulls(cut(1, 1, 64), cut(1, 1, 16), None);
    pulls(cut(1, 1, 48), cut(1, 1, 32), None);
    pushes(cut(1, 1, 16), cut(1, 1, 64), 1);
    pushes(cut(1, 1, 64), cut(1, 1, 16), 1);
}

/// Pieces of blocks, through buffers that hold a few of them.
#[test]
fn what_is_staged_is_cut_differently_too() {
    let staged = Way::from(PathKind::Staged);
    pulls_over(staged, cut(3, 1, 16), cut(6, 1, 16), None);
    pulls_over(staged, cut(1, 1, 48), cut(1, 1, 32), None);
    pushes_over(staged, cut(6, 1, 16), cut(2, 1, 16), 3);
    pushes_over(staged, cut(1, 1, 64), cut(1, 1, 16), 1);
}

/// Pieces of blocks by launches, from GPUs to the host's memory and back.
#[test]
fn ranks_on_gpus_and_on_the_host_are_cut_differently_too() {
    for host in [KvRole::Producer, KvRole::Consumer] {
        let way = Way {
            path: PathKind::Ipc,
            on_host: Some(host),
        };
        pulls_over(way, cut(3, 1, 16), cut(6, 1, 16), None);
        pulls_over(way, cut(1, 1, 48), cut(1, 1, 32), None);
        pushes_over(way, cut(6, 1, 16), cut(2, 1, 16), 3);
        pushes_over(way, cut(1, 1, 64), cut(1, 1, 16), 1);
    }
}

#[test]
fn everything_at_once() {
    let other = Cut {
        head_first: true,
        ..cut(3, 2, 64)
    };
    pulls(cut(2, 1, 16), other, None);
    pulls(other, cut(2, 1, 16), None);
}

/// A prefix that is here already, and an end inside a block.
#[test]
fn some_tokens_of_a_request() {
    pulls(cut(2, 1, 16), cut(1, 1, 16), Some(32..96));
    pulls(cut(1, 1, 16), cut(1, 1, 64), Some(48..128));
    pulls(cut(1, 1, 64), cut(1, 1, 16), Some(16..112));
}

/// One rank's blocks are not whole without the others: it is said before anything moves.
#[test]
fn a_part_is_not_taken_for_the_whole() {
    let pair = pair(cut(2, 1, 16), cut(1, 1, 16));
    let tickets = pair.offers("r");
    let instance = pair.connect(0);
    let alone = support::pairs([(pair.src[0].blocks[0], 0)]);
    let error = instance
        .pull(&tickets[1], &alone, PullOptions::default())
        .expect_err("half of the heads");
    assert!(matches!(error, Error::MissingPart { .. }), "{error}");
    assert!(error.to_string().contains("head"), "{error}");
    let pull = |tickets: &[Ticket]| {
        let options = PullOptions::default();
        let pull = instance.pull_ranks(tickets, &pair.dst, None, options);
        pull.expect_err("not all").to_string()
    };
    let error = pull(&tickets[..1]);
    assert!(error.contains("dp0.pp0.tp0 do not keep"), "{error}");
    let twice = [tickets[0].clone(), tickets[0].clone()];
    assert!(pull(&twice).contains("two tickets"), "{}", pull(&twice));
    let other = pair.producers.nodes[1]
        .engine
        .offer(&RequestId::from("other"), &pair.src, 1, LONG)
        .expect("an offer");
    let mixed = [tickets[0].clone(), other];
    assert!(
        pull(&mixed).contains("of request other"),
        "{}",
        pull(&mixed)
    );
    pair.consumers.verify(0, SEED, &pair.dst, 0..0);
}

/// Two senders that have the same do not make up for one that never came.
#[test]
fn as_many_senders_as_expected_but_not_the_right_ones() {
    let pair = pair(cut(12, 1, 16), cut(1, 1, 16));
    let request = RequestId::from("w");
    let consumer = &pair.consumers.nodes[0];
    let mut log = Log::new(&consumer.engine);
    // One of each pair of ranks with the same head would do.
    let expected = consumer.engine.expect(&request, &pair.dst, 2, LONG);
    expected.expect("expected");
    for node in [&pair.producers.nodes[0], &pair.producers.nodes[2]] {
        let instance = node
            .engine
            .connect_ranks(&pair.consumers.addresses, LONG)
            .expect("a session");
        let push = instance
            .begin_push_ranks(&request, &[], &PushOptions::default())
            .expect("a push");
        push.all_layers(&pair.src, None, None).expect("planned");
        let push = push.commit().expect("committed");
        assert!(push.wait(LONG).is_some());
    }
    let failed = log.wait("the outcome", |e| {
        matches!(e, Event::Received { .. } | Event::Failed { .. })
    });
    let Event::Failed {
        first_cause: Cause::MissingPart { part },
        invalid_blocks,
        ..
    } = failed
    else {
        panic!("{failed:?}");
    };
    assert_eq!(invalid_blocks, pair.dst);
    assert!(part.to_string().contains("head"), "{part}");
    log.assert_told_once();
}

/// One rank's offer runs out under the pull: the whole pull fails, once, and may be tried again.
#[test]
fn one_part_fails() {
    let pair = pair(cut(2, 1, 16), cut(1, 1, 16));
    let tickets = pair.offers("r");
    let instance = pair.connect(0);
    let mut log = Log::new(&pair.consumers.nodes[0].engine);
    assert!(
        pair.producers.nodes[1]
            .engine
            .retract(&RequestId::from("r"))
    );
    let pull = instance
        .pull_ranks(&tickets, &pair.dst, None, PullOptions::default())
        .expect("a pull");
    let outcome = pull.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("a failure");
    assert!(
        matches!(failure.first_cause, Cause::LeaseExpired | Cause::Retracted),
        "{failure:?}"
    );
    assert!(pull.wait_released(LONG));
    log.wait("the failure", |e| matches!(e, Event::Failed { .. }));
    log.assert_told_once();
    // The rank that was well still holds its blocks.
    let again = pair.producers.nodes[1]
        .engine
        .offer(&RequestId::from("r"), &pair.src, 1, LONG)
        .expect("an offer");
    let tickets = [tickets[0].clone(), again];
    let pull = instance
        .pull_ranks(&tickets, &pair.dst, None, PullOptions::default())
        .expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    pair.consumers.verify(0, SEED, &pair.dst, 0..TOKENS);
}

#[test]
fn a_pull_of_several_ranks_is_cancelled_as_one() {
    let pair = pair(cut(3, 1, 16), cut(1, 1, 16));
    let slow = Cluster::with(
        "slow",
        KvRole::Consumer,
        cut(1, 1, 16),
        ROOM / 16,
        |config| {
            config.faults = Some("delay=1:1s".parse().expect("a plan"));
        },
    );
    let tickets = pair.offers("r");
    let engine = &slow.nodes[0].engine;
    let instance = engine
        .connect_ranks(&pair.producers.addresses, LONG)
        .expect("sessions with all ranks");
    let mut log = Log::new(engine);
    let pull = instance
        .pull_ranks(&tickets, &pair.dst, None, PullOptions::default())
        .expect("a pull");
    // What one pull writes no other may have, until nothing of it can land.
    let again = instance.pull_ranks(&tickets, &pair.dst, None, PullOptions::default());
    assert!(matches!(again, Err(Error::InUse(_))), "{again:?}");
    pull.cancel();
    let outcome = pull.wait(LONG).expect("an outcome");
    let failure = outcome.failure().expect("it takes a second otherwise");
    assert_eq!(failure.first_cause, Cause::Cancelled);
    assert!(pull.wait_released(LONG));
    log.assert_told_once();
    // What was posted may have been ended with its sessions, which come back.
    let mut again = None;
    support::until("the offers stand, and the blocks are free", || {
        let options = PullOptions {
            tag: 1,
            ..PullOptions::default()
        };
        again = instance.pull_ranks(&tickets, &pair.dst, None, options).ok();
        again.is_some()
    });
    let again = again.expect("a pull");
    again.cancel();
    assert!(again.wait(LONG).is_some_and(|outcome| !outcome.is_done()));
    assert!(again.wait_released(LONG));
    log.assert_told_once();
}

/// Prefill in chunks. What has been written is not written again, for nothing would order the two.
#[test]
fn a_push_in_chunks() {
    let pair = pair(cut(1, 1, 16), cut(2, 1, 64));
    let request = RequestId::from("w");
    let expect = |node: &support::Node| node.engine.expect(&request, &pair.dst, 1, LONG);
    for node in &pair.consumers.nodes {
        expect(node).expect("expected");
    }
    let instance = pair.producers.nodes[0]
        .engine
        .connect_ranks(&pair.consumers.addresses, LONG)
        .expect("sessions");
    let push = instance
        .begin_push_ranks(&request, &[], &PushOptions::default())
        .expect("a push");
    for tokens in [0..48, 48..112] {
        for layer in 0..4 {
            push.layer(layer, &pair.src, Some(tokens.clone()), None)
                .expect("new tokens");
        }
    }
    let error = push
        .layer(2, &pair.src, Some(96..128), None)
        .expect_err("written before");
    assert!(
        matches!(error, Error::WrittenTwice { layer: Some(2), .. }),
        "{error}"
    );
    let error = push
        .all_layers(&pair.src, None, None)
        .expect_err("written before");
    assert!(
        matches!(error, Error::WrittenTwice { layer: None, .. }),
        "{error}"
    );
    push.all_layers(&pair.src, Some(112..192), None)
        .expect("the rest");
    let push = push.commit().expect("committed");
    assert_eq!(push.wait(LONG), Some(Outcome::Done));
    for (at, node) in pair.consumers.nodes.iter().enumerate() {
        let mut log = Log::new(&node.engine);
        log.wait("the outcome", |e| matches!(e, Event::Received { .. }));
        pair.consumers.verify(at, SEED, &pair.dst, 0..TOKENS);
    }
}

/// A rank that has nothing for this one may be away.
#[test]
fn a_rank_that_is_not_needed_is_not_missed() {
    let mut pair = pair(cut(2, 1, 16), cut(6, 1, 16));
    let tickets = pair.offers("r");
    let instance = pair.connect(0);
    drop(pair.producers.nodes.pop());
    support::until("the loss", || !instance.is_up());
    let pull =
        |tickets: &[Ticket]| instance.pull_ranks(tickets, &pair.dst, None, PullOptions::default());
    let needed = pull(&tickets[1..]).expect_err("it is away");
    assert!(matches!(needed, Error::NotConnected { .. }), "{needed}");
    let pull = pull(&tickets).expect("a pull");
    assert_eq!(pull.wait(LONG), Some(Outcome::Done));
    pair.consumers.verify(0, SEED, &pair.dst, 0..TOKENS);
}

/// A push to several ranks of which one does not want it.
#[test]
fn one_consumer_rank_gives_up() {
    let pair = pair(cut(1, 1, 16), cut(3, 1, 16));
    let request = RequestId::from("w");
    let mut logs: Vec<Log> = pair
        .consumers
        .nodes
        .iter()
        .map(|n| Log::new(&n.engine))
        .collect();
    let expect = |node: &support::Node| node.engine.expect(&request, &pair.dst, 1, LONG);
    let nodes = pair.consumers.nodes.iter();
    let tickets: Vec<Ticket> = nodes.map(|node| expect(node).expect("expected")).collect();
    let producer = &pair.producers.nodes[0];
    let mut log = Log::new(&producer.engine);
    let instance = producer
        .engine
        .connect_ranks(&pair.consumers.addresses, LONG)
        .expect("sessions");
    let push = instance
        .begin_push_ranks(&request, &tickets, &PushOptions::default())
        .expect("a push");
    push.layer(0, &pair.src, None, None).expect("planned");
    assert!(pair.consumers.nodes[1].engine.cancel_expect(&request));
    log.wait("the failure", |e| matches!(e, Event::Failed { .. }));
    let push = push.commit().expect("committed");
    let outcome = push.wait(LONG).expect("an outcome");
    let cause = outcome.failure().map(|f| &f.first_cause);
    // It may have been cancelled before the push had asked.
    let late = Cause::Refused {
        reason: Refusal::Late,
    };
    assert!(
        cause == Some(&Cause::Revoked) || cause == Some(&late),
        "{cause:?}"
    );
    assert!(push.wait_released(LONG));
    for log in &mut logs {
        log.wait("the failure", |e| matches!(e, Event::Failed { .. }));
        log.assert_told_once();
    }
    log.assert_told_once();
}
