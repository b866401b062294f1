//! What completions mean.

use std::sync::Arc;

use tracing::{debug, error, warn};

use kvxfer_verbs::{Completion, WcStatus};

use super::{Check, LaneQp, Single, Worker};
use crate::engine::notices::Inbox;
use crate::engine::peer_session::PeerSession;
use crate::error::chain;
use crate::transfer::{Cause, CompletionStatus, LaneId, LeaseAnswer, LocalOperation};
use crate::wire::Message;

/// Completions taken in one poll.
pub(super) const POLL_BATCH: usize = 64;

impl Worker {
    pub(super) fn poll(&mut self) -> bool {
        let mut busy = false;
        for rail in 0..self.rails.len() {
            if !self.is_spent(rail) {
                busy |= self.poll_rail(rail);
            }
        }
        busy
    }

    fn poll_rail(&mut self, at: usize) -> bool {
        let Some(rail) = self.rails.get(at) else {
            return false;
        };
        let mut completions = std::mem::take(&mut self.completions);
        completions.clear();
        let more = match rail.cq.poll(&mut completions, POLL_BATCH) {
            Ok(poll) => poll.more,
            Err(error) => {
                self.device_failed(at, &error);
                false
            }
        };
        let any = !completions.is_empty();
        let mut failed: Vec<LaneId> = Vec::new();
        for completion in &completions {
            // A completion of a queue pair that is gone has nobody to go to.
            let Some(lane) = self.lane_of_qp(at, completion.qp_num) else {
                continue;
            };
            if let Some(slot) = Inbox::slot(completion.wr_id) {
                self.received(lane, slot, completion);
                continue;
            }
            if self.holds(lane, completion) {
                continue;
            }
            let result = match completion.status {
                WcStatus::Success => Ok(()),
                status => {
                    failed.push(lane);
                    Err(self.cause_of(lane, status, completion.vendor_err))
                }
            };
            self.scheduler.complete(lane, completion.wr_id, result);
        }
        failed.dedup();
        for lane in failed {
            self.look_at_peer_of(lane);
        }
        self.completions = completions;
        self.singles_done();
        any | more
    }

    pub(super) fn singles_done(&mut self) {
        while let Some(single) = self.scheduler.poll_single() {
            self.single_done(single.lane, single.token, single.result);
        }
    }

    fn lane_of_qp(&mut self, rail: usize, qp_num: u32) -> Option<LaneId> {
        let qp = (rail, qp_num);
        if let Some(&lane) = self.lane_of.get(&qp) {
            return Some(lane);
        }
        // The first notice of a peer can be here when the command that brings its queue pair has come
        // since the loop last looked. The command was given before the peer could know of anything
        // to tell.
        self.take_commands();
        self.lane_of.get(&qp).copied()
    }

    /// A device itself failed: every queue pair of this worker on it is lost with it.
    pub(super) fn device_failed(&mut self, at: usize, error: &kvxfer_verbs::Error) {
        let Some(rail) = self.rails.get(at) else {
            return;
        };
        if rail.events.is_over() {
            return;
        }
        error!(%error, "completion queue failed");
        let errno = errno_of(error);
        let cause = Cause::LocalDevice {
            operation: LocalOperation::Poll,
            errno,
        };
        let stranded = |(lane, of): &(&LaneId, &LaneQp)| {
            of.rail == at && !self.scheduler.lives_elsewhere(**lane)
        };
        let peers: Vec<Arc<PeerSession>> = (self.lanes.iter().filter(stranded))
            .map(|(_, of)| Arc::clone(&of.peer))
            .collect();
        for peer in peers {
            peer.fail(cause.clone());
        }
        // Nothing more can be learnt of what is posted: only destroying the queue pairs ends it.
        rail.events.give_up(&self.others);
    }

    pub(super) fn cause_of(&mut self, lane: LaneId, status: WcStatus, vendor: u32) -> Cause {
        let rail = self.lanes.get(&lane).and_then(|at| self.rails.get(at.rail));
        let soft = rail.is_some_and(|rail| rail.events.is_soft());
        if soft && vendor == kvxfer_verbs::vendor::PEER_GONE {
            if self.scheduler.moves(lane, &Cause::PeerReset) {
                return Cause::PeerReset;
            }
            // The control connection knows better than the data path how the peer went.
            let known = self.lanes.get(&lane).and_then(|at| at.peer.ends_for());
            return known.unwrap_or(Cause::PeerDead);
        }
        if let Some(cause) = self.blame_port(lane, status) {
            return cause;
        }
        let status = completion_status(status, soft.then_some(vendor));
        Cause::Completion { status, vendor }
    }

    fn single_done(&mut self, lane: LaneId, token: u64, result: Result<(), Cause>) {
        match self.singles.remove(&token) {
            Some(Single::Lease {
                check,
                engine,
                landing,
            }) => {
                let lease = self.live.get(&check.id).and_then(|live| live.lease);
                let shown = lease.is_some_and(|lease| engine.scratch.shows(landing, lease.word));
                engine.scratch.give(landing);
                self.check_done(check, shown, result);
            }
            Some(Single::Notice { slot, peer, done }) => {
                self.outbox.give(slot);
                match result {
                    Ok(()) => {
                        self.told_on(lane, *done);
                        peer.untold.told();
                    }
                    Err(cause) if peer.is_rdma() => {
                        debug!(%cause, "notice goes by another queue pair");
                        self.waiting_notices.push_back((peer, *done));
                    }
                    Err(cause) => {
                        debug!(%cause, "notice goes by the control connection");
                        peer.link.send((*done).into());
                        peer.untold.told();
                    }
                }
            }
            None => {}
        }
    }

