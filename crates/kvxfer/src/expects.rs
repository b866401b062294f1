//! A consumer's expectations: blocks that other engines may write. Pure: messages and time go in,
//! [`ExpectOutput`]s come out.
//!
//! # Who may write
//! A peer may write only after it was *bound* to the expectation: by announcing the ticket to it
//! on its control connection ([`Expects::announce`]), or, when the ticket reached it through a
//! router, by asking first ([`Expects::push_started`]). At most `senders` peers are bound. So when
//! all of them have said that they are done nobody is left who could write, and when an
//! expectation fails the peers that could still write are known by name.
//!
//! A sender is a rank of an engine, by name, and one sender has one session: a rank that has said it
//! is done, or is bound over one session, is not bound again over another, nor after a restart under
//! its name. Otherwise one producer that writes twice would count for another that never came.
//!
//! A push that outlives its queue pairs (one side reset them) must ask with `push_started` again
//! before it is posted on new ones: its expectation may have ended in between.
//!
//! # How it ends
//! The outcome comes once: [`Received`](ExpectOutput::Received), or
//! [`Failed`](ExpectOutput::Failed) by deadline, cancel, abort or a lost peer. After a failure the
//! memory is quarantined while a bound peer may still write: each is sent a
//! [`Revoke`](ExpectOutput::Revoke) and must answer that it has closed its push, which it does
//! only when nothing of it is under way. One that does not answer within the grace is cut off
//! ([`ForceReset`](ExpectOutput::ForceReset)): this side resets its own queue pairs to it, after
//! which nothing of that peer can land. When the last one is closed or cut off comes
//! [`Released`](ExpectOutput::Released), once.
//!
//! # Kernels that write
//! A peer that was let ([`Expects::let_kernels_write`]) has kernels of its own write the blocks, which no queue pair
//! carries: a reset takes nothing away from them. Such a peer is not cut off, and when its session is over it stays a
//! writer until it says that it has closed its push, or until its process has ended
//! ([`Expects::process_ended`]).

mod endings;
mod types;

pub use types::{ExpectError, ExpectOutput, ExpectSpec, PushProgress, PushRefusal, Sender};

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::block_set::{BlockSet, check_groups};
use crate::blocks::GroupBlocks;
use crate::claims::{Claim, Claimant, Claims, Purpose};
use crate::event::PeerName;
use crate::ids::{Nonce, RequestId};
use crate::plan::Cover;
use crate::rails::RailSet;
use crate::recent::Recent;
use crate::ticket::MAX_PARTIES;
use crate::time::Time;
use crate::transfer::{Cause, PeerKey};

/// How many ended expectations are remembered to tell a late message from a wrong one.
const REMEMBERED: usize = 4096;

/// The immediates that one sender may tell of one try: each is an event, which waits until the owner takes it.
pub const MOST_IMMEDIATES: u64 = 1 << 16;

/// How far a bound peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    /// It may write.
    Open,
    /// Its session is over, and kernels of its process may write yet.
    Kernels,
    /// It will write no more; what it has written is compared with its checksums.
    Written,
    /// It will write no more.
    Closed,
}

#[derive(Debug)]
struct Bound {
    /// The session over which it writes.
    peer: PeerKey,
    /// Who it is.
    name: PeerName,
    /// What of each block it writes.
    cover: Cover,
    state: Writer,
    /// Whether kernels of its own may write.
    kernels: bool,
    /// The pairs of rails that it has written over, once it has said so; and those of them of which it has
    /// said that all is in memory.
    rails: RailSet,
    spoken: RailSet,
    /// How many immediates it has told.
    immediates: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The outcome is to come, by this time.
    Standing(Time),
    /// Failed; open writers were told, and are cut off at this time, if they were not yet.
    Draining(Option<Time>),
}

#[derive(Debug)]
struct Expectation {
    request: RequestId,
    nonce: Nonce,
    tag: u64,
    groups: Vec<GroupBlocks>,
    /// The same blocks, to be asked for one by one; from the first time on that they are.
    set: OnceLock<Arc<BlockSet>>,
    senders: u32,
    /// The bound peers; at most `senders`, usually a handful.
    writers: Vec<Bound>,
    phase: Phase,
    /// Its blocks, while a peer may write them.
    _claim: Claim,
}

impl Expectation {
    fn writer(&mut self, peer: PeerKey) -> Option<&mut Writer> {
        self.writers
            .iter_mut()
            .find(|w| w.peer == peer)
            .map(|w| &mut w.state)
    }

