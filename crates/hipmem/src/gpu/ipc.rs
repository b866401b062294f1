//! Memory of a GPU in two processes: handles, and what they open.
//!
//! A legacy handle names a whole allocation. So what travels is the handle, where in the allocation the
//! memory lies, and who exported it, told by what all processes of a machine share: PCI address and UUID.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvxfer_verbs::PciAddress;

use super::code::{INVALID_VALUE, NOT_SUPPORTED, Refused};
use super::device::{Gpu, Uuid};
use super::error::GpuFault;
use super::memory::{GpuMemory, Span};
use super::runtime::RuntimeKind;
use crate::error::{Error, Operation};

/// What begins a handle's bytes; the last is the version.
const MAGIC: [u8; 4] = *b"kvg\x01";

/// A handle of a span of a GPU's memory, for another process of the same machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpcHandle {
    runtime: RuntimeKind,
    /// The runtime's handle of the allocation.
    handle: [u8; 64],
    /// Bytes of the allocation.
    size: u64,
    /// Where in the allocation the span begins.
    offset: u64,
    /// Bytes of the span.
    len: u64,
    pci: PciAddress,
    uuid: Uuid,
    /// The process that exported it.
    process: [u8; 16],
}

/// Why bytes are no handle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IpcFormFault {
    /// Too few bytes, or too many.
    #[error("{len} bytes, a handle has {}", IpcHandle::BYTES)]
    Length {
        /// How many there are.
        len: usize,
    },
    /// They begin otherwise.
    #[error("it begins with {0:02x?}: another version, or something else")]
    Magic([u8; 4]),
    /// There is no such runtime.
    #[error("runtime {0} is unknown")]
    Runtime(u8),
    /// A place on the PCI bus that cannot be.
    #[error("device {device:#x}, function {function} is no place on a PCI bus")]
    Pci {
        /// The device.
        device: u8,
        /// The function.
        function: u8,
    },
    /// The span is empty or not inside its allocation.
    #[error("{len} bytes at {offset} are not inside an allocation of {size}")]
    Span {
        /// Where it begins.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// Bytes of the allocation.
        size: u64,
    },
}

impl IpcHandle {
    /// The length of a handle's bytes.
    pub const BYTES: usize = 4 + 1 + 64 + 8 * 3 + 7 + 16 + 16;

    /// The runtime that opens it.
    #[must_use]
    pub fn runtime(&self) -> RuntimeKind {
        self.runtime
    }

    /// The device whose memory it is.
    #[must_use]
    pub fn pci(&self) -> PciAddress {
        self.pci
    }

