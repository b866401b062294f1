//! A source for the unit tests of this module.

use std::ops::Range;
use std::sync::Arc;

use crate::plan::source::{Op, OpSource, Piece};

/// `ops` operations of `len` bytes each.
pub(super) struct Even {
    pub(super) ops: u64,
    pub(super) len: u32,
}

pub(super) fn even(ops: u64, len: u32) -> Arc<dyn OpSource> {
    Arc::new(Even { ops, len })
}

impl OpSource for Even {
    fn ops(&self) -> u64 {
        self.ops
    }

    fn bytes(&self) -> u64 {
        self.ops * u64::from(self.len)
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        for op in range.start..range.end.min(self.ops) {
            let offset = op * u64::from(self.len);
            let piece = Piece {
                region: 0,
                len: self.len,
                offset,
            };
            let (len, local) = (u64::from(self.len), std::slice::from_ref(&piece));
            sink(&Op {
                remote_region: 0,
                remote_offset: offset,
                len,
                local,
            });
        }
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        if op < self.ops {
            out.push((0, op as u32));
        }
    }
}
