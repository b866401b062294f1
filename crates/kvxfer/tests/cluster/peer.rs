//! A peer of an engine: one session with one life of another, and how it is lost.

use kvxfer::ids::Generation;
use kvxfer::transfer::{Cause, DrainToken, PeerKey};
use kvxfer::wire::PathKind;

use super::bug::{Bug, Step, ensure};
use super::link::Order;
use super::worker::Cmd;
use super::world::{World, log};

pub(crate) struct PeerM {
    pub(crate) life: usize,
    pub(crate) key: PeerKey,
    /// Whom it is a life of.
    pub(crate) slot: usize,
    pub(crate) generation: Generation,
    pub(crate) link: usize,
    /// The workers that have lanes; never empty.
    pub(crate) workers: Vec<usize>,
    pub(crate) notices: bool,
    /// Whether the ends of pushes may go by queue pairs alone.
    pub(crate) rdma: bool,
    /// By their numbers.
    pub(crate) lanes: Vec<LaneM>,
    pub(crate) lost: Option<Cause>,
    pub(crate) dropping: bool,
    gone: bool,
    pub(crate) workers_left: usize,
    waiting: Vec<(usize, DrainToken)>,
}

/// A lane, for all workers.
pub(crate) struct LaneM {
    pub(crate) qp: usize,
    /// It has failed here; the peer has taken its half down.
    pub(crate) failed: bool,
    pub(crate) down_there: bool,
    /// This side has destroyed its half.
    pub(crate) down_here: bool,
    /// How many successors it has had.
    pub(crate) rebuilt: u32,
}

impl LaneM {
    pub(crate) fn new(qp: usize) -> Self {
        Self {
            qp,
            failed: false,
            down_there: false,
            down_here: false,
            rebuilt: 0,
        }
    }
}

/// Who may say that what went over a rail is in the peer's memory: the workers that have such lanes.
pub(crate) enum Speaker {
    Pair(Vec<usize>),
    Any(Vec<usize>),
    Nobody,
}

