//! Pinned host memory that blocks of this rank's GPU go through: buffers that peers read, and buffers that this rank
//! reads into. Each is one peer's until it is given back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvxfer_verbs::Memory;

use super::GpuSide;
use super::launcher::Launcher;
use crate::config::Config;
use crate::engine::scratch::turn_over;
use crate::error::{Error, chain};
use crate::leases::{LeaseWord, SLOT_BYTES};
use crate::mem::gather::{Gather, GpuKernels, PieceList};
use crate::mem::gpu::{GpuMemory, PinnedMemory, Place, Stream};
use crate::mem::kernels::Piece;
use crate::mem::{ArenaOptions, HostArena};
use crate::transfer::PeerKey;
use crate::wire::Stretch;

/// What buffers begin at a multiple of.
const PAGE: u64 = 4096;

/// Buffers of one direction.
#[derive(Debug)]
pub(crate) struct Slots {
    memory: PinnedMemory,
    /// Where the first begins: before it are the stamps.
    first: u64,
    bytes: u64,
    /// The most that one peer has at a time, so that one that stops leaves some to the others.
    share: usize,
    pool: Mutex<Pool>,
}

#[derive(Debug)]
struct Pool {
    free: Vec<u32>,
    held: HashMap<PeerKey, usize>,
}

impl Slots {
    fn new(kernels: &GpuKernels, count: u32, bytes: u64) -> Result<Self, Error> {
        let bytes = bytes.next_multiple_of(PAGE);
        let first = (u64::from(count) * SLOT_BYTES as u64).next_multiple_of(PAGE);
        // A file, so that a peer on this host can map it.
        let arena = HostArena::with_options(
            first + bytes * u64::from(count),
            ArenaOptions {
                prefault: true,
                ..ArenaOptions::default()
            },
        )?;
        let memory = PinnedMemory::register(kernels.gpu(), arena.memory())?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        Ok(Self {
            memory,
            first,
            bytes,
            share: (count / 2).max(1),
            pool: Mutex::new(Pool {
                free: (0..u32::try_from(count).unwrap_or(u32::MAX))
                    .rev()
                    .collect(),
                held: HashMap::new(),
            }),
        })
    }

    /// What a device registers.
    pub(crate) fn memory(&self) -> Arc<dyn Memory> {
        self.memory.host().as_memory()
    }

    /// Where a buffer begins, in bytes from where the memory does.
    pub(crate) fn at(&self, slot: u32) -> u64 {
        self.first + u64::from(slot) * self.bytes
    }

    /// Where its stamp is.
    pub(crate) fn stamp_at(slot: u32) -> u64 {
        u64::from(slot) * SLOT_BYTES as u64
    }

    /// A buffer for a peer; `None`: there is none now, or it has its share.
    pub(crate) fn take(&self, peer: PeerKey) -> Option<u32> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.held.get(&peer).is_some_and(|held| *held >= self.share) {
            return None;
        }
        let slot = pool.free.pop()?;
        *pool.held.entry(peer).or_default() += 1;
        Some(slot)
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.free.len()
    }

    /// Nothing touches a peer's buffer any more.
    pub(crate) fn give(&self, peer: PeerKey, slot: u32) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.free.push(slot);
        if let Some(held) = pool.held.get_mut(&peer) {
            *held -= 1;
            if *held == 0 {
                pool.held.remove(&peer);
            }
        }
    }

    /// Shows whose a buffer is. When it returns, a reader that begins to read sees it.
    fn show(&self, slot: u32, word: LeaseWord) -> Result<(), Error> {
        let at = Self::stamp_at(slot);
        let host = self.memory.host();
        Ok(turn_over(word, |offset, value| {
            host.store_u64(at + offset, value)
        })?)
    }
}

/// Both directions of one GPU.
#[derive(Debug)]
pub(crate) struct Staging {
    /// What peers read, and what this rank reads into.
    pub(crate) out: Slots,
    pub(crate) into: Slots,
    packing: Stream,
    unpacking: Stream,
    /// The word of the next stamp.
    next: AtomicU64,
}

/// Bytes in a buffer, and where they are in a memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    /// In bytes from where the buffer begins.
    pub(crate) at: u64,
    pub(crate) of: Stretch,
}

