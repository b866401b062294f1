//! The code that runs on a GPU, as it was built from `kernels/`: one image for each target, embedded,
//! so that a build needs no device compiler and a run only the driver.
//!
//! # For the launcher
//!
//! Every kernel takes one argument, a struct of [this module](self#structs), by value. Addresses in
//! it and in what it leads to are the device's. Grids and workgroups have one dimension; the threads
//! of a workgroup are a multiple of the warp ([`Image::warp`]) and at most [`MAX_THREADS`].
//!
//! | symbol | argument | grid | what it writes |
//! |---|---|---|---|
//! | [`KVX_GATHER`] | [`GatherArgs`] | [`GatherShape::new`] | the destination blocks; one [`GatherSlot`] a workgroup |
//! | [`KVX_ACQUIRE`], [`KVX_RELEASE`] | [`FenceArgs`] | [`FENCE_WORKGROUPS`] × one warp | one [`FenceSlot`] a workgroup |
//! | [`KVX_VERIFY`] | [`VerifyArgs`] | up to 4 × compute units of 256 threads | one sum a block and tensor |
//!
//! [`gather`](crate::gather) does all of what follows.
//!
//! Sections, tensors, pieces and pairs are read over and over: put them into the device's memory, not
//! into pinned memory. They must stand still while the kernel runs. The abort word belongs into the
//! memory of the device that runs the kernel, where it is set by a copy on another stream: each warp
//! looks at it for every [`GatherShape::poll_bytes`], and over the bus to pinned memory that held a
//! gather at 67 to 120 of 394 GB/s on an H200. It must always be there. Slots belong into pinned memory,
//! where the host sees them; each is written once.
//!
//! A gather has succeeded when every slot holds the launch's sequence and [`WHOLE`], and the slots' bytes add up to
//! the transfer's. Its destination blocks are then visible to every device and to the host.
//! A workgroup's sequence may be awaited in place of an event.
//!
//! On AMD, look at the units of the fence slots: they must name every XCC of the device, or the
//! fence has not reached them all and must be launched again with more workgroups.
//!
//! On the host the same kernels are functions of [`HostKernels`]: nothing about GPUs is needed.

mod args;
mod checksum;
mod error;
mod host;
mod prebuilt;
pub mod queue;
pub mod regions;
mod shape;

pub(crate) use args::bytes_of;
pub use args::{
    ABORTED, DESTINATION, FenceArgs, FenceSlot, GatherArgs, GatherSlot, Pair, Piece, SOURCE,
    Section, Table, Tensor, VerifyArgs, WHOLE,
};
pub use checksum::{block_sum, piece_sum};
pub use error::KernelError;
pub use host::HostKernels;
pub use shape::{GatherShape, spread};

/// Copies scattered blocks.
pub const KVX_GATHER: &str = "kvx_gather";
/// The fence before a consumer reads received blocks.
pub const KVX_ACQUIRE: &str = "kvx_acquire";
/// The fence after a producer's kernels, before anybody else reads what they wrote.
pub const KVX_RELEASE: &str = "kvx_release";
/// Checksums of blocks.
pub const KVX_VERIFY: &str = "kvx_verify";

/// Posts in numbers, each thread for itself ([`queue::PostArgs`]); in an image of its own
/// ([`posts_for_target`]).
pub const KVX_POST_THREADS: &str = "kvx_post_threads";
/// The same, each wave as one.
pub const KVX_POST_WAVES: &str = "kvx_post_waves";
/// The same, each workgroup as one.
pub const KVX_POST_BLOCKS: &str = "kvx_post_blocks";

/// Puts over GPU links, each workgroup as one ([`queue::PostArgs`] of all puts together).
pub const KVX_PUSH_BLOCKS: &str = "kvx_push_blocks";

/// A producer: makes blocks layer by layer and pushes each ([`queue::ProduceArgs`]), each workgroup as one.
pub const KVX_PRODUCE: &str = "kvx_produce";

/// For measurements, one thread with the device's clock around what it does, in the ticket of each result: a put and
/// its wait ([`queue::PostArgs`]).
pub const KVX_TIME_WAITS: &str = "kvx_time_waits";
/// The same: a flag at [`bell`](queue::Queue::bell), until the same number is at [`words`](queue::Queue::words).
pub const KVX_TIME_ECHO: &str = "kvx_time_echo";
/// The same, two results: as many WQEs as `count` says, of which nobody is told; and again, each with its release.
pub const KVX_TIME_WQES: &str = "kvx_time_wqes";

/// The most threads of a workgroup.
pub const MAX_THREADS: u32 = 1024;

/// Workgroups, of one warp each, that a fence is launched with: on a device of eight XCCs, where
/// workgroups go round by turns, eight for each.
pub const FENCE_WORKGROUPS: u32 = 64;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// An AMD code object, for `hipModuleLoadData`.
    CodeObject,
    /// PTX with a zero byte at its end, for `cuModuleLoadData`.
    Ptx,
    /// A shared object of this machine's own processor.
    Host,
}

