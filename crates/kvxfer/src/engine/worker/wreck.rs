//! What becomes of a worker that has panicked: a defect of this library, or of code that it calls.
//!
//! Nothing is concluded from the state machines any more. The worker's queue pairs are destroyed;
//! every transfer that it owned fails with [`Cause::WorkerPanicked`], its memory quarantined; its
//! peers are lost for all workers, so that theirs end too; and the memory is released when the last
//! queue pair to the peer is gone, on whatever worker. The thread stays to answer for that until
//! the engine goes, and the engine takes no new work.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tracing::error;

use super::outputs::by_group;
use super::visible::Visible;
use super::{Command, Live, QueueOrder, Worker};
use crate::engine::handle::{Failure, Outcome};
use crate::engine::notices::Inbox;
use crate::engine::peer_session::PeerSession;
use crate::event::MemoryState;
use crate::mem::post::Status;
use crate::transfer::{Cause, DrainToken, Incomplete, PeerKey, TransferId};

pub(super) struct Wreck {
    worker: Worker,
    /// Peers that have been told that this worker's queue pairs to them are gone, or never will be, for they
    /// are not; and where notices may yet land on those.
    drained: HashSet<PeerKey>,
    /// Pushes whose kernels may write: no queue pair that goes says anything of them, and nobody here looks any more
    /// whether they have ended.
    kernels: HashSet<TransferId>,
    inboxes: Vec<Inbox>,
}

impl Wreck {
    /// The thread's body from the panic on. Returns what [`Worker::run`] does.
    pub(super) fn run(worker: Worker) -> Vec<Live> {
        error!(
            worker = worker.index,
            "a worker has panicked; the engine takes no new work"
        );
        worker.health.break_down();
        let mut wreck = Self {
            worker,
            drained: HashSet::new(),
            kernels: HashSet::new(),
            inboxes: Vec::new(),
        };
        wreck.abandon();
        while let Ok(command) = wreck.worker.commands.recv() {
            if matches!(command, Command::Shutdown) {
                break;
            }
            wreck.command(command);
        }
        let Self {
            worker, kernels, ..
        } = &mut wreck;
        let mut over = Vec::new();
        for (id, live) in worker.live.drain() {
            match kernels.contains(&id) {
                // Its outcome is told.
                true => std::mem::forget(live),
                false => over.push(*live),
            }
        }
        over
    }

