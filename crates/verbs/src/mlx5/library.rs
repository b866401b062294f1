//! libmlx5, loaded when it is asked for. It is never unloaded.

use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::transmute;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use libc::{c_int, c_void};

use super::dv::{
    MLX5DV_OBJ_CQ, MLX5DV_OBJ_QP, MLX5DV_QP_MASK_UAR_MMAP_OFFSET, mlx5dv_cq, mlx5dv_obj,
    mlx5dv_obj_qp, mlx5dv_qp, mlx5dv_qp_bf, mlx5dv_qp_sq,
};
use super::mapped::NoMlx5;
use crate::sys::Library;
use crate::sys::types::{ibv_cq, ibv_device, ibv_qp};

/// The name that holds for the ABI declared here, whatever the version of rdma-core.
const NAME: &str = "libmlx5.so.1";

/// The functions, by the prototypes that tests/abi compares with the header.
pub(super) type IsSupported = unsafe extern "C" fn(device: *mut ibv_device) -> bool;
pub(super) type InitObj = unsafe extern "C" fn(obj: *mut mlx5dv_obj, obj_type: u64) -> c_int;

/// libmlx5, the part of rdma-core that drives mlx5 devices.
#[derive(Debug)]
pub struct Mlx5 {
    is_supported: IsSupported,
    init_obj: InitObj,
    path: PathBuf,
}

impl Mlx5 {
    /// The library of this process. What is not there is looked for again the next time.
    ///
    /// # Errors
    ///
    /// [`NoMlx5::Library`], [`NoMlx5::Symbol`].
    pub fn get() -> Result<&'static Self, NoMlx5> {
        static LOADED: OnceLock<Mlx5> = OnceLock::new();
        if let Some(mlx5) = LOADED.get() {
            return Ok(mlx5);
        }
        let mlx5 = Self::open(NAME)?;
        Ok(LOADED.get_or_init(|| mlx5))
    }

    /// The library of a name, or a path.
    pub(super) fn open(name: impl AsRef<OsStr>) -> Result<Self, NoMlx5> {
        let library = Library::open(name.as_ref()).map_err(|missing| NoMlx5::Library {
            name: missing.name,
            why: missing.why,
        })?;
        let is_supported = symbol(&library, c"mlx5dv_is_supported", c"MLX5_1.8")?;
        let init_obj = symbol(&library, c"mlx5dv_init_obj", c"MLX5_1.2")?;
        let path = library.path();
        tracing::debug!(path = %path.display(), "libmlx5 is loaded");
        Ok(Self {
            // SAFETY: a symbol of this name and version is a function of this prototype: tests/abi compares it with
            // the header.
            is_supported: unsafe { transmute::<NonNull<c_void>, IsSupported>(is_supported) },
            // SAFETY: as above.
            init_obj: unsafe { transmute::<NonNull<c_void>, InitObj>(init_obj) },
            path,
        })
    }

    /// One whose functions are these, for tests.
    #[cfg(test)]
    pub(super) fn of(is_supported: IsSupported, init_obj: InitObj) -> Self {
        Self {
            is_supported,
            init_obj,
            path: PathBuf::new(),
        }
    }

    /// Its file, as the loader found it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether libmlx5 drives the device.
    ///
    /// # Safety
    ///
    /// The device is of libibverbs, and there.
    pub(super) unsafe fn drives(&self, device: NonNull<ibv_device>) -> bool {
        // SAFETY: it compares a pointer in the device, which the caller keeps.
        unsafe { (self.is_supported)(device.as_ptr()) }
    }

    /// What a queue pair is made of.
    ///
    /// # Safety
    ///
    /// The queue pair is there, and libmlx5 drives its device.
    pub(super) unsafe fn queue_pair(&self, qp: NonNull<ibv_qp>) -> io::Result<mlx5dv_qp> {
        let mut out = mlx5dv_qp {
            dbrec: ptr::null_mut(),
            sq: NO_QUEUE,
            rq: NO_QUEUE,
            bf: mlx5dv_qp_bf {
                reg: ptr::null_mut(),
                size: 0,
            },
            comp_mask: MLX5DV_QP_MASK_UAR_MMAP_OFFSET,
            uar_mmap_offset: 0,
            tirn: 0,
            tisn: 0,
            rqn: 0,
            sqn: 0,
            tir_icm_addr: 0,
        };
        let mut obj = NOTHING;
        obj.qp = mlx5dv_obj_qp {
            r#in: qp.as_ptr().cast(),
            out: (&raw mut out).cast(),
        };
        // SAFETY: it reads the queue pair, which the caller keeps, and fills `out`.
        let code = unsafe { (self.init_obj)(&raw mut obj, MLX5DV_OBJ_QP) };
        answered(code)?;
        Ok(out)
    }

    /// What a completion queue is made of.
    ///
    /// # Safety
    ///
    /// The queue is there, and libmlx5 drives its device.
    pub(super) unsafe fn completion_queue(&self, cq: NonNull<ibv_cq>) -> io::Result<mlx5dv_cq> {
        let mut out = mlx5dv_cq {
            buf: ptr::null_mut(),
            dbrec: ptr::null_mut(),
            cqe_cnt: 0,
            cqe_size: 0,
            cq_uar: ptr::null_mut(),
            cqn: 0,
            comp_mask: 0,
        };
        let mut obj = NOTHING;
        obj.cq = mlx5dv_obj_qp {
            r#in: cq.as_ptr().cast(),
            out: (&raw mut out).cast(),
        };
        // SAFETY: it reads the queue, which the caller keeps, and fills `out`.
        let code = unsafe { (self.init_obj)(&raw mut obj, MLX5DV_OBJ_CQ) };
        answered(code)?;
        Ok(out)
    }
}

const NO_QUEUE: mlx5dv_qp_sq = mlx5dv_qp_sq {
    buf: ptr::null_mut(),
    wqe_cnt: 0,
    stride: 0,
};

const NO_OBJECT: mlx5dv_obj_qp = mlx5dv_obj_qp {
    r#in: ptr::null_mut(),
    out: ptr::null_mut(),
};

const NOTHING: mlx5dv_obj = mlx5dv_obj {
    qp: NO_OBJECT,
    cq: NO_OBJECT,
    srq: NO_OBJECT,
    rwq: NO_OBJECT,
    dm: NO_OBJECT,
    ah: NO_OBJECT,
    pd: NO_OBJECT,
};

/// 0, or an errno; some of its ways out have a sign before it.
fn answered(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_abs())),
    }
}

fn symbol(
    library: &Library,
    name: &'static CStr,
    version: &'static CStr,
) -> Result<NonNull<c_void>, NoMlx5> {
    library.symbol(name, version).ok_or_else(|| NoMlx5::Symbol {
        symbol: name.to_str().unwrap_or_default(),
        version: version.to_str().unwrap_or_default(),
        library: library.path(),
    })
}