    /// The UUID of the device whose memory it is.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Bytes of the memory.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the memory has no bytes (never: what is empty is not exported).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The form that travels.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.push(match self.runtime {
            RuntimeKind::Hip => 1,
            RuntimeKind::Cuda => 2,
            RuntimeKind::Host => 3,
        });
        bytes.extend_from_slice(&self.handle);
        for number in [self.size, self.offset, self.len] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.pci.domain.to_le_bytes());
        bytes.extend_from_slice(&[self.pci.bus, self.pci.device, self.pci.function]);
        bytes.extend_from_slice(&self.uuid.0);
        bytes.extend_from_slice(&self.process);
        let mut out = [0; Self::BYTES];
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = from;
        }
        out
    }

    /// Reads the form that travels.
    ///
    /// # Errors
    ///
    /// [`GpuFault::IpcForm`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        Self::read(bytes).map_err(|fault| GpuFault::IpcForm(fault).into())
    }

    fn read(bytes: &[u8]) -> Result<Self, IpcFormFault> {
        let len = bytes.len();
        let short = || IpcFormFault::Length { len };
        if len != Self::BYTES {
            return Err(short());
        }
        let mut rest = bytes;
        let magic: [u8; 4] = take(&mut rest).ok_or_else(short)?;
        if magic != MAGIC {
            return Err(IpcFormFault::Magic(magic));
        }
        let [runtime] = take(&mut rest).ok_or_else(short)?;
        let runtime = match runtime {
            1 => RuntimeKind::Hip,
            2 => RuntimeKind::Cuda,
            3 => RuntimeKind::Host,
            other => return Err(IpcFormFault::Runtime(other)),
        };
        let handle = take(&mut rest).ok_or_else(short)?;
        let mut number = || take(&mut rest).map(u64::from_le_bytes).ok_or_else(short);
        let (size, offset, len) = (number()?, number()?, number()?);
        let domain = u32::from_le_bytes(take(&mut rest).ok_or_else(short)?);
        let [bus, device, function] = take(&mut rest).ok_or_else(short)?;
        if device >= 32 || function >= 8 {
            return Err(IpcFormFault::Pci { device, function });
        }
        let uuid = Uuid(take(&mut rest).ok_or_else(short)?);
        let process = take(&mut rest).ok_or_else(short)?;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(IpcFormFault::Span { offset, len, size });
        }
        Ok(Self {
            runtime,
            handle,
            size,
            offset,
            len,
            pci: PciAddress {
                domain,
                bus,
                device,
                function,
            },
            uuid,
            process,
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

/// What tells this process from all others. A forked child is another.
fn process() -> Result<[u8; 16], Error> {
    static OURS: Mutex<Option<(u32, [u8; 16])>> = Mutex::new(None);
    let pid = std::process::id();
    let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((of, token)) = *ours
        && of == pid
    {
        return Ok(token);
    }
    let mut token = [0; 16];
    // SAFETY: `token` has room for the 16 bytes asked for.
    let got = unsafe { libc::getrandom(token.as_mut_ptr().cast(), token.len(), 0) };
    if usize::try_from(got) != Ok(token.len()) {
        return Err(Error::Random {
            source: nix::errno::Errno::last(),
        });
    }
    *ours = Some((pid, token));
    Ok(token)
}

/// What this process has exported, by the handles' bytes. In a forked child it is of no use: no handle there is
/// its own.
fn own_exports() -> &'static Mutex<HashMap<[u8; IpcHandle::BYTES], Weak<Span>>> {
    static EXPORTED: OnceLock<Mutex<HashMap<[u8; IpcHandle::BYTES], Weak<Span>>>> = OnceLock::new();
    EXPORTED.get_or_init(Mutex::default)
}

/// Which mapping a handle has in this process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    runtime: RuntimeKind,
    ordinal: u32,
    handle: [u8; 64],
    /// A later process's handle may be the same.
    process: [u8; 16],
}

struct Mapped {
    addr: u64,
    /// None: it is going to be closed.
    users: usize,
    /// It is being closed, which may take as long as any kernel runs: who opens it again waits, and nobody else.
    is_closing: bool,
}

/// What is open in this process.
#[derive(Default)]
struct Open {
    mapped: Mutex<HashMap<Key, Mapped>>,
    closed: Condvar,
}

impl Open {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Mapped>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open() -> &'static Open {
    static OPEN: OnceLock<Open> = OnceLock::new();
    OPEN.get_or_init(Open::default)
}

/// One user of a mapping of another process's allocation.
pub(super) struct Opened {
    pub(super) gpu: Gpu,
    pub(super) addr: u64,
    pub(super) size: u64,
    pub(super) owner: (PciAddress, Uuid),
    key: Key,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut mapped = open().lock();
        let Some(mapping) = mapped.get_mut(&self.key) else {
            return;
        };
        mapping.users -= 1;
        if mapping.users > 0 {
            return;
        }
        drop(mapped);
        let (gpu, key) = (self.gpu.clone(), self.key.clone());
        self.gpu.when_nobody_posts(move || close(&gpu, &key));
    }
}

