//! Where blocks lie on both sides of what is measured.

use kvxfer_hipmem::gather::{GatherOptions, GatherSection, GatherTable, GpuKernels, TensorPlaces};
use kvxfer_hipmem::gpu::{GpuMemory, PinnedMemory, Place};
use kvxfer_hipmem::kernels::{Pair, Piece};

use super::Result;

/// A side's memory.
pub(super) enum Memory {
    Gpu(GpuMemory),
    Pinned(PinnedMemory),
}

impl Memory {
    pub(super) fn at(&self, offset: u64) -> Place<'_> {
        match self {
            Self::Gpu(memory) => Place::Gpu(memory, offset),
            Self::Pinned(memory) => Place::Pinned(memory, offset),
        }
    }
}

/// How blocks lie: tensors after each other.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) tensors: u64,
    pub(super) block: u64,
    /// Of one tensor.
    pub(super) blocks: u32,
}

impl Layout {
    pub(super) fn of(total: u64, tensors: u64, block: u64) -> Self {
        let blocks = u32::try_from(total / tensors / block).unwrap_or(u32::MAX);
        Self {
            tensors,
            block,
            blocks,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.tensors * self.block * u64::from(self.blocks)
    }

    pub(super) fn table(
        &self,
        kernels: &GpuKernels,
        (src, dst): (&Memory, &Memory),
        options: GatherOptions,
    ) -> Result<GatherTable> {
        let stride = self.block * u64::from(self.blocks);
        let tensors = (0..self.tensors).map(|i| TensorPlaces {
            src: src.at(i * stride),
            dst: dst.at(i * stride),
        });
        let section = GatherSection {
            tensors: &tensors.collect::<Vec<_>>(),
            pieces: &[Piece {
                src: 0,
                dst: 0,
                len: self.block,
            }],
            strides: (self.block, self.block),
            blocks: (self.blocks, self.blocks),
        };
        Ok(kernels.table(&[section], options)?)
    }

    /// All blocks, none beside one that was beside it.
    pub(super) fn scattered(&self) -> Vec<Pair> {
        let mut order: Vec<u32> = (0..self.blocks).collect();
        let mut x = 88_172_645_463_325_252_u64;
        for i in (1..order.len()).rev() {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            order.swap(i, (x % (i as u64 + 1)) as usize);
        }
        let n = self.blocks;
        // Sources by odd numbers, then by even ones.
        let src = (0..n).map(|i| {
            if i < n / 2 {
                2 * i + 1
            } else {
                (2 * (i - n / 2)).min(n - 1)
            }
        });
        src.zip(order).map(|(src, dst)| Pair { src, dst }).collect()
    }
}
