//! How many workgroups a gather is launched with, and how its work is cut.

use super::MAX_THREADS;
use super::args::Section;

/// A chunk of large transfers: enough passes of a warp that looking up the next one costs little.
const LARGE_CHUNK: u32 = 16 << 10;

/// A chunk of small transfers: four passes of 32 lanes. Smaller ones take more warps than they save
/// time.
const SMALL_CHUNK: u32 = 2 << 10;

/// A grid for [`KVX_GATHER`](super::KVX_GATHER).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatherShape {
    /// Workgroups.
    pub workgroups: u32,
    /// Threads of a workgroup.
    pub threads: u32,
    /// For [`Section::new`]: the most bytes that a warp copies at a time.
    pub chunk: u32,
    /// For [`GatherArgs::poll_bytes`](super::GatherArgs). With the abort word in the memory of the device that runs the kernel
    /// these looks cost nothing that could be measured on an H200 (16 KiB to 1 GiB between two looks:
    /// the same speed). With the word in pinned memory they are a million reads a second over PCIe, which
    /// hold the kernel at 67 to 120 of 394 GB/s.
    pub poll_bytes: u32,
}

impl GatherShape {
    /// The grid for `bytes`: at most `workgroups` of `threads` threads, in warps of `warp`.
    ///
    /// Small transfers take fewer and are cut finer, so that one block is on its way in one pass.
    #[must_use]
    pub fn new(bytes: u64, warp: u32, workgroups: u32, threads: u32) -> Self {
        let most = workgroups.max(1);
        let per_group = (threads.min(MAX_THREADS) / warp.max(1)).max(1);
        let warps = u64::from(most) * u64::from(per_group);
        let mut chunk = SMALL_CHUNK;
        while chunk < LARGE_CHUNK && bytes / u64::from(chunk) > warps {
            chunk *= 2;
        }
        let wanted = bytes.div_ceil(u64::from(chunk)).clamp(1, warps);
        // At most `warps`, which is a product of two 32-bit numbers capped by the device.
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let in_group = wanted.min(per_group);
        Self {
            workgroups: wanted.div_ceil(in_group).min(most),
            threads: in_group * warp,
            chunk,
            poll_bytes: 64 << 10,
        }
    }

    /// Warps of the whole grid.
    #[must_use]
    pub fn warps(&self, warp: u32) -> u32 {
        self.workgroups.saturating_mul(self.threads / warp.max(1))
    }
}

/// Lets each section begin at the warp after the one that has the last chunk of the section before,
/// so that many small sections keep all `warps` of a grid busy.
pub fn spread(sections: &mut [Section], warps: u32) {
    let warps = u128::from(warps.max(1));
    let mut first = 0;
    for section in sections {
        // Below `warps`, which is 32 bits.
        section.set_first(u32::try_from(first).unwrap_or(0));
        first = (first + section.chunks()) % warps;
    }
}

#[cfg(test)]
mod tests {
    use super::GatherShape;

    #[test]
    fn small_transfers_take_few_warps_and_large_ones_all() {
        let one = GatherShape::new(16 << 10, 32, 132, 1024);
        assert_eq!((one.workgroups, one.threads, one.chunk), (1, 256, 2048));
        let large = GatherShape::new(1 << 30, 32, 132, 1024);
        assert_eq!(
            (large.workgroups, large.threads, large.chunk),
            (132, 1024, 16384)
        );
        let few = GatherShape::new(1 << 30, 32, 16, 512);
        assert_eq!((few.workgroups, few.threads), (16, 512));
        let amd = GatherShape::new(1 << 30, 64, 304, 1024);
        assert_eq!((amd.workgroups, amd.threads), (304, 1024));
        assert_eq!(amd.warps(64), 304 * 16);
        for bytes in [0, 1, 2048, 2049, 1 << 20, u64::MAX] {
            for threads in [0, 32, 100, 1024, u32::MAX] {
                let shape = GatherShape::new(bytes, 32, 7, threads);
                assert!((1..=7).contains(&shape.workgroups), "{shape:?}");
                assert!(shape.threads >= 32 && shape.threads <= 1024, "{shape:?}");
                assert_eq!(shape.threads % 32, 0);
            }
        }
    }
}
