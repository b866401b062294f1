//! Control connections: bytes between two real sessions, the orders of other threads, the exchange
//! of queue pairs, and dialling again.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::time::Duration;

use kvxfer::ids::{Generation, Rank};
use kvxfer::session::{Closed, Event, Session, SessionConfig, SessionError, SessionState};
use kvxfer::time::Time;
use kvxfer::transfer::{Cause, PeerKey};
use kvxfer::wire::{
    Blob, ConfigFacts, Describe, ErrorCode, Fingerprint, GoodbyeReason, HandshakeNonce, KvRole,
    Message, PathKind, QpAnswer, QpOffer, RailEndpoint, Ready, Refusal, Secret,
};

use super::bug::{Bug, Step, Violation, ensure};
use super::world::{Acted, Actor, MS, World, log};

const PATHS: [PathKind; 4] = [
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Rdma,
];

#[derive(Debug)]
pub(crate) enum Order {
    Send(Box<Message>),
    Rebuild(usize),
    Reset(Cause),
    Close(GoodbyeReason),
}

/// A connection: 0 has dialled, 1 was dialled.
pub(crate) struct Conn {
    /// Bytes on their way to each end.
    to: [VecDeque<u8>; 2],
    open: [bool; 2],
    /// It was reset in between.
    pub(crate) cut: bool,
    /// Nothing gets through, and nobody says so.
    pub(crate) silent: bool,
}

/// One end of a connection and its thread.
pub(crate) struct LinkEnd {
    pub(crate) life: usize,
    conn: usize,
    pub(crate) side: usize,
    pub(crate) session: Box<Session>,
    orders: VecDeque<Order>,
    awake: bool,
    over: bool,
    cause: Option<Cause>,
    /// The first reason to end that anybody gave.
    pub(crate) first_cause: Option<Cause>,
    pub(crate) closed: Option<Closed>,
    pub(crate) last_words: u64,
    pub(crate) gone: bool,
    keeper: Option<usize>,
    key: PeerKey,
    pub(crate) qps: Vec<usize>,
    /// Successors that were offered, by their offers: the lane's number, and the queue pair.
    pub(crate) made: Vec<(u32, usize, usize)>,
    /// Engine, generation and whether it takes notices on the data plane.
    theirs: Option<(usize, Generation, bool)>,
    pub(crate) peer: Option<usize>,
}

/// Who keeps a session up.
pub(crate) struct Keeper {
    pub(crate) life: usize,
    to: usize,
    pause: u64,
    pub(crate) next_at: u64,
    pub(crate) link: Option<usize>,
}

fn config() -> SessionConfig {
    SessionConfig {
        secret: Secret::new(b"a secret of the simulation's own".to_vec()).ok(),
        handshake_timeout: Duration::from_millis(8),
        establish_timeout: Duration::from_millis(16),
        heartbeat_interval: Duration::from_millis(4),
        stall_after: Duration::from_millis(9),
        dead_after: Duration::from_millis(25),
        ..SessionConfig::default()
    }
}

fn cause_of(closed: &Closed) -> Cause {
    match closed {
        Closed::Goodbye(GoodbyeReason::Replaced) => Cause::LaneReset,
        Closed::Goodbye(_) => Cause::PeerClosed,
        Closed::Failed(error) => match error {
            SessionError::PeerClosed { .. } | SessionError::ConnectionLost { .. } => {
                Cause::PeerDead
            }
            SessionError::PeerStalled { silent } => Cause::PeerStalled {
                silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
            },
            _ => Cause::PeerUnreachable,
        },
        _ => Cause::ShuttingDown,
    }
}

pub(crate) fn endpoint(q: usize) -> RailEndpoint {
    RailEndpoint::first(Blob::pack("endpoint", &(q as u64)).unwrap_or_default())
}

impl World {
    /// A life wants a session with whoever lives at `to`, from now on.
    pub(crate) fn keep_up(&mut self, life: usize, to: usize) {
        self.keepers.push(Keeper {
            life,
            to,
            pause: MS / 2,
            next_at: self.now,
            link: None,
        });
        self.actors.push(Actor::Keeper(self.keepers.len() - 1));
    }

