//! What can go wrong before a kernel runs.

use nix::errno::Errno;

/// Why there is no kernel to launch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No image is for this architecture.
    #[error(
        "no kernels for {arch:?}: built in are {}; add it to the targets of cargo xtask kernels",
        built_in()
    )]
    NoImage {
        /// The architecture, as its runtime names it.
        arch: String,
    },
    /// `memfd_create` refused the host image.
    #[error("memfd_create for the host kernels: {source}")]
    HostFile {
        /// The kernel's answer.
        source: Errno,
    },
    /// The host image could not be written into its memfd.
    #[error("writing the host kernels into their memfd: {source}")]
    HostWrite {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The loader refused the host image, or it lacks a symbol.
    #[error("loading the host kernels: {source}")]
    HostLoad {
        /// The loader's words.
        source: libloading::Error,
    },
    /// Counts or a chunk that the kernels cannot take.
    #[error(
        "{tensors} tensors x {pairs} pairs x {pieces} pieces of up to {longest} bytes in chunks of \
         {chunk}: counts must be below 2^31 and chunks 16 bytes to 1 GiB"
    )]
    Section {
        /// Tensors.
        tensors: u32,
        /// Block pairs.
        pairs: u32,
        /// Pieces of a block.
        pieces: u32,
        /// Bytes of the longest piece.
        longest: u64,
        /// Bytes of a chunk.
        chunk: u32,
    },
}

/// The embedded targets, for people to read.
fn built_in() -> String {
    let names = super::images().iter().map(|image| match image.format {
        super::Format::CodeObject => image.target.to_owned(),
        super::Format::Ptx => format!("{} and later", image.target),
        super::Format::Host => format!("host ({})", image.target),
    });
    names.collect::<Vec<_>>().join(", ")
}
