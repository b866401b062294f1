//! A shared library: found when it is first asked for, and never closed, for GPU runtimes have threads and
//! tables of their own.

use std::ffi::{CString, OsStr};
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
                // SAFETY: the handle is of a library that is never closed.
                let file = unsafe { kvxfer_verbs::library_file(handle) };
                let path = file.unwrap_or_else(|| name.into());
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