/// The kernels of one target.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// What it was built for: `gfx942`, `sm_80`, `x86_64`.
    pub target: &'static str,
    /// What the bytes are.
    pub format: Format,
    /// What the driver loads.
    pub bytes: &'static [u8],
    /// SHA-256 of the file in `kernels/prebuilt`, in hex.
    pub sha256: &'static str,
    /// Threads that step together.
    pub warp: u32,
}

/// What the images were built from and by.
#[derive(Debug, Clone, Copy)]
pub struct Provenance {
    /// SHA-256 over the sources' names and bytes, in hex.
    pub sources_sha256: &'static str,
    /// The compiler's first line about itself.
    pub compiler: &'static str,
}

/// What the embedded images were built from and by.
#[must_use]
pub const fn provenance() -> Provenance {
    prebuilt::PROVENANCE
}

/// All embedded images.
#[must_use]
pub const fn images() -> &'static [Image] {
    prebuilt::IMAGES
}

/// The image for an architecture as its runtime names it: `gfx942:sramecc+:xnack-`, `sm_90`, or
/// `host`.
///
/// # Errors
///
/// [`KernelError::NoImage`], which names what there is.
pub fn for_target(arch: &str) -> Result<&'static Image, KernelError> {
    among(images(), arch)
}

/// The image that has [`KVX_POST_THREADS`] and its like; on the host the same one as for the rest.
///
/// # Errors
///
/// [`KernelError::NoImage`], which names what there is.
pub fn posts_for_target(arch: &str) -> Result<&'static Image, KernelError> {
    among(prebuilt::POST_IMAGES, arch).or_else(|none| {
        let rest = for_target(arch).ok();
        rest.filter(|image| image.format == Format::Host)
            .ok_or(none)
    })
}

fn among(all: &'static [Image], arch: &str) -> Result<&'static Image, KernelError> {
    let plain = arch.split(':').next().unwrap_or_default();
    let found = all.iter().find(|image| match image.format {
        Format::CodeObject => image.target == plain,
        // PTX of a capability is compiled by the driver for that one and all later ones.
        Format::Ptx => matches!(
            (capability(plain), capability(image.target)),
            (Some(wanted), Some(oldest)) if wanted >= oldest
        ),
        Format::Host => plain == "host" && image.target == std::env::consts::ARCH,
    });
    found.ok_or_else(|| KernelError::NoImage {
        arch: arch.to_owned(),
    })
}

/// The number in `sm_90` or `sm_90a`.
fn capability(arch: &str) -> Option<u32> {
    let number = arch.strip_prefix("sm_")?;
    number
        .trim_end_matches(|c: char| c.is_ascii_lowercase())
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::{Format, capability, for_target, images, posts_for_target};

    #[test]
    fn architectures_find_their_images() {
        for (arch, target) in [
            ("gfx90a:sramecc+:xnack-", "gfx90a"),
            ("gfx942", "gfx942"),
            ("gfx950:sramecc+", "gfx950"),
            ("gfx1100", "gfx1100"),
            ("sm_80", "sm_80"),
            ("sm_90", "sm_80"),
            ("sm_90a", "sm_80"),
            ("sm_120", "sm_80"),
        ] {
            let found = for_target(arch).map(|image| image.target);
            assert_eq!(found.ok(), Some(target), "{arch}");
            let posts = posts_for_target(arch).map(|image| image.target);
            assert_eq!(posts.ok(), Some(target), "{arch}");
        }
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        assert_eq!(
            for_target("host").map(|image| image.format).ok(),
            Some(Format::Host)
        );
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        assert_eq!(
            posts_for_target("host").map(|image| image.sha256).ok(),
            for_target("host").map(|image| image.sha256).ok()
        );
    }

    #[test]
    fn what_is_not_there_is_named_beside_what_is() {
        for arch in ["gfx908", "gfx94", "gfx9420", "sm_75", "sm_", "x86_64", ""] {
            let Err(e) = for_target(arch) else {
                panic!("{arch} has an image");
            };
            let text = e.to_string();
            assert!(text.contains(arch) && text.contains("gfx942"), "{text}");
            assert!(text.contains("sm_80 and later"), "{text}");
        }
    }

    #[test]
    fn images_are_what_they_say() {
        for image in images() {
            let magic: &[u8] = match image.format {
                Format::CodeObject | Format::Host => b"\x7fELF",
                Format::Ptx => b"//\n// Generated by LLVM",
            };
            assert!(image.bytes.starts_with(magic), "{}", image.target);
        }
        let ptx = images().iter().find(|i| i.format == Format::Ptx);
        let zero = ptx.and_then(|i| i.bytes.iter().position(|b| *b == 0));
        let last = ptx.map(|i| i.bytes.len() - 1);
        assert_eq!(zero, last, "PTX has one zero, at its end");
    }

    #[test]
    fn capabilities_are_numbers() {
        assert_eq!(capability("sm_90a"), Some(90));
        assert_eq!(capability("sm_100"), Some(100));
        assert_eq!(capability("gfx942"), None);
        assert_eq!(capability("sm_x"), None);
    }
}
