//! What the tests of refusals and faults share: one side with its memory, its events, and waiting
//! that always ends.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod child;
pub(crate) mod counts;
pub(crate) mod meaning;
pub(crate) mod proxy;

use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{Config, ConfigBuilder, KvRole, PathKind, PathSet};
use kvxfer::engine::Engine;
use kvxfer::event::{Event, MemoryState, PeerName, ReleaseReason};
use kvxfer::ids::{Nonce, RequestId};
use kvxfer::layout::{KvFormat, LayerWindow, Topology};
use kvxfer::mem::gpu::{GpuRuntime, RuntimeChoice};

/// Longer than anything takes on a busy machine; only a hang waits for so long.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// A word of poisoned memory.
pub(crate) const POISON: u64 = 0xa5a5_a5a5_a5a5_a5a5;
/// What recycled memory is filled with.
pub(crate) const RECYCLED: u64 = 0x5c5c_5c5c_5c5c_5c5c;

/// One side.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) side: BenchSide,
}

/// What a side is made of.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) config: Config,
    pub(crate) format: KvFormat,
    pub(crate) blocks: u32,
    pub(crate) memory: BenchMemory,
    /// Which data-parallel rank of how many.
    pub(crate) dp: (u32, u32),
    /// Which pipeline rank of how many.
    pub(crate) pp: (u32, u32),
}

/// The configuration takes this path and no other. The RDMA device is one that `KVXFER_TEST_RDMA` names: of
/// its first pair, `ra:rb`, the first is for producers; one alone is for both.
pub(crate) fn take(config: &mut Config, path: PathKind) {
    config.path = PathSet::only(path);
    if path != PathKind::Rdma {
        return;
    }
    let names = std::env::var("KVXFER_TEST_RDMA").expect("KVXFER_TEST_RDMA names an RDMA device");
    let pair = names.split(',').next().unwrap_or_default();
    let (first, second) = pair.split_once(':').unwrap_or((pair, pair));
    let name = match config.kv_role {
        KvRole::Consumer => second,
        _ => first,
    };
    let mut builder = ConfigBuilder::new();
    let given = builder.flag("rdma_devices", "KVXFER_TEST_RDMA", name);
    let given = given.and_then(|builder| builder.build());
    config.rdma_devices = given.expect("names of devices").rdma_devices;
}

/// The runtime that `KVXFER_TEST_GPU` names, or the stand-in, which engines take only where they are told to.
pub(crate) fn gpu_runtime() -> RuntimeChoice {
    let name = std::env::var("KVXFER_TEST_GPU").unwrap_or_else(|_| "host".to_owned());
    name.parse().expect("KVXFER_TEST_GPU names a runtime")
}

/// Memory of a GPU: of the runtime that `KVXFER_TEST_GPU` names, or of the stand-in. Consumers take the last
/// of the devices there are, and producers the first.
pub(crate) fn gpu_memory(role: KvRole) -> BenchMemory {
    let runtime = gpu_runtime();
    let found = GpuRuntime::open(runtime).unwrap_or_else(|e| panic!("KVXFER_TEST_GPU: {e}"));
    let ordinal = match role {
        KvRole::Consumer => u32::try_from(found.gpus().len() - 1).expect("few devices"),
        _ => 0,
    };
    BenchMemory::Gpu { runtime, ordinal }
}

/// A side over one path; its memory is of the kind that the path wants.
pub(crate) fn recipe(role: KvRole, path: PathKind, block_bytes: u64, blocks: u32) -> Recipe {
    let mut config = Config::default();
    config.kv_role = role;
    take(&mut config, path);
    if matches!(path, PathKind::Ipc | PathKind::Staged) {
        config.gpu = gpu_runtime();
    }
    config.num_worker_threads = 2;
    config.qp_per_transfer = 4;
    config.connect_timeout = Duration::from_secs(5);
    config.drain_grace = Duration::from_millis(300);
    Recipe {
        config,
        format: KvFormat::opaque(block_bytes, 2).expect("a format"),
        blocks,
        memory: match path {
            PathKind::ProcessVm => BenchMemory::Anonymous,
            PathKind::Ipc | PathKind::Staged => gpu_memory(role),
            _ => BenchMemory::Arena,
        },
        dp: (0, 1),
        pp: (0, 1),
    }
}

impl Recipe {
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    pub(crate) fn rank(mut self, dp: u32, ranks: u32) -> Self {
        self.dp = (dp, ranks);
        self
    }

