//! Where the queues of a real device lie: what a kernel that writes WQEs itself would have to know.
//!
//! The addresses are libmlx5's, in memory of this process that the CPU reaches. For a GPU to post there, its runtime
//! has to map them: the two queues and their records as any memory of the host, the doorbell's page as registers of a
//! device ([`MappedQueues::memory`]). No session uses it, and no device has been mapped. Queues in memory of one's own
//! choice, such as a GPU's, are not made by this interface at all but by DEVX, which is not here.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::ptr::NonNull;

use super::CQE_BYTES;
use super::dv::{MLX5DV_QP_MASK_UAR_MMAP_OFFSET, mlx5dv_cq, mlx5dv_qp};
use super::geometry::{CqDepth, SqDepth, WQEBB};
use super::library::Mlx5;
use super::wqe::Qpn;
use crate::device::CompletionQueue;
use crate::qp::QueuePair;
use crate::sys::types::{ibv_cq, ibv_qp};

/// What is missing for a device's queues to be mapped, in the order in which it is looked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoMlx5 {
    /// libmlx5 cannot be loaded.
    #[error(
        "libmlx5 cannot be loaded ({}: {why}): install rdma-core's providers (Debian: ibverbs-providers)",
        name.display()
    )]
    Library {
        /// The name that the loader was given.
        name: PathBuf,
        /// The loader's words.
        why: String,
    },
    /// The library is there and too old, or is something else.
    #[error("{} has no {symbol}@{version}: it is older than rdma-core 30, or another library of that name", library.display())]
    Symbol {
        /// The function.
        symbol: &'static str,
        /// The version of its symbol.
        version: &'static str,
        /// The file of the library.
        library: PathBuf,
    },
    /// A queue of the software device.
    #[error("{what} is not of an RDMA device: the software device has no queues that a NIC reads")]
    NotRdma {
        /// What was to be mapped.
        what: &'static str,
    },
    /// An RDMA device of another kind.
    #[error(
        "{device} is not an mlx5 device: libmlx5 does not drive it, and no other vendor's queues are known here"
    )]
    NotMlx5 {
        /// The kernel's name of the device.
        device: String,
    },
    /// The queue pair's sends complete elsewhere.
    #[error("queue pair {qpn:#x} completes its sends on another completion queue")]
    OtherQueue {
        /// The queue pair's number.
        qpn: u32,
    },
    /// The queue pair's receives complete where its sends do.
    #[error(
        "queue pair {qpn:#x} completes its receives on the completion queue of its sends, which kernels read as sends alone: give the receives a queue of their own"
    )]
    SharedQueue {
        /// The queue pair's number.
        qpn: u32,
    },
    /// `mlx5dv_init_obj` refused.
    #[error("mlx5dv_init_obj of {device}'s {what}: {source}")]
    Refused {
        /// The kernel's name of the device.
        device: String,
        /// What was to be mapped.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The queue is there, and is not as kernels here write it.
    #[error("{device}'s {what} is {found}, and must be {wanted}")]
    Shape {
        /// The kernel's name of the device.
        device: String,
        /// What of the queue.
        what: &'static str,
        /// What it is.
        found: u64,
        /// What it would have to be.
        wanted: &'static str,
    },
}

/// A send queue of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedSends {
    /// The queue pair.
    pub qpn: Qpn,
    /// Where its WQEs lie, 64 bytes each.
    pub slots: u64,
    /// How many.
    pub depth: SqDepth,
    /// Its doorbell record: eight bytes, of which the send queue has the last four.
    pub record: u64,
    /// Its doorbell.
    pub bell: u64,
    /// Bytes of each of the register's two halves, which take whole WQEs (BlueFlame); 0: there are none, and the doorbell
    /// takes eight bytes alone. Kernels write eight bytes to the first half always ([`MappedQueues::memory`]).
    pub bell_bytes: u32,
    /// Where the doorbell's page is in the device's file, for another mapping of it; where libmlx5 tells.
    pub bell_offset: Option<u64>,
}

