//! Queues over GPU links: why there is none, and what kernels have put.

use std::sync::Arc;
use std::time::Duration;

use super::PostFault;
use super::table::{has_source, layer_of};
use crate::blocks::BlockPair;
use crate::mem::kernels::queue::{LOCAL_PLACE, LinkRefused, PUT, REMOTE_PLACE};
use crate::mem::post::device::LinkPuts;
use crate::mem::post::{Place, Status};
use crate::plan::{BlockOps, Posted};
use crate::wire::{LinksRefused, PathKind};

/// Why kernels may not write a push's blocks themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoLinks {
    /// The session does not go from GPU to GPU.
    #[error(
        "the path to the consumer is {path}: kernels write over ipc from a GPU's memory to a GPU's, of one node, alone"
    )]
    Path {
        /// The path.
        path: PathKind,
    },
    /// The GPU is shared through CUDA's MPS server.
    #[error(
        "this process's kernels run in CUDA's MPS server, which may go on with what a process that has died had begun: stop the server (echo quit | nvidia-cuda-mps-control), or use another kind of queue"
    )]
    Mps,
    /// The consumer's ticket has not come.
    #[error(
        "the consumer's ticket has not come within {after:?}: its blocks have to be known first; have it expect the request, or be more patient"
    )]
    NoTicket {
        /// How long it was waited for.
        after: Duration,
    },
    /// The consumer has not answered.
    #[error("the consumer has not said within {after:?} whether kernels may write its blocks")]
    NoAnswer {
        /// How long it was waited for.
        after: Duration,
    },
    /// The consumer does not let them.
    #[error(transparent)]
    Refused(LinksRefused),
}

/// What kernels have put, as blocks of a push.
///
/// # Errors
///
/// A number that is not in the ranks' layouts: somebody has written over the queue's notes.
pub(crate) fn posted(of: &Arc<BlockOps>, puts: &LinkPuts) -> Result<Posted, PostFault> {
    let mut posted = Posted::new(of);
    for put in &puts.puts {
        let (group, layer) = (put.group, put.layer);
        let found = of.find(group.into(), layer.into());
        let (at, _) = found.ok_or(PostFault::Layer { group, layer })?;
        has_source(of, group, put.src)?;
        let pair = BlockPair {
            src: put.src,
            dst: put.dst,
        };
        posted.add(at, pair);
    }
    Ok(posted)
}

/// What was wrong with a put that the device has refused: the device says only what it told its kernel, and which put it
/// was.
pub(crate) fn refused(of: &BlockOps, put: &LinkRefused) -> PostFault {
    let places = u64::from(LOCAL_PLACE | REMOTE_PLACE);
    if put.op != u64::from(PUT) {
        return PostFault::Operation;
    }
    if put.flags & places != places {
        return PostFault::Address;
    }
    let (here, there) = (Place::from_word(put.local), Place::from_word(put.remote));
    let group = here.group;
    let is_there = layer_of(of, (here, there), put.len);
    if let Err(fault) = is_there.and_then(|_| has_source(of, group, here.block)) {
        return fault;
    }
    // Whether there is such a block at all, or it is another request's.
    if [Status::BadRange, Status::BadRights]
        .map(|status| u64::from(status.number()))
        .contains(&put.status)
    {
        return PostFault::NotExpected {
            group,
            block: there.block,
        };
    }
    // Nothing that can be seen: other flags, or somebody has written over what was noted.
    PostFault::Malformed
}