    pub(crate) fn stage(mut self, pp: u32, stages: u32) -> Self {
        self.pp = (pp, stages);
        self
    }

    pub(crate) fn try_node(&self) -> Result<Node, kvxfer::Error> {
        let mut topology = Topology::single(&self.format);
        (topology.rank.dp, topology.dp) = self.dp;
        (topology.rank.pp, topology.pp) = self.pp;
        topology.layers = LayerWindow::even(self.format.layers(), self.pp.0, self.pp.1);
        let shape = BenchShape {
            format: self.format.clone(),
            num_blocks: vec![self.blocks; self.format.groups().len()],
            topology,
            memory: self.memory,
        };
        let side = BenchSide::new(&shape)?;
        let (format, placement) = (side.format().clone(), side.placement().clone());
        Ok(Node {
            engine: Engine::new(self.config.clone(), format, placement)?,
            side,
        })
    }

    pub(crate) fn node(&self) -> Node {
        self.try_node().expect("an engine")
    }
}

impl Node {
    /// Writes one word over all of some blocks.
    pub(crate) fn fill_blocks(&self, blocks: impl Iterator<Item = u32> + Clone, word: u64) {
        self.each_block(blocks, |memory, offset, len| {
            memory.fill_words(offset, len, |_| word)
        });
    }

    /// Checks that some blocks hold nothing but one word.
    #[track_caller]
    pub(crate) fn assert_blocks(&self, blocks: impl Iterator<Item = u32> + Clone, word: u64) {
        self.each_block(blocks, |memory, offset, len| {
            memory.verify_words(offset, len, |_| word)
        });
    }

    /// Checks that all blocks but these are as `BenchSide::poison` left them.
    #[track_caller]
    pub(crate) fn assert_untouched_but(&self, written: impl IntoIterator<Item = u32>) {
        let written: HashSet<u32> = written.into_iter().collect();
        let blocks = self.side.placement().desc().num_blocks(0).expect("group 0");
        let others: Vec<u32> = (0..blocks).filter(|b| !written.contains(b)).collect();
        self.assert_blocks(others.into_iter(), POISON);
    }

    #[track_caller]
    fn each_block(
        &self,
        blocks: impl Iterator<Item = u32> + Clone,
        act: impl Fn(&kvxfer::bench::BlockMemory, u64, u64) -> Result<(), kvxfer::mem::Error>,
    ) {
        for tensor in self.side.placement().desc().tensors() {
            let memory = &self.side.memory()[tensor.memory as usize];
            for block in blocks.clone() {
                let offset = tensor.offset + u64::from(block) * tensor.block_stride;
                if let Err(error) = act(memory, offset, tensor.block_stride) {
                    panic!("block {block} of layer {}: {error}", tensor.layer);
                }
            }
        }
    }

    /// The first word of a block's first tensor.
    pub(crate) fn first_word(&self, block: u32) -> u64 {
        let tensor = &self.side.placement().desc().tensors()[0];
        let offset = tensor.offset + u64::from(block) * tensor.block_stride;
        self.side.memory()[tensor.memory as usize]
            .load_u64(offset)
            .expect("inside the memory")
    }

    pub(crate) fn name(&self) -> PeerName {
        PeerName {
            engine: self.engine.id().clone(),
            rank: self.engine.rank(),
        }
    }
}

pub(crate) fn groups(blocks: impl IntoIterator<Item = u32>) -> Vec<GroupBlocks> {
    vec![GroupBlocks {
        group: 0,
        blocks: blocks.into_iter().collect(),
    }]
}

pub(crate) fn pairs(pairs: impl IntoIterator<Item = (u32, u32)>) -> Vec<GroupPairs> {
    let pairs = pairs
        .into_iter()
        .map(|(src, dst)| BlockPair { src, dst })
        .collect();
    vec![GroupPairs { group: 0, pairs }]
}

/// The pairs dealt out to so many pulls, each with destinations of its own.
pub(crate) fn dealt(table: &[GroupPairs], pulls: u32) -> Vec<Vec<GroupPairs>> {
    let part = |at: u32| {
        let of = |group: &GroupPairs| GroupPairs {
            group: group.group,
            pairs: (0..)
                .zip(&group.pairs)
                .filter(|(i, _): &(u32, _)| i % pulls == at)
                .map(|(_, pair)| *pair)
                .collect(),
        };
        table.iter().map(of).collect()
    };
    (0..pulls).map(part).collect()
}