/// A completion queue of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedCompletions {
    /// Its number.
    pub cqn: u32,
    /// Where its completions lie, 64 bytes each.
    pub slots: u64,
    /// How many.
    pub depth: CqDepth,
    /// Its doorbell record: eight bytes, of which the first four say what was taken.
    pub record: u64,
}

/// A queue pair whose sends somebody else writes than this library, and where that goes. It is held, with its completion
/// queue, so that what the addresses name stays; through it nothing can be posted any more, for two who count the same
/// queue would write over each other. The receive queue is left alone.
pub struct MappedQueues<S> {
    sends: MappedSends,
    completions: MappedCompletions,
    _qp: QueuePair<S>,
    _cq: CompletionQueue,
}

impl<S> MappedQueues<S> {
    /// Maps a queue pair's send queue and the completion queue of its sends, which must be its alone: whoever reads
    /// completions counts them. Nothing may have been posted.
    ///
    /// # Errors
    ///
    /// [`NoMlx5`], with what is missing first. The queue pair is gone then.
    pub fn new(qp: QueuePair<S>, cq: &CompletionQueue) -> Result<Self, NoMlx5> {
        // What can be told without a library is told first.
        let raw_qp = qp.ibv().ok_or(NoMlx5::NotRdma {
            what: "the queue pair",
        })?;
        let raw_cq = cq.ibv().ok_or(NoMlx5::NotRdma {
            what: "the completion queue",
        })?;
        // SAFETY: `qp` and `cq` hold what the pointers name.
        let (sends, completions) = unsafe { map(Mlx5::get()?, raw_qp, raw_cq) }?;
        Ok(Self {
            sends,
            completions,
            _qp: qp,
            _cq: cq.clone(),
        })
    }

    /// The send queue.
    #[must_use]
    pub fn sends(&self) -> &MappedSends {
        &self.sends
    }

    /// The completion queue.
    #[must_use]
    pub fn completions(&self) -> &MappedCompletions {
        &self.completions
    }
}

impl<S> fmt::Debug for MappedQueues<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedQueues")
            .field("sends", &self.sends)
            .field("completions", &self.completions)
            .finish()
    }
}

/// Asks libmlx5, and checks what it says.
///
/// # Safety
///
/// Queue pair and completion queue are of libibverbs, and there.
pub(super) unsafe fn map(
    mlx5: &Mlx5,
    qp: NonNull<ibv_qp>,
    cq: NonNull<ibv_cq>,
) -> Result<(MappedSends, MappedCompletions), NoMlx5> {
    let raw = qp.as_ptr();
    // SAFETY: the caller keeps the queue pair, of which these fields stand still.
    let context = unsafe { (*raw).context };
    // SAFETY: as above.
    let number = unsafe { (*raw).qp_num };
    // SAFETY: as above.
    let sends_to = unsafe { (*raw).send_cq };
    // SAFETY: as above.
    let receives_to = unsafe { (*raw).recv_cq };
    let context = NonNull::new(context);
    // SAFETY: a queue pair's context, and that one's device, are there as long as it is.
    let device = context.and_then(|context| NonNull::new(unsafe { (*context.as_ptr()).device }));
    let Some(device) = device else {
        return Err(NoMlx5::NotRdma {
            what: "the queue pair",
        });
    };
    // SAFETY: as above.
    let name = unsafe { &raw const (*device.as_ptr()).name };
    // SAFETY: libibverbs ends the name with a zero byte, inside of its field.
    let name = unsafe { CStr::from_ptr(name.cast()) };
    let name = name.to_string_lossy().into_owned();
    // SAFETY: as above.
    if !unsafe { mlx5.drives(device) } {
        return Err(NoMlx5::NotMlx5 { device: name });
    }
    if sends_to != cq.as_ptr() {
        return Err(NoMlx5::OtherQueue { qpn: number });
    }
    if receives_to == sends_to {
        return Err(NoMlx5::SharedQueue { qpn: number });
    }
    let refused = |what, source| NoMlx5::Refused {
        device: name.clone(),
        what,
        source,
    };
    // SAFETY: the caller keeps it, and libmlx5 drives the device.
    let out = unsafe { mlx5.queue_pair(qp) }.map_err(|e| refused("queue pair", e))?;
    let sends = sends(&name, number, &out)?;
    // SAFETY: as above.
    let out = unsafe { mlx5.completion_queue(cq) }.map_err(|e| refused("completion queue", e))?;
    Ok((sends, completions(&name, &out)?))
}

