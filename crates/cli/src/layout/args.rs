//! Options of `kvxfer layout`.

use std::fmt;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use kvxfer::layout::DType;

use super::blocks::Blocks;
use crate::args::Trust;
use crate::size::{self, Size};

/// What to do with layouts.
#[derive(Debug, Subcommand)]
pub(crate) enum LayoutCommand {
    /// Show what one rank keeps of a model's KV cache: tensors, bytes, and how long a request takes.
    Show(Box<ShowArgs>),
    /// Compare two layouts field by field: what differs, why it matters, and how to mend it.
    ///
    /// A and B are each a config.json or its folder, a layout file (`layout show --json`), the
    /// `HOST:PORT` of a live engine, or a built-in model's name, with options after a colon:
    /// `config.json:tp=4,block-size=16,dtype=fp8`. The options are tp, pp, tp-rank, pp-rank, block-size,
    /// dtype, mtp, one-table, model-id and revision, as of `layout show`. A layout file and an engine
    /// say all of it themselves.
    ///
    /// The exit code is 0 if blocks can be exchanged as they are, and otherwise 1.
    Diff(Box<DiffArgs>),
    /// Show what a transfer of some blocks from A to B would move, in how many operations of which
    /// sizes.
    ///
    /// A and B are named as for `layout diff`. Where they differ, that is shown instead, and the exit
    /// code is 1.
    Plan(Box<PlanArgs>),
}

/// Options of `kvxfer layout show`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ShowArgs {
    /// A config.json or its folder, a layout file, a live engine's HOST:PORT, or a built-in model's name
    #[arg(value_name = "CONFIG|NAME|HOST:PORT")]
    pub(crate) source: String,

    #[command(flatten)]
    pub(crate) shape: Shape,

    /// Tokens of the request that is looked at
    #[arg(long, value_name = "N", default_value_t = 4096)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub(crate) tokens: u64,

    /// Say how many blocks fit into this much memory of a rank (40G)
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,

    /// Say how long the request takes at this many gigabits a second for each rank
    #[arg(long, value_name = "GBPS", value_parser = size::rate)]
    pub(crate) gbps: Option<f64>,

    /// Hold that time against this many milliseconds of prefill
    #[arg(long, value_name = "MS", value_parser = milliseconds, requires = "gbps")]
    pub(crate) prefill_ms: Option<f64>,

    #[command(flatten)]
    pub(crate) ask: Ask,

    /// One line of JSON on standard output; it is a layout file
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `kvxfer layout diff`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DiffArgs {
    /// The producer's (prefill) layout
    #[arg(value_name = "A")]
    pub(crate) producer: String,

    /// The consumer's (decode) layout
    #[arg(value_name = "B")]
    pub(crate) consumer: String,

    /// Exit with 1 also where the layouts are reshardable
    #[arg(long)]
    pub(crate) strict: bool,

    #[command(flatten)]
    pub(crate) ask: Ask,

    /// One line of JSON on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `kvxfer layout plan`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlanArgs {
    /// The producer's (prefill) layout
    #[arg(value_name = "A")]
    pub(crate) producer: String,

    /// The consumer's (decode) layout
    #[arg(value_name = "B")]
    pub(crate) consumer: String,

    /// The producer's blocks in token order, and the consumer's first one where they go elsewhere
    /// than to the same ids, or tokens where blocks are of unequal size (0-15,32:7,40-47:100)
    /// [default: 0]
    #[arg(long, value_name = "LIST")]
    pub(crate) blocks: Option<Blocks>,

    /// Between all ranks of both sides instead of the two that are named (tp-rank, pp-rank)
    #[arg(long)]
    pub(crate) all_ranks: bool,

    /// Whether the consumer pulls or the producer pushes
    #[arg(long, value_enum, default_value_t = Direction::Read)]
    pub(crate) op: Direction,

    /// The most bytes of an operation
    #[arg(long, value_name = "SIZE", default_value_t = Size(8 << 20))]
    pub(crate) max_msg: Size,

    /// The most local pieces of an operation
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_msg_sge: u32,

    #[command(flatten)]
    pub(crate) ask: Ask,

    /// One line of JSON on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// How live engines are asked.
#[derive(Debug, Clone, Args)]
pub(crate) struct Ask {
    #[command(flatten)]
    pub(crate) trust: Trust,

    /// Give up on a live engine that has not answered after this long [default: 30]
    #[arg(long, value_name = "TIME", value_parser = size::duration)]
    pub(crate) timeout: Option<Duration>,
}

/// Which side posts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    Read,
    Write,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// What a config.json does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct Shape {
    /// Tensor-parallel ranks [default: 1]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tp: Option<u32>,

    /// Pipeline-parallel ranks [default: 1]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pp: Option<u32>,

    /// Which tensor-parallel rank is looked at [default: 0]
    #[arg(long, value_name = "RANK")]
    pub(crate) tp_rank: Option<u32>,

    /// Which pipeline-parallel rank is looked at [default: 0]
    #[arg(long, value_name = "RANK")]
    pub(crate) pp_rank: Option<u32>,

    /// Tokens a block [default: 16]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) block_size: Option<u32>,

    /// The cache's type, such as bf16 or fp8 [default: the model's]
    #[arg(long, value_name = "TYPE", value_parser = dtype)]
    pub(crate) dtype: Option<DType>,

    /// The model's draft layers (multi-token prediction) have a cache too
    #[arg(long)]
    pub(crate) mtp: bool,

    /// All layers share one block table, also those that need only a window
    #[arg(long)]
    pub(crate) one_table: bool,

    /// The model's id, such as meta-llama/Llama-3.1-8B, to be compared
    #[arg(long, value_name = "ID")]
    pub(crate) model_id: Option<String>,

    /// The weights' revision, to be compared
    #[arg(long, value_name = "REV")]
    pub(crate) revision: Option<String>,
}

/// A number of milliseconds: finite and above zero.
fn milliseconds(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(ms) if ms.is_finite() && ms > 0.0 => Ok(ms),
        _ => Err(format!("`{text}` is no number of milliseconds")),
    }
}

pub(super) fn dtype(text: &str) -> Result<DType, String> {
    DType::from_name(text).ok_or_else(|| {
        let known = DType::ALL.map(DType::name).join(", ");
        format!("`{text}` is no type of a cache: say one of {known}")
    })
}
