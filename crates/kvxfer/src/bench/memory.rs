//! Memory of a bandwidth test: the host's or a GPU's, filled and checked alike.

use std::sync::Arc;

use kvxfer_hipmem::gpu::{GpuMemory, GpuRuntime, RuntimeChoice};
use kvxfer_hipmem::{Error, FirstMismatch, HostArena, HostBuffer, HostMemory, PageInfo};
use kvxfer_verbs::Memory;

/// What is written to a GPU or read from it at a time.
const CHUNK: u64 = 4 << 20;

/// What kind of memory a side takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BenchMemory {
    /// Arenas, which a peer on this host can map.
    Arena,
    /// Anonymous memory, registered by address.
    Anonymous,
    /// Memory of a GPU.
    Gpu {
        /// By which runtime.
        runtime: RuntimeChoice,
        /// Which of the devices that this process sees.
        ordinal: u32,
    },
}

/// One allocation.
#[derive(Debug, Clone)]
pub enum BlockMemory {
    /// An arena.
    Arena(HostArena),
    /// Anonymous memory.
    Anonymous(HostBuffer),
    /// A GPU's.
    Gpu(GpuMemory),
}

impl BlockMemory {
    /// Allocates.
    ///
    /// # Errors
    ///
    /// Those of the memory; [`Error::NoGpu`].
    pub(super) fn new(kind: BenchMemory, bytes: u64) -> Result<Self, Error> {
        Ok(match kind {
            BenchMemory::Arena => Self::Arena(HostArena::new(bytes)?),
            BenchMemory::Anonymous => Self::Anonymous(HostBuffer::new(bytes)?),
            BenchMemory::Gpu { runtime, ordinal } => {
                let runtime = GpuRuntime::open(runtime)?;
                Self::Gpu(GpuMemory::new(runtime.gpu(ordinal)?, bytes)?)
            }
        })
    }

    /// The host's memory, if it is that.
    #[must_use]
    pub fn host(&self) -> Option<&HostMemory> {
        match self {
            Self::Arena(arena) => Some(arena.memory()),
            Self::Anonymous(buffer) => Some(buffer.memory()),
            Self::Gpu(_) => None,
        }
    }

    /// The GPU's memory, if it is that.
    #[must_use]
    pub fn gpu(&self) -> Option<&GpuMemory> {
        match self {
            Self::Gpu(memory) => Some(memory),
            Self::Arena(_) | Self::Anonymous(_) => None,
        }
    }

    /// Which pages it has, and why no better ones; `None` for a GPU's.
    pub(super) fn pages(&self) -> Option<PageInfo> {
        match self {
            Self::Arena(arena) => Some(arena.pages()),
            Self::Anonymous(buffer) => Some(buffer.pages()),
            Self::Gpu(_) => None,
        }
    }

