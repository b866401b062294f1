//! Stretches of bytes between two memories, without a table that was made before: what is packed for a network card
//! differs from launch to launch.

use std::sync::Arc;

use super::super::stream::Keep;
use super::GpuKernels;
use super::error::Side;
use super::launch::{Gather, Launch, clear_abort};
use super::route::{Grid, Route};
use super::scratch::TABLES;
use super::table::{GatherOptions, check, count, end};
use crate::error::Error;
use crate::gpu::{Place, Stream};
use crate::kernels::{self, Pair, Piece, Table, Tensor, bytes_of, spread};

/// A stretch is cut into pieces of so many bytes: the kernel counts as many chunks for each as for the longest.
const LONGEST: u64 = 64 << 10;

/// Stretches from one memory to another.
#[derive(Debug, Clone, Copy)]
pub struct PieceList<'a> {
    /// Where sources are counted from.
    pub src: Place<'a>,
    /// Where destinations are counted from.
    pub dst: Place<'a>,
    /// The stretches.
    pub pieces: &'a [Piece],
}

/// A list's pieces, none longer than [`LONGEST`].
fn cut(pieces: &[Piece]) -> Vec<Piece> {
    let mut all = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let mut at = 0;
        while at < piece.len {
            let len = (piece.len - at).min(LONGEST);
            all.push(Piece {
                src: piece.src + at,
                dst: piece.dst + at,
                len,
            });
            at += len;
        }
    }
    all
}

impl GpuKernels {
    /// Puts the copying of these stretches on a stream of the kernels' GPU, in one launch.
    ///
    /// # Errors
    ///
    /// [`GatherFault`](super::GatherFault) and [`GpuFault`](crate::gpu::GpuFault) for what is not inside its
    /// memory or out of reach; then nothing was put. [`Error::Gpu`]; then some of it may have been.
    pub fn pieces(
        &self,
        stream: &Stream,
        lists: &[PieceList<'_>],
        options: GatherOptions,
    ) -> Result<Gather, Error> {
        let gpu = self.gpu();
        super::super::device::same("the kernels", gpu, stream.gpu())?;
        let mut keep: Vec<Keep> = vec![Arc::clone(&self.0) as Keep];
        let mut grid: Option<Grid> = None;
        let mut cuts = Vec::with_capacity(lists.len());
        let (mut launched, mut len) = (0_u64, 0);
        for (i, list) in lists.iter().enumerate() {
            let of = |side: fn(&Piece) -> u64| list.pieces.iter().map(move |p| (side(p), p.len));
            check(
                gpu,
                (i, 0, Side::Source),
                list.src,
                end(0, 1, of(|p| p.src)),
            )?;
            check(
                gpu,
                (i, 0, Side::Destination),
                list.dst,
                end(0, 1, of(|p| p.dst)),
            )?;
            keep.extend([list.src.keep(), list.dst.keep()]);
            let most = Route::of(gpu, list.src, list.dst).grid(gpu, self.0.warp);
            if grid.is_none_or(|g| g.workgroups < most.workgroups) {
                grid = Some(most);
            }
            let pieces = cut(list.pieces);
            launched = pieces
                .iter()
                .fold(launched, |sum, p| sum.saturating_add(p.len));
            count(i, "pieces", pieces.len())?;
            len += size_of::<kernels::Section>() + size_of::<Tensor>() + size_of::<Pair>();
            len += size_of_val(pieces.as_slice());
            cuts.push(pieces);
        }
        let mut grid = grid.unwrap_or(Route::Local.grid(gpu, self.0.warp));
        if let Some(most) = options.max_workgroups {
            grid.workgroups = grid.workgroups.min(most.max(1));
        }
        let launch = Launch::new(self, grid, launched, len as u64)?;
        if launch.workgroups > 0 {
            self.stage_lists(&launch, lists, &cuts)?;
        }
        let args = launch.args(self, lists.len());
        clear_abort(self, &launch.scratch, stream)?;
        keep.push(Arc::clone(&launch.scratch) as Keep);
        let pending = stream.put(keep, |raw| {
            // SAFETY: `keep` has every memory that the tables name, each piece inside it as `check` has found, and
            // the scratch.
            unsafe { launch.put(self, &args, raw) }
        })?;
        Ok(launch.begun(self, pending, &args))
    }

    /// Puts the tables into the launch's staging memory: sections, then each list's tensor, pair and pieces.
    fn stage_lists(
        &self,
        launch: &Launch,
        lists: &[PieceList<'_>],
        cuts: &[Vec<Piece>],
    ) -> Result<(), Error> {
        let begins = size_of::<kernels::Section>() * lists.len();
        let mut tables = Vec::new();
        let mut sections = Vec::with_capacity(lists.len());
        for (i, (list, pieces)) in lists.iter().zip(cuts).enumerate() {
            let mut put = |bytes: &[u8], len| {
                let addr = launch.tables() + (begins + tables.len()) as u64;
                tables.extend_from_slice(bytes);
                Table { addr, len }
            };
            let tensor = Tensor {
                src: list.src.device_addr(),
                dst: list.dst.device_addr(),
            };
            let tensors = put(bytes_of(std::slice::from_ref(&tensor)), 1);
            let pairs = put(bytes_of(&[Pair::default()]), 1);
            let longest = pieces.iter().map(|piece| piece.len).max().unwrap_or(0);
            let pieces = put(
                bytes_of(pieces.as_slice()),
                count(i, "pieces", pieces.len())?,
            );
            let chunk = launch.shape.chunk;
            sections.push(kernels::Section::new(
                tensors,
                pairs,
                pieces,
                (0, 0),
                longest,
                chunk,
            )?);
        }
        spread(&mut sections, launch.shape.warps(self.0.warp));
        let staging = launch.scratch.staging().host();
        staging.write(TABLES, bytes_of(&sections))?;
        staging.write(TABLES + begins as u64, &tables)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_stretches_are_cut_and_no_byte_is_lost() {
        let piece = |src, dst, len| Piece { src, dst, len };
        let of = [
            piece(5, 0, 2 * LONGEST + 1),
            piece(7, 9, 0),
            piece(1, 2, LONGEST),
        ];
        let wanted = [
            piece(5, 0, LONGEST),
            piece(5 + LONGEST, LONGEST, LONGEST),
            piece(5 + 2 * LONGEST, 2 * LONGEST, 1),
            piece(1, 2, LONGEST),
        ];
        assert_eq!(cut(&of), wanted);
    }
}
