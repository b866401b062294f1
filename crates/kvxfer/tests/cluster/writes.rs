//! WRITE mode as the authors use it: expectations, and pushes that go on layer by layer.

use kvxfer::expects::ExpectSpec;
use kvxfer::ticket::{Ticket, TicketKind};
use kvxfer::transfer::{Kind, Spec, TransferId};
use kvxfer::wire::PushStart;

use super::app::{Hold, Request, Todo, groups};
use super::books::NO_TICKET;
use super::bug::Step;
use super::check::Seen;
use super::memory::{LAYERS, Owner};
use super::pushes::LayerPart;
use super::worker::{Cmd, Live};
use super::world::{World, log};

impl World {
    pub(crate) fn wants_pushes(&mut self) -> Step {
        let to = self.rng.index(self.slots.len());
        let others: Vec<usize> = (0..self.slots.len()).filter(|s| *s != to).collect();
        let n = 1 + self.rng.index(others.len().min(2));
        let from = self.rng.index(others.len());
        let senders = (0..n).map(|i| others[(from + i) % others.len()]).collect();
        let request = self.requests.len();
        self.requests.push(Request {
            name: format!("write-{request}").into(),
            to,
            blocks: n + self.rng.index(5),
            senders,
        });
        self.tries_request(request, 0);
        Ok(())
    }

    /// The two sides hear of a request in any order.
    pub(crate) fn tries_request(&mut self, request: usize, tries: u32) {
        self.todo.push(Todo::Expect { request, tries });
        for sender in 0..self.requests[request].senders.len() {
            self.todo.push(Todo::BeginPush {
                request,
                sender,
                ticket: None,
                tries: 0,
            });
        }
    }

    pub(crate) fn expects(&mut self, request: usize, tries: u32) -> Step {
        let Request {
            name,
            to,
            blocks,
            senders,
        } = self.requests[request].clone();
        let Some(life) = self.author(to) else {
            return Ok(());
        };
        let nonce = self.fresh_nonce();
        let leave = self.leaves(Hold::Expects);
        let rng = &mut self.rng;
        let memory = &mut self.lives[life].memory;
        let owner = Owner::Expect(nonce.0);
        let Some(taken) = memory.take(rng, blocks, leave, owner, &mut self.fresh) else {
            if self.faults.quiet() || tries < 8 {
                let tries = tries + 1;
                self.todo.push(Todo::Expect { request, tries });
            }
            return Ok(());
        };
        let limit = self.time_limit();
        let senders = senders.len() as u32;
        let (stands, deadline) = self.books_do(life, |books, now| {
            let deadline = now + limit;
            let spec = ExpectSpec {
                request: &name,
                nonce,
                groups: &groups(&taken),
                senders,
                deadline,
                tag: 0,
            };
            (books.expects.expect(now, spec), deadline)
        })?;
        if stands.is_err() {
            self.lives[life].memory.free(&taken, &mut self.fresh);
            return Ok(());
        }
        let seen = super::check::ExpectSeen::new(
            format!("the expectation of {name} by life {life}"),
            name.clone(),
            deadline,
            taken.clone(),
            senders,
        );
        log!(self, "{}: {blocks} blocks, {nonce:?}", seen.name);
        self.lives[life].expected.insert(nonce.0, seen);
        self.sum.count("expectations");
        let ticket = self.ticket(life, TicketKind::Expect, &name, nonce, &taken, senders);
        if self.rng.permille(300) {
            // The router carries it as well.
            for todo in &mut self.todo {
                if let Todo::BeginPush {
                    request: r,
                    ticket: t,
                    ..
                } = todo
                    && *r == request
                {
                    *t = Some(ticket.clone());
                }
            }
        }
        self.announce(life, &ticket)
    }

