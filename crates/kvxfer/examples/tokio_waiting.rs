//! Three ways to wait for transfers, in a tokio program: a [`Transfer`] as a future, the engine's
//! event fd, and a loop that polls. docs/waiting.md explains them.
//!
//! kvxfer itself needs no async runtime: everything here goes through a waker or a file descriptor.

use std::error::Error;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::{Config, KvRole};
use kvxfer::engine::{Outcome, PullOptions, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::layout::{KvFormat, KvPlacement, Packing, Topology};
use kvxfer::mem::HostArena;
use kvxfer::ticket::Ticket;
use kvxfer::{Engine, Instance};

type Failed = Box<dyn Error + Send + Sync>;

const LONG: Duration = Duration::from_secs(30);

// docs/waiting.md: (a)
/// Waits for a pull, and gives it up when `patience` is at its end.
async fn future(mut pull: Transfer, patience: Duration) -> Result<Outcome, Failed> {
    let outcome = match timeout(patience, &mut pull).await {
        Ok(outcome) => outcome,
        Err(_) => {
            // Dropping the handle would let the transfer go on. Cancelling ends it; the outcome
            // comes soon, at the latest by the transfer's deadline.
            pull.cancel();
            (&mut pull).await
        }
    };
    if let Some(failure) = outcome.failure()
        && failure.memory == MemoryState::Quarantined
    {
        // The destination blocks must not be used before `Event::Released`.
        println!("quarantined: {:?}", failure.first_cause);
    }
    Ok(outcome)
}
// end of (a)

// docs/waiting.md: (b)
/// An engine as tokio's reactor wants it. It holds the engine, so the descriptor stays open.
struct EngineFd(Engine);

impl AsRawFd for EngineFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.event_fd().as_raw_fd()
    }
}

/// Handles events as they come, until one says `false`.
async fn event_fd(engine: Engine, mut handle: impl FnMut(Event) -> bool) -> Result<(), Failed> {
    // One for the life of the engine: a descriptor cannot be registered twice.
    //
    // New versions of tokio call this deprecated in favour of `unsafe { AsyncFd::register }`, whose
    // one condition is that the descriptor stays open and the same while it is registered.
    // `EngineFd` keeps that.
    #[allow(deprecated)]
    let fd = AsyncFd::new(EngineFd(engine))?;
    let mut events = Vec::new();
    loop {
        // Events first, readiness afterwards: what comes between the two makes the descriptor
        // readable again, so nothing is lost.
        fd.get_ref().0.poll_events(&mut events);
        for event in events.drain(..) {
            if !handle(event) {
                return Ok(());
            }
        }
        let mut ready = fd.readable().await?;
        fd.get_ref().0.poll_events(&mut events);
        ready.clear_ready();
    }
}
// end of (b)

// docs/waiting.md: (c)
/// One step of an engine that has a loop of its own anyway. Never waits.
fn step(engine: &Engine, events: &mut Vec<Event>) -> Vec<Event> {
    engine.poll_events(events);
    // … run the model for one step …
    std::mem::take(events)
}
// end of (c)

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failed> {
    let producer = engine(KvRole::Producer)?;
    let consumer = engine(KvRole::Consumer)?;
    let address = producer.listen("127.0.0.1:0")?.to_string();
    // The one call that waits for the network; a runtime has threads for such.
    let instance = {
        let consumer = consumer.clone();
        tokio::task::spawn_blocking(move || consumer.connect(&address, LONG)).await??
    };

    let (ticket, pairs) = offer(&producer, "a")?;
    let pull = instance.pull(&ticket, &pairs, PullOptions::default())?;
    let outcome = future(pull, LONG).await?;
    println!("future: {outcome:?}");

    start(&producer, &instance, "b")?;
    let received = |event: Event| match event {
        Event::Received { request, .. } if &*request.0 == "b" => {
            println!("event fd: Received {request}");
            false
        }
        _ => true,
    };
    timeout(LONG, event_fd(consumer.clone(), received)).await??;

    start(&producer, &instance, "c")?;
    let mut events = Vec::new();
    let polled = async {
        loop {
            for event in step(&consumer, &mut events) {
                if let Event::Received { request, .. } = event {
                    return request;
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let request = timeout(LONG, polled).await?;
    println!("poll loop: Received {request}");
    Ok(())
}

/// Pulls a request and drops the handle: its end comes as an event.
fn start(producer: &Engine, instance: &Instance, request: &str) -> Result<(), Failed> {
    let (ticket, pairs) = offer(producer, request)?;
    drop(instance.pull(&ticket, &pairs, PullOptions::default())?);
    Ok(())
}

fn offer(producer: &Engine, request: &str) -> Result<(Ticket, Vec<GroupPairs>), Failed> {
    let blocks = vec![0, 1, 2, 3];
    let pairs = blocks.iter().map(|&src| BlockPair { src, dst: src + 4 });
    let pairs = vec![GroupPairs {
        group: 0,
        pairs: pairs.collect(),
    }];
    let groups = [GroupBlocks { group: 0, blocks }];
    let ticket = producer.offer(&RequestId::from(request), &groups, 1, LONG)?;
    Ok((ticket, pairs))
}

fn engine(role: KvRole) -> Result<Engine, Failed> {
    let format = KvFormat::opaque(64 << 10, 4)?;
    let topology = Topology::single(&format);
    let uniform = KvPlacement::uniform(&format, topology, &[16], Packing::OneMemory, 4096)?;
    let arena = HostArena::new(uniform.memory_bytes().iter().sum())?;
    let placement = uniform.place(&format, vec![arena.as_memory()])?;
    let mut config = Config::default();
    config.kv_role = role;
    Ok(Engine::new(config, format, placement)?)
}
