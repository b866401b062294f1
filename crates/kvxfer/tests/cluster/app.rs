//! The engines' authors, and the router that carries tickets between them.

use std::sync::Arc;
use std::time::Duration;

use kvxfer::blocks::GroupBlocks;
use kvxfer::ids::{Nonce, Rank, RequestId};
use kvxfer::ticket::{Ticket, TicketKind};
use kvxfer::time::Time;
use kvxfer::transfer::{Cause, Class, Kind, Spec, TransferId};
use kvxfer::wire::Release;

use super::bug::{Bug, Step};
use super::check::{Ended, Seen};
use super::device::mask;
use super::memory::{BLOCK_CELLS, MOST, Owner};
use super::pushes::LayerPart;
use super::source::{CellOp, Cells};
use super::worker::{Cmd, Live};
use super::world::{MS, World, log};

/// An offer as its author knows it.
#[derive(Debug)]
pub(crate) struct OfferSeen {
    pub(crate) name: String,
    pub(crate) blocks: Vec<u32>,
    pub(crate) expires: Time,
    pub(crate) released: bool,
}

/// A request in WRITE mode: who sends whom what.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) name: RequestId,
    pub(crate) to: usize,
    pub(crate) blocks: usize,
    pub(crate) senders: Vec<usize>,
}

/// Something that somebody is going to do.
#[derive(Debug, Clone)]
pub(crate) enum Todo {
    Pull {
        slot: usize,
        ticket: Ticket,
        /// What stands in the offered blocks.
        values: Vec<u64>,
        tries: u32,
    },
    /// A pull that held has ended: its reader lets the offer go.
    Release {
        slot: usize,
        ticket: Ticket,
        after: usize,
    },
    Expect {
        request: usize,
        tries: u32,
    },
    BeginPush {
        request: usize,
        sender: usize,
        ticket: Option<Ticket>,
        tries: u32,
    },
    /// The next part of a push.
    PushOn {
        life: usize,
        id: TransferId,
        parts: Vec<LayerPart>,
    },
}

/// What those who take blocks wait for while they hold them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Another engine's author, who needs blocks there first: a reader, an expectation.
    Waits,
    /// Pushes, whose authors need blocks.
    Expects,
    /// Nothing that needs blocks.
    Runs,
}

pub(crate) fn groups(blocks: &[u32]) -> Vec<GroupBlocks> {
    vec![GroupBlocks {
        group: 0,
        blocks: blocks.to_vec(),
    }]
}

impl World {
    /// Somebody begins something, goes on with it, or gives it up.
    pub(crate) fn app_acts(&mut self) -> Step {
        match self.rng.below(10) {
            0..=1 => self.offers(),
            2..=3 => self.wants_pushes(),
            4..=8 => self.app_goes_on(),
            _ => self.gives_up(),
        }
    }

    /// What was begun is brought to its end.
    pub(crate) fn app_finishes(&mut self) -> Step {
        self.app_goes_on()
    }

    fn app_goes_on(&mut self) -> Step {
        if self.todo.is_empty() {
            return Ok(());
        }
        let at = self.rng.index(self.todo.len());
        match self.todo.swap_remove(at) {
            Todo::Pull {
                slot,
                ticket,
                values,
                tries,
            } => self.pulls(slot, ticket, values, tries),
            Todo::Release {
                slot,
                ticket,
                after,
            } => {
                let seen = &self.seen[after];
                if seen.ended.is_none() && self.lives[seen.life].alive {
                    self.todo.push(Todo::Release {
                        slot,
                        ticket,
                        after,
                    });
                } else if let Some((life, peer)) = self.way(slot, &ticket)
                    && self.runs(life)
                {
                    let (request, nonce) = (ticket.request, ticket.nonce);
                    self.send(peer, Release { request, nonce }.into());
                }
                Ok(())
            }
            Todo::Expect { request, tries } => self.expects(request, tries),
            Todo::BeginPush {
                request,
                sender,
                ticket,
                tries,
            } => self.begins_push(request, sender, ticket, tries),
            Todo::PushOn { life, id, parts } => {
                self.pushes_on(life, id, parts);
                Ok(())
            }
        }
    }

    /// A slot's life that runs and takes calls.
    pub(crate) fn author(&self, slot: usize) -> Option<usize> {
        self.slots[slot].filter(|l| self.runs(*l) && !self.lives[*l].leaving)
    }

    /// The life at `slot` and its peer for a ticket.
    fn way(&self, slot: usize, ticket: &Ticket) -> Option<(usize, usize)> {
        let life = self.slots[slot]?;
        let there = self.lives.iter().find(|l| l.name == ticket.engine)?.slot;
        let peer = self.peer_named(life, there)?;
        let fits = self.peers[peer].generation == ticket.generation || self.bug == Bug::OldTicket;
        (fits && self.peers[peer].lost.is_none()).then_some((life, peer))
    }

