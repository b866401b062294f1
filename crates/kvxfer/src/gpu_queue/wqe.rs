//! Queues of WQEs: what kernels may name in them, and what a model of their device makes of it.
//!
//! A push's kernels name blocks; the table on their device ([`RegionLayer`]) says which stretches a block is in, and
//! each stretch is a WQE. Here each stretch has a key of its own, as if it were a memory window: so what a WQE names is
//! known by arithmetic, and it is a stretch of a block or nothing. The WQEs of a block are its stretches in their order,
//! one behind the other, and a block that is whole is a post like any other.

use kvxfer_verbs::mlx5::model::{
    Carried, Copying, Hca, HcaSetup, KeyTable, Queues, Region, Sink, Violation,
};
use kvxfer_verbs::mlx5::{Gather, Operation, Syndrome};

use super::fault::{PostFault, QueueRule};
use crate::blocks::BlockPair;
use crate::mem::post::device::WqeMemory;
use crate::mem::post::{RegionLayer, RegionPiece, RegionSide, Status};
use crate::plan::{BlockOps, LayerAt, PieceSide, Role};

/// The first key.
const FIRST_KEY: u32 = 0x100;
/// The peer's memory `n` begins here, times `n + 1`: the model's own addresses, which nobody can follow.
const PEER_MEMORY: u64 = 1 << 48;

/// A stretch of the blocks of a layer, by its key.
#[derive(Debug, Clone, Copy)]
struct Window {
    layer: LayerAt,
    /// Which stretch of a block, in the order in which they are posted.
    piece: u32,
    is_last: bool,
    local: RegionSide,
    remote: RegionSide,
    len: u64,
}

impl Window {
    /// The block whose stretch this address begins.
    fn block(side: RegionSide, addr: u64) -> Option<u32> {
        let ahead = addr.checked_sub(side.addr)?;
        match side.stride {
            // The only one.
            0 => (ahead == 0).then_some(0),
            stride if ahead.is_multiple_of(stride) => u32::try_from(ahead / stride).ok(),
            _ => None,
        }
    }
}

/// What kernels may name: by its keys.
#[derive(Debug)]
pub(crate) struct Windows {
    /// Whether it is the consumer whose kernels name blocks.
    role: Role,
    all: Vec<Window>,
}

/// The same with what a queue is made of.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) windows: Windows,
    /// What the device knows of keys.
    pub(crate) keys: KeyTable,
    /// What the table of the kernels' own device is made of.
    pub(crate) layers: Vec<RegionLayer>,
    /// The most stretches that a block is in: so many slots its post takes.
    pub(crate) most: u32,
}

impl Named {
    /// The stretches of all layers that places have numbers for. `local` says where this rank's memories are. `None`
    /// where blocks do not lie evenly, or beyond the model's addresses.
    pub(crate) fn new(of: &BlockOps, local: impl Fn(u32) -> Option<u64>) -> Option<Self> {
        let role = of.role();
        let reads = role == Role::Pull;
        let mut named = Self {
            windows: Windows {
                role,
                all: Vec::new(),
            },
            keys: KeyTable::default(),
            layers: Vec::new(),
            most: 0,
        };
        for (at, layer) in of.layers() {
            let tensors = of.pieces(at)?;
            let (Ok(group), Ok(number)) = (u8::try_from(layer.group), u16::try_from(layer.layer))
            else {
                // Not to be named by a post.
                continue;
            };
            if tensors.is_empty() {
                continue;
            }
            let (produced, consumed) = of.num_blocks(layer.group);
            let (local_blocks, remote_blocks) = match role {
                Role::Push => (produced, consumed),
                Role::Pull => (consumed, produced),
            };
            let count: usize = tensors.iter().map(Vec::len).sum();
            named.most = named.most.max(u32::try_from(count).ok()?);
            let mut row = RegionLayer {
                group,
                layer: number,
                local_blocks,
                remote_blocks,
                tensors: Vec::with_capacity(tensors.len()),
            };
            let mut piece = 0;
            for tensor in tensors {
                let mut pieces = Vec::with_capacity(tensor.len());
                for of in tensor {
                    let key =
                        FIRST_KEY.checked_add(u32::try_from(named.windows.all.len()).ok()?)?;
                    let side = |base: u64, at: PieceSide| {
                        Some(RegionSide {
                            addr: base.checked_add(at.offset)?,
                            stride: at.stride,
                            key,
                        })
                    };
                    let there = u64::from(of.remote.region).checked_add(1)?;
                    let window = Window {
                        layer: at,
                        piece,
                        is_last: piece as usize + 1 == count,
                        local: side(local(of.local.region)?, of.local)?,
                        remote: side(PEER_MEMORY.checked_mul(there)?, of.remote)?,
                        len: of.len,
                    };
                    let region = |side: RegionSide, blocks: u32, writable| {
                        let last = side.stride.checked_mul(blocks.saturating_sub(1).into())?;
                        let len = last.checked_add(of.len)?;
                        // So that an address and its end are numbers.
                        side.addr.checked_add(len)?;
                        Some(Region {
                            addr: side.addr,
                            len,
                            writable,
                        })
                    };
                    let here = region(window.local, local_blocks, reads)?;
                    let there = region(window.remote, remote_blocks, !reads)?;
                    named.keys.local.insert(key, here);
                    named.keys.remote.insert(key, there);
                    named.windows.all.push(window);
                    pieces.push(RegionPiece {
                        local: window.local,
                        remote: window.remote,
                        len: window.len,
                    });
                    piece += 1;
                }
                row.tensors.push(pieces);
            }
            named.layers.push(row);
        }
        Some(named)
    }
}

