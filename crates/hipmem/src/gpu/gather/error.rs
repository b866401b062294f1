//! What can go wrong with a gather, a fence or a check.

use std::fmt;

use kvxfer_verbs::PciAddress;

use crate::gpu::GpuFault;

/// A side of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where blocks are read.
    Source,
    /// Where blocks are written.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Why blocks cannot be gathered as was asked, or were not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GatherFault {
    /// There is nothing to launch it with, memory of the GPU most likely: nothing was put on the GPU.
    #[error("nothing was launched: {0}")]
    NotBegun(#[source] Box<GpuFault>),
    /// A tensor's last block does not end inside its memory.
    #[error(
        "section {section}, tensor {tensor}: the {side}'s blocks end {end} bytes after block 0 begins, the memory has {room} there"
    )]
    Outside {
        /// Which section.
        section: usize,
        /// Which of its tensors.
        tensor: usize,
        /// Whose memory.
        side: Side,
        /// Where the last block ends, in bytes from where block 0 begins.
        end: u128,
        /// Bytes that the memory has from there.
        room: u64,
    },
    /// Another process's memory was opened for another GPU than the one that would reach it.
    #[error(
        "section {section}, tensor {tensor}: the {side}'s memory is another process's and was opened for GPU {opened}: open it for {gpu}, which shall reach it"
    )]
    OpenedElsewhere {
        /// Which section.
        section: usize,
        /// Which of its tensors.
        tensor: usize,
        /// Whose memory.
        side: Side,
        /// The device it was opened for.
        opened: PciAddress,
        /// The device whose kernel would reach it.
        gpu: PciAddress,
    },
    /// Lists of block pairs for more or fewer sections than there are.
    #[error("{given} lists of block pairs for {sections} sections")]
    Lists {
        /// How many lists.
        given: usize,
        /// How many sections.
        sections: usize,
    },
    /// A section, or tensors of one, that a table does not have.
    #[error("section {section}: there are no tensors {from} to {to}")]
    NoSuchTensors {
        /// Which section.
        section: usize,
        /// The first tensor that was named.
        from: usize,
        /// What follows the last one.
        to: usize,
    },
    /// A block that a section does not have.
    #[error("section {section}, pair {pair}: block {block} at the {side}, which has {blocks}")]
    NoSuchBlock {
        /// Which section.
        section: usize,
        /// Which of its pairs.
        pair: usize,
        /// Where.
        side: Side,
        /// The block.
        block: u32,
        /// How many there are.
        blocks: u32,
    },
    /// More of something than a kernel counts.
    #[error("section {section}: {count} {what}: fewer than 2^31 can be counted")]
    TooMany {
        /// Which section.
        section: usize,
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// A launch has ended, and its workgroups did not say that they copied everything.
    #[error(
        "a gather ended with {ended} of {workgroups} workgroups' words for it, {bytes} of {wanted} bytes"
    )]
    Incomplete {
        /// Workgroups that say that they ended.
        ended: u32,
        /// Workgroups.
        workgroups: u32,
        /// Bytes that those say they copied.
        bytes: u64,
        /// Bytes that were asked for.
        wanted: u64,
    },
    /// A fence has not run on all compute dies, so caches of some may be stale.
    #[error("a fence of {workgroups} workgroups ran on {seen} of {xccs} compute dies")]
    FenceReach {
        /// Its workgroups.
        workgroups: u32,
        /// Dies that it ran on.
        seen: u32,
        /// Dies that there are.
        xccs: u32,
    },
    /// A fence's launch has ended, and not all of its workgroups said so.
    #[error("a fence ended with {ended} of {workgroups} workgroups' words for it")]
    FenceIncomplete {
        /// Workgroups that say that they ended.
        ended: u32,
        /// Workgroups.
        workgroups: u32,
    },
}
