//! The decode process: it fetches blocks, or expects them, and checks every byte that came.

use std::collections::HashMap;
use std::ops::Range;

use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::config::Config;
use kvxfer::engine::{PullOptions, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::{Engine, Instance};

use crate::Failed;
use crate::cache::{Cache, FULL, SLIDING, Table};
use crate::desk::{DEADLINE, Desk, Input, tell};
use crate::message::{Answer, Ending, Job, Mode, Order, Story};

/// Blocks of each group: enough for all requests in flight. A decode engine asks for a request's
/// blocks only when it has room for it.
const NUM_BLOCKS: [u32; 2] = [400, 170];

/// A request whose blocks are in use.
#[derive(Debug)]
struct Running {
    job: Job,
    table: Table,
    /// The part that is to come.
    wanted: Range<u32>,
    /// The producer's offer, to be released.
    offer: Option<Ticket>,
    /// The pulls, for their reports.
    pulls: Vec<Transfer>,
    /// Outcomes, and memory, that are still to come.
    left: usize,
    ending: Ending,
}

#[derive(Debug)]
struct Decode {
    engine: Engine,
    cache: Cache,
    producer: Option<Instance>,
    running: HashMap<String, Running>,
    finishing: bool,
}

pub(crate) fn run(config: Config, shareable: bool) -> Result<(), Failed> {
    let cache = Cache::new(NUM_BLOCKS, shareable)?;
    let engine = Engine::new(config, cache.format.clone(), cache.placement.clone())?;
    let desk = Desk::new(&engine);
    let mut decode = Decode {
        engine,
        cache,
        producer: None,
        running: HashMap::new(),
        finishing: false,
    };
    while !(decode.finishing && decode.running.is_empty()) {
        match desk.next()? {
            Input::Order(order) => decode.order(order)?,
            Input::Event(event) => decode.event(event)?,
            Input::Hangup => return Err("the router is gone".into()),
        }
    }
    if !decode.cache.pool.is_whole() {
        return Err("blocks were lost".into());
    }
    tell(&Answer::Idle)
}

impl Decode {
    fn order(&mut self, order: Order) -> Result<(), Failed> {
        match order {
            Order::Connect { address } => {
                // The only call that waits for the network. The session is kept up from here on.
                let producer = self.engine.connect(&address, DEADLINE)?;
                let path = producer.path()?.path.to_string();
                self.producer = Some(producer);
                tell(&Answer::Connected { path })
            }
            Order::Start {
                job,
                kv_transfer_params,
            } => self.start(job, kv_transfer_params.map(|ticket| *ticket)),
            Order::TakeBack { request } => {
                // `Event::Failed` follows, with the state of the memory.
                self.engine.cancel_expect(&RequestId::from(request));
                Ok(())
            }
            Order::Finish => {
                self.finishing = true;
                Ok(())
            }
        }
    }

    fn start(&mut self, job: Job, offer: Option<Ticket>) -> Result<(), Failed> {
        let table = self.cache.pool.take(job.tokens);
        let table = table.ok_or("the router has sent more than there is room for")?;
        // What the prefix cache has already need not come.
        let all = table.all();
        let known = match job.story {
            Story::Prefix => all.end / 2,
            Story::FullHit => all.end,
            _ => 0,
        };
        for (layer, _) in Cache::layers() {
            self.cache
                .compute(&job.request, &table, layer, &(0..known))?;
        }
        let wanted = known..all.end;
        let running = Running {
            job,
            table,
            wanted,
            offer,
            pulls: Vec::new(),
            left: 1,
            ending: Ending::Received,
        };
        let name = running.job.request.clone();
        let running = match running.job.mode {
            Mode::Read => self.pull(running)?,
            Mode::Write => self.expect(running)?,
        };
        if running.left == 0 {
            return self.finish(running);
        }
        self.running.insert(name, running);
        Ok(())
    }

    /// READ: fetches what is wanted under the producer's ticket.
    fn pull(&self, mut running: Running) -> Result<Running, Failed> {
        let producer = self.producer.as_ref().ok_or("not connected")?;
        let ticket = running.offer.as_ref().ok_or("a pull needs a ticket")?;
        if running.wanted.is_empty() {
            // Nothing to read, but the producer must hear that it need not wait for us. It is the
            // same for a request that is given up.
            producer.release(ticket)?;
            running.left = 0;
            return Ok(running);
        }
        let pairs_of = |group: u32| {
            let pairs = running.table.with_ticket(ticket, group, &running.wanted);
            let pairs = pairs.into_iter().map(|(dst, src)| BlockPair { src, dst });
            let pairs = pairs.collect();
            GroupPairs { group, pairs }
        };
        // Usually one pull takes everything and releases the offer by itself. With `hold` there
        // can be several, at once or one after the other, and the release is a call of its own.
        let parts = match running.job.story {
            Story::Prefix => vec![vec![pairs_of(FULL)], vec![pairs_of(SLIDING)]],
            _ => vec![vec![pairs_of(FULL), pairs_of(SLIDING)]],
        };
        let options = PullOptions {
            deadline: Some(DEADLINE),
            hold: parts.len() > 1,
            ..PullOptions::default()
        };
        running.left = parts.len();
        for part in parts {
            // Until its outcome nothing may use the destination blocks.
            let pull = producer.pull(ticket, &part, options.clone())?;
            running.pulls.push(pull);
        }
        Ok(running)
    }

    /// WRITE: lets the producer write what is wanted. From here the blocks are its own until the
    /// outcome, and after a failure until they are released.
    fn expect(&self, running: Running) -> Result<Running, Failed> {
        let request = running.job.request.clone();
        let blocks = running.table.blocks(&running.wanted);
        let ticket =
            self.engine
                .expect(&RequestId::from(request.as_str()), &blocks, 1, DEADLINE)?;
        tell(&Answer::Ticket {
            request,
            kv_transfer_params: ticket,
        })?;
        Ok(running)
    }

    fn event(&mut self, event: Event) -> Result<(), Failed> {
        match event {
            Event::Received { request, .. } => self.one_less(&request),
            Event::Failed {
                request,
                first_cause,
                memory,
                invalid_blocks,
                ..
            } => {
                let running = self.of(&request)?;
                running.ending = Ending::Failed(first_cause);
                // Nothing of what was to come can be trusted. An engine that would rather
                // recompute than fail the request starts from this list.
                let wanted = running.table.blocks(&running.wanted);
                if sorted(invalid_blocks.clone()) != sorted(wanted) {
                    return Err(format!("{request}: invalid blocks {invalid_blocks:?}").into());
                }
                match memory {
                    MemoryState::Released => self.one_less(&request),
                    // A writer may still be under way: `Event::Released` follows.
                    MemoryState::Quarantined => Ok(()),
                }
            }
            Event::Released { request, .. } => self.one_less(&request),
            Event::PeerUp { .. } | Event::PeerDown { .. } | Event::PeerRestarted { .. } => Ok(()),
            other => Err(format!("unexpected: {other:?}").into()),
        }
    }

    fn of(&mut self, request: &RequestId) -> Result<&mut Running, Failed> {
        let running = self.running.get_mut(&*request.0);
        running.ok_or_else(|| format!("{request} has ended twice").into())
    }

    /// One outcome with free memory has come. With the last one the request is over.
    fn one_less(&mut self, request: &RequestId) -> Result<(), Failed> {
        let running = self.of(request)?;
        running.left -= 1;
        if running.left > 0 {
            return Ok(());
        }
        match self.running.remove(&*request.0) {
            Some(running) => self.finish(running),
            None => Ok(()),
        }
    }

    /// The only place where blocks become free.
    fn finish(&mut self, running: Running) -> Result<(), Failed> {
        let failed = running.ending != Ending::Received;
        if let (Some(producer), Some(offer)) = (&self.producer, &running.offer)
            && (failed || running.pulls.len() > 1)
        {
            // A failed pull leaves the offer as it is, so that it could be tried again. Who does
            // not says so, and spares the producer the wait for the lease to run out.
            producer.release(offer)?;
        }
        let (moved, checked) = match failed {
            true => (0, 0),
            false => {
                let (request, table) = (&running.job.request, &running.table);
                (
                    running.pulls.iter().map(|pull| pull.report().bytes).sum(),
                    self.cache.check(request, table, &table.all())?,
                )
            }
        };
        self.cache.pool.give(running.table);
        tell(&Answer::Finished {
            request: running.job.request,
            ending: running.ending,
            moved,
            checked,
        })
    }
}

/// As sets, without empty groups.
fn sorted(mut groups: Vec<GroupBlocks>) -> Vec<GroupBlocks> {
    groups.retain(|group| !group.blocks.is_empty());
    for group in &mut groups {
        group.blocks.sort_unstable();
    }
    groups
}