    /// A time to live or a deadline.
    pub(crate) fn time_limit(&mut self) -> Duration {
        let short = self.rng.permille(self.faults.hurry);
        Duration::from_nanos(if self.faults.quiet() {
            100_000 * MS
        } else if short {
            MS / 4 + self.rng.below(2 * MS)
        } else {
            3 * MS + self.rng.below(25 * MS)
        })
    }

    /// How many blocks are left for those on whom one who takes some will wait. Authors who wait for
    /// each other's memory in a ring would do so until their deadlines, which a quiet history does
    /// not reach.
    pub(crate) fn leaves(&self, hold: Hold) -> usize {
        match hold {
            _ if !self.faults.quiet() => 0,
            Hold::Waits => 2 * MOST,
            Hold::Expects => MOST,
            Hold::Runs => 0,
        }
    }

    // ---- READ mode ---------------------------------------------------------------------------

    fn offers(&mut self) -> Step {
        let slot = self.rng.index(self.slots.len());
        let Some(life) = self.author(slot) else {
            return Ok(());
        };
        let nonce = self.fresh_nonce();
        let n = 1 + self.rng.index(MOST);
        let leave = self.leaves(Hold::Waits);
        let rng = &mut self.rng;
        let memory = &mut self.lives[life].memory;
        let Some(blocks) = memory.take(rng, n, leave, Owner::Offer(nonce.0), &mut self.fresh)
        else {
            return Ok(());
        };
        let request: RequestId = format!("read-{}", nonce.0 % 1_000_000).into();
        let others: Vec<usize> = (0..self.slots.len()).filter(|s| *s != slot).collect();
        let readers = 1 + self.rng.index(others.len().min(2));
        // A reader that was promised and never comes leaves the offer to its lease.
        let promised = readers as u32 + u32::from(!self.faults.quiet() && self.rng.permille(100));
        let ttl = self.time_limit();
        let offered = self.books_do(life, |books, now| {
            books
                .leases
                .offer(now, &request, nonce, &groups(&blocks), promised, ttl)
        })?;
        let Ok(offered) = offered else {
            self.lives[life].memory.free(&blocks, &mut self.fresh);
            return Ok(());
        };
        let books = &mut self.lives[life];
        books.table[offered.lease.slot as usize] = offered.flip;
        let name = format!("the offer of {request} by life {life}");
        log!(self, "{name}: {n} blocks for {promised} readers");
        let books = &mut self.lives[life];
        let offer = OfferSeen {
            name,
            blocks: blocks.clone(),
            expires: offered.expires,
            released: false,
        };
        books.offers.insert((request.clone(), nonce.0), offer);
        let values = blocks
            .iter()
            .flat_map(|b| books.memory.read(b * BLOCK_CELLS, BLOCK_CELLS))
            .collect::<Vec<u64>>();
        let mut ticket = self.ticket(life, TicketKind::Offer, &request, nonce, &blocks, promised);
        ticket.lease = Some(offered.lease);
        self.sum.count("offers");
        let mut others = others;
        for _ in 0..readers {
            let slot = others.swap_remove(self.rng.index(others.len()));
            let (ticket, values) = (ticket.clone(), values.clone());
            self.todo.push(Todo::Pull {
                slot,
                ticket,
                values,
                tries: 0,
            });
        }
        Ok(())
    }

    pub(crate) fn ticket(
        &self,
        life: usize,
        kind: TicketKind,
        request: &RequestId,
        nonce: Nonce,
        blocks: &[u32],
        parties: u32,
    ) -> Ticket {
        let life = &self.lives[life];
        Ticket {
            kind,
            engine: life.name.clone(),
            generation: life.generation,
            rank: Rank::default(),
            addr: None,
            request: request.clone(),
            nonce,
            groups: groups(blocks),
            lease: None,
            format: [7; 32],
            parties,
            ttl: Duration::from_secs(1),
        }
    }