/// A queue's numbers, checked for a device of this name.
struct Shapes<'a>(&'a str);

impl Shapes<'_> {
    fn check(
        &self,
        what: &'static str,
        found: u64,
        good: bool,
        wanted: &'static str,
    ) -> Result<u64, NoMlx5> {
        match good {
            true => Ok(found),
            false => Err(NoMlx5::Shape {
                device: self.0.to_owned(),
                what,
                found,
                wanted,
            }),
        }
    }

    fn address<T>(
        &self,
        what: &'static str,
        at: *mut T,
        to: u64,
        wanted: &'static str,
    ) -> Result<u64, NoMlx5> {
        let found = at.expose_provenance() as u64;
        self.check(what, found, found != 0 && found.is_multiple_of(to), wanted)
    }
}

const A_LINE: &str = "an address that is a multiple of 64";
const A_WORD: &str = "an address that is a multiple of 8";
const A_DEPTH: &str = "a power of two up to 32768";

fn sends(device: &str, number: u32, out: &mlx5dv_qp) -> Result<MappedSends, NoMlx5> {
    let shape = Shapes(device);
    let stride = out.sq.stride.into();
    shape.check("send queue's stride", stride, stride == WQEBB as u64, "64")?;
    let depth = SqDepth::new(out.sq.wqe_cnt);
    let depth = depth.map_err(|_| NoMlx5::Shape {
        device: device.to_owned(),
        what: "send queue's depth",
        found: out.sq.wqe_cnt.into(),
        wanted: A_DEPTH,
    })?;
    let qpn = Qpn::new(number);
    let qpn = qpn.map_err(|_| NoMlx5::Shape {
        device: device.to_owned(),
        what: "queue pair's number",
        found: number.into(),
        wanted: "a number of 24 bits",
    })?;
    let told = out.comp_mask & MLX5DV_QP_MASK_UAR_MMAP_OFFSET != 0;
    Ok(MappedSends {
        qpn,
        slots: shape.address("send queue", out.sq.buf, WQEBB as u64, A_LINE)?,
        depth,
        record: shape.address("doorbell record", out.dbrec, 8, A_WORD)?,
        bell: shape.address("doorbell", out.bf.reg, 8, A_WORD)?,
        bell_bytes: out.bf.size,
        bell_offset: told
            .then_some(out.uar_mmap_offset)
            .and_then(|at| u64::try_from(at).ok()),
    })
}

fn completions(device: &str, out: &mlx5dv_cq) -> Result<MappedCompletions, NoMlx5> {
    let shape = Shapes(device);
    let size = out.cqe_size.into();
    let wanted = "64 (see MLX5_CQE_SIZE in mlx5dv(7))";
    shape.check("completions' size", size, size == CQE_BYTES as u64, wanted)?;
    let depth = CqDepth::new(out.cqe_cnt);
    let depth = depth.map_err(|_| NoMlx5::Shape {
        device: device.to_owned(),
        what: "completion queue's depth",
        found: out.cqe_cnt.into(),
        wanted: A_DEPTH,
    })?;
    Ok(MappedCompletions {
        cqn: out.cqn,
        slots: shape.address("completion queue", out.buf, CQE_BYTES as u64, A_LINE)?,
        depth,
        record: shape.address("completion queue's record", out.dbrec, 8, A_WORD)?,
    })
}
