//! The list of devices and an open device: pointers of libibverbs, freed when they are dropped.

use std::ffi::{CStr, OsStr};
use std::fs::OpenOptions;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

use libc::{EINVAL, ENOSYS, c_int};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::sysfs;
use crate::error::{Error, KernelFault, NoRdma};
use crate::sys::enums::{ibv_gid_type, ibv_transport_type};
use crate::sys::inline;
use crate::sys::types::{
    ibv_context, ibv_device, ibv_device_attr, ibv_gid, ibv_gid_entry, ibv_port_attr,
};
use crate::sys::{Functions, Verbs};

/// GIDs that are asked for of one port: how many it has is a driver's word, and room is made for them.
const MAX_GIDS: u32 = 4096;

/// The devices that libibverbs gives.
pub(super) struct DeviceList {
    verbs: &'static Verbs,
    list: NonNull<*mut ibv_device>,
    len: usize,
}

impl DeviceList {
    /// Asks libibverbs; there is at least one device in what is returned.
    pub(super) fn get(verbs: &'static Verbs, sys: &Path) -> Result<Self, Error> {
        let mut len: c_int = 0;
        // SAFETY: it writes one number.
        let list = unsafe { (verbs.functions.ibv_get_device_list)(&raw mut len) };
        let failure = io::Error::last_os_error();
        let Some(list) = NonNull::new(list) else {
            return Err(match failure.raw_os_error() {
                Some(ENOSYS) => Error::NoRdma(no_kernel(verbs, sys)),
                _ => Error::Os {
                    op: "ibv_get_device_list",
                    source: failure,
                },
            });
        };
        let list = Self {
            verbs,
            list,
            len: usize::try_from(len).unwrap_or(0),
        };
        if list.len == 0 {
            return Err(Error::NoRdma(match sysfs::interface_version(sys) {
                None => no_kernel(verbs, sys),
                Some(_) => NoRdma::Device {
                    kernel: sysfs::devices(sys),
                },
            }));
        }
        Ok(list)
    }

    /// Each device, as libibverbs orders them.
    pub(super) fn devices(&self) -> impl Iterator<Item = Listed<'_>> {
        (0..self.len).filter_map(|at| {
            // SAFETY: the place is within the array, whose length libibverbs told.
            let place = unsafe { self.list.add(at) };
            // SAFETY: the array stays until this is dropped.
            let device = NonNull::new(unsafe { place.read() })?;
            Some(Listed { list: self, device })
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list is freed once; devices that were opened stay.
        unsafe { (self.verbs.functions.ibv_free_device_list)(self.list.as_ptr()) };
    }
}

/// A device of the list.
pub(super) struct Listed<'a> {
    list: &'a DeviceList,
    device: NonNull<ibv_device>,
}

impl Listed<'_> {
    pub(super) fn name(&self) -> String {
        // SAFETY: the list has the device.
        let name = unsafe { (self.list.verbs.functions.ibv_get_device_name)(self.device.as_ptr()) };
        if name.is_null() {
            return String::new();
        }
        // SAFETY: the name is in the device, and ends with a zero byte.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }

    pub(super) fn guid(&self) -> u64 {
        // SAFETY: the list has the device.
        let guid = unsafe { (self.list.verbs.functions.ibv_get_device_guid)(self.device.as_ptr()) };
        u64::from_be(guid)
    }

    pub(super) fn transport(&self) -> ibv_transport_type {
        // SAFETY: the list has the device, and nobody writes to it.
        unsafe { (*self.device.as_ptr()).transport_type }
    }

    pub(super) fn open(&self) -> Result<OpenDevice, Error> {
        let verbs = self.list.verbs;
        // SAFETY: the list has the device.
        let context = unsafe { (verbs.functions.ibv_open_device)(self.device.as_ptr()) };
        let failure = io::Error::last_os_error();
        let Some(context) = NonNull::new(context) else {
            return Err(self.why_not_open(failure));
        };
        let device = OpenDevice {
            verbs,
            context,
            name: self.name(),
            pid: std::process::id(),
        };
        device.set_nonblocking()?;
        Ok(device)
    }

    /// libibverbs tries another place after the device's file, and tells of that alone.
    fn why_not_open(&self, failure: io::Error) -> Error {
        // SAFETY: the list has the device, and nobody writes to it.
        let name = unsafe { (*self.device.as_ptr()).dev_name };
        let name: Vec<u8> = name
            .iter()
            .flat_map(|c| c.to_ne_bytes())
            .take_while(|b| *b != 0)
            .collect();
        if !name.is_empty() {
            let path = Path::new("/dev/infiniband").join(OsStr::from_bytes(&name));
            let node = OpenOptions::new().read(true).write(true).open(&path);
            if let Err(source) = node {
                return Error::DeviceNode {
                    device: self.name(),
                    path,
                    source,
                };
            }
        }
        Error::Device {
            device: self.name(),
            call: "ibv_open_device",
            source: failure,
        }
    }
}

