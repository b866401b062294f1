//! Operations over the memory of one model transfer.

use std::ops::Range;
use std::sync::Arc;

use kvxfer::plan::source::{Op, OpSource, Piece};

use super::rng::Rng;

/// One operation: a remote span and its local pieces, all in the transfer's own two memories.
#[derive(Debug, Clone)]
pub(crate) struct SimOp {
    pub(crate) remote: u64,
    pub(crate) len: u64,
    pub(crate) local: Vec<Piece>,
}

/// The operations of one job.
#[derive(Debug)]
pub(crate) struct SimSource {
    pub(crate) memory: u32,
    pub(crate) ops: Vec<SimOp>,
    pub(crate) bytes: u64,
}

impl SimSource {
    /// Cuts `span` of a transfer's memories into operations, and the local side of some of them
    /// into pieces that lie in another order than the remote bytes.
    pub(crate) fn random(rng: &mut Rng, memory: u32, span: Range<u64>) -> Arc<Self> {
        let mut ops = Vec::new();
        let mut at = span.start;
        while at < span.end {
            let len = (1 + rng.below(9)).min(span.end - at);
            let piece = |from: u64, len: u64| Piece {
                region: memory,
                len: len as u32,
                offset: from,
            };
            let local = if len > 1 && rng.permille(400) {
                let cut = 1 + rng.below(len - 1);
                vec![piece(at + len - cut, cut), piece(at, len - cut)]
            } else {
                vec![piece(at, len)]
            };
            ops.push(SimOp {
                remote: at,
                len,
                local,
            });
            at += len;
        }
        // The order of operations has nothing to do with that of addresses.
        for i in (1..ops.len()).rev() {
            ops.swap(i, rng.index(i + 1));
        }
        Arc::new(Self {
            memory,
            ops,
            bytes: span.end - span.start,
        })
    }
}

impl OpSource for SimSource {
    fn ops(&self) -> u64 {
        self.ops.len() as u64
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        for op in &self.ops[range.start as usize..range.end as usize] {
            sink(&Op {
                remote_region: self.memory,
                remote_offset: op.remote,
                len: op.len,
                local: &op.local,
            });
        }
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        out.push((0, self.ops[op as usize].remote as u32));
    }
}