    /// The token that engines take.
    #[must_use]
    pub fn as_memory(&self) -> Arc<dyn Memory> {
        match self {
            Self::Arena(arena) => arena.memory().as_memory(),
            Self::Anonymous(buffer) => buffer.memory().as_memory(),
            Self::Gpu(memory) => memory.as_memory(),
        }
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Arena(arena) => arena.memory().len(),
            Self::Anonymous(buffer) => buffer.memory().len(),
            Self::Gpu(memory) => memory.len(),
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; [`Error::Gpu`].
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Result<(), Error> {
        match self {
            Self::Gpu(memory) => memory.fill(offset, len, byte),
            Self::Arena(arena) => arena.memory().fill(offset, len, byte),
            Self::Anonymous(buffer) => buffer.memory().fill(offset, len, byte),
        }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill).
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        match self {
            Self::Gpu(memory) => memory.read(offset, into),
            Self::Arena(arena) => arena.memory().read(offset, into),
            Self::Anonymous(buffer) => buffer.memory().read(offset, into),
        }
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill).
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        match self {
            Self::Gpu(memory) => memory.write(offset, from),
            Self::Arena(arena) => arena.memory().write(offset, from),
            Self::Anonymous(buffer) => buffer.memory().write(offset, from),
        }
    }

    /// The 64-bit word at a multiple of 8.
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill); [`Error::Misaligned`] in the host's memory.
    pub fn load_u64(&self, offset: u64) -> Result<u64, Error> {
        if let Some(host) = self.host() {
            return host.load_u64(offset);
        }
        let mut word = [0; 8];
        self.read(offset, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Fills a range with words, as [`HostMemory::fill_words`] does.
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill).
    pub fn fill_words(&self, offset: u64, len: u64, f: impl Fn(u64) -> u64) -> Result<(), Error> {
        let Self::Gpu(memory) = self else {
            return self.on_host(|host| host.fill_words(offset, len, &f));
        };
        for (at, len) in chunks(len) {
            let words = at / 8..(at + len).div_ceil(8);
            let mut bytes: Vec<u8> = words.flat_map(|i| f(i).to_le_bytes()).collect();
            bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
            memory.write(offset.saturating_add(at), &bytes)?;
        }
        Ok(())
    }

    /// Checks a range against words, as [`HostMemory::verify_words`] does.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] with the first word that differs; as [`fill`](Self::fill).
    pub fn verify_words(&self, offset: u64, len: u64, f: impl Fn(u64) -> u64) -> Result<(), Error> {
        let Self::Gpu(memory) = self else {
            return self.on_host(|host| host.verify_words(offset, len, &f));
        };
        for (at, len) in chunks(len) {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
            memory.read(offset.saturating_add(at), &mut bytes)?;
            for (found, i) in bytes.chunks(8).zip(at / 8..) {
                let wanted = f(i).to_le_bytes();
                if found == &wanted[..found.len()] {
                    continue;
                }
                let word = |bytes: &[u8]| {
                    let mut word = [0; 8];
                    word[..bytes.len()].copy_from_slice(bytes);
                    u64::from_le_bytes(word)
                };
                return Err(Error::Mismatch(FirstMismatch {
                    offset: offset.saturating_add(8 * i),
                    wanted: word(&wanted[..found.len()]),
                    found: word(found),
                }));
            }
        }
        Ok(())
    }

    fn on_host(&self, act: impl FnOnce(&HostMemory) -> Result<(), Error>) -> Result<(), Error> {
        self.host().map_or(Ok(()), act)
    }
}

/// Where parts of a range begin, from its beginning, and their lengths.
fn chunks(len: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = usize::try_from(CHUNK).unwrap_or(usize::MAX);
    (0..len)
        .step_by(step)
        .map(move |at| (at, CHUNK.min(len - at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpus_memory_is_filled_and_checked_as_the_hosts() {
        let runtime = "host".parse().expect("the stand-in");
        let gpu = BenchMemory::Gpu {
            runtime,
            ordinal: 0,
        };
        for kind in [BenchMemory::Arena, gpu] {
            // More than a chunk, and no multiple of a word.
            let len = CHUNK + 4099;
            let memory = BlockMemory::new(kind, len + 100).expect("memory");
            let word = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            memory.fill(0, len + 100, 0xa5).expect("inside");
            memory.fill_words(16, len, word).expect("inside");
            memory
                .verify_words(16, len, word)
                .expect("as it was filled");
            let mut edge = [0; 4];
            memory.read(16 + len - 2, &mut edge).expect("inside");
            assert_eq!(edge[2..], [0xa5; 2], "behind the range");
            assert_eq!(memory.load_u64(24).expect("inside"), word(1));
            for at in [0, CHUNK + 9, len - 1] {
                let mut byte = [0];
                memory.read(16 + at, &mut byte).expect("inside");
                memory.write(16 + at, &[byte[0] ^ 1]).expect("inside");
                let wrong = memory.verify_words(16, len, word).expect_err("changed");
                assert!(
                    matches!(&wrong, Error::Mismatch(m) if m.offset == 16 + at / 8 * 8
                        && m.wanted != m.found),
                    "{wrong}"
                );
                memory.write(16 + at, &byte).expect("inside");
            }
            assert!(memory.fill_words(200, len, word).is_err());
        }
    }
}