impl Windows {
    fn of_key(&self, key: u32) -> Option<&Window> {
        let at = key.checked_sub(FIRST_KEY)?;
        self.all.get(usize::try_from(at).ok()?)
    }
}

/// A block whose WQEs have all come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    /// Its ticket, as the kernel has it: the last WQE, and how many come before it.
    pub(crate) ticket: u64,
    pub(crate) layer: LayerAt,
    pub(crate) pair: BlockPair,
}

/// A block some of whose WQEs have come.
#[derive(Debug, Clone, Copy)]
struct Begun {
    first: u64,
    next_piece: u32,
    layer: LayerAt,
    pair: BlockPair,
}

/// The numbers of a ticket's WQEs, and one behind the last (`KVX_TICKET` of `kernels/queue.h`).
fn wqes_of(ticket: u64) -> std::ops::Range<u64> {
    let (last, more) = (ticket & ((1 << 56) - 1), ticket >> 56);
    last.saturating_sub(more)..last + 1
}

/// Puts WQEs together to blocks.
#[derive(Debug)]
struct Blocks {
    windows: Windows,
    begun: Option<Begun>,
    whole: Vec<Block>,
    /// What is wrong with the WQE that was refused.
    wrong: Option<PostFault>,
    /// Nothing is carried out any more, and this is what is told.
    closed: Option<Syndrome>,
}

impl Blocks {
    fn take(&mut self, n: u64, operation: &Operation) -> Result<(), (PostFault, Syndrome)> {
        let (remote, local) = match (operation, self.windows.role) {
            (Operation::Write { remote, local }, Role::Push)
            | (Operation::Read { remote, local }, Role::Pull) => (remote, local),
            _ => return Err((PostFault::Operation, Syndrome::LOCAL_QP_OPERATION)),
        };
        let Gather::One(local) = local else {
            return Err((PostFault::Operation, Syndrome::LOCAL_QP_OPERATION));
        };
        // The keys have been looked at: both are there.
        let window = self.windows.of_key(remote.rkey);
        let window = window.filter(|_| remote.rkey == local.lkey());
        let stretch = (PostFault::Stretch, Syndrome::REMOTE_ACCESS);
        let window = window.ok_or(stretch)?;
        let blocks = (
            Window::block(window.local, local.addr()),
            Window::block(window.remote, remote.addr),
        );
        let (Some(here), Some(there)) = blocks else {
            return Err(stretch);
        };
        if u64::from(local.len()) != window.len {
            return Err(stretch);
        }
        let pair = match self.windows.role {
            Role::Push => BlockPair {
                src: here,
                dst: there,
            },
            Role::Pull => BlockPair {
                src: there,
                dst: here,
            },
        };
        let begun = self.begun.take().unwrap_or(Begun {
            first: n,
            next_piece: 0,
            layer: window.layer,
            pair,
        });
        let goes_on = (begun.layer, begun.pair, begun.next_piece);
        if goes_on != (window.layer, pair, window.piece) {
            return Err((PostFault::Places, Syndrome::LOCAL_QP_OPERATION));
        }
        if window.is_last {
            self.whole.push(Block {
                ticket: (n - begun.first) << 56 | n,
                layer: window.layer,
                pair,
            });
        } else {
            self.begun = Some(Begun {
                next_piece: begun.next_piece + 1,
                ..begun
            });
        }
        Ok(())
    }
}

impl Sink for Blocks {
    fn execute(&mut self, n: u64, operation: &Operation) -> Result<Carried, Syndrome> {
        if let Some(syndrome) = self.closed {
            return Err(syndrome);
        }
        match self.take(n, operation) {
            Ok(()) => Ok(Carried::UnderWay),
            Err((fault, syndrome)) => {
                self.wrong = Some(fault);
                Err(syndrome)
            }
        }
    }
}

/// A WQE that was wrong, or a rule that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wrong {
    pub(crate) wqe: u64,
    pub(crate) fault: PostFault,
}

/// The device of a queue of WQEs: a model of one, which carries nothing out itself.
#[derive(Debug)]
pub(crate) struct WqeDevice {
    hca: Hca<WqeMemory, Blocks>,
    /// A WQE was wrong, and it was said.
    is_told: bool,
    /// A rule was broken: the queue is of no more use.
    is_lost: bool,
}

