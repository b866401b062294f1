//! The prefill process: it computes requests, and offers or pushes their blocks.

use std::collections::{HashMap, VecDeque};

use kvxfer::blocks::{BlockPair, GroupPairs};
use kvxfer::config::Config;
use kvxfer::engine::{PushOptions, Transfer};
use kvxfer::event::{Event, MemoryState};
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::{Engine, Error, Peer};

use crate::Failed;
use crate::cache::{Cache, Table};
use crate::desk::{DEADLINE, Desk, Input, tell};
use crate::message::{Answer, Ending, Job, Mode, Order, Story};

/// Blocks of each group: fewer than all requests in flight need, so that some have to wait.
const NUM_BLOCKS: [u32; 2] = [200, 90];

/// A request whose blocks are in use.
#[derive(Debug)]
struct Running {
    table: Table,
    /// The push, for its report.
    push: Option<Transfer>,
    /// How it ended, while its memory is not free yet.
    ending: Option<Ending>,
}

#[derive(Debug)]
struct Prefill {
    engine: Engine,
    cache: Cache,
    /// The decode process, once it has connected: whom to push to.
    consumer: Option<Peer>,
    running: HashMap<String, Running>,
    /// Requests for which there were no free blocks.
    waiting: VecDeque<(Job, Option<Ticket>)>,
    finishing: bool,
}

pub(crate) fn run(config: Config, shareable: bool) -> Result<(), Failed> {
    let cache = Cache::new(NUM_BLOCKS, shareable)?;
    let engine = Engine::new(config, cache.format.clone(), cache.placement.clone())?;
    let desk = Desk::new(&engine);
    // Either side may listen; a session carries both modes, whoever has opened it.
    let address = engine.listen("127.0.0.1:0")?.to_string();
    tell(&Answer::Listening { address })?;
    let mut prefill = Prefill {
        engine,
        cache,
        consumer: None,
        running: HashMap::new(),
        waiting: VecDeque::new(),
        finishing: false,
    };
    while !(prefill.finishing && prefill.running.is_empty() && prefill.waiting.is_empty()) {
        match desk.next()? {
            Input::Order(order) => prefill.order(order)?,
            Input::Event(event) => prefill.event(event)?,
            Input::Hangup => return Err("the router is gone".into()),
        }
    }
    if !prefill.cache.pool.is_whole() {
        return Err("blocks were lost".into());
    }
    tell(&Answer::Idle)
}

impl Prefill {
    fn order(&mut self, order: Order) -> Result<(), Failed> {
        match order {
            Order::Start {
                job,
                kv_transfer_params,
            } => {
                self.waiting
                    .push_back((job, kv_transfer_params.map(|ticket| *ticket)));
                self.start_waiting()
            }
            Order::TakeBack { request } => {
                // The blocks are not free yet: `Event::Released` follows.
                self.engine.retract(&RequestId::from(request));
                Ok(())
            }
            Order::Finish => {
                self.finishing = true;
                Ok(())
            }
            Order::Connect { .. } => Err("the prefill process listens".into()),
        }
    }

    fn start_waiting(&mut self) -> Result<(), Failed> {
        while let Some((job, _)) = self.waiting.front() {
            let Some(table) = self.cache.pool.take(job.tokens) else {
                return Ok(());
            };
            let Some((job, ticket)) = self.waiting.pop_front() else {
                return Ok(());
            };
            let running = Running {
                table: table.clone(),
                push: None,
                ending: None,
            };
            self.running.insert(job.request.clone(), running);
            match job.mode {
                Mode::Read => self.offer(job, &table)?,
                Mode::Write => {
                    let push = self.push(&job, &table, ticket)?;
                    if let Some(running) = self.running.get_mut(&job.request) {
                        running.push = push;
                    }
                }
            }
        }
        Ok(())
    }

    /// READ: compute everything, then let the decode process fetch it.
    fn offer(&mut self, job: Job, table: &Table) -> Result<(), Failed> {
        for (layer, _) in Cache::layers() {
            self.cache
                .compute(&job.request, table, layer, &table.all())?;
        }
        let request = RequestId::from(job.request.as_str());
        // From here the blocks must stand still until `Event::Released`, which comes when the
        // reader is done, when we retract, or when the lease runs out: whichever is first.
        let ticket = self
            .engine
            .offer(&request, &table.blocks(&table.all()), 1, DEADLINE)?;
        tell(&Answer::Ticket {
            request: job.request,
            kv_transfer_params: ticket,
        })
    }