    fn pulls(&mut self, slot: usize, ticket: Ticket, values: Vec<u64>, tries: u32) -> Step {
        let way = self.author(slot).and_then(|_| self.way(slot, &ticket));
        let Some((life, peer)) = way else {
            // No session now; or the ticket is of an earlier life, which only time tells apart here.
            let again = self.faults.quiet() || tries < 6 && !self.calm;
            if again {
                let tries = tries + 1;
                self.todo.push(Todo::Pull {
                    slot,
                    ticket,
                    values,
                    tries,
                });
            }
            return Ok(());
        };
        let src = ticket
            .groups
            .first()
            .map_or(&[][..], |g| &g.blocks)
            .to_vec();
        let tid = self.seen.len();
        let part = if self.rng.permille(700) {
            src.len()
        } else {
            self.rng.index(src.len() + 1)
        };
        let rng = &mut self.rng;
        let memory = &mut self.lives[life].memory;
        let Some(dst) = memory.take(rng, part, 0, Owner::Pull(tid as u64), &mut self.fresh) else {
            self.todo.push(Todo::Pull {
                slot,
                ticket,
                values,
                tries,
            });
            return Ok(());
        };
        let id = TransferId(tid as u64);
        let deadline = self.clock(life) + self.time_limit();
        let workers = self.peers[peer].workers.clone();
        let owner = workers[tid % workers.len()];
        let (request, nonce) = (ticket.request.clone(), ticket.nonce);
        let generation = ticket.generation;
        let mut seen = Seen::new(
            life,
            owner,
            peer,
            false,
            request.clone(),
            nonce.0,
            generation,
            deadline,
            dst.clone(),
        );
        seen.hold = self.rng.permille(200);
        let mut ops = Vec::new();
        let from = self.rng.index(src.len() - part + 1);
        for (i, block) in dst.iter().enumerate() {
            let place = from + i;
            let len = [1, 2, 4][self.rng.index(3)];
            for at in (0..BLOCK_CELLS).step_by(len as usize) {
                let local = block * BLOCK_CELLS + at;
                ops.push(CellOp {
                    remote: src[place] * BLOCK_CELLS + at,
                    local,
                    len,
                    block: *block,
                });
                seen.planned |= mask(local, len);
            }
            for at in 0..BLOCK_CELLS {
                let value = values[place * BLOCK_CELLS as usize + at as usize];
                seen.wants.push((block * BLOCK_CELLS + at, value));
            }
        }
        let (hold, check_lease) = (seen.hold, !ops.is_empty());
        log!(self, "{} begins: {} operations", seen.name(), ops.len());
        self.seen.push(seen);
        self.lives[life].open.insert(tid as u64);
        self.sum.count("pulls");
        if hold {
            let ticket = ticket.clone();
            self.todo.push(Todo::Release {
                slot,
                ticket,
                after: tid,
            });
        }
        let kind = Kind::Pull {
            source: Arc::new(Cells(ops)),
            check_lease,
            release: !hold,
        };
        let spec = Spec {
            id,
            peer: self.peers[peer].key,
            kind,
            verify: self.rng.permille(200),
            deadline,
            workers: workers.len() as u16,
        };
        let live = Live {
            peer,
            request,
            nonce,
            lease: ticket.lease,
        };
        if tries < 3 && !self.faults.quiet() && self.rng.permille(300) {
            let tries = 9;
            // Kept for a second try, if this one fails.
            self.retries.insert(
                tid,
                Todo::Pull {
                    slot,
                    ticket,
                    values,
                    tries,
                },
            );
        }
        self.command(life, owner, Cmd::Submit { spec, live });
        Ok(())
    }

    // ---- second thoughts ---------------------------------------------------------------------

    fn gives_up(&mut self) -> Step {
        if !self.rng.permille(self.faults.gives_up) {
            return Ok(());
        }
        let slot = self.rng.index(self.slots.len());
        let Some(life) = self.author(slot) else {
            return Ok(());
        };
        match self.rng.below(3) {
            0 => {
                // Any transfer, ended ones too.
                if !self.seen.is_empty() {
                    let tid = self.rng.index(self.seen.len());
                    let (life, owner) = (self.seen[tid].life, self.seen[tid].owner);
                    if self.runs(life) {
                        let id = TransferId(tid as u64);
                        self.command(life, owner, Cmd::Cancel { id });
                    }
                }
                Ok(())
            }
            1 => {
                let offers: Vec<RequestId> = self.lives[life]
                    .offers
                    .keys()
                    .map(|(r, _)| r.clone())
                    .collect();
                if !offers.is_empty() {
                    let request = offers[self.rng.index(offers.len())].clone();
                    self.books_do(life, |books, _| books.leases.retract(&request))?;
                }
                Ok(())
            }
            _ => {
                let expected = self.lives[life].expected.values_mut();
                let mut standing: Vec<_> = expected.filter(|e| !e.ended).collect();
                if standing.is_empty() {
                    return Ok(());
                }
                let at = self.rng.index(standing.len());
                standing[at].reason.get_or_insert(Cause::Cancelled);
                let request = standing[at].request.clone();
                self.sum.count("expectation: cancelled");
                self.books_do(life, |books, now| {
                    books.expects.cancel(now, &request, Cause::Cancelled)
                })?;
                let again = self.requests.iter().position(|r| r.name == request);
                if let (Some(request), true) = (again, self.rng.permille(500)) {
                    // Another try under the same name: what is late of the first must not count.
                    self.tries_request(request, 0);
                }
                Ok(())
            }
        }
    }

    /// A transfer of this life has its outcome.
    pub(crate) fn app_hears(&mut self, _life: usize, id: TransferId) {
        let Some(again) = self.retries.remove(&(id.0 as usize)) else {
            return;
        };
        if let Some(Ended::Failed(cause)) = &self.seen[id.0 as usize].ended
            && cause.class() == Class::Retry
            && !self.calm
        {
            self.sum.count("pull: tried again");
            self.todo.push(again);
        }
    }
}
