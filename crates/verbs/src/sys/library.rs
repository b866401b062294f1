//! The library itself: found when it is first asked for, and never closed, for its drivers have
//! threads and tables of their own.

use std::ffi::{CStr, OsStr, OsString};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::OnceLock;

use libc::c_void;
use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};

use super::functions::Functions;
use crate::error::NoRdma;

/// The name that holds for the ABI declared here, whatever the version of rdma-core.
const NAME: &str = "libibverbs.so.1";

/// libibverbs, loaded.
pub(crate) struct Verbs {
    pub(crate) functions: Functions,
    /// The file, as the loader found it.
    pub(crate) path: PathBuf,
}

impl Verbs {
    /// The library of this process. What is not there is looked for again the next time.
    ///
    /// # Errors
    ///
    /// [`NoRdma::Library`], [`NoRdma::Symbol`].
    pub(crate) fn get() -> Result<&'static Self, NoRdma> {
        static LOADED: OnceLock<Verbs> = OnceLock::new();
        if let Some(verbs) = LOADED.get() {
            return Ok(verbs);
        }
        let verbs = Self::open(NAME)?;
        Ok(LOADED.get_or_init(|| verbs))
    }

    /// The library of a name, or a path.
    pub(crate) fn open(name: impl AsRef<OsStr>) -> Result<Self, NoRdma> {
        let library = Library::open(name.as_ref()).map_err(|missing| NoRdma::Library {
            name: missing.name,
            why: missing.why,
        })?;
        let functions = Functions::find(&library)?;
        // `ibv_fork_init` is for who registers memory, and nobody does yet: it changes what every
        // user of the library in this process registers.
        let path = library.path();
        tracing::debug!(path = %path.display(), "libibverbs is loaded");
        Ok(Self { functions, path })
    }
}

/// A shared library that stays loaded.
pub(crate) struct Library {
    handle: *mut c_void,
    name: OsString,
}

/// A library that is not there, or is none.
pub(crate) struct NotLoaded {
    pub(crate) name: PathBuf,
    /// The loader's words.
    pub(crate) why: String,
}

impl Library {
    /// Loads libibverbs, or a library of its drivers.
    pub(crate) fn open(name: &OsStr) -> Result<Self, NotLoaded> {
        // SAFETY: libibverbs, its drivers and what they need may be loaded at any time: their
        // initialisers touch nothing of ours.
        match unsafe { Opened::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(opened) => Ok(Self {
                handle: opened.into_raw(),
                name: name.to_owned(),
            }),
            Err(e) => Err(NotLoaded {
                name: name.into(),
                why: e.to_string(),
            }),
        }
    }

    /// The address of a symbol of this version. An unversioned library's symbols fit any.
    pub(crate) fn symbol(&self, name: &CStr, version: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle is of a library that is never closed.
        #[cfg(target_env = "gnu")]
        let address = unsafe { libc::dlvsym(self.handle, name.as_ptr(), version.as_ptr()) };
        // Other loaders know no versions, and pass over all that are not the default.
        // SAFETY: as above.
        #[cfg(not(target_env = "gnu"))]
        let address = {
            let _ = version;
            unsafe { libc::dlsym(self.handle, name.as_ptr()) }
        };
        NonNull::new(address)
    }

    pub(crate) fn lacks(&self, symbol: &'static str, version: &'static str) -> NoRdma {
        NoRdma::Symbol {
            symbol,
            version,
            library: self.path(),
        }
    }

    /// Its file, or the name that it was asked for by.
    pub(crate) fn path(&self) -> PathBuf {
        // SAFETY: the handle is of a library that is never closed.
        let file = unsafe { library_file(self.handle) };
        file.unwrap_or_else(|| self.name.clone().into())
    }
}

/// The file of a loaded library, as the loader found it; `None` where the loader does not tell. Used by
/// kvxfer-hipmem as well.
///
/// # Safety
///
/// The handle is of `dlopen`, and its library is never closed.
#[doc(hidden)]
#[must_use]
#[cfg(target_env = "gnu")]
pub unsafe fn library_file(handle: *mut c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;

    /// The head of `struct link_map` in <link.h>.
    #[repr(C)]
    struct LinkMap {
        address: usize,
        name: *const libc::c_char,
    }

    let mut map: *const LinkMap = std::ptr::null();
    let out = (&raw mut map).cast();
    // SAFETY: the request writes one pointer to `out`; the caller has the handle from the loader.
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

/// The same where the loader does not tell.
///
/// # Safety
///
/// None is asked for.
#[doc(hidden)]
#[must_use]
#[cfg(not(target_env = "gnu"))]
pub unsafe fn library_file(_: *mut c_void) -> Option<PathBuf> {
    None
}
