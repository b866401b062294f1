//! WRITEs of a ping that a kernel posts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::WORD;
use crate::error::Error;
use crate::mem::gpu::{Gpu, Stream};
use crate::mem::kernels::queue::{EACH, Move, PUT};
use crate::mem::post::device::{DeviceQueue, PostBy, PostKernels, Posting, Posts, PreparedPosts};
use crate::mem::post::{Consumer, Status, Taken};

/// Slots of the queue: a ping posts one.
const DEPTH: u32 = 2;
/// How long the kernel waits for its post's end. It has ended long before if the ping was answered.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a kernel that posts one WRITE is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// It has posted: the WRITE is to go out.
    Posted,
    /// It has not, or it waits.
    Under,
    /// It has ended, or none runs.
    Over,
}

/// A kernel that posts a small put and waits for its end, once for each ping; and its queue.
#[derive(Debug)]
pub(super) struct Poster {
    queue: Arc<DeviceQueue>,
    consumer: Consumer,
    kernels: PostKernels,
    stream: Stream,
    prepared: PreparedPosts,
    posting: Option<Posting>,
    /// The post that is carried out.
    ticket: Option<u64>,
}

impl Poster {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, Error> {
        let (queue, consumer) = DeviceQueue::new(gpu, DEPTH, PATIENCE)?;
        let kernels = PostKernels::load(gpu)?;
        // Where it lies on both sides is the session's to know: there is one word that a ping writes.
        let moves = [Move {
            len: WORD.into(),
            ..Move::default()
        }];
        let prepared = kernels.prepare(&Posts {
            moves: &moves,
            posters: 1,
            by: PostBy::Waves,
            op: PUT,
            until: EACH,
        })?;
        Ok(Self {
            queue: Arc::new(queue),
            consumer,
            kernels,
            stream: Stream::new(gpu)?,
            prepared,
            posting: None,
            ticket: None,
        })
    }

    /// Has the kernel post.
    pub(super) fn launch(&mut self) -> Result<(), Error> {
        let launched = self
            .kernels
            .launch(&self.stream, &self.queue, &self.prepared)?;
        self.posting = Some(launched);
        Ok(())
    }

    /// Looks once. `is_idle`: the WRITE that was posted has ended, or none is out.
    pub(super) fn turn(&mut self, is_idle: bool) -> Result<Turn, Error> {
        let Some(posting) = &self.posting else {
            return Ok(Turn::Over);
        };
        if let Some(ticket) = self.ticket.filter(|_| is_idle) {
            self.ticket = None;
            // It was taken and has not ended.
            let _known = self
                .consumer
                .complete(self.queue.ring(), ticket, Status::Ok)?;
        }
        if self.ticket.is_some() {
            return Ok(Turn::Under);
        }
        match self.consumer.take(self.queue.ring())? {
            Some(Taken::Post(post)) => {
                self.ticket = Some(post.ticket);
                return Ok(Turn::Posted);
            }
            // The built-in kernel posts nothing else.
            Some(_) => {
                return Err(Error::PingKernel {
                    status: Status::Malformed,
                });
            }
            None => {}
        }
        if !posting.is_done()? {
            return Ok(Turn::Under);
        }
        let results = posting.wait(Instant::now())?;
        self.posting = None;
        let status = |n| Status::from_number(n).unwrap_or(Status::Malformed);
        for result in results {
            match (status(result.posted), status(result.ended)) {
                (Status::Ok, Status::Ok) => {}
                // It has lost its patience with a peer that was stalled, whose ping is lost.
                (Status::Ok, Status::Timeout) => {}
                (Status::Ok, status) | (status, _) => return Err(Error::PingKernel { status }),
            }
        }
        Ok(Turn::Over)
    }
}

impl Drop for Poster {
    fn drop(&mut self) {
        if self.posting.is_some()
            && let Err(error) = self.queue.stop()
        {
            tracing::error!(%error, "a ping's kernel cannot be told to stop: it waits as long as it is patient");
        }
    }
}
