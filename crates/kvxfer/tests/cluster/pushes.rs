//! Pushes as the engine and its author share them: the stages of one, and which ticket is for which.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvxfer::ids::{Nonce, RequestId};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::{Cause, PeerKey, Refusal, TransferId};

use super::bug::{Bug, Step};
use super::device::mask;
use super::memory::{BLOCK_CELLS, LAYER_CELLS};
use super::source::{CellOp, Cells};
use super::worker::Cmd;
use super::world::World;

/// Some blocks of one layer: places in the ticket's list, and the source blocks.
#[derive(Debug, Clone)]
pub(crate) struct LayerPart {
    pub(crate) layer: u32,
    pub(crate) blocks: Vec<(usize, u32)>,
}

#[derive(Debug)]
pub(crate) enum Stage {
    Asked {
        waiting: Vec<LayerPart>,
        committed: bool,
    },
    Open(Ticket),
    Ended {
        opened: bool,
    },
}

impl Stage {
    fn end(&mut self) {
        let opened = matches!(self, Stage::Open(_) | Stage::Ended { opened: true });
        *self = Stage::Ended { opened };
    }
}

#[derive(Debug)]
pub(crate) struct Pushing {
    pub(crate) peer: usize,
    pub(crate) owner: usize,
    pub(crate) request: RequestId,
    pub(crate) asked_for: Option<Nonce>,
    pub(crate) stage: Stage,
    /// Removed from the tables; the author's handle still leads here.
    gone: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Pushes {
    pub(crate) by_id: BTreeMap<TransferId, Pushing>,
    by_request: BTreeMap<(PeerKey, RequestId), TransferId>,
    used: BTreeSet<(RequestId, u64)>,
}

impl World {
    /// Takes a new push, unless an earlier one of the request has not ended.
    pub(crate) fn push_begins(
        &mut self,
        life: usize,
        peer: usize,
        id: TransferId,
        owner: usize,
        request: &RequestId,
        asked_for: Option<Nonce>,
    ) -> bool {
        let key = self.peers[peer].key;
        let pushes = &mut self.lives[life].pushes;
        let place = (key, request.clone());
        if pushes.by_request.contains_key(&place) {
            return false;
        }
        pushes.by_request.insert(place, id);
        let stage = Stage::Asked {
            waiting: Vec::new(),
            committed: false,
        };
        let pushing = Pushing {
            peer,
            owner,
            request: request.clone(),
            asked_for,
            stage,
            gone: false,
        };
        pushes.by_id.insert(id, pushing);
        true
    }

    fn push_of(&self, life: usize, key: PeerKey, request: &RequestId) -> Option<TransferId> {
        let pushes = &self.lives[life].pushes;
        pushes.by_request.get(&(key, request.clone())).copied()
    }

    fn pushing(&mut self, life: usize, id: TransferId) -> &mut Pushing {
        self.lives[life]
            .pushes
            .by_id
            .get_mut(&id)
            .expect("a push is kept while anything names it")
    }

    fn push_sends(&mut self, life: usize, id: TransferId, command: Cmd) {
        let owner = self.pushing(life, id).owner;
        self.command(life, owner, command);
    }

    /// The consumer has sent a ticket.
    pub(crate) fn push_announced(&mut self, life: usize, peer: usize, ticket: &Ticket) -> Step {
        let key = self.peers[peer].key;
        let place = (ticket.request.clone(), ticket.nonce.0);
        let used = !self.lives[life].pushes.used.insert(place);
        match self.push_of(life, key, &ticket.request) {
            Some(id) if used => {
                if matches!(self.pushing(life, id).stage, Stage::Asked { .. }) {
                    let cause = Cause::Refused {
                        reason: Refusal::Late,
                    };
                    self.push_sends(life, id, Cmd::Fail { id, cause });
                    self.pushing(life, id).stage.end();
                }
            }
            Some(id) => self.push_opens(life, id, ticket),
            None if used => {}
            None => self.close_push(peer, &ticket.request, ticket.nonce),
        }
        Ok(())
    }

    /// The ticket is here: what waited goes out.
    fn push_opens(&mut self, life: usize, id: TransferId, ticket: &Ticket) {
        let push = self.pushing(life, id);
        let ended = matches!(push.stage, Stage::Ended { .. });
        let (waiting, committed) = match &mut push.stage {
            Stage::Asked { waiting, committed } => (std::mem::take(waiting), *committed),
            Stage::Ended { opened: false } => (Vec::new(), false),
            Stage::Open(_) | Stage::Ended { opened: true } => return,
        };
        let (request, peer) = (push.request.clone(), push.peer);
        let nonce = ticket.nonce;
        self.push_sends(
            life,
            id,
            Cmd::Ticket {
                id,
                nonce,
                request,
                peer,
            },
        );
        if ended {
            self.pushing(life, id).stage = Stage::Ended { opened: true };
            return;
        }
        for part in waiting {
            self.push_adds(life, id, ticket, &part);
        }
        if committed {
            self.push_sends(life, id, Cmd::Commit { id });
            self.pushing(life, id).stage = Stage::Ended { opened: true };
        } else {
            self.pushing(life, id).stage = Stage::Open(ticket.clone());
        }
    }