    pub(crate) fn begins_push(
        &mut self,
        request: usize,
        sender: usize,
        ticket: Option<Ticket>,
        tries: u32,
    ) -> Step {
        let Request {
            name,
            to,
            blocks,
            senders,
        } = self.requests[request].clone();
        let life = self.author(senders[sender]);
        let way = life.and_then(|life| {
            let peer = self.peer_named(life, to)?;
            let newer = ticket
                .as_ref()
                .is_none_or(|t| t.generation == self.peers[peer].generation);
            (newer && self.peers[peer].lost.is_none()).then_some((life, peer))
        });
        let again = Todo::BeginPush {
            request,
            sender,
            ticket: ticket.clone(),
            tries: tries + 1,
        };
        let Some((life, peer)) = way else {
            if self.faults.quiet() || tries < 6 && !self.calm {
                self.todo.push(again);
            }
            return Ok(());
        };
        let tid = self.seen.len();
        let id = TransferId(tid as u64);
        let places: Vec<usize> = (0..blocks)
            .filter(|i| i % senders.len() == sender)
            .collect();
        let stands = |l: usize| self.lives[l].tickets.contains_key(&name);
        let leave = self.leaves(match self.slots[to].is_some_and(stands) {
            true => Hold::Runs,
            false => Hold::Waits,
        });
        let rng = &mut self.rng;
        let memory = &mut self.lives[life].memory;
        let owner = Owner::Push(tid as u64);
        let Some(src) = memory.take(rng, places.len(), leave, owner, &mut self.fresh) else {
            if self.faults.quiet() || tries < 6 {
                self.todo.push(again);
            }
            return Ok(());
        };
        let workers = self.peers[peer].workers.clone();
        let owner = workers[tid % workers.len()];
        let asked_for = ticket.map(|t| t.nonce);
        if !self.push_begins(life, peer, id, owner, &name, asked_for) {
            self.lives[life].memory.free(&src, &mut self.fresh);
            return Ok(());
        }
        let limit = self.time_limit();
        let deadline = self.clock(life) + limit;
        let nonce = asked_for.unwrap_or(NO_TICKET);
        let generation = self.peers[peer].generation;
        let seen = Seen::new(
            life,
            owner,
            peer,
            true,
            name.clone(),
            0,
            generation,
            deadline,
            src.clone(),
        );
        log!(self, "{} begins", seen.name());
        self.seen.push(seen);
        self.seen[tid].nonce = nonce.0;
        self.lives[life].open.insert(tid as u64);
        self.sum.count("pushes");
        let spec = Spec {
            id,
            peer: self.peers[peer].key,
            kind: Kind::Push,
            verify: self.rng.permille(200),
            deadline,
            workers: workers.len() as u16,
        };
        let live = Live {
            peer,
            request: name.clone(),
            nonce,
            lease: None,
        };
        self.command(life, owner, Cmd::Submit { spec, live });
        let start = PushStart {
            request: name,
            nonce: asked_for,
        };
        self.send(peer, start.into());
        // Layer after layer, now and then one in two parts.
        let all: Vec<(usize, u32)> = places.into_iter().zip(src).collect();
        let mut parts = Vec::new();
        for layer in (0..LAYERS).rev() {
            let cut = self.rng.index(all.len() + 1);
            for blocks in [&all[..cut], &all[cut..]] {
                if !blocks.is_empty() {
                    let blocks = blocks.to_vec();
                    parts.push(LayerPart { layer, blocks });
                }
            }
        }
        self.todo.push(Todo::PushOn { life, id, parts });
        Ok(())
    }

    pub(crate) fn pushes_on(&mut self, life: usize, id: TransferId, mut parts: Vec<LayerPart>) {
        if !self.lives[life].alive {
            return;
        }
        if self.lives[life].stopped {
            self.todo.push(Todo::PushOn { life, id, parts });
            return;
        }
        if self.rng.permille(self.faults.gives_up / 4) {
            self.push_abort(life, id);
            return;
        }
        for _ in 0..1 + self.rng.index(3) {
            let Some(part) = parts.pop() else {
                self.push_commit(life, id);
                return;
            };
            if !self.push_layer(life, id, part) {
                return self.push_abort(life, id);
            }
        }
        self.todo.push(Todo::PushOn { life, id, parts });
    }
}