    pub(crate) fn keeper_acts(&mut self, k: usize) -> Result<Acted, Violation> {
        let keeper = &self.keepers[k];
        let life = keeper.life;
        if !self.lives[life].alive || self.lives[life].leaving {
            return Ok(Acted::Gone);
        }
        if keeper.link.is_some() || keeper.next_at > self.now || self.lives[life].stopped {
            return Ok(Acted::No);
        }
        let there = self.slots[keeper.to];
        let Some(there) = there.filter(|there| !self.lives[*there].leaving) else {
            self.dial_later(k);
            return Ok(Acted::Yes);
        };
        let conn = self.conns.len();
        self.conns.push(Conn {
            to: [VecDeque::new(), VecDeque::new()],
            open: [true; 2],
            cut: false,
            silent: false,
        });
        for (side, life) in [life, there].into_iter().enumerate() {
            let mut nonce = HandshakeNonce([side as u8; 32]);
            nonce.0[..8].copy_from_slice(&self.rng.next().to_le_bytes());
            let session = match side {
                0 => Session::client(config(), nonce),
                _ => Session::server(config(), nonce),
            };
            let mut session = Box::new(session);
            session.start(self.clock(life));
            self.links.push(LinkEnd {
                life,
                conn,
                side,
                session,
                orders: VecDeque::new(),
                awake: true,
                over: false,
                cause: None,
                first_cause: None,
                closed: None,
                last_words: 0,
                gone: false,
                keeper: (side == 0).then_some(k),
                key: PeerKey(0),
                qps: Vec::new(),
                made: Vec::new(),
                theirs: None,
                peer: None,
            });
            self.actors.push(Actor::Link(self.links.len() - 1));
        }
        self.keepers[k].link = Some(self.links.len() - 2);
        Ok(Acted::Yes)
    }

    fn dial_later(&mut self, k: usize) {
        let keeper = &mut self.keepers[k];
        keeper.next_at = self.now + keeper.pause;
        keeper.pause = (keeper.pause * 2).min(8 * MS);
        if self.bug == Bug::NoRedial {
            keeper.next_at = u64::MAX;
        }
    }

    /// Whether every session that somebody keeps up stands.
    pub(crate) fn sessions_stand(&self) -> bool {
        self.keepers.iter().all(|keeper| {
            let here = &self.lives[keeper.life];
            let up = |link: usize| self.links[link].peer.is_some() && !self.links[link].gone;
            !here.alive || keeper.link.is_some_and(up)
        }) && self.links.iter().all(|link| {
            // What waits to be said is said, and what has ended is known to have.
            let conn = &self.conns[link.conn];
            let still = conn.open[1 - link.side] && !conn.cut && conn.to[link.side].is_empty();
            link.gone || link.orders.is_empty() && still
        })
    }

    /// What keeps sessions from standing, for people.
    pub(crate) fn sessions_left(&self) -> String {
        let mut left = Vec::new();
        for keeper in &self.keepers {
            let up = |link: usize| self.links[link].peer.is_some() && !self.links[link].gone;
            if self.lives[keeper.life].alive && !keeper.link.is_some_and(up) {
                left.push(format!(
                    "life {} has no session with engine {}",
                    keeper.life, keeper.to
                ));
            }
        }
        for (i, link) in self.links.iter().enumerate().filter(|(_, l)| !l.gone) {
            let conn = &self.conns[link.conn];
            let waits = conn.to[link.side].len();
            let there = conn.open[1 - link.side];
            if waits > 0 || !there || conn.cut || !link.orders.is_empty() {
                left.push(format!(
                    "link {i} of life {} in state {}: {waits} bytes, {} orders, open there {there}, cut {}, silent {}, closed {:?}, runs {}",
                    link.life,
                    link.session.state(),
                    link.orders.len(),
                    conn.cut,
                    conn.silent,
                    link.closed,
                    self.runs(link.life),
                ));
            }
        }
        left.join(", ")
    }

