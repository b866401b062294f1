//! Checksums of blocks, made on the GPU.

use std::sync::Arc;
use std::time::Instant;

use super::super::device::same;
use super::super::stream::Keep;
use super::error::Side;
use super::launch::{GatherPart, Part, clear_abort, put_tables, stage_tables, tables_len};
use super::scratch::TABLES;
use super::table::{GatherTable, Section};
use crate::error::Error;
use crate::gpu::pool::Touched;
use crate::gpu::{Event, Pending, PinnedMemory, RuntimeKind, Stream};
use crate::kernels::{DESTINATION, Pair, SOURCE, VerifyArgs, bytes_of};

/// Workgroups a unit, and threads of one: enough loads to keep a memory busy.
const WORKGROUPS: u32 = 4;
const THREADS: u32 = 256;

/// No piece is cut for a check.
const CHUNK: u32 = 1 << 30;

/// A check that is on a stream.
#[derive(Debug)]
pub struct Verify {
    pending: Pending,
    sums: Option<PinnedMemory>,
    /// Sums of each section.
    lens: Vec<usize>,
}

impl GatherTable {
    /// Puts checksums of the blocks of one side on a stream. They are those of
    /// [`block_sum`](crate::kernels::block_sum). It checks, and makes nothing coherent.
    ///
    /// # Errors
    ///
    /// As [`gather`](Self::gather).
    pub fn verify(&self, stream: &Stream, side: Side, pairs: &[&[Pair]]) -> Result<Verify, Error> {
        let kernels = &self.0.kernels;
        let gpu = kernels.gpu();
        same("the table", gpu, stream.gpu())?;
        self.check_lists(pairs)?;
        let parts: Vec<GatherPart<'_>> = self.all_of(pairs).collect();
        let parts = self.check(&parts)?.into_iter().map(|(part, _)| part);
        let parts: Vec<Part<'_>> = parts.collect();
        let lens: Vec<usize> = (parts.iter())
            .map(|part| (part.tensors.len as usize).saturating_mul(part.pairs.len()))
            .collect();
        let blocks = lens
            .iter()
            .fold(0, |sum: u64, n| sum.saturating_add(*n as u64));
        let sums = match blocks {
            0 => None,
            _ => Some(PinnedMemory::pooled(
                gpu,
                blocks.saturating_mul(8),
                Touched::ByOwn,
            )?),
        };
        if let Some(sums) = &sums {
            // What another check has left could pass for this one's.
            sums.host().fill(0, sums.len(), 0xee)?;
        }
        let len = tables_len(&parts);
        let scratch = kernels.scratch(len)?;
        let base = scratch.device().addr() + TABLES;
        // The longest piece is not looked at.
        let all = |section: &Section| (section.pieces, 0);
        stage_tables(&scratch, &parts, base, all, (CHUNK, 1))?;
        let (most, threads) = match gpu.runtime() {
            RuntimeKind::Host => (1, kernels.0.warp),
            RuntimeKind::Cuda | RuntimeKind::Hip => (
                gpu.info().compute_units.saturating_mul(WORKGROUPS).max(1),
                THREADS,
            ),
        };
        let grid = u32::try_from(blocks).unwrap_or(u32::MAX).min(most);
        let args = VerifyArgs {
            sections: base,
            sums: sums.as_ref().map_or(0, PinnedMemory::device_addr),
            abort: scratch.device().addr(),
            sections_len: u32::try_from(parts.len()).unwrap_or(0),
            side: match side {
                Side::Source => SOURCE,
                Side::Destination => DESTINATION,
            },
        };
        clear_abort(kernels, &scratch, stream)?;
        let mut keep: Vec<Keep> = vec![Arc::clone(&scratch) as Keep, Arc::clone(&self.0) as Keep];
        keep.extend(sums.iter().map(|sums| Arc::clone(&sums.pinned) as Keep));
        let pending = stream.put(keep, |raw| {
            if grid == 0 {
                return Ok(());
            }
            // SAFETY: `keep` has the scratch.
            unsafe { put_tables(kernels, &scratch, Some(len), raw) }?;
            let args = bytes_of(std::slice::from_ref(&args));
            // SAFETY: as for a gather; there is a sum for each tensor and pair.
            unsafe { kernels.0.verify.put(raw, grid, threads, args) }
        })?;
        Ok(Verify {
            pending,
            sums,
            lens,
        })
    }
}

impl Verify {
    /// The mark behind it, for other streams to wait for.
    #[must_use]
    pub fn event(&self) -> &Event {
        self.pending.event()
    }

    /// Waits for the sums: a list for each section, with those of all pairs of a tensor after each other.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Deadline`](crate::gpu::GpuFault::Deadline), [`Error::Gpu`].
    pub fn wait(&self, deadline: Instant) -> Result<Vec<Vec<u64>>, Error> {
        self.pending.wait(deadline)?;
        let mut at = 0;
        let mut next = || {
            let sum = self
                .sums
                .as_ref()
                .map_or(Ok(0), |sums| sums.host().load_u64(at));
            at += 8;
            sum
        };
        let lens = self.lens.iter();
        lens.map(|len| (0..*len).map(|_| next()).collect())
            .collect()
    }
}