/// What of the kernel is missing.
fn no_kernel(verbs: &Verbs, sys: &Path) -> NoRdma {
    NoRdma::Kernel {
        fault: match sysfs::interface_version(sys) {
            None => KernelFault::NoInterface {
                path: sysfs::interface(sys),
            },
            Some(version) => KernelFault::Version {
                version,
                library: verbs.path.clone(),
            },
        },
    }
}

/// A device that is open.
pub(super) struct OpenDevice {
    verbs: &'static Verbs,
    context: NonNull<ibv_context>,
    name: String,
    /// The process that has opened it.
    pid: u32,
}

// SAFETY: libibverbs lets any thread use a context and what is made with it, at the same time as
// others (ibv_open_device(3), "thread safe"); it is closed once, when it is dropped.
unsafe impl Send for OpenDevice {}
// SAFETY: as above.
unsafe impl Sync for OpenDevice {}

/// An entry of a port's table of GIDs.
pub(super) struct RawGid {
    pub(super) port: u32,
    pub(super) index: u32,
    pub(super) raw: [u8; 16],
    /// `None` where it was asked for alone, and sysfs has to say.
    pub(super) kind: Option<ibv_gid_type>,
}

impl OpenDevice {
    /// The file of libibverbs.
    pub(super) fn library(&self) -> &Path {
        &self.verbs.path
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether this is a forked child of the process that has opened it: what it would free is its
    /// parent's.
    pub(super) fn is_inherited(&self) -> bool {
        self.pid != std::process::id()
    }

    pub(super) fn functions(&self) -> &'static Functions {
        &self.verbs.functions
    }

    pub(super) fn context(&self) -> *mut ibv_context {
        self.context.as_ptr()
    }