    pub(crate) fn order(&mut self, link: usize, order: Order) {
        let end = &mut self.links[link];
        if !end.over {
            end.orders.push_back(order);
            end.awake = true;
        }
    }

    /// Sends a peer a message, unless its session is over.
    pub(crate) fn send(&mut self, peer: usize, message: Message) {
        let link = self.peers[peer].link;
        log!(
            self,
            "life {} orders {} to engine {}",
            self.peers[peer].life,
            message.kind(),
            self.peers[peer].slot
        );
        self.order(link, Order::Send(Box::new(message)));
    }

    pub(crate) fn close_links(&mut self, life: usize) {
        for link in 0..self.links.len() {
            if self.links[link].life == life && !self.links[link].gone {
                self.order(link, Order::Close(GoodbyeReason::ShuttingDown));
            }
        }
    }

    /// The process has ended: its sockets close, and what it has sent before still arrives.
    pub(crate) fn links_die(&mut self, life: usize, silently: bool) {
        for end in self.links.iter_mut().filter(|l| l.life == life && !l.gone) {
            end.gone = true;
            end.over = true;
            let conn = &mut self.conns[end.conn];
            conn.open[end.side] = false;
            conn.silent |= silently;
        }
        for end in &mut self.links {
            end.awake = true;
        }
    }

    pub(crate) fn link_acts(&mut self, link: usize) -> Result<Acted, Violation> {
        let end = &self.links[link];
        if end.gone {
            return Ok(Acted::Gone);
        }
        if !self.runs(end.life) {
            return Ok(Acted::No);
        }
        let conn = &self.conns[end.conn];
        let heard = !conn.to[end.side].is_empty() || conn.cut || !conn.open[1 - end.side];
        let hears = heard && !conn.silent && end.closed.is_none();
        if !end.awake && !hears {
            return Ok(Acted::No);
        }
        self.link_turn(link)?;
        Ok(Acted::Yes)
    }

    /// One round of the thread's loop.
    pub(crate) fn link_turn(&mut self, link: usize) -> Step {
        let life = self.links[link].life;
        let now = self.clock(life);
        self.links[link].awake = false;
        self.link_reads(link, now);
        let due = self.links[link].session.next_timeout();
        if due.is_some_and(|at| at <= now) {
            self.links[link].session.on_time(now);
        }
        self.link_takes_orders(link);
        while let Some(event) = self.links[link].session.poll_event() {
            match event {
                Event::Closed(how) => {
                    let end = &mut self.links[link];
                    ensure!(
                        end.closed.is_none(),
                        Session,
                        "a session of life {life} closes twice"
                    );
                    let known = end.cause.clone().unwrap_or_else(|| cause_of(&how));
                    end.first_cause.get_or_insert(known);
                    end.closed = Some(how);
                    end.last_words = self.now + MS / 5;
                }
                event => self.link_event(link, event)?,
            }
        }
        self.link_writes(link);
        let end = &self.links[link];
        if end.closed.is_some() && (end.session.is_finished() || end.last_words <= self.now) {
            self.link_ends(link)?;
        }
        Ok(())
    }

    fn link_reads(&mut self, link: usize, now: Time) {
        let end = &mut self.links[link];
        let conn = &mut self.conns[end.conn];
        if end.session.is_closed() || conn.silent {
            return;
        }
        if conn.cut {
            return end.session.on_io_error(now, ErrorKind::ConnectionReset);
        }
        let pipe = &mut conn.to[end.side];
        if pipe.is_empty() {
            if !conn.open[1 - end.side] {
                end.session.on_eof(now);
            }
            return;
        }
        let all = pipe.len();
        let n = if self.rng.permille(800) {
            all
        } else {
            1 + self.rng.index(all)
        };
        let bytes: Vec<u8> = pipe.drain(..n).collect();
        end.session.on_bytes(now, &bytes);
    }