impl WqeDevice {
    /// A device for a queue's memory; `setup` has the keys of `windows`.
    ///
    /// # Errors
    ///
    /// Memory that is too small.
    pub(crate) fn new(
        queues: Queues<WqeMemory>,
        setup: HcaSetup,
        windows: Windows,
    ) -> Result<Self, Violation> {
        let blocks = Blocks {
            windows,
            begun: None,
            whole: Vec::new(),
            wrong: None,
            closed: None,
        };
        Ok(Self {
            hca: Hca::new(queues, setup, blocks)?,
            is_told: false,
            is_lost: false,
        })
    }

    /// WQEs that were taken.
    pub(crate) fn taken(&self) -> u64 {
        self.hca.consumed()
    }

    /// Those whose ends have not been told.
    pub(crate) fn under_way(&self) -> u64 {
        match self.is_lost {
            true => 0,
            false => self.hca.consumed() - self.hca.ended(),
        }
    }

    /// Whether a block has begun that is not whole.
    pub(crate) fn has_begun(&self) -> bool {
        self.hca.sink().begun.is_some()
    }

    /// What it has been told of and is still being copied out of the GPU's memory: the next look goes on with that.
    pub(crate) fn copying(&self) -> Option<Copying> {
        self.hca.copying().filter(|_| !self.is_lost)
    }

    /// Takes what has been posted, but so many WQEs at most: blocks in their order, and how many WQEs that were. What is
    /// wrong is said once, and nothing behind it is taken.
    pub(crate) fn look(&mut self, most: u64, blocks: &mut Vec<Block>) -> (u64, Option<Wrong>) {
        if self.is_lost {
            return (0, None);
        }
        let looked = self.hca.look(most);
        blocks.append(&mut self.hca.sink_mut().whole);
        match looked {
            Ok(count) => (count, self.wrong()),
            Err(violation) => (0, Some(self.lose(&violation))),
        }
    }

    /// What became of the first WQE that was refused.
    fn wrong(&mut self) -> Option<Wrong> {
        let (wqe, syndrome) = self.hca.refused()?;
        if self.is_told || self.hca.sink().closed.is_some() {
            return None;
        }
        self.is_told = true;
        // Where its keys do not allow it, it was not carried out at all.
        let fault = self.hca.sink_mut().wrong.take();
        let fault = fault.unwrap_or(match syndrome {
            Syndrome::LOCAL_PROTECTION | Syndrome::REMOTE_ACCESS => PostFault::Key,
            _ => PostFault::Malformed,
        });
        Some(Wrong { wqe, fault })
    }

    fn lose(&mut self, violation: &Violation) -> Wrong {
        tracing::error!(%violation, "a queue of WQEs");
        self.is_lost = true;
        Wrong {
            wqe: self.hca.consumed(),
            fault: PostFault::Rule {
                rule: QueueRule::of(violation),
            },
        }
    }

    /// A block has ended: so have its WQEs. What is wrong is of the queue.
    pub(crate) fn complete(&mut self, ticket: u64, status: Status) -> Result<(), Wrong> {
        let mut ended = match status {
            Status::Ok => None,
            status => Some(syndrome_of(status)),
        };
        for wqe in wqes_of(ticket) {
            if self.is_lost {
                return Ok(());
            }
            let end = match ended {
                None => Ok(0),
                Some(syndrome) => Err(syndrome),
            };
            if let Err(violation) = self.hca.complete(wqe, end) {
                return Err(self.lose(&violation));
            }
            ended = ended.map(|_| Syndrome::FLUSHED);
        }
        Ok(())
    }

    /// From now on nothing is carried out, and posters are told so.
    pub(crate) fn close(&mut self, status: Status) {
        let closed = &mut self.hca.sink_mut().closed;
        closed.get_or_insert(syndrome_of(status));
    }

    /// All that is under way has ended, and nothing is carried out any more.
    pub(crate) fn fail(&mut self, status: Status) -> Result<(), Wrong> {
        self.close(status);
        if self.is_lost {
            return Ok(());
        }
        let failed = self.hca.fail(syndrome_of(status));
        failed.map_err(|violation| self.lose(&violation))
    }
}

/// What a device has to say of it: it has no word for a deadline or an end.
fn syndrome_of(status: Status) -> Syndrome {
    match status {
        Status::Peer => Syndrome::TRANSPORT_RETRY,
        Status::Flushed => Syndrome::FLUSHED,
        Status::BadRights | Status::BadRange => Syndrome::REMOTE_ACCESS,
        Status::BadKey => Syndrome::LOCAL_PROTECTION,
        Status::Malformed | Status::BadOp => Syndrome::LOCAL_QP_OPERATION,
        Status::BadLength => Syndrome::LOCAL_LENGTH,
        _ => Syndrome::REMOTE_ABORTED,
    }
}

#[cfg(test)]
#[path = "wqe_tests.rs"]
mod tests;
