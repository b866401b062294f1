//! What one session measures: a layout on both sides, and which blocks go where.

use kvxfer::bench::{BenchMemory, BenchShape};
use kvxfer::blocks::{BlockPair, GroupBlocks, GroupPairs};
use kvxfer::layout::{KvFormat, KvPlacement, Packing, PlacementDesc, Topology};

use super::table::{self, Pair};
use crate::args::{BwArgs, ServePattern};
use crate::layout::{self, Layout};
use crate::output::schema::{Op, PatternConfig};
use crate::problem::{Exit, Problem};

/// Transfers under way at once, so that nobody waits for a wake-up.
const SLOTS: u32 = 4;
/// How much is moved where sizes are measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Most {
    /// Bytes on a side.
    memory: u64,
    /// Transfers that share them.
    slots: u32,
    /// Blocks a transfer.
    blocks: u64,
    /// Layers that have the same blocks: an engine's table names a block once for all of them.
    layers: u32,
    /// Requests of a model under way at least, however large they are.
    requests: u32,
}

const MEMORY: u64 = 256 << 20;
pub(crate) const ON_HOST: Most = Most {
    memory: MEMORY,
    slots: SLOTS,
    blocks: 4096,
    layers: 1,
    requests: 1,
};
/// A GPU's links take a gigabyte in some milliseconds.
pub(crate) const ON_GPU: Most = Most {
    memory: 2 << 30,
    slots: 2,
    blocks: 1 << 18,
    layers: 64,
    requests: 2,
};

/// What a case may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// The kind of memory.
    pub(crate) memory: BenchMemory,
    /// Where sizes are measured: how much, unless told.
    pub(crate) most: Most,
    /// How often this machine holds the blocks: on this side, for the limit, in a target.
    pub(crate) sides: u64,
    /// Bytes that this machine has left, if it says.
    pub(crate) available: Option<u64>,
}

/// Bytes that a block's pair takes in tables, while they are drawn and moved.
const PAIR: u64 = 64;

impl Room {
    /// A machine that runs out of memory kills whom it likes: better to say so first, and before
    /// tables of so many blocks are made.
    fn holds(&self, memory: u64, pool: u32) -> Result<(), Problem> {
        let tables = u64::from(pool) * PAIR;
        let needed = memory.saturating_mul(self.sides).saturating_add(tables);
        let Some(available) = self.available.filter(|available| needed > *available) else {
            return Ok(());
        };
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let cause = format!("{} MiB of memory are needed", mib(needed));
        Err(Problem::new(Exit::Device, cause)
            .with_evidence(format!(
                "{} MiB of blocks, {} times (on each side that this machine holds, and for the \
                 limit), and tables of {pool} blocks",
                mib(memory),
                self.sides
            ))
            .with_evidence(format!(
                "/proc/meminfo: {} MiB are available",
                mib(available)
            ))
            .with_fix("say fewer --blocks or --tokens, or smaller sizes"))
    }
}

/// The layout of both sides and the transfers over it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) shape: BenchShape,
    /// What it is called while it runs.
    pub(crate) name: String,
    /// Bytes of one block of one tensor of one layer.
    pub(crate) block_bytes: u64,
    /// Such blocks a transfer.
    pub(crate) blocks: u64,
    /// Memory on each side, in bytes.
    pub(crate) memory: u64,
    /// The blocks of each slot.
    pub(crate) slots: Vec<Vec<Pair>>,
}

impl Case {
    /// Blocks of one size, scattered.
    pub(crate) fn of_size(
        size: u64,
        blocks: Option<u32>,
        seed: u64,
        room: Room,
    ) -> anyhow::Result<Self> {
        let most = room.most;
        let auto = (most.memory / u64::from(most.slots) / size).clamp(1, most.blocks);
        let blocks = blocks.unwrap_or(u32::try_from(auto).unwrap_or(u32::MAX));
        let layers = most.layers.min(blocks);
        let blocks = blocks / layers;
        let transfer = size.saturating_mul(u64::from(blocks) * u64::from(layers));
        let slots = fitting(most.memory, transfer, 2);
        let pool = pool(blocks, slots)?;
        let format = KvFormat::opaque(size, layers).map_err(kvxfer::Error::from)?;
        let shape = BenchShape {
            topology: Topology::single(&format),
            num_blocks: vec![pool],
            format,
            memory: room.memory,
        };
        let name = crate::size::Size(size).to_string();
        Self::new(shape, name, room, || table::scattered(seed, slots, blocks))
    }

