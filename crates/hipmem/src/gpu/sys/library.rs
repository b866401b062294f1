//! A shared library: found when it is first asked for, and never closed, for GPU runtimes have threads and
//! tables of their own.

use std::ffi::{CStr, CString, OsStr};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use libc::c_void;
use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};

use crate::gpu::error::{NoGpu, Tried};

/// A shared library that stays loaded.
pub(in crate::gpu) struct Library {
    handle: *mut c_void,
    path: PathBuf,
}

// SAFETY: the handle is only given to the loader, which locks for itself.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The first of these names that the loader finds.
    pub(in crate::gpu) fn first(names: &[&OsStr]) -> Result<Self, NoGpu> {
        let mut tried = Vec::new();
        for name in names {
            match Self::open(name) {
                Ok(library) => return Ok(library),
                Err(why) => tried.push(Tried {
                    name: name.into(),
                    why,
                }),
            }
        }
        Err(NoGpu::Library { tried })
    }

    fn open(name: &OsStr) -> Result<Self, String> {
        // SAFETY: GPU runtimes and what they need may be loaded at any time: their initialisers touch
        // nothing of ours.
        match unsafe { Opened::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(opened) => {
                let handle = opened.into_raw();
                let path = file(handle).unwrap_or_else(|| name.into());
                tracing::debug!(path = %path.display(), "a GPU runtime is loaded");
                Ok(Self { handle, path })
            }
            Err(e) => Err(e.to_string()),
        }
    }

    pub(in crate::gpu) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::gpu) fn symbol(&self, name: &str) -> Option<NonNull<c_void>> {
        let name = CString::new(name).ok()?;
        // SAFETY: the handle is of a library that is never closed.
        NonNull::new(unsafe { libc::dlsym(self.handle, name.as_ptr()) })
    }

    pub(in crate::gpu) fn required(&self, symbol: &'static str) -> Result<NonNull<c_void>, NoGpu> {
        self.symbol(symbol).ok_or_else(|| NoGpu::Symbol {
            symbol,
            library: self.path.clone(),
        })
    }
}

/// The file, as the loader found it.
#[cfg(target_env = "gnu")]
fn file(handle: *mut c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;

    /// The head of `struct link_map` in <link.h>.
    #[repr(C)]
    struct LinkMap {
        address: usize,
        name: *const libc::c_char,
    }

    let mut map: *const LinkMap = std::ptr::null();
    let out = (&raw mut map).cast();
    // SAFETY: the request writes one pointer to `out`.
    let code = unsafe { libc::dlinfo(handle, libc::RTLD_DI_LINKMAP, out) };
    if code != 0 {
        return None;
    }
    // SAFETY: null, or the entry of a library that is never closed.
    let name = unsafe { map.as_ref() }?.name;
    if name.is_null() {
        return None;
    }
    // SAFETY: the loader's name of the file ends with a zero byte, and stays.
    let name = unsafe { CStr::from_ptr(name) };
    Some(OsStr::from_bytes(name.to_bytes()).into())
}

#[cfg(not(target_env = "gnu"))]
fn file(_: *mut c_void) -> Option<PathBuf> {
    let _: Option<&CStr> = None;
    None
}