    fn abandon(&mut self) {
        let worker = &mut self.worker;
        let mut peers: HashMap<PeerKey, Arc<PeerSession>> = HashMap::new();
        peers.extend(
            worker
                .lanes
                .values()
                .map(|at| (at.peer.key, Arc::clone(&at.peer))),
        );
        peers.extend(worker.dropping.drain(..).map(|(peer, _)| (peer.key, peer)));
        // Before the queue pairs go: the peers notice that, and what they answer is not the cause.
        peers.values().for_each(give_up);
        let lanes: Vec<_> = worker.lanes.drain().map(|(_, lane)| lane).collect();
        // Their memory waits for the device to be closed, as does that of what was so before.
        let before = worker.undead.values().map(|undead| undead.peer);
        let mut undead: HashSet<PeerKey> = before.collect();
        let mut inboxes = Vec::new();
        for lane in lanes {
            lane.qp.to_error();
            if let Err(error) = lane.qp.destroy() {
                error!(%error, "queue pair not destroyed: its memory stays quarantined");
                undead.insert(lane.peer.key);
                inboxes.extend(lane.inbox);
            }
        }
        // Launches that have not ended count in the same way.
        undead.extend(worker.gathers.end());
        self.kernels = worker.with_kernels();
        // Kernels are told what has become of their posts, as everybody is.
        for queue in &mut worker.queues {
            queue.end(Status::Device);
        }
        worker.queues.clear();
        worker.visible = Visible::default();
        worker.lane_of.clear();
        worker.singles.clear();
        let mut ids: Vec<TransferId> = worker.live.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            self.fail(id);
        }
        for peer in self.worker.lost.drain(..) {
            peer.told();
        }
        self.drained.extend(undead);
        self.inboxes = inboxes;
        for peer in peers.values() {
            self.has_no_lanes(peer);
        }
        // Whose memory waits for queue pairs of other workers.
        let waiting: HashMap<PeerKey, Arc<PeerSession>> = self
            .worker
            .live
            .values()
            .map(|live| (live.peer.key, Arc::clone(&live.peer)))
            .collect();
        for peer in waiting.into_values() {
            give_up(&peer);
            peer.drain(self.worker.index, DrainToken::ANY);
        }
    }

    /// Says so to a peer, once.
    fn has_no_lanes(&mut self, peer: &PeerSession) {
        if self.drained.insert(peer.key) {
            peer.part_drained();
        }
    }

    /// Ends a transfer of which something may be posted.
    fn fail(&mut self, id: TransferId) {
        let Some(live) = self.worker.live.get(&id) else {
            return;
        };
        if live.has_outcome() {
            return;
        }
        for job in &live.jobs {
            job.stop();
        }
        // What is asked here may be in disorder: another panic must not end this thread, whose
        // transfers would then count as released.
        let transfers = &self.worker.transfers;
        let incomplete = catch_unwind(AssertUnwindSafe(|| transfers.incomplete(id))).ok();
        let listed = catch_unwind(AssertUnwindSafe(|| match incomplete.flatten() {
            _ if live.push => Vec::new(),
            _ if live.into.is_some() => live.into.clone().unwrap_or_default(),
            Some(incomplete) => by_group(&incomplete.blocks()),
            // It was just about to end, or nobody knows: all of them.
            None => by_group(&Incomplete::all_of(&live.jobs).blocks()),
        }));
        let invalid_blocks = listed.unwrap_or_default();
        self.end(id, invalid_blocks, MemoryState::Quarantined);
    }

    fn end(
        &mut self,
        id: TransferId,
        invalid_blocks: Vec<crate::blocks::GroupBlocks>,
        memory: MemoryState,
    ) {
        let failure = Failure {
            first_cause: Cause::WorkerPanicked,
            invalid_blocks,
            memory,
        };
        self.worker.end(id, Outcome::Failed(failure));
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit { spec, live } => {
                *self.worker.running.entry(spec.peer).or_default() += 1;
                self.worker.live.insert(spec.id, live);
                // Nothing of it was posted.
                self.end(spec.id, Vec::new(), MemoryState::Released);
            }
            Command::AddLane { peer, lane, .. } => {
                let rebuilt = lane.rebuilt;
                match lane.qp.destroy() {
                    Ok(()) if rebuilt => peer.part_drained(),
                    Ok(()) => {}
                    Err(error) => {
                        error!(%error, "queue pair not destroyed: its memory stays quarantined");
                        self.drained.insert(peer.key);
                    }
                }
                give_up(&peer);
            }
            Command::Queue(QueueOrder::Add(mut queue)) => queue.end(Status::Device),
            Command::DropLanes { peer } => self.has_no_lanes(&peer),
            Command::PeerLost { peer, .. } => peer.told(),
            Command::PeerDrained { peer, .. } => {
                let mut ids: Vec<TransferId> = self
                    .worker
                    .live
                    .iter()
                    .filter(|(id, live)| live.peer.key == peer && !self.kernels.contains(id))
                    .map(|(id, _)| *id)
                    .collect();
                ids.sort_unstable();
                for id in ids {
                    self.worker.released(id);
                }
            }
            // The rest is about transfers that have ended here, or end elsewhere with their peer.
            _ => {}
        }
    }
}

/// Ends the session with a peer, and for every worker what runs over it.
fn give_up(peer: &Arc<PeerSession>) {
    peer.fail(Cause::WorkerPanicked);
    peer.lose(Cause::WorkerPanicked);
}
