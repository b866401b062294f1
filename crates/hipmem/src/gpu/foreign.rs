//! Memory of others that kernels of GPUs reach: the queues that a NIC's library has made, pinned where they lie, and
//! the registers of its doorbells. Drivers take whole pages, each once. A library puts the doorbell records of many
//! queues into one page, and several doorbells into another; so a page is taken once for all of this process that have
//! a part of it here, and given back behind the last.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvxfer_verbs::{Memory, MemoryKind};

use super::code::{ALREADY_REGISTERED, Refused};
use super::device::Gpu;
use super::error::GpuFault;
use super::runtime::RuntimeKind;
use crate::error::Error;
use crate::pages;

/// A span of such memory, mapped for the GPUs of a runtime until the value goes.
pub(crate) struct ForeignMemory {
    device_addr: u64,
    pages: Arc<Pages>,
    /// What was mapped together in these pages, its own memory first: all of it goes behind the pages that it lies in.
    memory: Vec<Arc<dyn Memory>>,
}

/// Pages that are mapped for all who have a part of them.
struct Pages {
    runtime: RuntimeKind,
    kind: MemoryKind,
    span: Range<u64>,
    /// Held while the driver is asked, so that pages whose last user goes are not given out again: who wants others
    /// need not wait for it.
    mapped: Mutex<Option<Mapped>>,
}

struct Mapped {
    /// Through which they were mapped.
    gpu: Gpu,
    device_addr: u64,
    users: usize,
}

/// All that are mapped, and some that no longer are.
static ALL: Mutex<Vec<Arc<Pages>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pages {
    /// The same for all who want exactly these.
    fn of(runtime: RuntimeKind, kind: MemoryKind, span: Range<u64>) -> Arc<Self> {
        let mut all = lock(&ALL);
        all.retain(|pages| Arc::strong_count(pages) > 1);
        let wanted = (runtime, kind, &span);
        let found = all
            .iter()
            .find(|pages| (pages.runtime, pages.kind, &pages.span) == wanted);
        if let Some(found) = found {
            return Arc::clone(found);
        }
        let pages = Arc::new(Self {
            runtime,
            kind,
            span,
            mapped: Mutex::new(None),
        });
        all.push(Arc::clone(&pages));
        pages
    }

    /// One more user, whose memory lies in them: where GPUs find them.
    fn enter(&self, gpu: &Gpu) -> Result<u64, MapFault> {
        let mut mapped = lock(&self.mapped);
        if let Some(mapped) = &mut *mapped {
            mapped.users += 1;
            return Ok(mapped.device_addr);
        }
        let _current = gpu.enter().map_err(MapFault::Other)?;
        let (at, len) = (self.span.start, self.span.end - self.span.start);
        let api = gpu.api();
        let device_addr = match self.kind {
            // SAFETY: the caller holds memory in each of these pages, which are mapped as long as that is, until it
            // leaves; the last one undoes it.
            MemoryKind::Registers => unsafe { api.host_register_registers(at, len) },
            // SAFETY: as above.
            _ => unsafe { api.host_register(at, len) },
        };
        let device_addr = device_addr.map_err(MapFault::Refused)?;
        *mapped = Some(Mapped {
            gpu: gpu.clone(),
            device_addr,
            users: 1,
        });
        Ok(device_addr)
    }

    /// One user fewer. Where the driver does not let go of them, nothing else may come to lie there.
    fn leave(&self) -> Result<(), Error> {
        let mut mapped = lock(&self.mapped);
        let left = mapped.as_mut().map(|mapped| {
            mapped.users -= 1;
            mapped.users
        });
        let (Some(0), Some(last)) = (left, mapped.take_if(|mapped| mapped.users == 0)) else {
            return Ok(());
        };
        let _current = last.gpu.enter()?;
        // SAFETY: they were mapped once for all their users, of whom this is the last and still holds its memory; whoever
        // used them through a GPU held one of those.
        Ok(unsafe { last.gpu.api().host_unregister(self.span.start) }?)
    }
}

enum MapFault {
    Refused(Refused),
    Other(Error),
}

impl ForeignMemory {
    /// Maps memories for a GPU, all or none of them. What stands beside each is what faults call it.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Foreign`], [`GpuFault::ForeignAlready`]; [`Error::NotHost`] for memory of a GPU, [`Error::Empty`].
    pub(crate) fn map(
        gpu: &Gpu,
        parts: &[(&'static str, Arc<dyn Memory>)],
    ) -> Result<Vec<Self>, Error> {
        for (_, memory) in parts {
            let kind = memory.kind();
            if !matches!(kind, MemoryKind::Host | MemoryKind::Registers) {
                return Err(Error::NotHost { kind });
            }
            if memory.is_empty() {
                return Err(Error::Empty);
            }
        }
        let whole = |kind| {
            let of = parts
                .iter()
                .filter(move |(_, memory)| memory.kind() == kind);
            pages::whole(of.map(|(_, memory)| (memory.addr(), memory.len())))
        };
        let (host, registers) = (whole(MemoryKind::Host), whole(MemoryKind::Registers));
        let one = |(part, memory): &(&'static str, Arc<dyn Memory>)| {
            let spans = match memory.kind() {
                MemoryKind::Registers => &registers,
                _ => &host,
            };
            let around = spans.iter().find(|span| span.contains(&memory.addr()));
            let span = around.ok_or(Error::Empty)?.clone();
            let beside = parts.iter().map(|(_, beside)| beside);
            let beside = beside.filter(|beside| {
                beside.kind() == memory.kind()
                    && span.contains(&beside.addr())
                    && !Arc::ptr_eq(beside, memory)
            });
            let held = std::iter::once(memory).chain(beside).map(Arc::clone);
            Self::one(gpu, part, held.collect(), span)
        };
        parts.iter().map(one).collect()
    }

    fn one(
        gpu: &Gpu,
        part: &'static str,
        held: Vec<Arc<dyn Memory>>,
        span: Range<u64>,
    ) -> Result<Self, Error> {
        let memory = held.first().ok_or(Error::Empty)?;
        let (addr, kind) = (memory.addr(), memory.kind());
        let into = addr - span.start;
        let pages = Pages::of(gpu.runtime(), kind, span);
        let at = pages.enter(gpu).map_err(|fault| {
            let refused = match fault {
                MapFault::Other(error) => return error,
                MapFault::Refused(refused) => refused,
            };
            let device = gpu.info().pci;
            let fault = match refused.code.number {
                ALREADY_REGISTERED => GpuFault::ForeignAlready {
                    device,
                    part,
                    addr,
                    refused,
                },
                _ => GpuFault::Foreign {
                    device,
                    part,
                    addr,
                    kind,
                    refused,
                },
            };
            fault.into()
        })?;
        Ok(Self {
            device_addr: at.wrapping_add(into),
            pages,
            memory: held,
        })
    }

    /// The address that GPUs know its first byte by.
    pub(crate) fn device_addr(&self) -> u64 {
        self.device_addr
    }
}

impl Drop for ForeignMemory {
    fn drop(&mut self) {
        if let Err(error) = self.pages.leave() {
            tracing::warn!(%error, memory = ?self.memory, "memory of others stays mapped for a GPU, and is kept");
            std::mem::forget(self.memory.clone());
        }
    }
}

impl fmt::Debug for ForeignMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}, for kernels at {:#x}",
            self.memory, self.device_addr
        )
    }
}
