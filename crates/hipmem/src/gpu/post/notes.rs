//! What a queue of a push over links knows of the blocks that the peer expects, and what kernels note of each.

use std::time::Instant;

use super::posters::Posters;
use crate::error::{Error, Operation};
use crate::gpu::pool::Touched;
use crate::gpu::{Gpu, GpuMemory, PinnedMemory};
use crate::kernels::queue::{LinkRefused, NOTE_BEGUN, NOTE_PUT};
use crate::post::{Compiled, RegionFault, RegionLayer};

/// Bytes of a word.
const WORD: u64 = 4;

/// The blocks of a group that the peer expects.
#[derive(Debug, Clone, Copy)]
pub struct LinkExpected<'a> {
    /// The group.
    pub group: u8,
    /// Its blocks, in any order.
    pub blocks: &'a [u32],
}

/// A block of a layer that was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkPut {
    /// The group.
    pub group: u8,
    /// The layer.
    pub layer: u16,
    /// The block here. It is what the kernel's device has noted: who uses it as a number looks at it first.
    pub src: u32,
    /// The block at the peer.
    pub dst: u32,
}

/// What kernels have put.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkPuts {
    /// Each block of each layer once, however often it was put: as it was put last.
    pub puts: Vec<LinkPut>,
    /// Blocks of layers that were begun and are not whole.
    pub begun: u64,
    /// The first put that was refused. It is what the kernel's device has noted: who uses its words looks at them first.
    pub refused: Option<LinkRefused>,
}

/// The words of a queue of a push, in the GPU's memory.
pub(super) struct Notes {
    memory: GpuMemory,
    /// Where the notes begin, behind the words that say which blocks are expected.
    notes: u64,
    /// Where they are read into.
    read: PinnedMemory,
    /// Group, layer, and the blocks that its notes are of, in their order.
    layers: Vec<(u8, u16, Vec<u32>)>,
}

impl Notes {
    /// For these layers, whose table is told where their words are.
    pub(super) fn new(
        gpu: &Gpu,
        (rows, table): (&[RegionLayer], &mut Compiled),
        expected: &[LinkExpected<'_>],
    ) -> Result<Self, Error> {
        let number = |n: usize| u32::try_from(n).map_err(|_| RegionFault::TooLarge);
        let (mut words, mut groups) = (Vec::<u32>::new(), Vec::<(u8, usize, u32)>::new());
        let (mut layers, mut notes) = (Vec::new(), 0_usize);
        for row in rows {
            let blocks = expected.iter().find(|of| of.group == row.group);
            let blocks = blocks.map_or(&[][..], |of| of.blocks);
            let known = groups.iter().find(|(of, ..)| *of == row.group).copied();
            let (first, count) = match known {
                Some((_, first, count)) => (first, count),
                None => {
                    let first = words.len();
                    words.resize(first + row.remote_blocks as usize, 0);
                    groups.push((row.group, first, row.remote_blocks));
                    for (place, block) in (1..).zip(blocks) {
                        // A block that is there twice has the later place; the other note stays as it is.
                        let word = words
                            .get_mut(first..)
                            .and_then(|of| of.get_mut(*block as usize));
                        *word.ok_or(outside(*block, row.remote_blocks))? = place;
                    }
                    (first, row.remote_blocks)
                }
            };
            // Of a group whose layers say different numbers of blocks some would have no word.
            if count != row.remote_blocks {
                return Err(outside(row.remote_blocks, count));
            }
            number(row.local_blocks as usize + NOTE_PUT as usize)?;
            table.note(row.group, row.layer, (number(first)?, number(notes)?));
            notes = notes.saturating_add(blocks.len());
            layers.push((row.group, row.layer, blocks.to_vec()));
        }
        number(notes)?;
        let at = words.len() as u64 * WORD;
        let bytes = (notes.max(1) as u64) * WORD;
        let memory = GpuMemory::pooled(gpu, at + bytes, Touched::ByHandle)?;
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        if !words.is_empty() {
            memory.write(0, &words)?;
        }
        memory.fill(at, bytes, 0)?;
        Ok(Self {
            memory,
            notes: at,
            read: PinnedMemory::pooled(gpu, bytes, Touched::ByHandle)?,
            layers,
        })
    }

    /// For [`Queue::words`](crate::kernels::queue::Queue::words) and [`Queue::slots`](crate::kernels::queue::Queue::slots).
    pub(super) fn addrs(&self) -> (u64, u64) {
        (self.memory.addr(), self.memory.addr() + self.notes)
    }

    /// What is noted, once no kernel runs any more.
    pub(super) fn puts(&self, posters: &Posters, deadline: Instant) -> Result<LinkPuts, Error> {
        let into = (&self.read, 0);
        posters.read((&self.memory, self.notes), into, self.read.len(), deadline)?;
        let mut bytes = vec![0; self.read.len() as usize];
        self.read.host().read(0, &mut bytes)?;
        let mut words = bytes.chunks_exact(WORD as usize).map(|word| {
            let word = word.try_into().unwrap_or_default();
            u32::from_ne_bytes(word)
        });
        let mut all = LinkPuts {
            refused: posters.refused(deadline)?,
            ..LinkPuts::default()
        };
        for (group, layer, blocks) in &self.layers {
            for (dst, note) in blocks.iter().zip(&mut words) {
                match note.checked_sub(NOTE_PUT) {
                    Some(src) => all.puts.push(LinkPut {
                        group: *group,
                        layer: *layer,
                        src,
                        dst: *dst,
                    }),
                    None => all.begun += u64::from(note == NOTE_BEGUN),
                }
            }
        }
        Ok(all)
    }
}

fn outside(block: u32, blocks: u32) -> Error {
    Error::OutOfBounds {
        operation: Operation::CopyDestination,
        offset: block.into(),
        len: 1,
        size: blocks.into(),
    }
}
