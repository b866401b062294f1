//! Which part of a tensor a tensor-parallel rank keeps.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{LayoutError, TensorFormat, Topology};

/// The part of a sharded axis that a rank keeps, in whole-model indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shard {
    /// The first index.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Shard {
    /// The part of a tensor that falls to a rank where its sharded axis is dealt evenly; `None` for
    /// a tensor that every rank has whole. Where there are fewer heads than ranks, neighbouring
    /// ranks keep the same head: rank `r` of `tp` has head `r * heads / tp`.
    ///
    /// # Errors
    ///
    /// A rank outside its size, or an axis that cannot be dealt evenly: neither of extent and ranks
    /// divides the other.
    pub(super) fn of(
        tensor: &TensorFormat,
        topology: &Topology,
        path: impl Fn() -> String,
    ) -> Result<Option<Self>, LayoutError> {
        let Some(axis) = tensor.sharded_axis() else {
            return Ok(None);
        };
        let (tp, rank) = (u64::from(topology.tp), u64::from(topology.rank.tp));
        if rank >= tp {
            return Err(LayoutError::Rank {
                what: "tp",
                rank: topology.rank.tp,
                size: topology.tp,
            });
        }
        if axis.extent.is_multiple_of(tp) {
            let count = axis.extent / tp;
            let first = rank * count;
            return Ok(Some(Self { first, count }));
        }
        if tp.is_multiple_of(axis.extent) {
            let first = rank / (tp / axis.extent);
            return Ok(Some(Self { first, count: 1 }));
        }
        Err(LayoutError::UnevenShard {
            path: path(),
            axis: axis.kind,
            extent: axis.extent,
            tp: topology.tp,
        })
    }

    /// What two parts have in common; `None`: nothing.
    pub(crate) fn meet(self, other: Self) -> Option<Self> {
        let end = |s: Self| s.first.saturating_add(s.count);
        let first = self.first.max(other.first);
        let count = end(self).min(end(other)).checked_sub(first)?;
        (count > 0).then_some(Self { first, count })
    }

    /// Refuses a part that is empty or not within the tensor's sharded axis.
    pub(super) fn check(
        self,
        tensor: &TensorFormat,
        path: impl FnOnce() -> String,
    ) -> Result<(), LayoutError> {
        let extent = tensor.sharded_axis().map_or(0, |a| a.extent);
        let end = self.first.checked_add(self.count);
        if self.count == 0 || end.is_none_or(|end| end > extent) {
            return Err(LayoutError::Shard {
                path: path(),
                first: self.first,
                count: self.count,
                extent,
            });
        }
        Ok(())
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.first.saturating_add(self.count);
        write!(f, "{}..{end}", self.first)
    }
}
