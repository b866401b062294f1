//! A peer in a process of its own: this test binary once more, told what to be by an environment
//! variable and what to do by lines on its standard input. It ends with its parent.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::process::{Child as Process, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvxfer::bench::BenchMemory;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{GpuQueue, Peer, PullOptions, Push, PushOptions};
use kvxfer::event::{Event, MemoryState, PeerName};
use kvxfer::gpu_queue::{GpuQueueConfig, Kernels, QueueKind};
use kvxfer::ids::{EngineId, Rank, RequestId};
use kvxfer::mem::gpu::Stream;
use kvxfer::mem::kernels::queue::{
    ALL, ALL_TENSORS, LOCAL_PLACE, Move, PUT, PostResult, REMOTE_PLACE,
};
use kvxfer::mem::post::device::{PostBy, PostKernels, Posts};
use kvxfer::mem::post::{Place, Status};
use kvxfer::ticket::Ticket;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{LONG, Log, Node, POISON, dealt, groups, pairs, recipe, until};

const VARIABLE: &str = "KVXFER_TEST_CHILD";
/// The test that is a child's main function.
const ENTRY: &str = "child_entry";
/// Marks the child's own lines among those of the test harness.
const MARK: &str = "kvx ";

/// A peer process; killed, and waited for, when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    process: Process,
    orders: ChildStdin,
    lines: Receiver<String>,
    pub(crate) address: String,
}

/// What a child is to be.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) role: KvRole,
    pub(crate) path: PathKind,
    pub(crate) block_bytes: u64,
    pub(crate) blocks: u32,
    pub(crate) listen: String,
    pub(crate) engine_id: Option<String>,
    pub(crate) seed: u64,
    /// The network namespace that it runs in, if it is another.
    pub(crate) namespace: Option<String>,
}

impl Child {
    pub(crate) fn start(spec: &Spec) -> Child {
        Self::start_rank(spec, 0, 1)
    }

    /// As the data-parallel rank `dp` of `ranks`.
    pub(crate) fn start_rank(spec: &Spec, dp: u32, ranks: u32) -> Child {
        Self::start_as(spec, "dp", dp, ranks)
    }

    /// As the pipeline rank `pp` of `stages`, with its share of the two layers.
    pub(crate) fn start_stage(spec: &Spec, pp: u32, stages: u32) -> Child {
        Self::start_as(spec, "pp", pp, stages)
    }

    /// With its blocks in the host's memory, on whatever path.
    pub(crate) fn start_on_host(spec: &Spec) -> Child {
        Self::start_as(spec, "host", 0, 1)
    }

