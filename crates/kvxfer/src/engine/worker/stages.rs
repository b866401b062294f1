//! Stretches of this rank's GPU memory that peers want staged: packed into buffers that they read.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, error};

use super::Worker;
use super::fetches::abort;
use crate::engine::Inner;
use crate::engine::books::pack_cause;
use crate::engine::gpu::{GpuSide, MOST_STAGED, Packed, cause, told};
use crate::engine::peer_session::PeerSession;
use crate::error::Error;
use crate::mem::gather::{Gather, GatherEnd};
use crate::time::Time;
use crate::transfer::{Cause, GpuOperation, PeerKey};
use crate::wire::Staged;

/// What a peer wants staged.
#[derive(Debug)]
pub(crate) struct ToStage {
    /// The peer's number for it.
    pub(crate) number: u64,
    pub(crate) packed: Vec<Packed>,
    pub(crate) gpu: Arc<GpuSide>,
}

#[derive(Debug)]
struct Asked {
    peer: Arc<PeerSession>,
    staging: Box<ToStage>,
}

#[derive(Debug)]
struct Packing {
    asked: Asked,
    slot: u32,
    gather: Gather,
}

/// How long a peer may read a buffer that others wait for. It may have one again.
const READ_FOR: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Told {
    gpu: Arc<GpuSide>,
    slot: u32,
    since: Time,
}

#[derive(Debug, Default)]
pub(super) struct Stages {
    waiting: VecDeque<Asked>,
    packing: Vec<Packing>,
    /// Buffers that peers have been told of and read.
    told: HashMap<(PeerKey, u64), Told>,
}

impl Stages {
    fn of(&self, key: PeerKey) -> impl Iterator<Item = u64> {
        let waiting = self.waiting.iter();
        let asked = waiting.chain(self.packing.iter().map(|packing| &packing.asked));
        let asked = asked.map(|asked| (asked.peer.key, asked.staging.number));
        let all = asked.chain(self.told.keys().copied());
        all.filter(move |(peer, _)| *peer == key)
            .map(|(_, number)| number)
    }

    pub(super) fn on_gpu(&self) -> bool {
        !self.packing.is_empty()
    }

    /// Whether something waits for a buffer.
    pub(super) fn blocked(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether this rank's memory is still read for a peer.
    pub(super) fn touch(&self, peer: PeerKey) -> bool {
        (self.packing.iter()).any(|packing| packing.asked.peer.key == peer)
    }

    /// A peer's queue pairs are taken down.
    pub(super) fn stop_peer(&mut self, peer: PeerKey) {
        self.waiting.retain(|asked| asked.peer.key != peer);
        let of_peer = |packing: &&Packing| packing.asked.peer.key == peer;
        for packing in self.packing.iter().filter(of_peer) {
            abort(&packing.gather);
        }
    }

    /// Nothing is known of a peer any more. What it should read still, its stamp says it may not believe.
    pub(super) fn forget_peer(&mut self, peer: PeerKey) {
        self.waiting.retain(|asked| asked.peer.key != peer);
        let of_peer = |(of, _): &(PeerKey, u64), _: &mut Told| *of == peer;
        for (_, told) in self.told.extract_if(of_peer) {
            take_back(&told, peer);
        }
    }

    /// Takes buffers back that have been read for long while others wait: their stamps tell whoever reads still.
    fn take_late_back(&mut self, now: Time) {
        let late = |_: &(PeerKey, u64), told: &mut Told| now.since(told.since) >= READ_FOR;
        for ((peer, number), told) in self.told.extract_if(late) {
            debug!(
                number,
                "a buffer is taken back from a peer that reads it for long"
            );
            take_back(&told, peer);
        }
    }

    /// Tells what runs to stop and gives it, with its peer, to who waits.
    pub(super) fn end(&mut self) -> Vec<(PeerKey, Gather)> {
        self.waiting.clear();
        let all = std::mem::take(&mut self.packing).into_iter();
        all.map(|packing| {
            abort(&packing.gather);
            (packing.asked.peer.key, packing.gather)
        })
        .collect()
    }
}

fn take_back(told: &Told, peer: PeerKey) {
    if let Ok(staging) = told.gpu.staging() {
        staging.take_back(peer, told.slot);
    }
}

fn tell(peer: &PeerSession, number: u64, cause: &Cause) {
    let staged = Staged {
        number,
        offset: 0,
        stamp: 0,
        word: 0,
        failed: Some(pack_cause(cause)),
    };
    peer.link.send(staged.into());
}

impl Worker {
    /// A peer wants stretches staged.
    pub(super) fn stage(&mut self, peer: Arc<PeerSession>, staging: Box<ToStage>) {
        let open: Vec<u64> = self.gathers.stages.of(peer.key).collect();
        if open.len() >= MOST_STAGED as usize || open.contains(&staging.number) {
            return peer
                .link
                .cut_off(format!("{} stages, or one of them twice", open.len()));
        }
        if peer.usable().is_ok() {
            self.gathers
                .stages
                .waiting
                .push_back(Asked { peer, staging });
        }
    }

    /// A peer reads what was staged no more.
    pub(super) fn stage_free(&mut self, peer: &PeerSession, number: u64) {
        let stages = &mut self.gathers.stages;
        match stages.told.remove(&(peer.key, number)) {
            Some(told) => take_back(&told, peer.key),
            None if stages.of(peer.key).any(|of| of == number) => {
                let lie = "what is not staged yet is not read any more";
                peer.link.cut_off(lie.to_owned());
            }
            None => debug!(number, "nothing was staged that is not read any more"),
        }
    }