    fn link_writes(&mut self, link: usize) {
        let end = &mut self.links[link];
        let now = self.lives[end.life].clock;
        let conn = &mut self.conns[end.conn];
        let bytes = end.session.transmit();
        let n = bytes.len();
        if n == 0 {
            return;
        }
        if conn.open[1 - end.side] && !conn.cut {
            conn.to[1 - end.side].extend(bytes);
        } else if !conn.silent {
            end.session.on_io_error(now, ErrorKind::BrokenPipe);
            end.awake = true;
        }
        end.session.transmitted(n);
    }

    fn link_takes_orders(&mut self, link: usize) {
        while let Some(order) = self.links[link].orders.pop_front() {
            match order {
                Order::Send(message) => self.link_sends(link, &message),
                Order::Rebuild(number) => self.link_rebuilds(link, number),
                Order::Reset(cause) => {
                    let end = &mut self.links[link];
                    if !end.session.is_closed() {
                        end.first_cause.get_or_insert(cause.clone());
                    }
                    if self.bug == Bug::LastCause {
                        end.cause = Some(cause);
                    } else {
                        end.cause.get_or_insert(cause);
                    }
                    end.session.close(GoodbyeReason::Replaced);
                }
                Order::Close(reason) => self.links[link].session.close(reason),
            }
        }
    }

    pub(crate) fn link_sends(&mut self, link: usize, message: &Message) {
        let end = &mut self.links[link];
        if end.session.is_closed() {
            return;
        }
        if let Err(error) = end.session.send(message) {
            end.session.cut_off(ErrorCode::Internal, &error.to_string());
        }
    }

    fn describe(&self, life: usize) -> Describe {
        let life = &self.lives[life];
        Describe {
            engine: life.name.clone(),
            generation: life.generation,
            rank: Rank::default(),
            kv_role: KvRole::Both,
            wanted: None,
            fingerprint: Fingerprint([7; 32]),
            format: Blob::default(),
            placement: Blob::pack("slot", &(life.slot as u64)).unwrap_or_default(),
            rails: Vec::new(),
            facts: ConfigFacts {
                qp_per_transfer: 2,
                max_send_wr: 8,
                max_msg_sge: 1,
                max_msg_bytes: 8,
                enable_notification: life.notices,
                num_worker_threads: 1,
                listen_port: 0,
            },
            fd_backed: true,
            gpu: None,
            shared: None,
        }
    }

    fn link_event(&mut self, link: usize, event: Event) -> Step {
        let life = self.links[link].life;
        match event {
            Event::Authenticated { by_secret, .. } => {
                ensure!(by_secret, Session, "a session without its secret");
                let describe = self.describe(life);
                self.link_sends(link, &describe.into());
            }
            Event::PeerDescribed(describe) => {
                let slot: u64 = describe.placement.unpack("slot").unwrap_or(u64::MAX);
                let notices = describe.facts.enable_notification && self.lives[life].notices;
                if !self.meets(life, slot as usize, describe.generation) {
                    self.sum.count("session: of a life that is over");
                    let refusal = Refusal::GenerationRetired;
                    self.links[link].session.refuse(refusal);
                    return Ok(());
                }
                let end = &mut self.links[link];
                end.theirs = Some((slot as usize, describe.generation, notices));
                end.session.accept();
                if end.side == 0 {
                    let path = PATHS[self.rng.index(PATHS.len())];
                    self.sum.count(match path {
                        PathKind::Arena => "path: arena",
                        PathKind::ProcessVm => "path: process_vm",
                        PathKind::Tcp => "path: tcp",
                        _ => "path: rdma",
                    });
                    let lanes = 1 + self.rng.index(3);
                    let endpoints = self.make_qps(link, lanes, path);
                    let offer = QpOffer {
                        offer: 1,
                        replaces: None,
                        path,
                        candidates: Vec::new(),
                        endpoints,
                    };
                    self.link_sends(link, &offer.into());
                }
            }
            Event::QpOffer(offer) if offer.replaces.is_some() => {
                self.answers_successor(link, offer)?
            }
            Event::QpAnswer(answer) if answer.offer > 1 => {
                self.successor_answered(link, &answer)?
            }
            Event::QpOffer(offer) => {
                let endpoints = self.make_qps(link, offer.endpoints.len(), offer.path);
                self.join(link, &offer.endpoints);
                let answer = QpAnswer {
                    offer: offer.offer,
                    path: Some(offer.path),
                    candidates: Vec::new(),
                    endpoints,
                };
                self.link_sends(link, &answer.into());
                self.link_sends(link, &Ready {}.into());
            }
            Event::QpAnswer(answer) => {
                self.join(link, &answer.endpoints);
                self.link_sends(link, &Ready {}.into());
            }
            Event::Established => self.established(link)?,
            Event::Message(message) => {
                let state = self.links[link].session.state();
                ensure!(
                    matches!(state, SessionState::Established | SessionState::Closed),
                    Session,
                    "{} in state {state}",
                    message.kind()
                );
                if let Some(peer) = self.links[link].peer
                    && let Err(lie) = self.on_message(peer, message)?
                {
                    ensure!(false, Session, "life {life} hears a lie: {lie}");
                }
            }
            Event::Stalled { .. } => self.sum.count("event: peer stalled"),
            Event::Resumed { .. } => self.sum.count("event: peer heard again"),
            _ => {}
        }
        Ok(())
    }