    fn sender(&mut self, peer: PeerKey) -> Result<&mut Writer, PushRefusal> {
        self.writer(peer).ok_or(PushRefusal::NotASender)
    }

    fn open_writers(&self) -> impl Iterator<Item = PeerKey> {
        self.writers
            .iter()
            .filter(|w| w.state == Writer::Open)
            .map(|w| w.peer)
    }

    /// Whether anybody may write yet.
    fn may_be_written(&self) -> bool {
        let writes = |w: &Bound| matches!(w.state, Writer::Open | Writer::Kernels);
        self.writers.iter().any(writes)
    }

    fn timer(&self) -> Option<Time> {
        match self.phase {
            Phase::Standing(deadline) => Some(deadline),
            Phase::Draining(cut_off) => cut_off,
        }
    }
}

/// The expectations of one consumer rank.
#[derive(Debug)]
pub struct Expects {
    grace: Duration,
    next_key: u64,
    all: HashMap<u64, Expectation>,
    /// Both standing and draining ones: a new try may stand while an old one drains.
    by_try: HashMap<(RequestId, Nonce), u64>,
    standing: HashMap<RequestId, u64>,
    timers: BTreeSet<(Time, u64)>,
    /// Where the blocks of every standing or draining expectation are claimed.
    claims: Claims,
    /// Peers whose reset was asked for and has not been reported.
    resetting: HashSet<PeerKey>,
    ended: Recent,
    outputs: VecDeque<ExpectOutput>,
}

impl Expects {
    /// No expectations; a revoked peer has `grace` to answer before it is cut off. Blocks are claimed
    /// among the rank's `claims` until they are the owner's again.
    #[must_use]
    pub fn new(grace: Duration, claims: Claims) -> Expects {
        Expects {
            grace,
            next_key: 0,
            all: HashMap::new(),
            by_try: HashMap::new(),
            standing: HashMap::new(),
            timers: BTreeSet::new(),
            claims,
            resetting: HashSet::new(),
            ended: Recent::new(REMEMBERED),
            outputs: VecDeque::new(),
        }
    }

    /// Lets peers write the blocks of a request until a deadline. Expecting the same
    /// again is fine and changes nothing; `Ok(false)` says that it stood already.
    ///
    /// # Errors
    /// It makes no sense, contradicts an expectation that stands or has ended, or wants a block
    /// that is in something else. Nothing is changed then.
    pub fn expect(&mut self, now: Time, want: ExpectSpec<'_>) -> Result<bool, ExpectError> {
        let ExpectSpec {
            request,
            nonce,
            groups,
            senders,
            deadline,
            tag,
        } = want;
        if senders == 0 || senders > MAX_PARTIES {
            return Err(ExpectError::Senders {
                request: request.clone(),
                senders,
            });
        }
        if let Some(held) = self.standing.get(request).and_then(|key| self.all.get(key)) {
            return if held.nonce != nonce {
                Err(ExpectError::OtherNonce {
                    request: request.clone(),
                    held: held.nonce,
                    given: nonce,
                })
            } else if held.groups != groups || held.senders != senders {
                Err(ExpectError::Differs {
                    request: request.clone(),
                    nonce,
                })
            } else {
                Ok(false)
            };
        }
        // A try that still drains has ended too, as far as its outcome goes.
        if self.ended.contains(request, nonce)
            || self.by_try.contains_key(&(request.clone(), nonce))
        {
            return Err(ExpectError::Ended {
                request: request.clone(),
                nonce,
            });
        }
        if deadline <= now {
            return Err(ExpectError::NoTime {
                request: request.clone(),
            });
        }
        check_groups(groups).map_err(|source| ExpectError::Blocks {
            request: request.clone(),
            source,
        })?;
        let who = Claimant {
            request,
            purpose: Purpose::Expect,
        };
        let claim = self.claims.claim(who, groups.to_vec())?;

        let key = self.next_key;
        self.next_key += 1;
        self.by_try.insert((request.clone(), nonce), key);
        self.standing.insert(request.clone(), key);
        self.timers.insert((deadline, key));
        self.all.insert(
            key,
            Expectation {
                request: request.clone(),
                nonce,
                tag,
                groups: groups.to_vec(),
                set: OnceLock::new(),
                senders,
                writers: Vec::new(),
                phase: Phase::Standing(deadline),
                _claim: claim,
            },
        );
        Ok(true)
    }

    /// Binds a peer, before the ticket is sent to it. Announcing again over the same session is fine.
    ///
    /// # Errors
    /// The try does not stand, or has all its senders.
    pub fn announce(
        &mut self,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        who: Sender<'_>,
    ) -> Result<(), PushRefusal> {
        self.bind(request, nonce, peer, who)
    }

