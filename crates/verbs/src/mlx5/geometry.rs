//! Where the entries of queues lie, and 16-bit counters made whole.

use super::fault::Mlx5Fault;
use super::layout::MLX5_SEND_WQE_BB;

/// Bytes of a send queue's basic block.
pub const WQEBB: usize = MLX5_SEND_WQE_BB;

/// The most entries of a queue whose 16-bit counters are to be made whole: half of what they count.
pub const MAX_DEPTH: u32 = 1 << 15;

fn power_of_two(depth: u32) -> Result<u32, Mlx5Fault> {
    if !depth.is_power_of_two() || depth > MAX_DEPTH {
        return Err(Mlx5Fault::Depth {
            depth: depth.into(),
            max: MAX_DEPTH,
        });
    }
    Ok(depth)
}

/// The basic blocks of a send queue: a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqDepth(u32);

impl SqDepth {
    /// A depth.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Depth`].
    pub fn new(depth: u32) -> Result<Self, Mlx5Fault> {
        power_of_two(depth).map(Self)
    }

    /// Blocks.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// Bytes of the queue.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) * WQEBB as u64
    }

    /// Where WQE `n`, counted from 0, lies in the queue.
    #[must_use]
    pub fn offset(self, n: u64) -> u64 {
        (n & u64::from(self.0 - 1)) * WQEBB as u64
    }

    /// The WQE whose number has these low 16 bits and is in `from..to`: what has been posted and has
    /// not ended.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Counter`] if there is none.
    pub fn whole(self, counter: u16, from: u64, to: u64) -> Result<u64, Mlx5Fault> {
        // Low 16 bits.
        let ahead = counter.wrapping_sub(from as u16);
        let n = from.wrapping_add(ahead.into());
        if u64::from(ahead) >= to.wrapping_sub(from) || ahead >= self.0 as u16 {
            return Err(Mlx5Fault::Counter { counter, from, to });
        }
        Ok(n)
    }
}

/// The entries of a completion queue: a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CqDepth(u32);

impl CqDepth {
    /// A depth.
    ///
    /// # Errors
    ///
    /// [`Mlx5Fault::Depth`].
    pub fn new(depth: u32) -> Result<Self, Mlx5Fault> {
        power_of_two(depth).map(Self)
    }

    /// Entries.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// Bytes of the queue.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) * super::CQE_BYTES as u64
    }

    /// Where completion `n`, counted from 0, lies in the queue.
    #[must_use]
    pub fn offset(self, n: u64) -> u64 {
        (n & u64::from(self.0 - 1)) * super::CQE_BYTES as u64
    }

    /// The owner bit of completion `n`: it changes with every lap, so that what a lap before left is
    /// no completion of this one.
    #[must_use]
    pub fn owner(self, n: u64) -> bool {
        n & u64::from(self.0) != 0
    }
}