/// Closes what nobody has begun to use again.
fn close(gpu: &Gpu, key: &Key) {
    let unused = |mapping: &&mut Mapped| mapping.users == 0 && !mapping.is_closing;
    let addr = match open().lock().get_mut(key).filter(unused) {
        Some(mapping) => {
            mapping.is_closing = true;
            mapping.addr
        }
        None => return,
    };
    let closed = gpu.enter().and_then(|_current| {
        // SAFETY: it was opened once for all its users, and there is none; whoever used the memory held it.
        Ok(unsafe { gpu.api().ipc_close(addr) }?)
    });
    if let Err(error) = closed {
        tracing::warn!(%error, "another process's memory stays mapped");
    }
    open().lock().remove(key);
    open().closed.notify_all();
}

impl GpuMemory {
    /// A handle by which another process of this machine can open the memory. The memory has to stay for
    /// as long as others have it open: they are to be told before it goes.
    ///
    /// # Errors
    ///
    /// [`GpuFault::NotExportable`] for memory of pools and of virtual-memory calls, and for what is another
    /// process's.
    pub fn export(&self) -> Result<IpcHandle, Error> {
        let gpu = self.gpu();
        let refuse = |refused| GpuFault::NotExportable {
            addr: self.addr(),
            refused,
        };
        if self.is_opened() || self.is_empty() || self.exportable() == Some(false) {
            return Err(refuse(None).into());
        }
        let process = process()?;
        let _current = gpu.enter()?;
        let allocation = self.allocation();
        // SAFETY: the span holds the allocation, of which this is the first byte.
        let exported = unsafe { gpu.api().ipc_export(allocation.base) };
        let handle = exported.map_err(|refused| match refused.code.number {
            // What runtimes say of allocations that legacy handles do not name.
            INVALID_VALUE | NOT_SUPPORTED => refuse(Some(refused)).into(),
            _ => Error::from(refused),
        })?;
        let handle = IpcHandle {
            runtime: gpu.runtime(),
            handle,
            size: allocation.size,
            offset: self.addr() - allocation.base,
            len: self.len(),
            pci: gpu.info().pci,
            uuid: gpu.info().uuid,
            process,
        };
        let mut exported = own_exports().lock().unwrap_or_else(PoisonError::into_inner);
        exported.retain(|_, span| span.strong_count() > 0);
        exported.insert(handle.to_bytes(), Arc::downgrade(&self.span));
        Ok(handle)
    }

    /// The memory itself, if this process has exported it and has it still: what [`open`](Self::open) refuses.
    #[must_use]
    pub fn exported(handle: &IpcHandle) -> Option<Self> {
        if process().ok()? != handle.process {
            return None;
        }
        let exported = own_exports().lock().unwrap_or_else(PoisonError::into_inner);
        let span = exported.get(&handle.to_bytes())?.upgrade()?;
        Some(Self { span })
    }

    /// Opens memory that another process has exported, for use through `gpu`. What one process opens twice
    /// is mapped once, and unmapped when the last user goes.
    ///
    /// # Errors
    ///
    /// [`GpuFault::IpcOwn`], [`GpuFault::IpcRuntime`]; [`GpuFault::IpcOpen`] if the runtime refuses, as
    /// it does when the process has ended, unless this one has had it open until a moment ago; [`GpuFault::IpcSize`].
    pub fn open(gpu: &Gpu, handle: &IpcHandle) -> Result<Self, Error> {
        let ours = gpu.runtime();
        if handle.runtime != ours {
            let theirs = handle.runtime;
            return Err(GpuFault::IpcRuntime { ours, theirs }.into());
        }
        if handle.process == process()? {
            return Err(GpuFault::IpcOwn.into());
        }
        let key = Key {
            runtime: ours,
            ordinal: gpu.info().ordinal,
            handle: handle.handle,
            process: handle.process,
        };
        let _current = gpu.enter()?;
        let closing =
            |mapped: &mut HashMap<Key, Mapped>| mapped.get(&key).is_some_and(|m| m.is_closing);
        let waited = open().closed.wait_while(open().lock(), closing);
        let mut mapped = waited.unwrap_or_else(PoisonError::into_inner);
        let addr = match mapped.get_mut(&key) {
            Some(mapping) => {
                mapping.users += 1;
                mapping.addr
            }
            None => {
                let opened = gpu.api().ipc_open(&handle.handle);
                let addr = opened.map_err(|refused| refused_open(gpu, handle, refused))?;
                let mapping = Mapped {
                    addr,
                    users: 1,
                    is_closing: false,
                };
                mapped.insert(key.clone(), mapping);
                addr
            }
        };
        drop(mapped);
        let opened = Opened {
            gpu: gpu.clone(),
            addr,
            size: handle.size,
            owner: (handle.pci, handle.uuid),
            key,
        };
        // The handle's numbers are the peer's; what the runtime has mapped is not.
        let facts = gpu.api().pointer(addr)?;
        let there = facts.map_or(0, |facts| {
            let from = addr.saturating_sub(facts.base);
            facts.size.saturating_sub(from)
        });
        if there < handle.size {
            let said = handle.size;
            return Err(GpuFault::IpcSize {
                mapped: there,
                said,
            }
            .into());
        }
        let memory = Self::opened(opened, handle.offset, handle.len);
        memory.range(Operation::Slice, 0, handle.len)?;
        Ok(memory)
    }
}

