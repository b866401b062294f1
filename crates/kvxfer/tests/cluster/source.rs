//! Operations of one job over model memory.

use std::ops::Range;

use kvxfer::plan::source::{Op, OpSource, Piece};

/// One operation: a run of cells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CellOp {
    pub(crate) remote: u32,
    pub(crate) local: u32,
    pub(crate) len: u32,
    /// The destination block.
    pub(crate) block: u32,
}

/// The operations of one job. A cell counts as a byte.
#[derive(Debug)]
pub(crate) struct Cells(pub(crate) Vec<CellOp>);

impl OpSource for Cells {
    fn ops(&self) -> u64 {
        self.0.len() as u64
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|op| u64::from(op.len)).sum()
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        for op in &self.0[range.start as usize..range.end as usize] {
            let piece = Piece {
                region: 0,
                len: op.len,
                offset: op.local.into(),
            };
            sink(&Op {
                remote_region: 0,
                remote_offset: op.remote.into(),
                len: op.len.into(),
                local: &[piece],
            });
        }
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        if let Some(op) = self.0.get(op as usize) {
            out.push((0, op.block));
        }
    }
}