    /// A peer that has the ticket from elsewhere asks whether it may begin to write. It may when
    /// this succeeds; a peer that the ticket was announced to need not ask.
    ///
    /// # Errors
    /// It may not; tell it why.
    pub fn push_started(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        who: Sender<'_>,
    ) -> Result<(), PushRefusal> {
        self.on_time(now);
        self.bind(request, nonce, peer, who)
    }

    fn bind(
        &mut self,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        who: Sender<'_>,
    ) -> Result<(), PushRefusal> {
        let key = self.find(request, nonce)?;
        let expectation = self.expectation(key);
        if matches!(expectation.phase, Phase::Draining(_)) {
            return Err(PushRefusal::Late);
        }
        match expectation.writer(peer).copied() {
            Some(Writer::Open) => Ok(()),
            // It said that it is done; beginning again would write into finished blocks.
            Some(Writer::Written | Writer::Closed | Writer::Kernels) => Err(PushRefusal::Late),
            None if expectation.writers.iter().any(|w| w.name == *who.name) => {
                Err(PushRefusal::Late)
            }
            None if expectation.writers.len() >= expectation.senders as usize => {
                Err(PushRefusal::SendersFull {
                    senders: expectation.senders,
                })
            }
            None => {
                expectation.writers.push(Bound {
                    peer,
                    name: who.name.clone(),
                    cover: who.cover.clone(),
                    state: Writer::Open,
                    kernels: false,
                    rails: RailSet::EMPTY,
                    spoken: RailSet::EMPTY,
                    immediates: 0,
                });
                Ok(())
            }
        }
    }

    /// A sender has seen all completions, and what it has written over the pair `rail`, one of `rails`, is in
    /// memory. Whether that is so now for all of `rails`: only then may [`push_done`](Self::push_done) or
    /// [`push_written`](Self::push_written) be told. In which order they come, and how often, is all the same.
    ///
    /// # Errors
    /// No such try, or no such sender, as with those; or the sender has named other rails before.
    pub fn rail_done(
        &mut self,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        (rails, rail): (RailSet, u16),
    ) -> Result<bool, PushRefusal> {
        let key = self.find(request, nonce)?;
        let writers = &mut self.expectation(key).writers;
        let writer = writers.iter_mut().find(|w| w.peer == peer);
        let writer = writer.ok_or(PushRefusal::NotASender)?;
        let before = writer.rails;
        if !rails.contains(rail) || !before.is_empty() && before != rails {
            return Err(PushRefusal::OtherRails { before, rails });
        }
        writer.rails = rails;
        writer.spoken.insert(rail);
        Ok(rails.is_within(writer.spoken))
    }

    /// A sender has written everything and seen all completions. When it comes after the
    /// expectation failed it is refused, and counts as closed.
    ///
    /// With the last of them `gap` is asked what their parts together leave out. If that is anything,
    /// the expectation fails with it: as many senders came as were wanted, but not the right ones.
    ///
    /// # Errors
    /// The reason to tell the sender: its push did not count.
    pub fn push_done(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        gap: impl FnOnce(&[&Cover]) -> Option<Cause>,
    ) -> Result<PushProgress, PushRefusal> {
        self.on_time(now);
        let key = self.find(request, nonce)?;
        let expectation = self.expectation(key);
        let draining = matches!(expectation.phase, Phase::Draining(_));
        let writer = expectation.sender(peer)?;
        let fresh = *writer == Writer::Open;
        if draining {
            *writer = Writer::Closed;
            self.release_if_drained(key);
            return Err(PushRefusal::Late);
        }
        if !fresh {
            return Ok(PushProgress::Repeated);
        }
        *writer = Writer::Closed;
        Ok(self.count(now, key, gap))
    }

    /// A sender has written everything, and tells checksums of it: it counts when
    /// [`push_checked`](Self::push_checked) says that they are right. `false`: it has said so before.
    ///
    /// # Errors
    /// As [`push_done`](Self::push_done).
    pub fn push_written(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
    ) -> Result<bool, PushRefusal> {
        self.on_time(now);
        let key = self.find(request, nonce)?;
        let expectation = self.expectation(key);
        let draining = matches!(expectation.phase, Phase::Draining(_));
        let writer = expectation.sender(peer)?;
        if draining {
            *writer = Writer::Closed;
            self.release_if_drained(key);
            return Err(PushRefusal::Late);
        }
        let fresh = *writer == Writer::Open;
        if fresh {
            *writer = Writer::Written;
        }
        Ok(fresh)
    }