    fn make_qps(&mut self, link: usize, count: usize, path: PathKind) -> Vec<RailEndpoint> {
        let life = self.links[link].life;
        let key = PeerKey(self.keys);
        self.keys += 1;
        let workers = self.lives[life].workers.len() as u64;
        let qps: Vec<usize> = (0..count)
            .map(|lane| {
                // Two lanes for each worker in turn: one on each rail.
                let worker = ((key.0 + lane as u64 / 2) % workers) as usize;
                self.new_qp(life, worker, key, path, lane % 2)
            })
            .collect();
        let ends = qps.iter().map(|q| endpoint(*q)).collect();
        self.links[link].key = key;
        self.links[link].qps = qps;
        ends
    }

    fn join(&mut self, link: usize, theirs: &[RailEndpoint]) {
        for (q, end) in self.links[link].qps.iter().zip(theirs) {
            let remote: u64 = end.endpoint.unpack("endpoint").unwrap_or(u64::MAX);
            self.qps[*q].remote = Some(remote as usize);
        }
    }

    fn established(&mut self, link: usize) -> Step {
        let end = &self.links[link];
        let Some((slot, generation, notices)) = end.theirs else {
            ensure!(false, Session, "established without a description");
            return Ok(());
        };
        if let Some(k) = end.keeper {
            self.keepers[k].pause = MS / 2;
        }
        let (life, key, qps) = (end.life, end.key, end.qps.clone());
        self.new_peer(life, link, key, slot, generation, notices, qps)
    }

    fn link_ends(&mut self, link: usize) -> Step {
        let end = &mut self.links[link];
        end.gone = true;
        end.over = true;
        let how = end.closed.clone();
        let ended = how.as_ref().map_or(Cause::ShuttingDown, cause_of);
        let cause = end.cause.clone().unwrap_or(ended);
        self.conns[end.conn].open[end.side] = false;
        let (keeper, peer, qps) = (end.keeper, end.peer, std::mem::take(&mut end.qps));
        let made = std::mem::take(&mut end.made);
        // The other side's thread finds out.
        for other in &mut self.links {
            other.awake = true;
        }
        for (.., q) in made {
            self.qp_destroys(q)?;
        }
        match peer {
            Some(peer) => self.peer_down(peer, &cause)?,
            None => {
                self.sum.count("session: not set up");
                for q in qps {
                    self.qp_destroys(q)?;
                }
            }
        }
        if let Some(k) = keeper {
            self.keepers[k].link = None;
            self.dial_later(k);
        }
        Ok(())
    }

    /// A connection with two ends that live, to do something to.
    pub(crate) fn some_conn(&mut self) -> Option<usize> {
        let live: Vec<usize> = self
            .links
            .iter()
            .filter(|l| !l.gone && l.side == 0)
            .map(|l| l.conn)
            .collect();
        (!live.is_empty()).then(|| live[self.rng.index(live.len())])
    }
}
