//! What a path could do at best: its bare copying, over the same pairs in the same order, with as
//! many threads as the path has.

use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use kvxfer::bench::{BenchSide, BlockMemory};
use kvxfer::config::PathKind;
use kvxfer_hipmem::bare::{self, Piece, RemotePiece};
use kvxfer_hipmem::gpu::{Gpu, GpuMemory};
use kvxfer_hipmem::{CopyPair, HostArena, HostBuffer, HostMemory};

use super::case::Case;
use super::engine_limit::{Ends, EngineLimit};
use crate::output::schema::Op;

/// Spans of one bare call at most.
const BATCH: usize = 512;
/// Bytes that a thread takes at a time, where a block is not more.
const TAKE: u64 = 1 << 20;

/// What the limit must know of the session.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ways<'a> {
    pub(crate) path: PathKind,
    /// What its queue pairs go by.
    pub(crate) beneath: PathKind,
    pub(crate) op: Op,
    /// Queue pairs, which are streams over TCP.
    pub(crate) lanes: usize,
    /// Our threads that drive them.
    pub(crate) workers: usize,
    pub(crate) same_host: bool,
    /// The target's process and the address of its memory, if it is our own child.
    pub(crate) target: Option<(i32, u64)>,
    /// And its GPU.
    pub(crate) target_gpu: Option<&'a Gpu>,
}

/// A stretch of bytes that is contiguous on both sides.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    remote: u64,
    local: u64,
    len: u64,
}

impl Stretch {
    /// Where the bytes come from, and where they go.
    fn ends(&self, op: Op) -> (u64, u64) {
        match op {
            Op::Read => (self.remote, self.local),
            Op::Write => (self.local, self.remote),
        }
    }
}

/// A path's limit, ready to run.
#[derive(Debug)]
pub(crate) enum Limit {
    /// Of a path between memories of the host, also beneath what is staged.
    Bare(Box<BareLimit>),
    /// Of one by which a GPU copies.
    Engine(EngineLimit),
}

/// The bare copying of a path.
#[derive(Debug)]
pub(crate) struct BareLimit {
    how: How,
    op: Op,
    /// Our side's memory.
    local: HostMemory,
    /// Stands for the server's.
    mirror: HostMemory,
    /// For each slot, in the order in which the path copies.
    slots: Vec<Vec<Stretch>>,
    /// Stretches that a thread takes at a time.
    take: usize,
}

#[derive(Debug)]
enum How {
    Copy { threads: usize },
    ProcessVm { threads: usize, pid: i32, base: u64 },
    Tcp(Streams),
}

/// Both ends of the connections over the loopback.
#[derive(Debug)]
struct Streams {
    send: Vec<TcpStream>,
    receive: Vec<TcpStream>,
    senders: usize,
    receivers: usize,
}

impl Limit {
    /// The limit of a path; `None` where it has none.
    ///
    /// # Errors
    ///
    /// Memory or sockets that cannot be had.
    pub(crate) fn new(
        ways: Ways<'_>,
        case: &Case,
        side: &BenchSide,
    ) -> anyhow::Result<Option<Self>> {
        let own = side.memory().first().and_then(BlockMemory::gpu);
        if ways.path == PathKind::Ipc {
            let own = own.map(GpuMemory::gpu);
            let ends = match (own, ways.target_gpu, ways.target) {
                (Some(own), Some(target), _) => Some(Ends::Gpus(own, target)),
                // Of a target of our own it is known that it has none.
                (Some(own), None, Some(_)) => Some(Ends::OwnGpu(own)),
                (None, Some(target), _) => Some(Ends::TargetGpu(target)),
                _ => None,
            };
            let limit = ends.map(|ends| EngineLimit::new(ends, ways.op, case.bytes()));
            return Ok(limit.transpose()?.map(Self::Engine));
        }
        let limit = BareLimit::new(ways, case, side)?;
        Ok(limit.map(|limit| Self::Bare(Box::new(limit))))
    }

    /// Moves what `transfers` transfers would. Returns the time.
    ///
    /// # Errors
    ///
    /// A bare call that fails.
    pub(crate) fn run(&self, transfers: usize) -> anyhow::Result<Duration> {
        match self {
            Self::Bare(limit) => limit.run(transfers),
            Self::Engine(limit) => limit.run(transfers),
        }
    }
}