    /// Readable while there is an asynchronous event.
    pub(super) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device is open, and the number is set when it is opened.
        let fd = unsafe { (*self.context.as_ptr()).async_fd };
        // SAFETY: the descriptor is the context's, which is open for as long as this is.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn set_nonblocking(&self) -> Result<(), Error> {
        nonblocking(self.async_fd()).map_err(|source| Error::Device {
            device: self.name.clone(),
            call: "fcntl",
            source,
        })
    }

    /// Vectors that completion events can be spread over; at least one.
    pub(super) fn comp_vectors(&self) -> u32 {
        // SAFETY: the device is open, and the number is set when it is opened.
        let count = unsafe { (*self.context.as_ptr()).num_comp_vectors };
        u32::try_from(count).unwrap_or(1).max(1)
    }

    /// What a call has made, or why it has not.
    pub(super) fn made<T>(&self, call: &'static str, made: *mut T) -> Result<NonNull<T>, Error> {
        NonNull::new(made).ok_or_else(|| self.failure(call, -1))
    }

    /// Takes the result of a call that frees; there is nobody to tell but the log.
    pub(super) fn freed(&self, call: &'static str, code: c_int) {
        if let Err(error) = self.check(call, code) {
            tracing::warn!(%error, "something stays until the device is closed");
        }
    }

    pub(super) fn attr(&self) -> Result<ibv_device_attr, Error> {
        let mut attr = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: the device is open; one structure is written.
        let code = unsafe {
            (self.verbs.functions.ibv_query_device)(self.context.as_ptr(), attr.as_mut_ptr())
        };
        self.check("ibv_query_device", code)?;
        // SAFETY: numbers alone, for which all zero bytes are a value.
        Ok(unsafe { attr.assume_init() })
    }

    pub(super) fn port(&self, number: u8) -> Result<ibv_port_attr, Error> {
        let mut attr = ibv_port_attr::default();
        let context = self.context.as_ptr();
        // SAFETY: the device is open, by the same library.
        let code = unsafe { inline::query_port(&self.verbs.functions, context, number, &mut attr) };
        self.check("ibv_query_port", code)?;
        Ok(attr)
    }

    /// The GIDs of all ports at once, which are given with the lengths of their tables; `None` from a
    /// library before rdma-core 32, which cannot.
    pub(super) fn gid_table(
        &self,
        lengths: impl Iterator<Item = u32>,
    ) -> Option<Result<Vec<RawGid>, Error>> {
        let query = self.verbs.functions._ibv_query_gid_table?;
        let room = lengths.map(|len| len.min(MAX_GIDS) as usize).sum();
        if room == 0 {
            // The kernel takes no request for no entries, and there are none.
            return Some(Ok(Vec::new()));
        }
        let mut entries = vec![ibv_gid_entry::default(); room];
        let context = self.context.as_ptr();
        let size = size_of::<ibv_gid_entry>();
        // SAFETY: the device is open; no more than `room` entries of this size are written.
        let got = unsafe { query(context, entries.as_mut_ptr(), room, 0, size) };
        let Ok(got) = usize::try_from(got) else {
            let code = c_int::try_from(got).unwrap_or(-EINVAL);
            return Some(Err(self.failure("ibv_query_gid_table", code)));
        };
        Some(Ok(entries.iter().take(got).map(RawGid::new).collect()))
    }

    /// The GIDs of one port, one by one, without their types.
    pub(super) fn gids(&self, port: u8, len: u32) -> Result<Vec<RawGid>, Error> {
        let mut gids = Vec::new();
        for index in 0..len.min(MAX_GIDS) {
            let mut gid = ibv_gid::default();
            let (context, at) = (self.context.as_ptr(), index.cast_signed());
            // SAFETY: the device is open; one GID is written.
            let code =
                unsafe { (self.verbs.functions.ibv_query_gid)(context, port, at, &raw mut gid) };
            self.check("ibv_query_gid", code)?;
            if gid.raw != [0; 16] {
                gids.push(RawGid {
                    port: u32::from(port),
                    index,
                    raw: gid.raw,
                    kind: None,
                });
            }
        }
        Ok(gids)
    }

    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        match code {
            0 => Ok(()),
            code => Err(self.failure(call, code)),
        }
    }

    /// What a call returned that failed: the error's number or its negative, or -1 with the number in
    /// errno.
    pub(super) fn failure(&self, call: &'static str, code: c_int) -> Error {
        let source = match code {
            -1 => io::Error::last_os_error(),
            code => io::Error::from_raw_os_error(code.saturating_abs()),
        };
        Error::Device {
            device: self.name.clone(),
            call,
            source,
        }
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        if self.is_inherited() {
            return;
        }
        // SAFETY: it is closed once, and nothing of it is left.
        let code = unsafe { (self.verbs.functions.ibv_close_device)(self.context.as_ptr()) };
        if code != 0 {
            tracing::warn!(device = self.name, code, "ibv_close_device failed");
        }
    }
}

impl RawGid {
    fn new(entry: &ibv_gid_entry) -> Self {
        Self {
            port: entry.port_num,
            index: entry.gid_index,
            raw: entry.gid.raw,
            kind: Some(entry.gid_type),
        }
    }
}

/// Makes a descriptor of the library say that it has nothing rather than wait.
pub(super) fn nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
