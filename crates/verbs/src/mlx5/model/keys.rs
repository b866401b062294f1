//! What keys name.

use std::collections::BTreeMap;

use super::super::Gather;
use super::super::{Operation, Segment, SendWqe, Syndrome};

/// What a key names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its first byte.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it may be written: as the destination of a READ on this side, of a WRITE on the other.
    pub writable: bool,
}

impl Region {
    fn holds(&self, addr: u64, len: u64) -> bool {
        let from = addr.checked_sub(self.addr);
        from.and_then(|from| from.checked_add(len))
            .is_some_and(|end| end <= self.len)
    }
}

/// The keys of both sides.
#[derive(Debug, Clone, Default)]
pub struct KeyTable {
    /// This side's.
    pub local: BTreeMap<u32, Region>,
    /// The peer's.
    pub remote: BTreeMap<u32, Region>,
}

impl KeyTable {
    /// Whether a WQE stays inside of what its keys name.
    pub(super) fn check(&self, wqe: &SendWqe) -> Result<(), Syndrome> {
        let Some((remote, local)) = wqe.operation.sides() else {
            return Ok(());
        };
        let reads = matches!(wqe.operation, Operation::Read { .. });
        let near = |segment: &Segment| {
            let region = self.local.get(&segment.lkey());
            let held = region.is_some_and(|region| {
                region.holds(segment.addr(), segment.len().into()) && (region.writable || !reads)
            });
            if held {
                Ok(())
            } else {
                Err(Syndrome::LOCAL_PROTECTION)
            }
        };
        match local {
            Gather::Nothing | Gather::Inline(_) => {}
            Gather::One(one) => near(one)?,
            Gather::Two(one, two) => {
                near(one)?;
                near(two)?;
            }
        }
        if local.is_empty() {
            // Nothing is touched, so no key is looked at.
            return Ok(());
        }
        let region = self.remote.get(&remote.rkey);
        let held = region.is_some_and(|region| {
            region.holds(remote.addr, local.len()) && (region.writable || reads)
        });
        if held {
            Ok(())
        } else {
            Err(Syndrome::REMOTE_ACCESS)
        }
    }
}