/// Work requests of the software device take their time, and few are posted at once: what is begun at
/// once is under way for a while, however little it is.
pub(crate) fn take_time(config: &mut Config) {
    config.max_send_wr = 16;
    config.faults = Some("delay=1:10ms".parse().expect("a plan"));
}

/// Waits until something holds; panics with `what` when it never does.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < end, "{what}: never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs something on a thread of its own; panics if it does not come back.
#[track_caller]
pub(crate) fn bounded<R: Send + 'static>(
    what: &str,
    act: impl FnOnce() -> R + Send + 'static,
) -> R {
    let (done, wait) = channel();
    std::thread::spawn(move || {
        // Nobody waits any more if this took too long.
        let _ = done.send(act());
    });
    match wait.recv_timeout(LONG) {
        Ok(answer) => answer,
        Err(error) => panic!("{what}: {error}"),
    }
}

/// All events of an engine, kept.
#[derive(Debug)]
pub(crate) struct Log {
    engine: Engine,
    seen: Vec<Event>,
}

impl Log {
    pub(crate) fn new(engine: &Engine) -> Self {
        Self {
            engine: engine.clone(),
            seen: Vec::new(),
        }
    }

    /// Drops what has been seen.
    pub(crate) fn forget(&mut self) {
        self.seen.clear();
    }

    /// The first event, also among those that came before, that is wanted.
    #[track_caller]
    pub(crate) fn wait(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let end = Instant::now() + LONG;
        loop {
            if let Some(event) = self.seen.iter().find(|e| wanted(e)) {
                return event.clone();
            }
            assert!(
                Instant::now() < end,
                "no {what} came; these did: {:#?}",
                self.seen
            );
            self.engine
                .wait_events(&mut self.seen, Duration::from_millis(100));
        }
    }

    pub(crate) fn count(&mut self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.engine.poll_events(&mut self.seen);
        self.seen.iter().filter(|e| wanted(e)).count()
    }

    /// Has all events so far checked.
    pub(crate) fn assert_in_order(&mut self, check: impl Fn(&[Event])) {
        self.engine.poll_events(&mut self.seen);
        check(&self.seen);
    }

    /// Checks that every request and tag has ended at most once, that memory came back once and after
    /// its outcome, and all of it.
    #[track_caller]
    pub(crate) fn assert_told_once(&mut self) {
        // A handle says that its memory is back a moment before the event does.
        let soon = Instant::now() + Duration::from_secs(5);
        while self.held().values().any(|left| *left > 0) && Instant::now() < soon {
            self.engine
                .wait_events(&mut self.seen, Duration::from_millis(20));
        }
        let mut ended: HashMap<(RequestId, Nonce, u64), u32> = HashMap::new();
        for event in &self.seen {
            match event {
                Event::Received {
                    request,
                    nonce,
                    tag,
                }
                | Event::Sent {
                    request,
                    nonce,
                    tag,
                } => {
                    *ended.entry((request.clone(), *nonce, *tag)).or_default() += 1;
                }
                Event::Failed {
                    request,
                    nonce,
                    tag,
                    ..
                } => {
                    *ended.entry((request.clone(), *nonce, *tag)).or_default() += 1;
                }
                _ => {}
            }
        }
        for (of, times) in ended {
            assert_eq!(times, 1, "outcomes of {of:?}: {:#?}", self.seen);
        }
        for (of, left) in self.held() {
            assert_eq!(left, 0, "still quarantined: {of:?}: {:#?}", self.seen);
        }
    }

    /// How many outcomes of each request have said that memory is quarantined, and not been followed by
    /// its release.
    #[track_caller]
    fn held(&mut self) -> HashMap<(RequestId, Nonce), i64> {
        self.engine.poll_events(&mut self.seen);
        let mut held: HashMap<(RequestId, Nonce), i64> = HashMap::new();
        for event in &self.seen {
            match event {
                Event::Failed {
                    request,
                    nonce,
                    memory: MemoryState::Quarantined,
                    ..
                } => *held.entry((request.clone(), *nonce)).or_default() += 1,
                Event::Released {
                    request,
                    nonce,
                    reason: ReleaseReason::Drained,
                } => {
                    let left = held.entry((request.clone(), *nonce)).or_default();
                    *left -= 1;
                    assert!(*left >= 0, "released before its outcome: {:#?}", self.seen);
                }
                _ => {}
            }
        }
        held
    }
}
