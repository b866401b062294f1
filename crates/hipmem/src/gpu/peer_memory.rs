//! Host memory of another process that GPUs read: mapped by the software device, and pinned here.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvxfer_verbs::PeerMapping;

use super::device::Gpu;
use super::error::GpuFault;
use super::runtime::RuntimeKind;
use crate::error::{Error, Operation};

/// Memory of another process of this host, mapped and pinned to be read by GPUs. Clones are the same memory.
///
/// It stays mapped and pinned as long as any of them, and any work that was given it, whatever becomes of the
/// process.
#[derive(Clone)]
pub struct PeerHostMemory {
    pub(super) peer: Arc<Pinned>,
}

pub(super) struct Pinned {
    device_addr: u64,
    gpu: Gpu,
    /// Before the mapping.
    _file: File,
    mapping: PeerMapping,
}

/// A file that is pinned, for all who use memory in it.
struct Entry {
    device_addr: u64,
    users: usize,
}

type Pins = HashMap<(RuntimeKind, u64), Entry>;

/// What is pinned in this process, by where the file is mapped. Pinning and its end hold the lock, so that a file
/// whose last user goes is not given out again.
fn pins() -> &'static Mutex<Pins> {
    static PINS: OnceLock<Mutex<Pins>> = OnceLock::new();
    PINS.get_or_init(Mutex::default)
}

/// One user of a pinned file.
struct File {
    gpu: Gpu,
    base: u64,
}

impl Drop for File {
    fn drop(&mut self) {
        let mut pins = pins().lock().unwrap_or_else(PoisonError::into_inner);
        let key = (self.gpu.runtime(), self.base);
        let Some(entry) = pins.get_mut(&key) else {
            return;
        };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        pins.remove(&key);
        let undone = self.gpu.enter().and_then(|_current| {
            // SAFETY: it was registered once for all its users, of whom this is the last; whoever used it through
            // a GPU held it.
            Ok(unsafe { self.gpu.api().host_unregister(self.base) }?)
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "another process's memory stays pinned");
        }
    }
}

impl PeerHostMemory {
    /// Pins another process's memory to be read. The file that it lies in is pinned whole, once for all memory in it.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`]: CUDA refuses it on devices without `READ_ONLY_HOST_REGISTER_SUPPORTED`; HIP has nothing that
    /// says so, and may refuse what is mapped read-only.
    pub fn pin(gpu: &Gpu, mapping: PeerMapping) -> Result<Self, Error> {
        let (base, len) = mapping.file();
        let mut pins = pins().lock().unwrap_or_else(PoisonError::into_inner);
        let device_addr = match pins.get_mut(&(gpu.runtime(), base)) {
            Some(entry) => {
                entry.users += 1;
                entry.device_addr
            }
            None => {
                let _current = gpu.enter()?;
                // SAFETY: `File` undoes it, before the mapping goes that the value below holds.
                let device_addr = unsafe { gpu.api().host_register_read_only(base, len) }?;
                let users = 1;
                pins.insert((gpu.runtime(), base), Entry { device_addr, users });
                device_addr
            }
        };
        drop(pins);
        let gpu = gpu.clone();
        let file = File {
            gpu: gpu.clone(),
            base,
        };
        Ok(Self {
            peer: Arc::new(Pinned {
                device_addr: device_addr.wrapping_add(mapping.addr() - base),
                gpu,
                _file: file,
                mapping,
            }),
        })
    }

    /// The address that GPUs know its first byte by.
    #[must_use]
    pub fn device_addr(&self) -> u64 {
        self.peer.device_addr
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.peer.mapping.len()
    }

    /// Whether it has no bytes (never: what is empty is not mapped).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.peer.mapping.is_empty()
    }

    /// The device that it was pinned through.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.peer.gpu
    }

    /// The host's address of a range that is wholly inside, and may be read.
    pub(super) fn range(&self, operation: Operation, offset: u64, len: u64) -> Result<u64, Error> {
        let (addr, size) = (self.peer.mapping.addr(), self.len());
        if operation == Operation::CopyDestination {
            return Err(GpuFault::ReadOnly { addr, len: size }.into());
        }
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(addr + offset),
            _ => Err(Error::OutOfBounds {
                operation,
                offset,
                len,
                size,
            }),
        }
    }
}

impl fmt::Debug for PeerHostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PeerHostMemory({:?} for {:?})",
            self.peer.mapping, self.peer.gpu
        )
    }
}