    /// Begins what there are buffers for, and looks at what the GPU packs.
    pub(super) fn look_at_stages(&mut self) -> bool {
        let mut any = false;
        for _ in 0..self.gathers.stages.waiting.len() {
            let Some(asked) = self.gathers.stages.waiting.pop_front() else {
                break;
            };
            any |= self.pack(asked);
        }
        if self.gathers.stages.blocked() {
            let now = self.clock.now();
            self.gathers.stages.take_late_back(now);
        }
        let mut at = 0;
        while let Some(packing) = self.gathers.stages.packing.get_mut(at) {
            let Some(end) = packing.gather.poll() else {
                at += 1;
                continue;
            };
            any = true;
            let packing = self.gathers.stages.packing.swap_remove(at);
            self.packed(packing, end);
        }
        any
    }

    /// False: there is no buffer for it now, and it is put back.
    fn pack(&mut self, asked: Asked) -> bool {
        let Asked { peer, staging } = &asked;
        if peer.usable().is_err() {
            return true;
        }
        let Ok(buffers) = staging.gpu.staging() else {
            return true;
        };
        let Some(slot) = buffers.out.take(peer.key) else {
            self.gathers.stages.waiting.push_back(asked);
            return false;
        };
        match staging.gpu.pack(buffers, slot, &staging.packed) {
            Ok(gather) => {
                self.gathers.begun();
                self.gathers.stages.packing.push(Packing {
                    asked,
                    slot,
                    gather,
                });
            }
            Err(error @ Error::Memory(crate::mem::Error::Gpu(_))) => {
                self.lose_peer(peer, cause(GpuOperation::Gather, &error));
            }
            // Nothing was put on the GPU.
            Err(error) => {
                buffers.out.give(peer.key, slot);
                tell(peer, staging.number, &cause(GpuOperation::Gather, &error));
            }
        }
        true
    }

    fn packed(&mut self, packing: Packing, end: GatherEnd) {
        let Packing { asked, slot, .. } = packing;
        let Asked { peer, staging } = asked;
        let number = staging.number;
        let Ok(buffers) = staging.gpu.staging() else {
            return;
        };
        let failed = match end {
            GatherEnd::Whole => match buffers.stamp(slot) {
                Ok(word) => {
                    peer.link
                        .send(told(number, &buffers.out, slot, word).into());
                    let of = Told {
                        gpu: Arc::clone(&staging.gpu),
                        slot,
                        since: self.clock.now(),
                    };
                    self.gathers.stages.told.insert((peer.key, number), of);
                    return;
                }
                Err(error) => cause(GpuOperation::Gather, &error),
            },
            GatherEnd::Failed(error @ crate::mem::Error::Gpu(_)) => {
                let cause = cause(GpuOperation::Gather, &Error::Memory(error));
                return self.lose_peer(&peer, cause);
            }
            GatherEnd::Failed(error) => cause(GpuOperation::Gather, &Error::Memory(error)),
            // The peer's queue pairs go.
            _ => Cause::Cancelled,
        };
        buffers.out.give(peer.key, slot);
        tell(&peer, number, &failed);
    }

    /// A GPU has refused a part of a launch for a peer, or lost it: what it reads and writes is never given back.
    fn lose_peer(&mut self, peer: &PeerSession, cause: Cause) {
        error!(peer = %peer.name.engine, %cause, "a session's memory stays quarantined");
        self.gathers.lost(peer.key);
        peer.fail(cause);
    }
}

impl Inner {
    /// A peer wants stretches of this rank's memory staged. The error says why it cannot be trusted.
    pub(crate) fn stage(
        &self,
        peer: &Arc<PeerSession>,
        stage: crate::wire::Stage,
    ) -> Result<(), String> {
        let gpu = self.gpu.as_ref().filter(|_| peer.staged.is_some());
        let (Some(gpu), Some(Ok(buffers))) = (gpu, gpu.map(|gpu| gpu.staging())) else {
            return Err(format!("blocks to be staged over {}", peer.path.path));
        };
        let lengths = self.placement.desc().memory_len();
        let packed = crate::engine::gpu::packed(&stage, lengths, buffers.piece_bytes())?;
        let staging = Box::new(ToStage {
            number: stage.number,
            packed,
            gpu: Arc::clone(gpu),
        });
        peer.to_taker(stage.number, |peer| super::Command::Stage { peer, staging });
        Ok(())
    }

    /// A peer has staged what was asked for, or why not.
    pub(crate) fn staged(&self, peer: &Arc<PeerSession>, staged: Staged) -> Result<(), String> {
        if !peer.staged.as_ref().is_some_and(|staged| staged.from_gpu) {
            return Err(format!("blocks staged over {}", peer.path.path));
        }
        let failed = staged.failed.as_ref();
        let failed = failed.map(|cause| cause.unpack::<Cause>("cause").unwrap_or(Cause::Revoked));
        let job = crate::transfer::JobId(staged.number);
        if let Some(worker) = self.runtime.worker(job.owner()) {
            let peer = Arc::clone(peer);
            let staged = Box::new(staged);
            worker.send(super::Command::Staged {
                peer,
                staged,
                failed,
            });
        }
        Ok(())
    }
}