    /// What a sender has written was compared with its checksums. If they differ the expectation fails
    /// with the cause; otherwise the sender counts, as with [`push_done`](Self::push_done).
    ///
    /// # Errors
    /// The expectation has ended meanwhile, or the sender has not written.
    pub fn push_checked(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        verdict: Result<(), Cause>,
        gap: impl FnOnce(&[&Cover]) -> Option<Cause>,
    ) -> Result<PushProgress, PushRefusal> {
        self.on_time(now);
        let key = self.find(request, nonce)?;
        let expectation = self.expectation(key);
        if matches!(expectation.phase, Phase::Draining(_)) {
            return Err(PushRefusal::Late);
        }
        let writer = expectation.sender(peer)?;
        if *writer != Writer::Written {
            return Err(PushRefusal::NotASender);
        }
        *writer = Writer::Closed;
        match verdict {
            Ok(()) => Ok(self.count(now, key, gap)),
            Err(cause) => {
                self.fail(now, key, cause);
                Ok(PushProgress::Complete)
            }
        }
    }

    /// One more sender of a standing expectation is done.
    fn count(
        &mut self,
        now: Time,
        key: u64,
        gap: impl FnOnce(&[&Cover]) -> Option<Cause>,
    ) -> PushProgress {
        let expectation = self.expectation(key);
        let done = expectation
            .writers
            .iter()
            .filter(|w| w.state == Writer::Closed)
            .count();
        let done = u32::try_from(done).unwrap_or(u32::MAX);
        let left = expectation.senders.saturating_sub(done);
        if left > 0 {
            return PushProgress::Waiting { left };
        }
        let covers: Vec<&Cover> = expectation.writers.iter().map(|w| &w.cover).collect();
        if let Some(cause) = gap(&covers) {
            self.fail(now, key, cause);
            return PushProgress::Complete;
        }
        let expectation = self.remove(key);
        self.outputs.push_back(ExpectOutput::Received {
            request: expectation.request,
            nonce: expectation.nonce,
            tag: expectation.tag,
        });
        PushProgress::Complete
    }

    /// A peer has closed its push: nothing of it is under way and none will come. The answer to a
    /// revoke; unasked, it means that the producer aborted, and the expectation fails.
    ///
    /// # Errors
    /// The message does not fit any expectation; nothing was changed.
    pub fn push_closed(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
    ) -> Result<(), PushRefusal> {
        self.on_time(now);
        let key = self.find(request, nonce)?;
        let expectation = self.expectation(key);
        let phase = expectation.phase;
        let writer = expectation.sender(peer)?;
        let before = *writer;
        if matches!(before, Writer::Open | Writer::Kernels) {
            *writer = Writer::Closed;
        }
        match (phase, before) {
            (Phase::Draining(_), _) => self.release_if_drained(key),
            (Phase::Standing(_), Writer::Open) => self.fail(now, key, Cause::Aborted),
            // It was done before, and what it wrote is complete; and one whose session is over has no try that stands.
            (Phase::Standing(_), Writer::Written | Writer::Closed | Writer::Kernels) => {}
        }
        Ok(())
    }

    /// Lets kernels of a peer write the blocks, from when it is told so.
    ///
    /// # Errors
    /// It may not write for this try, or not any more; nothing was changed.
    pub fn let_kernels_write(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
    ) -> Result<(), PushRefusal> {
        self.on_time(now);
        let key = self.find(request, nonce)?;
        let expectation = self.expectation(key);
        let standing = matches!(expectation.phase, Phase::Standing(_));
        let mut writers = expectation.writers.iter_mut();
        let writer = writers.find(|w| w.peer == peer);
        let writer = writer.ok_or(PushRefusal::NotASender)?;
        if !standing || writer.state != Writer::Open {
            return Err(PushRefusal::Late);
        }
        writer.kernels = true;
        Ok(())
    }

    /// The peers whose sessions are over and whose kernels may write yet: whether their processes have ended is to be
    /// looked at.
    #[must_use]
    pub fn kernels_left(&self) -> Vec<PeerKey> {
        let writers = self.all.values().flat_map(|e| &e.writers);
        let left = writers.filter(|w| w.state == Writer::Kernels);
        let mut peers: Vec<PeerKey> = left.map(|w| w.peer).collect();
        peers.sort_unstable();
        peers.dedup();
        peers
    }