    fn check_done(&mut self, check: Check, shown: bool, result: Result<(), Cause>) {
        let Some(live) = self.live.get(&check.id) else {
            return;
        };
        let answer = match result {
            // The lane failed, not the lease: another one may do better before the deadline.
            Err(_) if live.peer.lost().is_none() => return self.waiting_checks.push_back(check),
            Err(cause) => LeaseAnswer::Gone { cause },
            Ok(()) if shown => LeaseAnswer::Live,
            Ok(()) => LeaseAnswer::Gone {
                cause: Cause::LeaseExpired,
            },
        };
        self.lease_answer(check, answer);
    }

    /// What is known of a lease is heeded.
    pub(super) fn lease_answer(&mut self, Check { id, job }: Check, answer: LeaseAnswer) {
        let now = self.clock.now();
        match job {
            None => self.transfers.lease_answer(now, id, answer),
            Some(job) => {
                self.transfers.job_checked(now, id, job, answer);
                self.end_posts_of(id, job);
            }
        }
    }

    /// A receive has completed: a notice has come, or the queue pair is flushed.
    fn received(&mut self, lane: LaneId, slot: u32, completion: &Completion) {
        let Some((at, inbox)) = self
            .lanes
            .get(&lane)
            .and_then(|at| Some((at, at.inbox.as_ref()?)))
        else {
            return;
        };
        let Some(len) = completion.byte_len() else {
            return;
        };
        let peer = Arc::clone(&at.peer);
        match inbox.take(&at.qp, slot, len).map_err(|error| chain(&error)) {
            Ok(Message::PushDone(done)) if !peer.may_speak(at.pair, usize::from(done.rail)) => {
                let (pair, rail) = (at.pair, done.rail);
                lies(
                    &peer,
                    format!("push done over rail {rail} told on rail {pair}"),
                );
            }
            Ok(Message::PushDone(done)) => self.push_told(&peer, done),
            Ok(notice) => self.heard(&peer, notice),
            Err(lie) => lies(&peer, lie),
        }
    }

    /// What a peer has told on a queue pair is heeded.
    pub(super) fn heard(&self, peer: &Arc<PeerSession>, notice: Message) {
        let engine = peer.engine.upgrade();
        if let Some(Err(lie)) = engine.map(|engine| engine.on_notice(peer, notice)) {
            lies(peer, lie);
        }
    }
}

pub(super) fn lies(peer: &PeerSession, lie: String) {
    warn!(peer = %peer.name.engine, %lie, "notice");
    peer.link.cut_off(lie);
}

/// The kernel's or the driver's number of an error; 0 where it has none.
pub(crate) fn errno_of(error: &kvxfer_verbs::Error) -> i32 {
    match error {
        kvxfer_verbs::Error::Os { source, .. } | kvxfer_verbs::Error::Device { source, .. } => {
            source.raw_os_error().unwrap_or(0)
        }
        _ => 0,
    }
}

/// The verbs' status in the words of causes; `soft` is the code of the software device, for cards have
/// codes of their own.
fn completion_status(status: WcStatus, soft: Option<u32>) -> CompletionStatus {
    match status {
        // This side's own verdict on what the peer sent: its responder has refused nothing.
        _ if soft == Some(kvxfer_verbs::vendor::PROTOCOL) => CompletionStatus::BadResponse,
        WcStatus::LocLen => CompletionStatus::LocalLength,
        WcStatus::LocQpOp => CompletionStatus::LocalQpOperation,
        WcStatus::LocProt => CompletionStatus::LocalProtection,
        // By the numbers of `enum ibv_wc_status`.
        WcStatus::Other(6) => CompletionStatus::MemoryWindowBind,
        WcStatus::Other(7) => CompletionStatus::BadResponse,
        WcStatus::Other(8) => CompletionStatus::LocalAccess,
        WcStatus::Other(16) => CompletionStatus::RemoteAborted,
        WcStatus::Other(19) => CompletionStatus::DeviceFatal,
        WcStatus::Other(20) => CompletionStatus::ResponseTimeout,
        WcStatus::WrFlush => CompletionStatus::Flush,
        WcStatus::RemInvReq => CompletionStatus::RemoteInvalidRequest,
        WcStatus::RemAccess => CompletionStatus::RemoteAccess,
        WcStatus::RemOp => CompletionStatus::RemoteOperation,
        WcStatus::RetryExc => CompletionStatus::RetryExceeded,
        WcStatus::RnrRetryExc => CompletionStatus::RnrRetryExceeded,
        other => CompletionStatus::Other(other.as_raw()),
    }
}

#[cfg(test)]
mod tests {
    use kvxfer_verbs::vendor;

    use super::*;
    use crate::transfer::Class;

    #[test]
    fn a_cards_codes_are_not_the_software_devices() {
        let refused = WcStatus::RemInvReq;
        let of_soft = completion_status(refused, Some(vendor::PROTOCOL));
        assert_eq!(of_soft, CompletionStatus::BadResponse);
        let of_card = completion_status(refused, None);
        assert_eq!(of_card, CompletionStatus::RemoteInvalidRequest);
    }

    #[test]
    fn every_status_of_a_card_has_its_name_and_none_ends_a_retry() {
        let of = |raw| completion_status(WcStatus::from_raw(raw), None);
        let unnamed: Vec<u32> = (1..=23)
            .filter(|raw| matches!(of(*raw), CompletionStatus::Other(_)))
            .collect();
        // End-to-end contexts and tag matching, of which there are none here; and "general".
        assert_eq!(unnamed, [3, 14, 15, 17, 18, 21, 22, 23]);
        let class = |raw| {
            let status = of(raw);
            Cause::Completion { status, vendor: 0 }.class()
        };
        for raw in [12, 13, 20] {
            assert_eq!(class(raw), Class::Retry, "{raw}");
        }
        assert_eq!(class(16), Class::Recompute);
    }
}
