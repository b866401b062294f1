//! The host build of the kernels, loaded from this program's own bytes.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsRawFd;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::args::{FenceArgs, GatherArgs, VerifyArgs};
use super::error::KernelError;
use super::for_target;
use super::queue::PostArgs;

/// What the host image exports for each kernel: workgroups `first..end` of a grid of `groups`, one
/// after the other.
type Kernel<Args> = unsafe extern "C" fn(args: *const Args, first: u32, end: u32, groups: u32);

/// The kernels as functions of this process. A workgroup is one warp of 32 lanes, which go one after
/// the other; a caller that wants threads gives each of them a part of the grid.
#[derive(Debug)]
pub struct HostKernels {
    gather: Kernel<GatherArgs>,
    acquire: Kernel<FenceArgs>,
    release: Kernel<FenceArgs>,
    verify: Kernel<VerifyArgs>,
    post: Kernel<PostArgs>,
    /// What the functions are in.
    _library: Library,
    /// What the library was loaded from. The loader knows libraries by their path: as long as this one is
    /// loaded, no other file may get its number.
    _file: File,
}

impl HostKernels {
    /// Loads the image that is built in. It needs no file system and no other library.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoImage`] on a processor that none was built for; what the kernel or the loader
    /// says otherwise.
    pub fn load() -> Result<Self, KernelError> {
        let image = for_target("host")?;
        let fd = memfd_create("kvxfer-kernels", MFdFlags::MFD_CLOEXEC)
            .map_err(|source| KernelError::HostFile { source })?;
        let mut file = File::from(fd);
        file.write_all(image.bytes)
            .map_err(|source| KernelError::HostWrite { source })?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the image has no initialisers and no dependencies: loading it runs no code.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|source| KernelError::HostLoad { source })?;
        Ok(Self {
            gather: kernel(&library, c"kvx_gather_host".to_bytes_with_nul())?,
            acquire: kernel(&library, c"kvx_acquire_host".to_bytes_with_nul())?,
            release: kernel(&library, c"kvx_release_host".to_bytes_with_nul())?,
            verify: kernel(&library, c"kvx_verify_host".to_bytes_with_nul())?,
            post: kernel(&library, c"kvx_post_host".to_bytes_with_nul())?,
            _library: library,
            _file: file,
        })
    }

    /// Runs workgroups of [`KVX_GATHER`](super::KVX_GATHER). Every workgroup of the grid must be run once, in any order
    /// and by any threads.
    ///
    /// # Safety
    ///
    /// `args` and what it leads to must be whole tables in this process; every source stretch they name
    /// must be mapped and readable and every destination stretch writable, none of them
    /// covered by a Rust reference; slots for the whole grid must be writable.
    pub unsafe fn gather(&self, args: &GatherArgs, groups: Range<u32>, grid: u32) {
        // SAFETY: the image was built from the sources that this crate mirrors, so the signature is
        // the function's; the caller answers for the addresses.
        unsafe { (self.gather)(args, groups.start, groups.end, grid) };
    }

    /// Runs workgroups of [`KVX_ACQUIRE`](super::KVX_ACQUIRE).
    ///
    /// # Safety
    ///
    /// Slots for the whole grid must be writable.
    pub unsafe fn acquire(&self, args: &FenceArgs, groups: Range<u32>, grid: u32) {
        // SAFETY: as for `gather`.
        unsafe { (self.acquire)(args, groups.start, groups.end, grid) };
    }

    /// Runs workgroups of [`KVX_RELEASE`](super::KVX_RELEASE).
    ///
    /// # Safety
    ///
    /// Slots for the whole grid must be writable.
    pub unsafe fn release(&self, args: &FenceArgs, groups: Range<u32>, grid: u32) {
        // SAFETY: as for `gather`.
        unsafe { (self.release)(args, groups.start, groups.end, grid) };
    }

    /// Runs workgroups of [`KVX_VERIFY`](super::KVX_VERIFY).
    ///
    /// # Safety
    ///
    /// As for [`gather`](Self::gather), but that blocks are only read, and that the sums of all
    /// sections must be writable.
    pub unsafe fn verify(&self, args: &VerifyArgs, groups: Range<u32>, grid: u32) {
        // SAFETY: as for `gather`.
        unsafe { (self.verify)(args, groups.start, groups.end, grid) };
    }

    /// Makes the posts of these posters, one poster after the other. Posters of different calls may
    /// post at the same time.
    ///
    /// # Safety
    ///
    /// Everything that `args` names must be mapped in this process and as long as the queue's depth, the
    /// number of posters and their posts say; moves readable, all else readable and writable, and none
    /// covered by a Rust reference other than of atomics. What the moves themselves name is not touched.
    pub unsafe fn post(&self, args: &PostArgs, posters: Range<u32>) {
        // SAFETY: as for `gather`.
        unsafe { (self.post)(args, posters.start, posters.end, args.posters) };
    }

    /// The sizes and offsets that the sources have.
    #[cfg(test)]
    fn layout(&self, len: usize) -> Result<Vec<usize>, libloading::Error> {
        // SAFETY: the symbol is an array of 32-bit numbers.
        let first = unsafe { self._library.get::<*const u32>(b"kvx_layout\0") }?;
        let first: *const u32 = *first;
        let numbers = (0..len).map(|i| {
            // SAFETY: the test asks for as many as the array has.
            let at = unsafe { first.add(i) };
            // SAFETY: inside the array, which the library keeps.
            unsafe { at.read() as usize }
        });
        Ok(numbers.collect())
    }
}

/// A function of the image.
fn kernel<Args>(library: &Library, symbol: &[u8]) -> Result<Kernel<Args>, KernelError> {
    // SAFETY: `kernels/` defines these symbols with this signature; the image is built from it.
    let found = unsafe { library.get::<Kernel<Args>>(symbol) };
    found
        .map(|function| *function)
        .map_err(|source| KernelError::HostLoad { source })
}

#[cfg(test)]
mod tests {
    use super::HostKernels;
    use crate::kernels::{args, queue, regions};

    #[test]
    fn the_mirror_is_what_the_sources_were_built_with() {
        let kernels = HostKernels::load().expect("the host image loads");
        let mut ours = args::layout();
        ours.extend(queue::layout());
        ours.extend(regions::layout());
        let theirs = kernels.layout(ours.len()).expect("the symbol is there");
        assert_eq!(ours, theirs);
    }
}
