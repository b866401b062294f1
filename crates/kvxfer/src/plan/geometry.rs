//! How one unit of a tensor lies on both sides.

use crate::layout::{AxisKind, Laid, Steps, common_split};

/// Part of a unit that is contiguous on both sides; offsets from where the unit begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnitPart {
    pub(super) remote: u64,
    pub(super) local: u64,
    pub(super) len: u64,
}

/// The common form of a tensor pair's strides; pairs with equal shapes have equal pieces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) remote: Steps,
    pub(super) local: Steps,
    /// Bytes contiguous on both sides.
    run: u64,
    /// What is left as (remote stride, local stride, extent), remote strides rising.
    loops: Vec<(u64, u64, u64)>,
}

impl Shape {
    /// The shape of a tensor of elements of so many bytes that both sides have cut alike. `None`
    /// where their axes have no common split, which a comparison of the layouts has reported
    /// already.
    pub(super) fn new(element: u64, remote: &Laid, local: &Laid) -> Option<Self> {
        let axes = remote.axes.iter().chain(&local.axes);
        let mut kinds: Vec<AxisKind> = axes.map(|a| a.0).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let mut loops = Vec::new();
        for kind in kinds {
            let common = common_split(remote.digits(kind), local.digits(kind))?;
            loops.extend(common.into_iter().map(|c| (c.a, c.b, c.extent)));
        }
        loops.sort_unstable();
        let mut run = element;
        let mut folded = 0;
        for &(remote, local, extent) in &loops {
            if remote != run || local != run {
                break;
            }
            run = run.checked_mul(extent)?;
            folded += 1;
        }
        loops.drain(..folded);
        Some(Self {
            remote: remote.steps,
            local: local.steps,
            run,
            loops,
        })
    }

    /// How many pieces a unit is in.
    pub(super) fn pieces_len(&self) -> u64 {
        self.loops.iter().fold(1, |n, l| n.saturating_mul(l.2))
    }

    /// Bytes of a unit.
    pub(super) fn bytes(&self) -> u64 {
        self.pieces_len().saturating_mul(self.run)
    }

    /// The pieces, by rising remote offset: the loops nest, so the largest stride is outermost.
    pub(super) fn pieces(&self) -> Vec<UnitPart> {
        let mut out = vec![UnitPart {
            remote: 0,
            local: 0,
            len: self.run,
        }];
        for &(remote, local, extent) in self.loops.iter().rev() {
            out = out
                .into_iter()
                .flat_map(|p| {
                    (0..extent).map(move |i| UnitPart {
                        remote: p.remote + i * remote,
                        local: p.local + i * local,
                        len: p.len,
                    })
                })
                .collect();
        }
        out
    }
}