impl BareLimit {
    fn new(ways: Ways<'_>, case: &Case, side: &BenchSide) -> anyhow::Result<Option<Self>> {
        let of_gpu;
        let local = match side.memory().first() {
            Some(memory) => match (memory.host(), memory.gpu()) {
                (Some(host), _) => host,
                // Staged: what the pinned memory of both sides could do at best.
                (None, Some(gpu)) => {
                    of_gpu = HostArena::new(gpu.len())?;
                    of_gpu.memory()
                }
                (None, None) => return Ok(None),
            },
            None => return Ok(None),
        };
        // A READ is copied by the workers that have queue pairs, a WRITE by the target's one
        // responder.
        let copying = match ways.op {
            // What is staged is read both ways.
            _ if ways.path == PathKind::Staged => ways.workers.max(1),
            Op::Read => ways.workers.max(1),
            Op::Write => 1,
        };
        let how = match ways.beneath {
            PathKind::Arena => How::Copy { threads: copying },
            PathKind::ProcessVm => How::ProcessVm {
                threads: copying,
                pid: 0,
                base: 0,
            },
            PathKind::Tcp if ways.same_host => {
                let (senders, receivers) = match ways.op {
                    // By one responder, on either side.
                    _ if ways.path == PathKind::Staged => (1, ways.workers),
                    Op::Read => (1, ways.workers),
                    Op::Write => (ways.workers, 1),
                };
                How::Tcp(Streams::open(ways.lanes, senders, receivers).context(
                    "opening connections over the loopback, to measure the path's limit",
                )?)
            }
            _ => return Ok(None),
        };
        // The target's blocks may be a GPU's, where nobody reads them so.
        let target = ways.target.filter(|_| ways.path != PathKind::Staged);
        let mirror = match (&how, target) {
            // The target's own memory is read: none is needed here.
            (How::ProcessVm { .. }, Some(_)) => local.clone(),
            (How::ProcessVm { .. }, None) => HostBuffer::new(local.len())?.memory().clone(),
            _ => HostArena::new(local.len())?.memory().clone(),
        };
        let how = match how {
            How::ProcessVm { threads, .. } => {
                let own = i32::try_from(std::process::id()).unwrap_or(0);
                let (pid, base) = target.unwrap_or((own, mirror.addr()));
                How::ProcessVm { threads, pid, base }
            }
            how => how,
        };
        let slots: Vec<Vec<Stretch>> = (0..case.slots.len())
            .map(|slot| stretches(case, side, slot))
            .collect();
        let take = (TAKE / case.block_bytes.max(1)).clamp(1, BATCH as u64);
        Ok(Some(Self {
            how,
            op: ways.op,
            local: local.clone(),
            mirror,
            slots,
            take: usize::try_from(take).unwrap_or(BATCH),
        }))
    }

    /// Copies what `transfers` transfers would, beginning with the first slot.
    fn run(&self, transfers: usize) -> anyhow::Result<Duration> {
        let work: Vec<&[Stretch]> = (0..transfers)
            .filter_map(|i| self.slots.get(i % self.slots.len().max(1)))
            .flat_map(|slot| slot.chunks(self.take))
            .collect();
        let (from, to) = match self.op {
            Op::Read => (&self.mirror, &self.local),
            Op::Write => (&self.local, &self.mirror),
        };
        let begun = Instant::now();
        match &self.how {
            How::Copy { threads } => {
                shared_out(
                    *threads,
                    &work,
                    |part: &[Stretch], pairs: &mut Vec<CopyPair>| {
                        pairs.clear();
                        pairs.extend(part.iter().map(|s| {
                            let (src, dst) = s.ends(self.op);
                            CopyPair {
                                src,
                                dst,
                                len: s.len,
                            }
                        }));
                        to.copy_pairs(from, pairs)
                    },
                )?;
            }
            How::ProcessVm { threads, pid, base } => {
                // Reading is what either side does: a WRITE is read by the target, from us. The
                // limit has the two processes change places then, and each byte its place.
                shared_out(
                    *threads,
                    &work,
                    |part: &[Stretch], pieces: &mut Vec<RemotePiece>| {
                        pieces.clear();
                        pieces.extend(part.iter().map(|s| {
                            let (src, dst) = s.ends(self.op);
                            RemotePiece {
                                remote_addr: base + src,
                                offset: dst,
                                len: s.len,
                            }
                        }));
                        bare::process_vm_readv(*pid, &self.local, pieces, BATCH).map(drop)
                    },
                )?;
            }
            How::Tcp(streams) => {
                let read = self.op == Op::Read;
                streams.run(&work, (from, !read), (to, read))?;
            }
        }
        Ok(begun.elapsed())
    }
}

