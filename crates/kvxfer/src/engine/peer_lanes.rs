//! The lanes of a session and the pairs of rails that they join, as all of its workers and its link know them:
//! which have failed, which are down on which side, what is used, and who may speak for what was written.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvxfer_verbs::RegionTable;
use tracing::warn;

use super::bringup::is_rebuilt;
use super::loopback::Loopback;
use super::peer_session::PeerSession;
use super::rail::RailMemory;
use super::worker::Command;
use crate::rails::RailSet;
use crate::transfer::Cause;
use crate::transport::{PathInfo, RdmaLink, SkippedRail};
use crate::wire::RemoteSpan;

/// A rail of this side and one of a peer that queue pairs join.
#[derive(Debug)]
pub(crate) struct PeerRail {
    /// This side's device.
    pub(crate) device: String,
    /// The way over it, on an RDMA device.
    pub(crate) link: Option<RdmaLink>,
    /// Why it is not used any more; the first reason stays.
    aside: Mutex<Option<String>>,
    /// What reads back through this side's device what that has written, where a GPU needs it.
    pub(crate) loopback: Option<Arc<Loopback>>,
    /// The memories of this side, as the plans number them.
    pub(crate) regions: Arc<RegionTable>,
    /// The peer's memories, as the plans number them; then where it stages.
    pub(crate) remote: Vec<RemoteSpan>,
    /// Its lease slots, if it offers.
    pub(crate) leases: Option<RemoteSpan>,
}

impl PeerRail {
    /// A pair of rails that is to be used: of this device, the way over it, the memories of both sides, and the lease
    /// slots of the peer.
    pub(super) fn new(
        device: &str,
        link: Option<&RdmaLink>,
        (own, remote): (&RailMemory, Vec<RemoteSpan>),
        leases: Option<RemoteSpan>,
    ) -> Self {
        Self {
            device: device.to_owned(),
            link: link.cloned(),
            aside: Mutex::default(),
            loopback: own.loopback.clone(),
            regions: Arc::clone(&own.regions),
            remote,
            leases,
        }
    }

    /// It was never joined.
    pub(super) fn leave_out(&self, reason: String) {
        *self.aside() = Some(reason);
    }

    /// Why it is not used any more.
    fn aside(&self) -> MutexGuard<'_, Option<String>> {
        // Valid at every step.
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// It has failed here: it takes nothing more.
const FAILED: u8 = 1;
/// This side has destroyed its half; the peer has.
const DOWN_HERE: u8 = 2;
const DOWN_THERE: u8 = 4;
/// This side has destroyed its half, or that of a queue pair that had its number before.
const EVER_DOWN: u8 = 8;

/// Where a lane is, and how it stands, for all workers.
#[derive(Debug)]
pub(crate) struct LanePlace {
    pub(crate) worker: u16,
    pub(crate) pair: usize,
    state: AtomicU8,
}

impl LanePlace {
    pub(crate) fn new(worker: u16, pair: usize) -> Self {
        Self {
            worker,
            pair,
            state: AtomicU8::new(0),
        }
    }

    /// One that the peer counts on and that is not there.
    pub(crate) fn down(worker: u16, pair: usize) -> Self {
        Self {
            state: AtomicU8::new(FAILED | DOWN_HERE | EVER_DOWN),
            ..Self::new(worker, pair)
        }
    }

    fn has(&self, bits: u8) -> bool {
        self.state.load(Ordering::Acquire) & bits == bits
    }

    fn works(&self) -> bool {
        !self.has(FAILED)
    }

    /// Notes something; what there was before.
    fn note(&self, bits: u8) -> u8 {
        self.state.fetch_or(bits, Ordering::AcqRel)
    }
}

/// Who may say that what was written over a pair of rails is in the peer's memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// A lane of that pair, of one of these workers: the receive puts the card's earlier writes there.
    Pair(Vec<u16>),
    /// Any lane, of one of these workers: the peer has destroyed all of that pair's queue pairs, which puts
    /// there what had come on them.
    Any(Vec<u16>),
    /// Nobody, before the peer has said so of the last of them.
    Nobody,
}

impl PeerSession {
    /// The pairs of rails that have not been set aside.
    pub(crate) fn rails_that_work(&self) -> RailSet {
        let mut all = RailSet::first(self.rails.len());
        for (at, rail) in (0..).zip(&self.rails) {
            if rail.aside().is_some() {
                all.remove(at);
            }
        }
        all
    }

    /// The way to it, over the rails that have not been set aside since.
    pub(crate) fn way(&self) -> PathInfo {
        let mut path = self.path.clone();
        for rail in &self.rails {
            match &*rail.aside() {
                Some(reason) => {
                    path.skipped.push(SkippedRail::new(&rail.device, reason));
                }
                None => path.rails.extend(rail.link.clone()),
            }
        }
        path
    }