    /// WRITE: each layer goes out as soon as it is computed. None of these calls waits for the
    /// network; how it ended comes as an event.
    fn push(
        &self,
        job: &Job,
        table: &Table,
        ticket: Option<Ticket>,
    ) -> Result<Option<Transfer>, Failed> {
        // Holds while the session that it came with stands; `begin_push` says if it does not.
        let consumer = self.consumer.as_ref().ok_or("no consumer has connected")?;
        let push = self.push_layers(consumer, job, table, ticket)?;
        if job.story == Story::LayersFirst {
            let request = job.request.clone();
            tell(&Answer::Pushing { request })?;
        }
        Ok(push)
    }

    /// The push, if it was committed.
    fn push_layers(
        &self,
        consumer: &Peer,
        job: &Job,
        table: &Table,
        ticket: Option<Ticket>,
    ) -> Result<Option<Transfer>, Failed> {
        let request = RequestId::from(job.request.as_str());
        let options = PushOptions {
            deadline: Some(DEADLINE),
            ticket: ticket.clone(),
            ..PushOptions::default()
        };
        let push = consumer.begin_push_with(&request, options)?;
        // A prompt of any length is computed in chunks; here in one, or in two for some.
        let half = table.all().end / 2;
        let chunks = match job.story {
            Story::Chunked => vec![0..half, half..table.all().end],
            _ => vec![table.all()],
        };
        for chunk in chunks {
            for (layer, group) in Cache::layers() {
                self.cache.compute(&job.request, table, layer, &chunk)?;
                let pushed = match &ticket {
                    Some(ticket) => {
                        let pairs = table.with_ticket(ticket, group, &chunk);
                        let pairs = pairs.into_iter().map(|(src, dst)| BlockPair { src, dst });
                        let pairs = pairs.collect();
                        // A part without blocks of this group is an empty list, which is fine.
                        push.layer(layer, &[GroupPairs { group, pairs }], None)
                    }
                    // Where the blocks go is not known yet: they wait for the consumer's ticket,
                    // which the consumer sends by itself as soon as it expects the request.
                    None => {
                        let mut blocks = table.blocks(&chunk);
                        blocks.retain(|blocks| blocks.group == group);
                        push.layer_in_order(layer, &blocks, None)
                    }
                };
                match pushed {
                    Ok(()) => {}
                    // It has failed meanwhile: the consumer wants it no more, or is gone. The event
                    // says why, and when the blocks are free.
                    Err(Error::PushEnded { .. }) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
                if job.story == Story::Abort && layer == 2 {
                    // Dropping the push does the same. The outcome comes as an event, so the handle
                    // is not needed.
                    drop(push.abort());
                    return Ok(None);
                }
            }
        }
        // Nothing follows. The handle could be awaited; here the event is what counts.
        Ok(Some(push.commit()?))
    }

    fn event(&mut self, event: Event) -> Result<(), Failed> {
        match event {
            Event::PeerUp { peer, .. } => {
                let consumer = self.engine.peer_of(&peer).ok_or("the consumer has gone")?;
                let path = consumer.path()?.path.to_string();
                self.consumer = Some(consumer);
                tell(&Answer::Connected { path })
            }
            Event::Sent { request, .. } => self.finish(&request, Ending::Sent),
            Event::Failed {
                request,
                first_cause,
                memory,
                ..
            } => {
                let ending = Ending::Failed(first_cause);
                match memory {
                    MemoryState::Released => self.finish(&request, ending),
                    // Something may still read the blocks: `Event::Released` follows.
                    MemoryState::Quarantined => {
                        if let Some(running) = self.running.get_mut(&*request.0) {
                            running.ending = Some(ending);
                        }
                        Ok(())
                    }
                }
            }
            Event::Released {
                request, reason, ..
            } => {
                let failed = self.running.get_mut(&*request.0);
                let ending = failed.and_then(|running| running.ending.take());
                self.finish(&request, ending.unwrap_or(Ending::Released(reason)))
            }
            // What it means for requests comes as their own events.
            Event::PeerDown { .. } | Event::PeerRestarted { .. } => {
                self.consumer = None;
                Ok(())
            }
            other => Err(format!("unexpected: {other:?}").into()),
        }
    }

    /// The only place where blocks become free.
    fn finish(&mut self, request: &RequestId, ending: Ending) -> Result<(), Failed> {
        let running = self.running.remove(&*request.0);
        let running = running.ok_or_else(|| format!("{request} has ended twice"))?;
        self.cache.scribble(&running.table)?;
        self.cache.pool.give(running.table);
        tell(&Answer::Finished {
            request: request.to_string(),
            ending,
            moved: running.push.map_or(0, |push| push.report().bytes),
            checked: 0,
        })?;
        self.start_waiting()
    }
}
