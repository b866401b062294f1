//! What a job moves, and what it waits for.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use crate::mem::gpu::Event;
use crate::plan::{Op, OpList, OpSource, Plan, Posted};

/// Which blocks, and how.
#[derive(Debug, Clone)]
pub(crate) enum Moved {
    /// A plan of all that was asked for at once.
    Planned(Arc<Plan>),
    /// What a kernel has named, block by block.
    Posted(Arc<Posted>),
}

impl Moved {
    fn source(&self) -> &dyn OpSource {
        match self {
            Self::Planned(plan) => &**plan,
            Self::Posted(posted) => &**posted,
        }
    }

    /// Stretches of blocks that follow each other on both sides.
    pub(crate) fn runs(&self) -> u64 {
        match self {
            Self::Planned(plan) => plan.report().runs,
            Self::Posted(posted) => posted.runs(),
        }
    }
}

/// The blocks of one submission.
#[derive(Debug, Clone)]
pub(crate) struct Moves {
    pub(crate) what: Moved,
    /// A GPU's work that comes first: what is read has to be written, or what is written to has to be read.
    pub(crate) after: Option<Event>,
    /// Whether who made the blocks has seen to it that others find them: a kernel that posts releases what it and
    /// those that post with it have written.
    pub(crate) is_released: bool,
    /// Whether it has been moved already, by the kernels that made it.
    pub(crate) is_there: bool,
}

impl Moves {
    /// What a job of an engine is made of.
    pub(crate) fn of(source: &dyn OpSource) -> Option<&Self> {
        (source as &dyn Any).downcast_ref()
    }
}

impl OpSource for Moves {
    fn ops(&self) -> u64 {
        self.what.source().ops()
    }

    fn bytes(&self) -> u64 {
        self.what.source().bytes()
    }

    fn emit(&self, range: Range<u64>, sink: &mut dyn FnMut(&Op<'_>)) {
        self.what.source().emit(range, sink);
    }

    fn list(&self, range: Range<u64>, list: &mut OpList) {
        self.what.source().list(range, list);
    }

    fn blocks_of(&self, op: u64, out: &mut Vec<(u32, u32)>) {
        self.what.source().blocks_of(op, out);
    }
}
