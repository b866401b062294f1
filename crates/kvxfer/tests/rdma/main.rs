//! Engines over RDMA devices, in a virtual machine with two hosts (tests/vm): blocks of every size, a
//! cable that is cut, loses and delays, peers that start again, and settings that name what is not there.
//! Producers stand on `ra`, consumers on `rb`. One test at a time: they share the cable.

#[path = "../support/mod.rs"]
mod support;

mod bytes;
mod cable;
mod lives;
mod rails;
mod settings;
mod vram;

use std::process::Command;
use std::time::Duration;

use kvxfer::blocks::GroupPairs;
use kvxfer::config::{Config, KvRole, PathKind};
use kvxfer::engine::{Instance, Outcome, Peer, PullOptions, PushOptions, Transfer, TransferReport};
use kvxfer::event::Event;
use kvxfer::ids::RequestId;
use support::{LONG, Log, Node, POISON, Recipe, groups, pairs, recipe, until};

const SEED: u64 = 11;

/// A producer on one host and a consumer on the other, which has connected.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) producer: Node,
    pub(crate) consumer: Node,
    pub(crate) instance: Instance,
    /// What the two are told.
    pub(crate) told: [Log; 2],
    blocks: u32,
    requests: u32,
}

impl Pair {
    pub(crate) fn new(block: u64, blocks: u32, change: impl Fn(&mut Config)) -> Self {
        Self::of(block, blocks, |recipe| change(&mut recipe.config))
    }

    pub(crate) fn of(block: u64, blocks: u32, change: impl Fn(&mut Recipe)) -> Self {
        let node = |role| {
            let mut recipe = recipe(role, PathKind::Rdma, block, blocks);
            change(&mut recipe);
            recipe.node()
        };
        let (producer, consumer) = (node(KvRole::Producer), node(KvRole::Consumer));
        producer.side.fill(SEED).expect("filled");
        consumer.side.poison().expect("poisoned");
        let address = producer.engine.listen("127.0.0.1:0").expect("a port");
        let instance = consumer.engine.connect(&address.to_string(), LONG);
        let instance = instance.expect("a session");
        let told = [&producer, &consumer].map(|node| Log::new(&node.engine));
        Self {
            producer,
            consumer,
            instance,
            told,
            blocks,
            requests: 0,
        }
    }

    fn request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId::from(format!("r{}", self.requests).as_str())
    }

    /// All blocks, so that none merges with its neighbour.
    pub(crate) fn all(&self) -> Vec<GroupPairs> {
        pairs((0..self.blocks).map(|b| (b, self.blocks - 1 - b)))
    }

    pub(crate) fn pull(
        &mut self,
        table: &[GroupPairs],
        deadline: Duration,
    ) -> Result<Transfer, kvxfer::Error> {
        let (request, all) = (self.request(), groups(0..self.blocks));
        let offer = self.producer.engine.offer(&request, &all, 1, LONG);
        let options = PullOptions {
            deadline: Some(deadline),
            ..PullOptions::default()
        };
        self.instance
            .pull(&offer.expect("an offer"), table, options)
    }

    /// The producer's way to the consumer.
    fn way(&self) -> Peer {
        let name = self.consumer.name();
        let mut way = None;
        until("the consumer's session", || {
            way = self.producer.engine.peer_of(&name);
            way.is_some()
        });
        way.expect("just found")
    }

    fn push(
        &mut self,
        table: &[GroupPairs],
        deadline: Duration,
    ) -> Result<(RequestId, Transfer), kvxfer::Error> {
        self.push_times(1, table, deadline)
    }

    /// The same blocks over and over in one push.
    pub(crate) fn push_times(
        &mut self,
        times: u32,
        table: &[GroupPairs],
        deadline: Duration,
    ) -> Result<(RequestId, Transfer), kvxfer::Error> {
        let (request, way) = (self.request(), self.way());
        let blocks = table.iter().flat_map(|group| &group.pairs);
        let blocks = groups(blocks.map(|pair| pair.dst));
        let options = PushOptions {
            deadline: Some(deadline),
            ..PushOptions::default()
        };
        let push = way.begin_push_with(&request, options)?;
        // The producer's deadline is the first, and names what has kept its work from moving.
        self.consumer
            .engine
            .expect(&request, &blocks, 1, deadline + LONG)
            .expect("nothing of an earlier push is left");
        for _ in 0..times {
            push.all_layers(table, None)?;
        }
        Ok((request, push.commit()?))
    }

    /// Pulls blocks and pushes them; every byte is looked at, and so are those that are none of theirs.
    pub(crate) fn moves(&mut self, table: &[GroupPairs]) -> [TransferReport; 2] {
        let pulled = self.pull(table, LONG).expect("a transfer");
        assert_eq!(pulled.wait(LONG), Some(Outcome::Done));
        self.arrived(table);
        let (request, pushed) = self.push(table, LONG).expect("a transfer");
        assert_eq!(pushed.wait(LONG), Some(Outcome::Done));
        self.told[1].wait(
            "receipt",
            |event| matches!(event, Event::Received { request: r, .. } if *r == request),
        );
        self.told[0].wait(
            "delivery",
            |event| matches!(event, Event::Sent { request: r, .. } if *r == request),
        );
        self.arrived(table);
        self.told_once();
        [pulled.report(), pushed.report()]
    }

    /// The blocks of a table are there and nothing else is; then all is as before.
    pub(crate) fn arrived(&self, table: &[GroupPairs]) {
        let bytes = self.consumer.side.verify(SEED, table).expect("every byte");
        assert!(bytes > 0);
        let written = table.iter().flat_map(|group| &group.pairs);
        self.consumer
            .assert_untouched_but(written.map(|pair| pair.dst));
        self.consumer.side.poison().expect("poisoned");
    }

    pub(crate) fn bytes_have_come(&self) {
        until("the first bytes", || {
            (0..self.blocks).any(|block| self.consumer.first_word(block) != POISON)
        });
    }

    pub(crate) fn told_once(&mut self) {
        self.told.iter_mut().for_each(Log::assert_told_once);
    }
}

/// Runs a program of the virtual machine.
#[track_caller]
pub(crate) fn sh(script: &str) {
    let output = Command::new("sh").args(["-c", script]).output();
    let output = output.expect("a shell");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
}