    fn start_as(spec: &Spec, kind: &str, rank: u32, ranks: u32) -> Child {
        let text = format!(
            "{}|{}|{}|{}|{}|{}|{}|{kind}|{rank}|{ranks}",
            match spec.role {
                KvRole::Producer => "producer",
                KvRole::Consumer => "consumer",
                _ => "both",
            },
            spec.path.name(),
            spec.block_bytes,
            spec.blocks,
            spec.listen,
            spec.engine_id.as_deref().unwrap_or(""),
            spec.seed,
        );
        let binary = std::env::current_exe().expect("this binary");
        let mut command = match &spec.namespace {
            Some(name) => {
                // It becomes the program that it is to run, so the process is still our child.
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(binary);
                command
            }
            None => Command::new(binary),
        };
        let mut process = command
            .args(["--exact", ENTRY, "--nocapture", "--test-threads=1"])
            .env(VARIABLE, text)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child");
        let orders = process.stdin.take().expect("its input");
        let output = process.stdout.take().expect("its output");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(at) = line.find(MARK)
                    && sender.send(line[at + MARK.len()..].to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut child = Child {
            process,
            orders,
            lines,
            address: String::new(),
        };
        child.address = child.answer("listening");
        child
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("the child is there");
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub(crate) fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    pub(crate) fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn die(&mut self) {
        self.kill();
        self.process.wait().expect("it ends");
    }

    pub(crate) fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").expect("the child reads");
        self.orders.flush().expect("the child reads");
    }

    /// The rest of the next line that begins so; others before it are dropped.
    #[track_caller]
    pub(crate) fn answer(&mut self, beginning: &str) -> String {
        let end = Instant::now() + LONG;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(beginning) {
                        return rest.trim().to_owned();
                    }
                }
                Err(error) => panic!("the child has not said {beginning:?}: {error}"),
            }
        }
    }

    /// Has the child offer its first `blocks` blocks.
    pub(crate) fn offer(&mut self, request: &str, blocks: u32, ttl: Duration) -> Ticket {
        self.tell(&format!("offer {request} {blocks} {}", ttl.as_millis()));
        Ticket::from_json(&self.answer("ticket")).expect("a ticket")
    }

    /// Has the child expect its first `blocks` blocks.
    pub(crate) fn expect(&mut self, request: &str, blocks: u32, deadline: Duration) -> Ticket {
        self.expect_at(request, 0..blocks, deadline)
    }

    /// Has the child expect these blocks of its own.
    pub(crate) fn expect_at(
        &mut self,
        request: &str,
        blocks: Range<u32>,
        deadline: Duration,
    ) -> Ticket {
        let Range { start, end } = blocks;
        self.tell(&format!(
            "expect {request} {start} {end} {}",
            deadline.as_millis()
        ));
        Ticket::from_json(&self.answer("ticket")).expect("a ticket")
    }

    /// Has the child push its first `blocks` blocks to the same ones of `peer`, `times` over.
    pub(crate) fn push(&mut self, peer: &PeerName, request: &str, blocks: u32, times: u32) {
        let engine = &peer.engine.0;
        self.tell(&format!("push {request} {blocks} {times} {engine}"));
        self.answer("pushing");
    }

    /// Has the child begin the same push once over, and not commit it.
    pub(crate) fn begin(&mut self, peer: &PeerName, request: &str, blocks: u32) {
        let engine = &peer.engine.0;
        self.tell(&format!("begin {request} {blocks} {engine}"));
        self.answer("begun");
    }

    /// Has the child begin a push whose blocks its kernels put over GPU links, again and again, until it dies.
    pub(crate) fn put_for_ever(&mut self, peer: &PeerName, request: &str, blocks: u32) {
        let engine = &peer.engine.0;
        self.tell(&format!("links {request} {blocks} {engine}"));
        self.answer("putting");
    }

    /// The same once, and to its end: how that was.
    pub(crate) fn put_once(&mut self, peer: &PeerName, request: &str, blocks: u32) -> String {
        let engine = &peer.engine.0;
        self.tell(&format!("links-once {request} {blocks} {engine}"));
        self.answer("put")
    }

    /// The same for blocks that do not begin with the first.
    pub(crate) fn begin_at(&mut self, peer: &PeerName, request: &str, blocks: Range<u32>) {
        let engine = &peer.engine.0;
        let Range { start, end } = blocks;
        self.tell(&format!("begin-at {request} {start} {end} {engine}"));
        self.answer("begun");
    }

    /// Has the child push under a ticket of an earlier life; how that ends for it.
    pub(crate) fn push_late(&mut self, peer: &PeerName, ticket: &Ticket) -> String {
        let engine = &peer.engine.0;
        let json = ticket.to_json().expect("json");
        self.tell(&format!("late {engine} {json}"));
        self.answer("late")
    }

    /// Has the child pull the first `blocks` blocks of a ticket, in `times` pulls.
    pub(crate) fn pull(&mut self, peer: &PeerName, ticket: &Ticket, blocks: u32, times: u32) {
        let engine = &peer.engine.0;
        let ticket = ticket.to_json().expect("json");
        self.tell(&format!("pull {times} {blocks} {engine} {ticket}"));
        self.answer("pulling");
    }

    /// Has the child push its first blocks to these of `peer`, if it can, and then `commit`, `abort` or
    /// `leave` it; whether it could.
    pub(crate) fn try_push(
        &mut self,
        peer: &PeerName,
        request: &str,
        how: &str,
        blocks: &[u32],
    ) -> bool {
        let blocks: Vec<String> = blocks.iter().map(u32::to_string).collect();
        let (engine, blocks) = (&peer.engine.0, blocks.join(","));
        self.tell(&format!("try-push {request} {how} {engine} {blocks}"));
        self.answer("tried") == "true"
    }

    /// Has the child pull the first `blocks` blocks of a ticket into its own, if it can; its
    /// `verdict` tells of them.
    pub(crate) fn try_pull(&mut self, peer: &PeerName, ticket: &Ticket, blocks: u32) -> bool {
        let engine = &peer.engine.0;
        let ticket = ticket.to_json().expect("json");
        self.tell(&format!("try-pull {blocks} {engine} {ticket}"));
        self.answer("tried") == "true"
    }

    /// Has the child expect its first `blocks` blocks and check them in its `verdict`.
    pub(crate) fn receive(&mut self, request: &str, blocks: u32, deadline: Duration) {
        self.tell(&format!(
            "receive {request} {blocks} {}",
            deadline.as_millis()
        ));
        self.answer("receiving");
    }

    /// How the child's one pull or expectation has ended: `good`, `failed`, or what is wrong with it.
    pub(crate) fn verdict(&mut self, request: &str) -> String {
        self.tell(&format!("verdict {request}"));
        self.answer("verdict")
    }

    /// How a request has ended for the child: `received`, `sent` or `failed`, and the event.
    pub(crate) fn outcome(&mut self, request: &str) -> String {
        self.tell(&format!("outcome {request}"));
        self.answer("outcome")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The child's main function; returns at once in the parent.
pub(crate) fn entry() {
    let Ok(text) = std::env::var(VARIABLE) else {
        return;
    };
    // A child that is stopped when its parent dies goes with it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).expect("prctl");
    let (node, seed) = build(&text);
    serve(&node, seed);
}

/// The child's side, and the seed of its pattern.
fn build(text: &str) -> (Node, u64) {
    let parts: Vec<&str> = text.split('|').collect();
    let [
        role,
        path,
        block_bytes,
        blocks,
        listen,
        engine_id,
        seed,
        kind,
        rank,
        ranks,
    ] = parts[..]
    else {
        panic!("not a child's description: {text}");
    };
    let role = match role {
        "producer" => KvRole::Producer,
        "consumer" => KvRole::Consumer,
        _ => KvRole::Both,
    };
    let path = [
        PathKind::Arena,
        PathKind::ProcessVm,
        PathKind::Tcp,
        PathKind::Rdma,
        PathKind::Ipc,
        PathKind::Staged,
    ]
    .into_iter()
    .find(|p| p.name() == path)
    .expect("a path");
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let blocks = u32::try_from(number(blocks)).expect("a number of blocks");
    let recipe = recipe(role, path, number(block_bytes), blocks);
    let count = |text| u32::try_from(number(text)).expect("a rank");
    let mut recipe = match kind {
        "pp" => recipe.stage(count(rank), count(ranks)),
        _ => recipe.rank(count(rank), count(ranks)),
    };
    if kind == "host" {
        recipe.memory = BenchMemory::Arena;
    }
    let recipe = recipe.with(|config| {
        // Whoever listens elsewhere is in a network of the test's own.
        config.allow_unauthenticated = !listen.starts_with("127.");
        // Nothing comes of it unless a push asks.
        config.gpu_links_in = true;
        if !engine_id.is_empty() {
            config.engine_id = Some(engine_id.to_owned());
        }
    });
    let node = recipe.node();
    let seed = number(seed);
    node.side.fill(seed).expect("filled");
    // Somebody who has just died may hold the address for a moment.
    let end = Instant::now() + LONG;
    let address = loop {
        match node.engine.listen(listen) {
            Ok(address) => break address,
            Err(error) if Instant::now() > end => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    say(&format!("listening {address}"));
    (node, seed)
}

fn say(line: &str) {
    println!("{MARK}{line}");
}

/// The session that a peer, the only rank of its engine, has opened, when it stands.
fn way_to(node: &Node, peer: &str) -> Peer {
    let name = PeerName {
        engine: EngineId::from(peer),
        rank: Rank::default(),
    };
    let mut found = None;
    until("a session", || {
        found = node.engine.peer_of(&name);
        found.is_some()
    });
    found.expect("a session")
}

fn begin(node: &Node, peer: &str, request: &str) -> Push {
    let mut push = None;
    until("a push", || {
        push = way_to(node, peer)
            .begin_push(&RequestId::from(request))
            .ok();
        push.is_some()
    });
    push.expect("a push")
}

/// Pushes the first blocks to these of the peer, if its session is there.
fn try_push(node: &Node, peer: &str, request: &str, how: &str, to: &str) -> Option<Option<Push>> {
    let name = PeerName {
        engine: EngineId::from(peer),
        rank: Rank::default(),
    };
    let way = node.engine.peer_of(&name)?;
    let push = way.begin_push(&RequestId::from(request)).ok()?;
    let to = to.split(',').map(|b| b.parse().expect("a block"));
    push.all_layers(&pairs((0..).zip(to)), None).ok()?;
    Some(match how {
        "commit" => {
            drop(push.commit().ok()?);
            None
        }
        "abort" => {
            drop(push.abort());
            None
        }
        _ => Some(push),
    })
}

/// Waits until a request has ended and its memory is free; checks its blocks if it was received.
fn verdict(node: &Node, log: &mut Log, request: &str, blocks: u32, seed: u64) -> String {
    let of = RequestId::from(request);
    let event = log.wait("outcome", |event| {
        event.request().is_some_and(|(r, _)| *r == of) && !matches!(event, Event::Released { .. })
    });
    let said = match event {
        Event::Received { .. } => {
            let table = pairs((0..blocks).map(|b| (b, b)));
            match node.side.verify(seed, &table) {
                Ok(_) => "good".to_owned(),
                Err(error) => error.to_string(),
            }
        }
        Event::Failed { memory, .. } => {
            if memory == MemoryState::Quarantined {
                log.wait(
                    "release",
                    |event| matches!(event, Event::Released { request, .. } if *request == of),
                );
            }
            "failed".to_owned()
        }
        other => format!("{other:?}"),
    };
    log.forget();
    said
}

/// Kernels that put the first blocks, both layers.
struct Links {
    queue: GpuQueue,
    kernels: PostKernels,
    stream: Stream,
    moves: Vec<Move>,
}

impl Links {
    fn of(node: &Node, push: &Push, blocks: u32) -> Self {
        let memory = node.side.memory()[0].gpu().expect("memory of a GPU");
        let mut config = GpuQueueConfig::new(memory.gpu());
        config.kind = QueueKind::Links;
        let queue = push.gpu_queue(&config).expect("a queue");
        let word = |layer, block| {
            let place = Place {
                group: 0,
                tensor: ALL_TENSORS,
                layer,
                block,
            };
            place.to_word()
        };
        let put = |(layer, block): (u16, u32)| Move {
            local: word(layer, block),
            remote: word(layer, block),
            len: queue.block_bytes(0, layer.into()).expect("a layer"),
            flags: LOCAL_PLACE | REMOTE_PLACE,
            ..Move::default()
        };
        let all = (0..blocks).flat_map(|block| [(0, block), (1, block)]);
        let moves = all.map(put).collect();
        Self {
            queue,
            kernels: PostKernels::load(memory.gpu()).expect("kernels"),
            stream: Stream::new(memory.gpu()).expect("a stream"),
            moves,
        }
    }

    fn put(&self) {
        let posts = Posts {
            moves: &self.moves,
            posters: 1,
            by: PostBy::Blocks,
            op: PUT,
            until: ALL,
        };
        let posting = self.kernels.post(&self.stream, self.queue.device(), &posts);
        let ended = posting.expect("launched").wait(Instant::now() + LONG);
        let ended = ended.expect("the kernel ends");
        // Of one that is told to stop nothing is wanted any more.
        let known = |end: &PostResult| {
            [Status::Ok, Status::Stopped]
                .map(Status::number)
                .contains(&end.ended)
        };
        assert!(ended.iter().all(known));
    }
}

fn serve(node: &Node, seed: u64) {
    let mut received = 0;
    let mut log = Log::new(&node.engine);
    let mut transfers = HashMap::new();
    let mut begun = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("an order");
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| text.parse::<u32>().expect("a number");
        match words[..] {
            ["offer", request, blocks, ttl] => {
                let ttl = Duration::from_millis(u64::from(number(ttl)));
                let blocks = groups(0..number(blocks));
                let ticket = node
                    .engine
                    .offer(&RequestId::from(request), &blocks, 1, ttl)
                    .expect("an offer");
                say(&format!("ticket {}", ticket.to_json().expect("json")));
            }
            ["expect", request, start, end, deadline] => {
                let deadline = Duration::from_millis(u64::from(number(deadline)));
                let blocks = groups(number(start)..number(end));
                let ticket = node
                    .engine
                    .expect(&RequestId::from(request), &blocks, 1, deadline)
                    .expect("an expectation");
                say(&format!("ticket {}", ticket.to_json().expect("json")));
            }
            ["push", request, blocks, times, peer] => {
                let push = begin(node, peer, request);
                let blocks = number(blocks);
                for _ in 0..number(times) {
                    push.all_layers(&pairs((0..blocks).map(|b| (b, b))), None)
                        .expect("pushed");
                }
                let transfer = push.commit().expect("committed");
                transfers.insert(request.to_owned(), transfer);
                say("pushing");
            }
            // Without a commit.
            ["begin", request, blocks, peer] => {
                let push = begin(node, peer, request);
                let blocks = number(blocks);
                push.all_layers(&pairs((0..blocks).map(|b| (b, b))), None)
                    .expect("pushed");
                begun.push(push);
                say("begun");
            }
            ["links", request, blocks, peer] => {
                let push = begin(node, peer, request);
                let links = Links::of(node, &push, number(blocks));
                begun.push(push);
                std::thread::spawn(move || {
                    loop {
                        links.put();
                    }
                });
                say("putting");
            }
            ["links-once", request, blocks, peer] => {
                let push = begin(node, peer, request);
                let links = Links::of(node, &push, number(blocks));
                links.put();
                let finished = links.queue.finish(Kernels::Ended, LONG);
                finished.expect("they have ended");
                let outcome = push.commit().expect("committed").wait(LONG);
                say(&format!("put {outcome:?}").replace('\n', " "));
            }
            ["begin-at", request, start, end, peer] => {
                let push = begin(node, peer, request);
                let blocks = number(start)..number(end);
                push.all_layers(&pairs(blocks.map(|b| (b, b))), None)
                    .expect("pushed");
                begun.push(push);
                say("begun");
            }
            ["late", peer, ticket] => {
                let options = PushOptions {
                    ticket: Some(Ticket::from_json(ticket).expect("a ticket")),
                    ..PushOptions::default()
                };
                let request = options.ticket.as_ref().expect("just put").request.clone();
                let mut push = None;
                until("a push", || {
                    push = way_to(node, peer)
                        .begin_push_with(&request, options.clone())
                        .ok();
                    push.is_some()
                });
                let push = push.expect("a push");
                let fits = push.all_layers(&pairs([(0, 0)]), None);
                let outcome = push.commit().expect("its outcome tells").wait(LONG);
                say(&format!("late {outcome:?} {fits:?}").replace('\n', " "));
            }
            ["pull", times, blocks, peer, ticket] => {
                let ticket = Ticket::from_json(ticket).expect("a ticket");
                let from = way_to(node, peer);
                let wanted = pairs((0..number(blocks)).map(|b| (b, b)));
                for (tag, wanted) in (0..).zip(dealt(&wanted, number(times))) {
                    let options = PullOptions {
                        tag,
                        hold: true,
                        ..PullOptions::default()
                    };
                    let transfer = from.pull(&ticket, &wanted, options).expect("a transfer");
                    transfers.insert(format!("pull-{tag}"), transfer);
                }
                say("pulling");
            }
            ["try-push", request, how, peer, to] => {
                let done = try_push(node, peer, request, how, to);
                say(&format!("tried {}", done.is_some()));
                begun.extend(done.flatten());
            }
            ["try-pull", blocks, peer, ticket] => {
                let ticket = Ticket::from_json(ticket).expect("a ticket");
                let name = PeerName {
                    engine: EngineId::from(peer),
                    rank: Rank::default(),
                };
                received = number(blocks);
                node.fill_blocks(0..received, POISON);
                let wanted = pairs((0..received).map(|b| (b, b)));
                let way = node.engine.peer_of(&name);
                let pull = way.and_then(|w| w.pull(&ticket, &wanted, PullOptions::default()).ok());
                say(&format!("tried {}", pull.is_some()));
            }
            ["receive", request, blocks, deadline] => {
                let deadline = Duration::from_millis(u64::from(number(deadline)));
                received = number(blocks);
                node.fill_blocks(0..received, POISON);
                node.engine
                    .expect(&RequestId::from(request), &groups(0..received), 1, deadline)
                    .expect("an expectation");
                say("receiving");
            }
            ["verdict", request] => {
                let said = verdict(node, &mut log, request, received, seed);
                say(&format!("verdict {said}").replace('\n', " "));
            }
            // The event that ends a request.
            ["outcome", request] => {
                let of = RequestId::from(request);
                let event = log.wait("outcome", |event| {
                    event.request().is_some_and(|(r, _)| *r == of)
                        && !matches!(event, Event::Released { .. })
                });
                let word = match event {
                    Event::Received { .. } => "received",
                    Event::Sent { .. } => "sent",
                    _ => "failed",
                };
                say(&format!("outcome {word} {event:?}").replace('\n', " "));
            }
            ["released", request] => {
                let of = RequestId::from(request);
                log.wait(
                    "release",
                    |event| matches!(event, Event::Released { request, .. } if *request == of),
                );
                say("released");
            }
            ["once"] => {
                log.assert_told_once();
                say("once");
            }
            _ => panic!("not an order: {line}"),
        }
    }
}
