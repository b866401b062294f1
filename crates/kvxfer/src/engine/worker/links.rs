//! Kernels that write a push's blocks themselves, over GPU links: a job of the push from before their launch until it is
//! said that they have ended, and what they have put by then.

use std::collections::HashSet;
use std::collections::hash_map::Entry;
use std::time::Duration;

use tracing::debug;

use super::kernel_queue::{KernelQueue, Served, Stage};
use super::{Command, Worker};
use crate::engine::moves::{Moved, Moves};
use crate::engine::push::{NotPosted, PutAll};
use crate::mem::post::Status;
use crate::transfer::{JobId, TransferId};

impl Worker {
    /// Takes a queue of a push that goes on; whether it does.
    pub(super) fn add_links(&mut self, mut queue: KernelQueue) -> bool {
        let now = self.clock.now();
        let open = self.live.get(&queue.id).is_some_and(|l| !l.has_outcome());
        let began = match open {
            true => self.transfers.kernels_began(now, queue.id),
            false => return false,
        };
        match began {
            Ok(ends) => {
                queue.served = Served::Links {
                    kernels: Some(ends),
                };
                *self.writing.entry(queue.id).or_default() += 1;
                self.queues.push(queue);
                true
            }
            Err(error) => {
                debug!(id = ?queue.id, %error, "links of a push that has ended");
                false
            }
        }
    }

    /// Stops the kernels that are this job, if it is of kernels.
    pub(super) fn stop_kernels(&mut self, job: JobId) -> bool {
        let is_it = |queue: &&KernelQueue| matches!(&queue.served, Served::Links { kernels: Some(ends) } if ends.job == job);
        let queue = self.queues.iter().find(is_it);
        if let Some(queue) = queue {
            queue.shared.stop();
        }
        queue.is_some()
    }

    /// What kernels have put is part of the push: it is there already.
    pub(super) fn take_puts(&mut self, queue: &mut KernelQueue, puts: PutAll) {
        let PutAll {
            count,
            has_begun,
            taken,
            prepare,
        } = puts;
        queue.has_begun = has_begun;
        queue.shared.note_taken(count);
        queue.shared.note_ended(count, Status::Ok);
        if queue.stage == Stage::Sealed {
            return;
        }
        match taken {
            Ok(Some(moved)) => self.add_puts(queue, moved, prepare),
            Ok(None) => {}
            Err(NotPosted::Cause(cause)) => self.command(Command::Fail {
                id: queue.id,
                cause,
            }),
            Err(NotPosted::Fault { fault, at }) => self.fail_post(queue.id, at as u64, fault),
        }
    }

    fn add_puts(&mut self, queue: &KernelQueue, what: Moved, prepare: Duration) {
        let runs = what.runs();
        let source = Moves {
            what,
            after: None,
            is_released: true,
            is_there: true,
        };
        // Of a push that has failed it is no part.
        let _ = self.add_job(queue.id, source, runs, prepare);
    }

    /// The pushes whose kernels may write: their memory is nobody's, whatever becomes of this worker.
    pub(super) fn with_kernels(&self) -> HashSet<TransferId> {
        self.writing.keys().copied().collect()
    }

    /// Ends the job that kernels are, where it has been said that they have ended.
    pub(super) fn end_kernels(&mut self, queue: &mut KernelQueue) {
        let Served::Links { kernels } = &mut queue.served else {
            return;
        };
        if !queue.shared.kernels_have_ended() {
            // Nobody will say so: it stays, and so does what they may touch.
            return;
        }
        if let Some(ends) = kernels.take() {
            if let Entry::Occupied(mut writing) = self.writing.entry(queue.id) {
                *writing.get_mut() -= 1;
                if *writing.get() == 0 {
                    writing.remove();
                }
            }
            self.transfers.job_report(self.clock.now(), &ends);
        }
    }
}