/// The stretches of a slot, in the planner's order: tensor by tensor, by the server's block.
fn stretches(case: &Case, side: &BenchSide, slot: usize) -> Vec<Stretch> {
    let mut pairs = case.slots.get(slot).cloned().unwrap_or_default();
    pairs.sort_unstable_by_key(|pair| pair.remote);
    let mut all: Vec<Stretch> = Vec::new();
    for tensor in side.placement().desc().tensors() {
        for pair in &pairs {
            let at = |block: u32| tensor.offset + u64::from(block) * tensor.block_stride;
            let next = Stretch {
                remote: at(pair.remote),
                local: at(pair.local),
                len: tensor.block_stride,
            };
            match all.last_mut() {
                Some(last)
                    if last.remote + last.len == next.remote
                        && last.local + last.len == next.local =>
                {
                    last.len += next.len;
                }
                _ => all.push(next),
            }
        }
    }
    all
}

/// Has `threads` threads take parts of the work until none is left, as workers do.
fn shared_out<P, T: Default>(
    threads: usize,
    work: &[P],
    each: impl Fn(P, &mut T) -> Result<(), kvxfer_hipmem::Error> + Sync,
) -> anyhow::Result<()>
where
    P: Copy + Sync,
{
    let next = AtomicUsize::new(0);
    let run = || {
        let mut scratch = T::default();
        while let Some(part) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            each(*part, &mut scratch)?;
        }
        Ok(())
    };
    if threads <= 1 {
        return Ok(run().map_err(|error: kvxfer_hipmem::Error| error)?);
    }
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        joined(others)
    })
}

fn joined(
    threads: Vec<std::thread::ScopedJoinHandle<'_, Result<(), kvxfer_hipmem::Error>>>,
) -> anyhow::Result<()> {
    let mut first = Ok(());
    for thread in threads {
        let result = match thread.join() {
            Ok(result) => result.map_err(anyhow::Error::from),
            Err(_) => Err(anyhow::anyhow!("a thread that measures the limit panicked")),
        };
        first = first.and(result);
    }
    first
}

impl Streams {
    fn open(count: usize, senders: usize, receivers: usize) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let (mut send, mut receive) = (Vec::new(), Vec::new());
        for _ in 0..count.max(1) {
            let one = TcpStream::connect(address)?;
            let (other, from) = listener.accept()?;
            if one.local_addr()? != from {
                return Err(std::io::Error::other("somebody else connected first"));
            }
            one.set_nodelay(true)?;
            other.set_nodelay(true)?;
            send.push(one);
            receive.push(other);
        }
        Ok(Self {
            senders: senders.clamp(1, send.len()),
            receivers: receivers.clamp(1, receive.len()),
            send,
            receive,
        })
    }

    /// Sends the parts over the streams in turn and receives them. Every thread goes through its
    /// streams' parts in the order of the list, so nobody waits for somebody who waits for him.
    ///
    /// A memory comes with whether its offsets are the local ones.
    fn run(
        &self,
        work: &[&[Stretch]],
        from: (&HostMemory, bool),
        to: (&HostMemory, bool),
    ) -> anyhow::Result<()> {
        let count = self.send.len();
        let pieces = |part: &[Stretch], local: bool, pieces: &mut Vec<Piece>| {
            pieces.clear();
            pieces.extend(part.iter().map(|s| Piece {
                offset: if local { s.local } else { s.remote },
                len: s.len,
            }));
        };
        // The parts of the streams that fall to one thread of several.
        let parts = |thread: usize, threads: usize| {
            work.iter()
                .enumerate()
                .map(move |(i, part)| (i % count, *part))
                .filter(move |(stream, _)| stream % threads == thread)
        };
        let sender = |thread: usize| {
            let mut list = Vec::new();
            for (stream, part) in parts(thread, self.senders) {
                pieces(part, from.1, &mut list);
                if let Some(stream) = self.send.get(stream) {
                    bare::writev(stream.as_fd(), from.0, &list, BATCH)?;
                }
            }
            Ok(())
        };
        let receiver = |thread: usize| {
            let mut list = Vec::new();
            for (stream, part) in parts(thread, self.receivers) {
                pieces(part, to.1, &mut list);
                if let Some(stream) = self.receive.get(stream) {
                    bare::readv(stream.as_fd(), to.0, &list, BATCH)?;
                }
            }
            Ok(())
        };
        // Whoever fails must not leave the others waiting.
        let guarded = |result: Result<(), kvxfer_hipmem::Error>| {
            if result.is_err() {
                for stream in self.send.iter().chain(&self.receive) {
                    let _ = stream.shutdown(Shutdown::Both);
                }
            }
            result
        };
        let (sender, receiver, guarded) = (&sender, &receiver, &guarded);
        std::thread::scope(|scope| {
            let senders = (0..self.senders).map(|t| scope.spawn(move || guarded(sender(t))));
            let mut all: Vec<_> = senders.collect();
            all.extend((0..self.receivers).map(|t| scope.spawn(move || guarded(receiver(t)))));
            joined(all)
        })
    }
}