    /// Whether kernels of a peer may write.
    #[must_use]
    pub fn kernels_may_write(&self, peer: PeerKey) -> bool {
        let mut writers = self.all.values().flat_map(|e| &e.writers);
        writers.any(|w| {
            w.peer == peer && w.kernels && matches!(w.state, Writer::Open | Writer::Kernels)
        })
    }

    /// Whether a peer may tell checksums of what it writes for this try: it is bound, and has not been
    /// counted.
    #[must_use]
    pub fn may_tell(&self, request: &RequestId, nonce: Nonce, peer: PeerKey) -> bool {
        let writers = self.of_try(request, nonce).map(|e| &e.writers);
        let mut writers = writers.into_iter().flatten();
        writers.any(|w| w.peer == peer && w.state != Writer::Closed)
    }

    /// Whether a peer may write for this try now: it stands, and the peer is bound and has not said that it has
    /// written all.
    #[must_use]
    pub fn may_write(&self, request: &RequestId, nonce: Nonce, peer: PeerKey) -> bool {
        let Some(expectation) = self.of_try(request, nonce) else {
            return false;
        };
        let standing = matches!(expectation.phase, Phase::Standing(_));
        standing && expectation.open_writers().any(|writer| writer == peer)
    }

    /// Whether a peer has begun to write something that stands, and has not said that it is done.
    #[must_use]
    pub fn is_written_by(&self, peer: PeerKey) -> bool {
        self.all.values().any(|expectation| {
            let standing = matches!(expectation.phase, Phase::Standing(_));
            standing && expectation.open_writers().any(|writer| writer == peer)
        })
    }

    /// A sender tells so many immediates of blocks that it has written. Whether anybody is to hear of them: as
    /// [`may_write`](Self::may_write).
    ///
    /// # Errors
    /// More than a push may have ([`MOST_IMMEDIATES`]).
    pub fn immediates(
        &mut self,
        request: &RequestId,
        nonce: Nonce,
        peer: PeerKey,
        count: u64,
    ) -> Result<bool, PushRefusal> {
        if !self.may_write(request, nonce, peer) {
            return Ok(false);
        }
        let key = self.find(request, nonce)?;
        let mut writers = self.expectation(key).writers.iter_mut();
        let writer = writers.find(|w| w.peer == peer);
        let writer = writer.ok_or(PushRefusal::NotASender)?;
        let count = writer.immediates.saturating_add(count);
        if count > MOST_IMMEDIATES {
            let most = MOST_IMMEDIATES;
            return Err(PushRefusal::Immediates { count, most });
        }
        writer.immediates = count;
        Ok(true)
    }

    /// The blocks of a try that stands, or whose memory has not been released.
    #[must_use]
    pub fn groups(&self, request: &RequestId, nonce: Nonce) -> Option<&[GroupBlocks]> {
        self.of_try(request, nonce).map(|e| e.groups.as_slice())
    }

    /// The same, to be asked for one by one.
    pub(crate) fn block_set(&self, request: &RequestId, nonce: Nonce) -> Option<Arc<BlockSet>> {
        let of = self.of_try(request, nonce)?;
        let set = of.set.get_or_init(|| {
            let mut set = BlockSet::default();
            for group in &of.groups {
                // They were checked: no block is there twice.
                let _ = set.insert_all(group.group, &group.blocks);
            }
            Arc::new(set)
        });
        Some(Arc::clone(set))
    }

    fn of_try(&self, request: &RequestId, nonce: Nonce) -> Option<&Expectation> {
        self.all.get(self.by_try.get(&(request.clone(), nonce))?)
    }

    /// When [`on_time`](Self::on_time) next has something to do.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.first().map(|(time, _)| *time)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<ExpectOutput> {
        self.outputs.pop_front()
    }

    /// Expectations whose outcome is to come.
    #[must_use]
    pub fn standing(&self) -> usize {
        self.standing.len()
    }

    /// Expectations that failed and whose memory is quarantined.
    #[must_use]
    pub fn draining(&self) -> usize {
        self.all.len() - self.standing.len()
    }

    fn find(&self, request: &RequestId, nonce: Nonce) -> Result<u64, PushRefusal> {
        if let Some(key) = self.by_try.get(&(request.clone(), nonce)) {
            Ok(*key)
        } else if self.ended.contains(request, nonce) {
            Err(PushRefusal::Late)
        } else if self.standing.contains_key(request) {
            Err(PushRefusal::WrongNonce)
        } else {
            Err(PushRefusal::UnknownRequest)
        }
    }

    fn expectation(&mut self, key: u64) -> &mut Expectation {
        self.all
            .get_mut(&key)
            .expect("a key in an index is removed together with its expectation")
    }
}