    /// The requests of an engine.
    pub(crate) fn of_model(pattern: &PatternConfig, seed: u64, room: Room) -> anyhow::Result<Self> {
        let Layout { format, topology } =
            layout::of_model(&pattern.model, pattern.block_size, pattern.tp)?;
        let blocks = pattern.tokens.div_ceil(pattern.block_size);
        // One block's bytes tell how many requests fit at once.
        let one = describe(&format, topology, 1)?;
        let block: u64 = one.tensors().iter().map(|tensor| tensor.block_stride).sum();
        let transfer = block.saturating_mul(u64::from(blocks));
        let slots = fitting(2 * MEMORY, transfer, room.most.requests);
        // A pool that a single request fills would be a run from one end to the other.
        let pool = if slots == 1 && transfer <= 4 * MEMORY {
            pool(blocks, 2)?
        } else {
            pool(blocks, slots)?
        };
        let shape = BenchShape {
            topology,
            num_blocks: vec![pool],
            format,
            memory: room.memory,
        };
        let name = pattern.model.clone();
        Self::new(shape, name, room, || {
            table::engines(seed, slots, blocks, pool)
        })
    }

    fn new(
        shape: BenchShape,
        name: String,
        room: Room,
        draw: impl FnOnce() -> Vec<Vec<Pair>>,
    ) -> anyhow::Result<Self> {
        let pool = shape.num_blocks.first().copied().unwrap_or(0);
        let desc = describe(&shape.format, shape.topology, pool)?;
        let memory = desc
            .memory_len()
            .iter()
            .copied()
            .fold(0, u64::saturating_add);
        room.holds(memory, pool)?;
        let slots = draw();
        let tensors = desc.tensors();
        let block_bytes = tensors.iter().map(|t| t.block_stride).min().unwrap_or(0);
        let blocks = slots.first().map_or(0, Vec::len) as u64;
        Ok(Self {
            name,
            block_bytes,
            blocks: blocks * tensors.len() as u64,
            memory,
            slots,
            shape,
        })
    }

    /// Bytes a transfer.
    pub(crate) fn bytes(&self) -> u64 {
        self.block_bytes * self.blocks
    }

    /// The pairs of a slot, as source and destination.
    pub(crate) fn pairs(&self, op: Op, slot: usize) -> Vec<GroupPairs> {
        let pairs = self.slots.get(slot).map_or(&[][..], Vec::as_slice);
        let pairs = pairs.iter().map(|pair| match op {
            Op::Read => BlockPair {
                src: pair.remote,
                dst: pair.local,
            },
            Op::Write => BlockPair {
                src: pair.local,
                dst: pair.remote,
            },
        });
        vec![GroupPairs {
            group: 0,
            pairs: pairs.collect(),
        }]
    }

    /// The pairs of all slots.
    pub(crate) fn all_pairs(&self, op: Op) -> Vec<GroupPairs> {
        let mut all = GroupPairs {
            group: 0,
            pairs: Vec::new(),
        };
        for slot in 0..self.slots.len() {
            for group in self.pairs(op, slot) {
                all.pairs.extend(group.pairs);
            }
        }
        vec![all]
    }

    /// The server's blocks of a slot, in the pairs' order.
    pub(crate) fn remote_blocks(&self, slot: usize) -> Vec<GroupBlocks> {
        let pairs = self.slots.get(slot).map_or(&[][..], Vec::as_slice);
        vec![GroupBlocks {
            group: 0,
            blocks: pairs.iter().map(|pair| pair.remote).collect(),
        }]
    }
}

/// The pattern that the options name.
pub(crate) fn pattern(args: &BwArgs) -> Option<PatternConfig> {
    let pattern = &args.work.pattern;
    Some(PatternConfig {
        model: pattern.model.clone()?,
        tp: pattern.tp.unwrap_or(1),
        block_size: pattern.block_size.unwrap_or(16),
        tokens: pattern.tokens.unwrap_or(4096),
    })
}