impl World {
    pub(crate) fn speaker(&self, peer: usize, rail: usize) -> Speaker {
        let lanes = &self.peers[peer].lanes;
        let on_rail = |lane: &&LaneM| self.qps[lane.qp].rail == rail;
        let workers = |lanes: &mut dyn Iterator<Item = &LaneM>| -> Vec<usize> {
            let works = lanes.filter(|lane| !lane.failed);
            works.map(|lane| self.qps[lane.qp].worker).collect()
        };
        let of_rail = workers(&mut lanes.iter().filter(on_rail));
        let down = lanes.iter().filter(on_rail).all(|lane| lane.down_there);
        let any = matches!(self.bug, Bug::OneRailTells)
            || self.bug == Bug::SpeaksTooSoon && of_rail.is_empty();
        match (of_rail.is_empty(), down || any) {
            (_, true) => Speaker::Any(workers(&mut lanes.iter())),
            (false, false) => Speaker::Pair(of_rail),
            (true, false) => Speaker::Nobody,
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what bring-up has found out")]
    pub(crate) fn new_peer(
        &mut self,
        life: usize,
        link: usize,
        key: PeerKey,
        slot: usize,
        generation: Generation,
        notices: bool,
        qps: Vec<usize>,
    ) -> Step {
        let rdma = qps.iter().all(|q| self.qps[*q].path == PathKind::Rdma);
        let notices = notices || rdma;
        let mut workers: Vec<usize> = qps.iter().map(|q| self.qps[*q].worker).collect();
        workers.sort_unstable();
        workers.dedup();
        let peer = self.peers.len();
        self.peers.push(PeerM {
            life,
            key,
            slot,
            generation,
            link,
            workers_left: workers.len(),
            workers,
            notices,
            rdma,
            lanes: qps.iter().map(|qp| LaneM::new(*qp)).collect(),
            lost: None,
            dropping: false,
            gone: false,
            waiting: Vec::new(),
        });
        for qp in qps {
            let w = self.qps[qp].worker;
            let replaces = None;
            self.command(life, w, Cmd::AddLane { peer, qp, replaces });
        }
        self.links[link].peer = Some(peer);
        // peer_up
        self.lives[life].up.insert(key, peer);
        self.sum.count("event: peer up");
        if self.lives[life].met.get(&slot) != Some(&generation) {
            // A later life was met while this session was set up.
            self.peer_fails(peer, Cause::PeerRestarted);
        }
        log!(self, "life {life}: engine {slot} is up ({generation})");
        Ok(())
    }

    /// A peer has said who it is (`Inner::meet`). False: a later life of it has been met. A new life
    /// ends the sessions with earlier ones.
    pub(crate) fn meets(&mut self, life: usize, slot: usize, generation: Generation) -> bool {
        // The model's generations count.
        let born = |g: &Generation| {
            let mut count = [0; 8];
            count.copy_from_slice(&g.0[..8]);
            u64::from_le_bytes(count)
        };
        match self.lives[life].met.get(&slot) {
            Some(old) if born(old) > born(&generation) => return false,
            Some(old) if *old != generation => self.sum.count("event: peer restarted"),
            _ => {}
        }
        self.lives[life].met.insert(slot, generation);
        let up: Vec<usize> = self.lives[life].up.values().copied().collect();
        for peer in up {
            let p = &self.peers[peer];
            if p.slot == slot && p.generation != generation {
                self.peer_fails(peer, Cause::PeerRestarted);
            }
        }
        true
    }

    pub(crate) fn peer_of_qp(&self, q: usize) -> Option<usize> {
        let key = self.qps[q].key;
        self.peers.iter().position(|p| p.key == key)
    }

    /// The newest peer of that name with a session that stands.
    pub(crate) fn peer_named(&self, life: usize, slot: usize) -> Option<usize> {
        let up = self.lives[life].up.values().copied();
        up.filter(|p| self.peers[*p].slot == slot)
            .max_by_key(|p| self.peers[*p].key)
    }

    /// The peer cannot be used any more: its session ends.
    pub(crate) fn peer_fails(&mut self, peer: usize, cause: Cause) {
        let link = self.peers[peer].link;
        self.order(link, Order::Reset(cause));
    }

    /// The session is over: the workers are told, and the queue pairs go down.
    pub(crate) fn lose(&mut self, peer: usize, cause: &Cause) -> Step {
        if self.peers[peer].lost.is_some() {
            return Ok(());
        }
        let (life, key, link) = {
            let p = &self.peers[peer];
            (p.life, p.key, p.link)
        };
        let first = self.links[link].first_cause.clone();
        ensure!(
            first.is_none() || first.as_ref() == Some(cause),
            FirstCause,
            "life {life} loses its peer with {cause}, first was {first:?}"
        );
        log!(
            self,
            "life {life} loses engine {}: {cause}",
            self.peers[peer].slot
        );
        self.peers[peer].lost = Some(cause.clone());
        for w in 0..self.lives[life].workers.len() {
            let cause = cause.clone();
            self.command(life, w, Cmd::PeerLost { peer: key, cause });
        }
        self.drop_lanes(peer);
        Ok(())
    }

    /// A ledger wants to know when nothing posted to the peer can touch memory any more.
    pub(crate) fn peer_drains(&mut self, peer: usize, w: usize, token: DrainToken) -> Step {
        if self.peers[peer].gone {
            self.answer_drain(peer, w, token);
            return Ok(());
        }
        self.peers[peer].waiting.push((w, token));
        self.peer_fails(peer, Cause::LaneReset);
        self.drop_lanes(peer);
        Ok(())
    }

    pub(crate) fn drop_lanes(&mut self, peer: usize) {
        if std::mem::replace(&mut self.peers[peer].dropping, true) {
            return;
        }
        let life = self.peers[peer].life;
        for w in self.peers[peer].workers.clone() {
            self.command(life, w, Cmd::DropLanes { peer });
        }
    }

    /// A worker has destroyed its queue pairs to the peer.
    pub(crate) fn worker_drained(&mut self, peer: usize) -> Step {
        self.peers[peer].workers_left -= 1;
        if self.peers[peer].workers_left > 0 {
            return Ok(());
        }
        self.peers[peer].gone = true;
        for (w, token) in std::mem::take(&mut self.peers[peer].waiting) {
            self.answer_drain(peer, w, token);
        }
        let (life, key) = (self.peers[peer].life, self.peers[peer].key);
        self.lives[life].draining.remove(&key);
        self.books_do(life, |books, _| books.expects.peer_reset(key))
    }

    fn answer_drain(&mut self, peer: usize, w: usize, token: DrainToken) {
        let (life, peer) = (self.peers[peer].life, self.peers[peer].key);
        self.command(life, w, Cmd::PeerDrained { peer, token });
    }

    /// A session is over: everything that ran over it ends.
    pub(crate) fn peer_down(&mut self, peer: usize, cause: &Cause) -> Step {
        let (life, key) = (self.peers[peer].life, self.peers[peer].key);
        self.lives[life].up.remove(&key);
        if !self.peers[peer].gone {
            self.lives[life].draining.insert(key);
        }
        self.lose(peer, cause)?;
        self.pushes_peer_lost(life, key);
        self.reason_of_writer(life, key, cause);
        let told = cause.clone();
        self.books_do(life, |books, now| {
            books.wanted.retain(|(_, k)| *k != key);
            books.expects.peer_lost(now, key, &told);
        })?;
        self.sum.count("event: peer down");
        Ok(())
    }
}
