//! Host memory of another process that GPUs read: mapped by the software device, and pinned here.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvxfer_verbs::PeerMapping;

use super::device::Gpu;
use super::error::GpuFault;
use super::runtime::RuntimeKind;
use crate::error::{Error, Operation};
use crate::pages;

/// Memory of another process of this host, mapped and pinned to be read by GPUs. Clones are the same memory.
///
/// It stays mapped and pinned as long as any of them, and any work that was given it, whatever becomes of the
/// process.
#[derive(Clone)]
pub struct PeerHostMemory {
    pub(super) peer: Arc<Pinned>,
}

/// A user of pages that are pinned.
pub(super) struct Pinned {
    device_addr: u64,
    gpu: Gpu,
    file: Arc<FilePins>,
    /// Those pages.
    pages: Range<u64>,
    mapping: PeerMapping,
}

/// Pages of a file that are pinned, for all who use memory in them.
struct Pin {
    pages: Range<u64>,
    device_addr: u64,
    /// None: it is going to be undone.
    users: usize,
    /// It is being undone, which may take as long as any kernel runs: who wants a part of it waits, and nobody else.
    is_undoing: bool,
}

/// What is pinned of a file.
#[derive(Default)]
struct FilePins {
    pins: Mutex<Vec<Pin>>,
    undone: Condvar,
}

impl FilePins {
    /// Undoes these, if nobody has begun to use them again.
    fn undo(&self, gpu: &Gpu, pages: &Range<u64>, mapping: PeerMapping) {
        let unused = |pin: &&mut Pin| pin.pages == *pages && pin.users == 0;
        match lock(&self.pins).iter_mut().find(unused) {
            Some(pin) if !pin.is_undoing => pin.is_undoing = true,
            _ => return,
        }
        let undone = gpu.enter().and_then(|_current| {
            // SAFETY: they were registered once for all their users, and there is none; whoever used them through a GPU
            // held it. They are mapped: this holds the mapping.
            Ok(unsafe { gpu.api().host_unregister(pages.start) }?)
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "another process's memory stays pinned");
            // And mapped: nothing else may come to lie there.
            std::mem::forget(mapping);
        }
        lock(&self.pins).retain(|pin| !pin.is_undoing || pin.pages != *pages);
        self.undone.notify_all();
    }

    /// Pins whole pages, or finds them in what is pinned: all that is, and its address for GPUs.
    fn pin(
        &self,
        gpu: &Gpu,
        mapping: &PeerMapping,
        pages: Range<u64>,
    ) -> Result<(Range<u64>, u64), Error> {
        let meets = |pin: &Pin| pin.pages.start < pages.end && pages.start < pin.pages.end;
        loop {
            let undoing = |pins: &mut Vec<Pin>| pins.iter().any(|pin| pin.is_undoing && meets(pin));
            let waited = self.undone.wait_while(lock(&self.pins), undoing);
            let mut pins = waited.unwrap_or_else(PoisonError::into_inner);
            let around =
                |pin: &&mut Pin| pin.pages.start <= pages.start && pages.end <= pin.pages.end;
            if let Some(pin) = pins.iter_mut().find(around) {
                pin.users += 1;
                return Ok((pin.pages.clone(), pin.device_addr));
            }
            // Drivers pin each page once.
            if let Some(unused) = pins.iter().find(|pin| pin.users == 0 && meets(pin)) {
                let before = unused.pages.clone();
                drop(pins);
                self.undo(gpu, &before, mapping.clone());
                continue;
            }
            let _current = gpu.enter()?;
            let (start, len) = (pages.start, pages.end - pages.start);
            // SAFETY: who undoes it holds the mapping, which is of whole pages.
            let device_addr = unsafe { gpu.api().host_register_read_only(start, len) }?;
            pins.push(Pin {
                pages: pages.clone(),
                device_addr,
                users: 1,
                is_undoing: false,
            });
            return Ok((pages, device_addr));
        }
    }
}

/// What is pinned of the file that is mapped there.
fn pins_of(runtime: RuntimeKind, base: u64) -> Arc<FilePins> {
    type Files = HashMap<(RuntimeKind, u64), Weak<FilePins>>;
    static FILES: OnceLock<Mutex<Files>> = OnceLock::new();
    let mut files = lock(FILES.get_or_init(Mutex::default));
    if let Some(pins) = files.get(&(runtime, base)).and_then(Weak::upgrade) {
        return pins;
    }
    files.retain(|_, pins| pins.strong_count() > 0);
    let pins = Arc::default();
    files.insert((runtime, base), Arc::downgrade(&pins));
    pins
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pins = lock(&self.file.pins);
        let Some(pin) = pins.iter_mut().find(|pin| pin.pages == self.pages) else {
            return;
        };
        pin.users -= 1;
        if pin.users > 0 {
            return;
        }
        drop(pins);
        let (gpu, file, pages) = (self.gpu.clone(), Arc::clone(&self.file), self.pages.clone());
        let mapping = self.mapping.clone();
        self.gpu
            .when_nobody_posts(move || file.undo(&gpu, &pages, mapping));
    }
}

impl PeerHostMemory {
    /// Pins memories of another process to be read: of the files that they lie in, the whole pages that they have a part
    /// in and no others, once for all that use them.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Holes`] for a file that has fewer pages than are to be pinned. [`Error::Gpu`]: CUDA refuses it on
    /// devices without `READ_ONLY_HOST_REGISTER_SUPPORTED`; HIP has nothing that says so, and may refuse what is mapped
    /// read-only; and pages some of which are pinned already are refused.
    pub fn pin(gpu: &Gpu, mappings: &[PeerMapping]) -> Result<Vec<Self>, Error> {
        let mut files: HashMap<u64, (u64, Vec<(u64, u64)>)> = HashMap::new();
        for mapping in mappings {
            let allocated = mapping.allocated();
            let file = files.entry(mapping.file().0);
            let (least, spans) = file.or_insert_with(|| (allocated, Vec::new()));
            *least = allocated.min(*least);
            spans.push((mapping.addr(), mapping.len()));
        }
        let mut wanted = Vec::new();
        for (allocated, spans) in files.into_values() {
            let pages = pages::whole(spans);
            let bytes = pages.iter().map(|span| span.end - span.start).sum();
            if bytes > allocated {
                let wanted = bytes;
                return Err(GpuFault::Holes { wanted, allocated }.into());
            }
            wanted.extend(pages);
        }
        let pin = |mapping: &PeerMapping| {
            let around = wanted.iter().find(|span| span.contains(&mapping.addr()));
            let pages = around.cloned().unwrap_or_default();
            Self::new(gpu, mapping, pages)
        };
        mappings.iter().map(pin).collect()
    }

    fn new(gpu: &Gpu, mapping: &PeerMapping, pages: Range<u64>) -> Result<Self, Error> {
        let file = pins_of(gpu.runtime(), mapping.file().0);
        let (pages, device_addr) = file.pin(gpu, mapping, pages)?;
        Ok(Self {
            peer: Arc::new(Pinned {
                device_addr: device_addr.wrapping_add(mapping.addr() - pages.start),
                gpu: gpu.clone(),
                file,
                pages,
                mapping: mapping.clone(),
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