impl Staging {
    pub(super) fn new(kernels: &GpuKernels, config: &Config) -> Result<Self, Error> {
        let slots = || {
            let (count, bytes) = (config.staging_slots, config.staging_slot_bytes.0);
            Slots::new(kernels, count, bytes)
        };
        Ok(Self {
            out: slots()?,
            into: slots()?,
            packing: Stream::new(kernels.gpu())?,
            unpacking: Stream::new(kernels.gpu())?,
            next: AtomicU64::new(1),
        })
    }

    /// The most bytes of one piece.
    pub(crate) fn piece_bytes(&self) -> u64 {
        self.out.bytes
    }

    /// A buffer that has been filled is shown as that of the one who asked for it, by this word.
    ///
    /// # Errors
    ///
    /// None that can be foreseen: the stamp is there.
    pub(crate) fn stamp(&self, slot: u32) -> Result<u64, Error> {
        let word = self.next.fetch_add(1, Ordering::Relaxed);
        self.out.show(slot, LeaseWord::live(word))?;
        Ok(word)
    }

    /// A peer's buffer is read no more, or whoever reads it is not to believe it.
    pub(crate) fn take_back(&self, peer: PeerKey, slot: u32) {
        match self.out.show(slot, LeaseWord::DEAD) {
            Ok(()) => self.out.give(peer, slot),
            // Then nobody gets it any more.
            Err(error) => tracing::error!(error = chain(&error), "a buffer keeps its stamp"),
        }
    }
}

impl GpuSide {
    /// Copies stretches of the memories into a buffer that peers read.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub(crate) fn pack(
        &self,
        staging: &Staging,
        slot: u32,
        packed: &[Packed],
    ) -> Result<Gather, Error> {
        let begins = staging.out.at(slot);
        let piece = |packed: &Packed| Piece {
            src: packed.of.offset,
            dst: packed.at,
            len: u64::from(packed.of.len),
        };
        let lists = self.by_memory(packed, piece)?;
        let lists: Vec<PieceList<'_>> = lists
            .iter()
            .map(|(memory, pieces)| PieceList {
                src: Place::Gpu(memory, 0),
                dst: Place::Pinned(&staging.out.memory, begins),
                pieces,
            })
            .collect();
        let stream = &staging.packing;
        let Launcher {
            kernels, options, ..
        } = &*self.launcher;
        Ok(kernels.pieces(stream, &lists, *options)?)
    }

    /// Copies what was read into a buffer to where it belongs.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub(crate) fn unpack(
        &self,
        staging: &Staging,
        slot: u32,
        packed: &[Packed],
    ) -> Result<Gather, Error> {
        let begins = staging.into.at(slot);
        let piece = |packed: &Packed| Piece {
            src: packed.at,
            dst: packed.of.offset,
            len: u64::from(packed.of.len),
        };
        let lists = self.by_memory(packed, piece)?;
        let lists: Vec<PieceList<'_>> = lists
            .iter()
            .map(|(memory, pieces)| PieceList {
                src: Place::Pinned(&staging.into.memory, begins),
                dst: Place::Gpu(memory, 0),
                pieces,
            })
            .collect();
        let stream = &staging.unpacking;
        let Launcher {
            kernels, options, ..
        } = &*self.launcher;
        Ok(kernels.pieces(stream, &lists, *options)?)
    }

    /// A list of pieces for each memory that is named.
    fn by_memory(
        &self,
        packed: &[Packed],
        piece: impl Fn(&Packed) -> Piece,
    ) -> Result<Vec<(&GpuMemory, Vec<Piece>)>, Error> {
        let mut lists: Vec<(u32, &GpuMemory, Vec<Piece>)> = Vec::new();
        for packed in packed {
            let index = packed.of.memory;
            let at = match lists.iter().rposition(|(of, ..)| *of == index) {
                Some(at) => at,
                None => {
                    let memory = usize::try_from(index).ok();
                    let memory = memory.and_then(|at| self.memories.get(at));
                    lists.push((index, memory.ok_or(Error::OtherPlan)?, Vec::new()));
                    lists.len() - 1
                }
            };
            if let Some((.., pieces)) = lists.get_mut(at) {
                pieces.push(piece(packed));
            }
        }
        Ok(lists.into_iter().map(|(_, of, list)| (of, list)).collect())
    }
}