fn refused_open(gpu: &Gpu, handle: &IpcHandle, refused: Refused) -> Error {
    GpuFault::IpcOpen {
        exporter: handle.pci,
        uuid: handle.uuid,
        opener: gpu.info().pci,
        refused,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle() -> IpcHandle {
        IpcHandle {
            runtime: RuntimeKind::Cuda,
            handle: std::array::from_fn(|i| i as u8),
            size: 1 << 40,
            offset: 4096,
            len: (1 << 40) - 4096,
            pci: "00ab:1b:1f.7".parse().unwrap(),
            uuid: Uuid([7; 16]),
            process: [9; 16],
        }
    }

    fn read(bytes: &[u8]) -> Result<IpcHandle, IpcFormFault> {
        IpcHandle::read(bytes)
    }

    #[test]
    fn a_handle_is_read_as_it_was_written() {
        for runtime in [RuntimeKind::Hip, RuntimeKind::Cuda, RuntimeKind::Host] {
            let handle = IpcHandle {
                runtime,
                ..handle()
            };
            assert_eq!(IpcHandle::from_bytes(&handle.to_bytes()).unwrap(), handle);
        }
    }

    #[test]
    fn what_is_no_handle_is_refused_with_what_is_wrong() {
        let good = handle().to_bytes();
        for len in [0, 1, good.len() - 1] {
            assert_eq!(read(&good[..len]), Err(IpcFormFault::Length { len }));
        }
        let long = [&good[..], &[0]].concat();
        let len = long.len();
        assert_eq!(read(&long), Err(IpcFormFault::Length { len }));
        let with = |at: usize, byte| {
            let mut bytes = good;
            bytes[at] = byte;
            read(&bytes)
        };
        assert_eq!(with(3, 2), Err(IpcFormFault::Magic(*b"kvg\x02")));
        assert_eq!(with(4, 0), Err(IpcFormFault::Runtime(0)));
        assert_eq!(with(4, 4), Err(IpcFormFault::Runtime(4)));
        let pci = 4 + 1 + 64 + 24 + 4;
        let fault = |device, function| Err(IpcFormFault::Pci { device, function });
        assert_eq!(with(pci + 1, 32), fault(32, 7));
        assert_eq!(with(pci + 2, 8), fault(31, 8));
    }

    #[test]
    fn a_span_outside_its_allocation_is_refused() {
        for (offset, len, size) in [
            (0, 0, 10),
            (0, 11, 10),
            (5, 6, 10),
            (11, 1, 10),
            (u64::MAX, 2, 10),
            (1, u64::MAX, u64::MAX),
        ] {
            let bad = IpcHandle {
                offset,
                len,
                size,
                ..handle()
            };
            let fault = Err(IpcFormFault::Span { offset, len, size });
            assert_eq!(read(&bad.to_bytes()), fault);
        }
    }

    #[test]
    fn a_process_has_one_token() {
        assert_eq!(process().unwrap(), process().unwrap());
        assert_ne!(process().unwrap(), [0; 16]);
    }
}