    /// Plans one part and hands it to the worker.
    fn push_adds(&mut self, life: usize, id: TransferId, ticket: &Ticket, part: &LayerPart) {
        let dst = ticket.groups.first().map_or(&[][..], |g| &g.blocks);
        let mut ops = Vec::new();
        for (place, src) in &part.blocks {
            let Some(block) = dst.get(*place).copied() else {
                let cause = Cause::Refused {
                    reason: Refusal::OutOfRange,
                };
                self.push_sends(life, id, Cmd::Fail { id, cause });
                return;
            };
            let at = part.layer * LAYER_CELLS;
            let (local, remote) = (src * BLOCK_CELLS + at, block * BLOCK_CELLS + at);
            let step = if self.rng.permille(500) {
                1
            } else {
                LAYER_CELLS
            };
            for from in (0..LAYER_CELLS).step_by(step as usize) {
                ops.push(CellOp {
                    remote: remote + from,
                    local: local + from,
                    len: step,
                    block,
                });
            }
        }
        let seen = &mut self.seen[id.0 as usize];
        for op in &ops {
            seen.planned |= mask(op.remote, op.len);
            for i in 0..op.len {
                let value = self.lives[life].memory.cells[(op.local + i) as usize];
                seen.wants.push((op.remote + i, value));
            }
        }
        let source = Arc::new(Cells(ops));
        self.push_sends(life, id, Cmd::AddJob { id, source });
    }

    /// The consumer wants a push no more, or never did.
    pub(crate) fn push_revoked(
        &mut self,
        life: usize,
        peer: usize,
        request: &RequestId,
        nonce: Nonce,
        cause: &Cause,
    ) -> Step {
        let key = self.peers[peer].key;
        let used = self.lives[life]
            .pushes
            .used
            .contains(&(request.clone(), nonce.0));
        let meant = self.push_of(life, key, request).filter(|id| {
            let push = &self.lives[life].pushes.by_id[id];
            match &push.stage {
                Stage::Open(ticket) => ticket.nonce == nonce,
                Stage::Asked { .. } => push.asked_for.map_or(!used, |asked| asked == nonce),
                Stage::Ended { .. } => true,
            }
        });
        self.sum.count("push revoked");
        match meant {
            Some(id) => {
                let cause = cause.clone();
                self.push_sends(life, id, Cmd::Fail { id, cause });
                if self.bug == Bug::ClosedTooSoon {
                    self.close_push(peer, request, nonce);
                }
            }
            None => self.close_push(peer, request, nonce),
        }
        Ok(())
    }

    pub(crate) fn pushes_peer_lost(&mut self, life: usize, key: PeerKey) {
        let peers = &self.peers;
        for push in self.lives[life].pushes.by_id.values_mut() {
            if !push.gone && peers[push.peer].key == key {
                push.stage.end();
            }
        }
    }

    /// Nothing of the push is posted, and the consumer has been told so.
    pub(crate) fn push_ended(&mut self, life: usize, id: TransferId) {
        let peers = &self.peers;
        let pushes = &mut self.lives[life].pushes;
        if let Some(push) = pushes.by_id.get_mut(&id) {
            push.gone = true;
            push.stage.end();
            let place = (peers[push.peer].key, push.request.clone());
            pushes.by_request.remove(&place);
        }
    }

    // ---- the author's calls ------------------------------------------------------------------

    /// `false`: the push has ended.
    pub(crate) fn push_layer(&mut self, life: usize, id: TransferId, part: LayerPart) -> bool {
        let ticket = match &mut self.pushing(life, id).stage {
            Stage::Asked {
                committed: true, ..
            }
            | Stage::Ended { .. } => return false,
            Stage::Asked { waiting, .. } => {
                waiting.push(part);
                return true;
            }
            Stage::Open(ticket) => ticket.clone(),
        };
        self.push_adds(life, id, &ticket, &part);
        true
    }

    pub(crate) fn push_commit(&mut self, life: usize, id: TransferId) {
        match &mut self.pushing(life, id).stage {
            Stage::Asked { committed, .. } => *committed = true,
            Stage::Open(_) => {
                self.push_sends(life, id, Cmd::Commit { id });
                self.pushing(life, id).stage.end();
            }
            Stage::Ended { .. } => {}
        }
    }

    pub(crate) fn push_abort(&mut self, life: usize, id: TransferId) {
        self.pushing(life, id).stage.end();
        self.push_sends(life, id, Cmd::Abort { id });
    }
}