/// What a server holds: a model's format, or the least there is.
pub(crate) fn served(pattern: &ServePattern) -> anyhow::Result<BenchShape> {
    let (format, topology) = match &pattern.model {
        Some(model) => {
            let (block_size, tp) = (pattern.block_size.unwrap_or(16), pattern.tp.unwrap_or(1));
            let Layout { format, topology } = layout::of_model(model, block_size, tp)?;
            (format, topology)
        }
        None => {
            let format = KvFormat::opaque(4096, 1).map_err(kvxfer::Error::from)?;
            let topology = Topology::single(&format);
            (format, topology)
        }
    };
    Ok(BenchShape {
        num_blocks: vec![1; format.groups().len()],
        topology,
        format,
        memory: BenchMemory::Arena,
    })
}

fn describe(format: &KvFormat, topology: Topology, blocks: u32) -> anyhow::Result<PlacementDesc> {
    let counts = vec![blocks; format.groups().len()];
    KvPlacement::uniform(format, topology, &counts, Packing::OneMemory, 4096)
        .and_then(|uniform| uniform.describe(format))
        .map_err(|error| kvxfer::Error::from(error).into())
}

/// How many transfers fit into the memory: at least `least`.
fn fitting(memory: u64, transfer: u64, least: u32) -> u32 {
    let fit = memory / transfer.max(1);
    u32::try_from(fit).unwrap_or(SLOTS).clamp(least, SLOTS)
}

fn pool(blocks: u32, slots: u32) -> anyhow::Result<u32> {
    blocks.checked_mul(slots).ok_or_else(|| {
        Problem::usage(format!(
            "{blocks} blocks a transfer are more than can be numbered"
        ))
        .with_fix("say fewer --blocks")
        .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_size(size: u64, blocks: Option<u32>) -> Case {
        Case::of_size(size, blocks, 7, ROOM).expect("a case")
    }

    const ROOM: Room = Room {
        memory: BenchMemory::Arena,
        most: ON_HOST,
        sides: 3,
        available: Some(8 << 30),
    };

    #[test]
    fn what_does_not_fit_is_told_before_its_tables_are_made() {
        let problem = |case: anyhow::Result<Case>| {
            let error = case.expect_err("too much");
            Problem::of(&error)
        };
        // Its tables alone would take more than any machine has.
        let many = problem(Case::of_size(1, Some(2_000_000_000), 7, ROOM));
        assert_eq!(many.exit, Exit::Device);
        let pattern = PatternConfig {
            model: "llama-3.1-8b".into(),
            tp: 1,
            block_size: 16,
            tokens: 4_000_000_000,
        };
        let long = problem(Case::of_model(&pattern, 7, ROOM));
        assert_eq!(long.exit, Exit::Device);
        assert!(
            long.to_string().contains("8192 MiB are available"),
            "{long}"
        );
    }

    #[test]
    fn the_default_sizes_stay_within_their_memory() {
        for size in [2, 100, 4 << 10, 16 << 10, 64 << 10, 1 << 20, 8 << 20] {
            let case = of_size(size, None);
            assert!(case.memory <= MEMORY, "{size}: {}", case.memory);
            assert_eq!(case.slots.len(), SLOTS as usize, "{size}");
            assert_eq!(case.bytes(), size * case.blocks, "{size}");
        }
        // More than the default is taken at the user's word, with two slots at least.
        assert_eq!(of_size(1 << 20, Some(400)).slots.len(), 2);
    }

    #[test]
    fn a_models_block_is_that_of_one_tensor_of_one_layer() {
        let pattern = PatternConfig {
            model: "llama-3.1-8b".into(),
            tp: 2,
            block_size: 16,
            tokens: 100,
        };
        let case = Case::of_model(&pattern, 7, ROOM).expect("a case");
        assert_eq!(case.block_bytes, 16 * 4 * 128 * 2);
        assert_eq!(case.blocks, 7 * 32 * 2);
        assert_eq!(case.bytes(), 7 * 16 * 131_072 / 2);
    }
}