    /// How many lanes take work.
    pub(crate) fn working_lanes(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.works()).count()
    }

    /// Notes that a pair of rails leads to the peer no more. False: that is known.
    pub(crate) fn set_aside(&self, pair: usize, cause: &Cause) -> bool {
        self.note_aside(pair, || cause.to_string())
    }

    fn note_aside(&self, pair: usize, reason: impl FnOnce() -> String) -> bool {
        let Some(rail) = self.rails.get(pair) else {
            return false;
        };
        let mut aside = rail.aside();
        if aside.is_some() {
            return false;
        }
        let reason = reason();
        *aside = Some(reason.clone());
        drop(aside);
        let (peer, device) = (&self.name.engine, &rail.device);
        warn!(%peer, device, reason, "device set aside; the work goes on over the others");
        true
    }

    /// The peer has taken its half of some lanes down.
    ///
    /// # Errors
    ///
    /// Numbers that no lane has, or of lanes that it has taken down before: what is wrong with them.
    pub(crate) fn lanes_reset(
        self: &Arc<Self>,
        lanes: &[u16],
        cause: &Cause,
    ) -> Result<(), String> {
        for number in lanes {
            let Some(lane) = self.lanes.get(usize::from(*number)) else {
                return Err(format!("queue pair {number} of {} reset", self.lanes.len()));
            };
            let before = lane.note(DOWN_THERE);
            if before & DOWN_THERE != 0 {
                return Err(format!("queue pair {number} reset twice"));
            }
            // What the peer says to a reset from here says nothing of its own way.
            let of_path = cause.is_of_path() && *cause != Cause::PeerReset;
            let left_out = matches!(cause, Cause::LocalDevice { .. }) || !is_rebuilt(&self.path);
            if self.rails.len() > 1 && (of_path || left_out && self.is_down_there(lane.pair)) {
                self.note_aside(lane.pair, || format!("taken down by the peer: {cause}"));
            }
            if let Some(worker) = self.all_workers.get(usize::from(lane.worker)) {
                worker.send(Command::LaneReset {
                    peer: Arc::clone(self),
                    number: *number,
                });
            }
            if before & DOWN_HERE != 0 {
                self.link.rebuild(*number);
            }
        }
        Ok(())
    }

    fn lanes_of(&self, pair: usize) -> impl Iterator<Item = &LanePlace> {
        self.lanes.iter().filter(move |lane| lane.pair == pair)
    }

    /// Whether the peer has destroyed all queue pairs of a pair of rails.
    fn is_down_there(&self, pair: usize) -> bool {
        let mut lanes = self.lanes_of(pair);
        lanes.all(|lane| lane.has(DOWN_THERE))
    }

    /// A lane takes nothing more.
    pub(crate) fn lane_failed(&self, number: u16) {
        if let Some(lane) = self.lanes.get(usize::from(number)) {
            lane.note(FAILED);
        }
    }

    /// This side has destroyed its half of a lane. Whether the peer has, too.
    pub(crate) fn lane_down(&self, number: u16) -> bool {
        let lane = self.lanes.get(usize::from(number));
        let before = lane.map_or(0, |lane| lane.note(DOWN_HERE | EVER_DOWN));
        before & DOWN_THERE != 0
    }

    /// Whether lanes that fail alone get successors, and work that is lost with them goes on. What a GPU has a part in
    /// is on no lane, or on several one after the other.
    pub(crate) fn rebuilds_lanes(&self) -> bool {
        is_rebuilt(&self.path) && !self.has_whole_jobs()
    }

    /// Whether a lane that fails alone gets a successor: nobody has set its rail aside.
    pub(crate) fn has_successor(&self, number: u16) -> bool {
        let lane = self.lanes.get(usize::from(number));
        let rail = lane.and_then(|lane| self.rails.get(lane.pair));
        is_rebuilt(&self.path) && rail.is_some_and(|rail| rail.aside().is_none())
    }

    /// Whether it may have it now: both sides have destroyed it.
    pub(crate) fn may_rebuild(&self, number: u16) -> bool {
        let lane = self.lanes.get(usize::from(number));
        let is_down = lane.is_some_and(|lane| lane.has(DOWN_HERE | DOWN_THERE));
        is_down && self.has_successor(number)
    }

    /// A lane has a successor.
    pub(crate) fn lane_is_back(&self, number: u16) {
        if let Some(lane) = self.lanes.get(usize::from(number)) {
            lane.state.store(EVER_DOWN, Ordering::Release);
        }
    }

    /// The successor that the peer counts on is not there.
    pub(crate) fn lane_lost_again(&self, number: u16) {
        if let Some(lane) = self.lanes.get(usize::from(number)) {
            let down = FAILED | DOWN_HERE | EVER_DOWN;
            lane.state.store(down, Ordering::Release);
        }
    }

    /// Whether the peer may say on a lane of the pair `on` that what it wrote over the pair `rail` is in memory
    /// here: `on` itself, or one of which nothing is left here.
    pub(crate) fn may_speak(&self, on: usize, rail: usize) -> bool {
        // What is said may have waited for longer than it took to have others in their places.
        on == rail || self.lanes_of(rail).all(|lane| lane.has(EVER_DOWN))
    }

    /// Who may speak for a pair of rails.
    pub(crate) fn speaker(&self, pair: usize) -> Speaker {
        let works = |lane: &&LanePlace| lane.works();
        let workers = |lanes: &mut dyn Iterator<Item = &LanePlace>| -> Vec<u16> {
            lanes.filter(works).map(|lane| lane.worker).collect()
        };
        // Looked at first: one that stands now may be gone when the others are looked at, not the reverse.
        let down = self.is_down_there(pair);
        let of_pair = workers(&mut self.lanes_of(pair));
        match (of_pair.is_empty(), down) {
            (false, false) => Speaker::Pair(of_pair),
            (_, true) => Speaker::Any(workers(&mut self.lanes.iter())),
            (true, false) => Speaker::Nobody,
        }
    }

    /// The pairs of rails of which the peer is to be told that what was written over them is in memory. Where
    /// no card stands between, or nothing was written, one stands for all.
    pub(crate) fn rails_to_speak_for(&self, wrote: RailSet) -> RailSet {
        match wrote.iter().next() {
            Some(_) if self.notices => wrote,
            Some(first) => RailSet::only(first),
            None => {
                let pair = self
                    .lanes
                    .iter()
                    .find(|lane| lane.works())
                    .map_or(0, |lane| lane.pair);
                RailSet::only(u16::try_from(pair).unwrap_or(0))
            }
        }
    }
}
