//! Anonymous host memory: no other process can map it.

use std::sync::Arc;

use kvxfer_verbs::Memory;

use crate::arena::{ArenaOptions, HugePages, checked_len, pages_of, round_up, take_pages};
use crate::error::Error;
use crate::mapping::{HUGE, Mapping};
use crate::memory::HostMemory;
use crate::pages::{self, PageInfo, WhyNotHuge};

/// Anonymous host memory, as an engine that knows nothing of arenas has it. A peer on the same
/// machine reaches it by `process_vm_readv`, any other over the network.
#[derive(Debug, Clone)]
pub struct HostBuffer {
    memory: HostMemory,
    why_not: Arc<[WhyNotHuge]>,
}

impl HostBuffer {
    /// A buffer of `len` bytes of zeros, with the default options.
    ///
    /// # Errors
    ///
    /// As [`with_options`](Self::with_options).
    pub fn new(len: u64) -> Result<Self, Error> {
        Self::with_options(len, ArenaOptions::default())
    }

    /// A buffer of `len` bytes of zeros. Reserved huge pages are never taken for it.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] for no bytes; [`Error::Map`] and [`Error::Populate`] with the kernel's
    /// answer.
    pub fn with_options(len: u64, options: ArenaOptions) -> Result<Self, Error> {
        let bytes = checked_len(len)?;
        let mut why_not = Vec::new();
        let small = bytes.get() < HUGE;
        let want_huge = options.huge == HugePages::Auto && !small;
        if options.huge == HugePages::Never {
            why_not.push(WhyNotHuge::NotAsked);
        } else if small {
            why_not.push(WhyNotHuge::Small { len });
        }
        let grain = if want_huge {
            HUGE
        } else {
            usize::try_from(pages::ordinary_page_size()).unwrap_or(HUGE)
        };
        let mapped = round_up(bytes, grain).ok_or(Error::TooLarge { len })?;
        let mapping = Mapping::anonymous(mapped).map_err(|source| Error::Map { len, source })?;
        take_pages(&mapping, want_huge, options.prefault, &mut why_not)?;
        Ok(Self {
            memory: HostMemory::buffer(mapping, bytes.get()),
            why_not: why_not.into(),
        })
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// The token that devices register.
    #[must_use]
    pub fn as_memory(&self) -> Arc<dyn Memory> {
        self.memory.as_memory()
    }

    /// Which pages the kernel has given so far, and why no better ones.
    #[must_use]
    pub fn pages(&self) -> PageInfo {
        pages_of(&self.memory, false, &self.why_not)
    }
}
