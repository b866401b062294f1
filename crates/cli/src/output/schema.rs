//! `kvxfer.bw/1`, as docs/json.md describes it. Fields may be added within the version; none is
//! renamed, dropped or given another meaning.

use std::fmt;
use std::time::Duration;

use kvxfer::{RdmaLink, SkippedRail};
use serde::{Serialize, Serializer};

use crate::stats::{Percentiles, median};

/// All of one run of `kvxfer bw`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BwReport {
    schema: Schema,
    pub(crate) config: BwConfig,
    pub(crate) rows: Vec<Row>,
}

impl BwReport {
    pub(crate) fn new(config: BwConfig, rows: Vec<Row>) -> Self {
        Self {
            schema: Schema::Bw1,
            config,
            rows,
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
enum Schema {
    #[serde(rename = "kvxfer.bw/1")]
    Bw1,
}

/// What was run: enough to run it again.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BwConfig {
    /// The version of the command.
    pub(crate) version: String,
    /// The server; null if the command started its own.
    pub(crate) peer: Option<String>,
    pub(crate) device: String,
    /// Ports and queue pairs of a way over NICs, of the last connection; null on another path.
    pub(crate) rdma: Option<RdmaLink>,
    /// The way over each pair of NICs; the first is that of `rdma`.
    pub(crate) rails: Vec<RdmaLink>,
    /// NICs that the settings name and that are not used, and why.
    pub(crate) skipped: Vec<SkippedRail>,
    /// What was asked for: `auto`, or a path.
    pub(crate) path: String,
    /// `read`, `write` or `both`.
    pub(crate) op: String,
    /// Who started the transfers.
    pub(crate) initiator: Initiator,
    /// The block sizes; null with a model.
    pub(crate) sizes: Option<Vec<u64>>,
    /// The engine's pattern; null without a model.
    pub(crate) pattern: Option<PatternConfig>,
    pub(crate) seed: u64,
    /// Seconds a row; null if transfers are counted.
    #[serde(serialize_with = "seconds")]
    pub(crate) duration_s: Option<Duration>,
    /// Transfers a row; null if time is measured.
    pub(crate) iters: Option<u64>,
    #[serde(serialize_with = "seconds")]
    pub(crate) timeout_s: Option<Duration>,
    pub(crate) qp_per_transfer: u32,
    pub(crate) num_worker_threads: u32,
    /// -1: chosen for each transfer.
    pub(crate) post_batch_size: i64,
    pub(crate) max_send_wr: u32,
    pub(crate) max_cqe_num: u32,
    pub(crate) max_msg_sge: u32,
    pub(crate) enable_notification: bool,
    pub(crate) authenticated: bool,
    /// Settings in which the server's differ from ours.
    pub(crate) differences: Vec<Difference>,
    /// Where the blocks lie.
    pub(crate) memory: MemoryConfig,
    /// Fences around what GPUs read and write.
    pub(crate) fence: String,
    /// Most workgroups of a kernel that moves blocks; 0: chosen.
    pub(crate) gpu_workgroups: u32,
    /// The pages of the memory on this side.
    pub(crate) pages: Pages,
    /// Processors that this process may use.
    pub(crate) cpus: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PatternConfig {
    pub(crate) model: String,
    pub(crate) tp: u32,
    pub(crate) block_size: u32,
    pub(crate) tokens: u32,
}

/// Where the blocks of a test lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct MemoryConfig {
    /// `host` or `gpu`.
    pub(crate) kind: &'static str,
    /// This side's GPU; null if there is none.
    pub(crate) gpu: Option<GpuConfig>,
    /// That of the target that the command has started.
    pub(crate) target_gpu: Option<GpuConfig>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct GpuConfig {
    pub(crate) runtime: String,
    /// Its place among those that the process sees.
    pub(crate) ordinal: u32,
    pub(crate) pci: String,
    pub(crate) name: String,
    pub(crate) arch: String,
}

impl fmt::Display for GpuConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            runtime,
            ordinal,
            pci,
            name,
            arch,
        } = self;
        write!(f, "GPU {ordinal} at {pci}, {name} ({arch}, {runtime})")
    }
}

/// A setting that the two sides have differently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    pub(crate) key: String,
    pub(crate) here: u64,
    pub(crate) there: u64,
    /// The value that holds; null where each side keeps its own.
    pub(crate) used: Option<u64>,
}

/// Pages in bytes, and why they are not larger.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Pages {
    pub(crate) size: u64,
    pub(crate) how: String,
    pub(crate) why_not: Vec<String>,
}

impl From<&kvxfer_hipmem::PageInfo> for Pages {
    fn from(pages: &kvxfer_hipmem::PageInfo) -> Self {
        Self {
            size: pages.size,
            how: pages.how.to_string(),
            why_not: pages.why_not.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Which way the bytes went, seen from the side that measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Op {
    Read,
    Write,
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Who posted the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Initiator {
    Host,
    Gpu,
}

/// What ran the kernel that posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Executor {
    Gpu,
    /// The host build of the same source.
    HostBuild,
}

/// What a kernel posted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum QueueKind {
    Proxy,
    GpuWqe,
    Direct,
    Links,
}

/// What carried a kernel's posts out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Hca {
    Nic,
    /// A model of one, over whatever path.
    Model,
    /// The software device, or GPU links.
    None,
}

impl Initiator {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Gpu => "gpu",
        }
    }
}

impl Executor {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::HostBuild => "host-build",
        }
    }
}

impl QueueKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::GpuWqe => "gpu-wqe",
            Self::Direct => "direct",
            Self::Links => "links",
        }
    }
}

impl Hca {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nic => "nic",
            Self::Model => "model",
            Self::None => "none",
        }
    }
}

/// A path that could have been taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Candidate {
    pub(crate) path: String,
    pub(crate) usable: bool,
    /// Null where it is usable.
    pub(crate) why_not: Option<String>,
}

impl From<&kvxfer::wire::Candidate> for Candidate {
    fn from(candidate: &kvxfer::wire::Candidate) -> Self {
        Self {
            path: candidate.path.to_string(),
            usable: candidate.usable(),
            why_not: candidate.why_not.clone(),
        }
    }
}

/// One block size, one operation, one path. Made from [`Measured`], which keeps the rules.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) op: Op,
    /// Who posted the blocks.
    pub(crate) initiator: Initiator,
    /// What ran the kernel that posted them; null where none did.
    pub(crate) executor: Option<Executor>,
    /// What it posted to; null where none did.
    pub(crate) queue: Option<QueueKind>,
    /// What carried its posts out; null where none did.
    pub(crate) hca: Option<Hca>,
    pub(crate) path: String,
    pub(crate) path_reason: String,
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) block_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
    pub(crate) transfers: u64,
    pub(crate) operations: u64,
    #[serde(serialize_with = "rounded")]
    pub(crate) gb_per_s: f64,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) limit_gb_per_s: Option<f64>,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) of_limit: Option<f64>,
    #[serde(serialize_with = "rounded")]
    pub(crate) blocks_per_s: f64,
    #[serde(serialize_with = "rounded")]
    pub(crate) p50_us: f64,
    #[serde(serialize_with = "rounded")]
    pub(crate) p99_us: f64,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) p999_us: Option<f64>,
    #[serde(serialize_with = "rounded")]
    pub(crate) prepare_us: f64,
    #[serde(serialize_with = "rounded")]
    pub(crate) post_us: f64,
    #[serde(serialize_with = "rounded")]
    pub(crate) wire_us: f64,
    pub(crate) verified_bytes: u64,
}

/// What a measurement yields; times in nanoseconds.
#[derive(Debug, Clone)]
pub(crate) struct Measured {
    pub(crate) op: Op,
    pub(crate) by: Option<(Executor, QueueKind, Hca)>,
    pub(crate) path: String,
    pub(crate) path_reason: String,
    pub(crate) candidates: Vec<Candidate>,
    /// Bytes of one block (of one tensor of one layer, with a model).
    pub(crate) block_bytes: u64,
    /// Blocks a transfer.
    pub(crate) blocks: u64,
    /// Bytes a transfer.
    pub(crate) bytes: u64,
    /// Operations a transfer.
    pub(crate) operations: u64,
    /// Rates of the measured runs, in bytes a second.
    pub(crate) rates: Vec<f64>,
    /// Rates of the limit's runs, one after each of them; empty where a path has no bare limit.
    pub(crate) limits: Vec<f64>,
    /// Timed transfers.
    pub(crate) transfers: u64,
    /// Latencies of timed transfers, from submission to outcome: of each, or of every nth if there
    /// were very many.
    pub(crate) latency_ns: Vec<u64>,
    pub(crate) prepare_ns: Vec<u64>,
    pub(crate) post_ns: Vec<u64>,
    pub(crate) wire_ns: Vec<u64>,
    pub(crate) verified_bytes: u64,
}

impl Measured {
    /// The row. `None` if nothing was timed, which is no row.
    pub(crate) fn into_row(self) -> Option<Row> {
        let rate = median(&self.rates)?;
        let limit = median(&self.limits).filter(|limit| *limit > 0.0);
        // What disturbs the machine for a while disturbs a run and the limit's run beside it alike.
        let ratios: Vec<f64> = self
            .rates
            .iter()
            .zip(&self.limits)
            .map(|(rate, limit)| rate / limit)
            .collect();
        let ratio = median(&ratios);
        let latency = Percentiles::of(&self.latency_ns)?;
        let us = |ns: u64| ns as f64 / 1e3;
        let median_us = |samples: &[u64]| Percentiles::of(samples).map_or(0.0, |p| us(p.p50));
        let transfers_per_s = rate / self.bytes.max(1) as f64;
        Some(Row {
            prepare_us: median_us(&self.prepare_ns),
            post_us: median_us(&self.post_ns),
            wire_us: median_us(&self.wire_ns),
            op: self.op,
            initiator: match self.by {
                Some(_) => Initiator::Gpu,
                None => Initiator::Host,
            },
            executor: self.by.map(|(executor, ..)| executor),
            queue: self.by.map(|(_, queue, _)| queue),
            hca: self.by.map(|(.., hca)| hca),
            path: self.path,
            path_reason: self.path_reason,
            candidates: self.candidates,
            block_bytes: self.block_bytes,
            blocks: self.blocks,
            bytes: self.bytes,
            transfers: self.transfers,
            operations: self.operations,
            gb_per_s: rate / 1e9,
            limit_gb_per_s: limit.map(|limit| limit / 1e9),
            of_limit: limit.and(ratio),
            blocks_per_s: transfers_per_s * self.blocks as f64,
            p50_us: us(latency.p50),
            p99_us: us(latency.p99),
            p999_us: latency.p999.map(us),
            verified_bytes: self.verified_bytes,
        })
    }
}

/// Three decimals: more would be noise, and whole numbers stay short.
pub(super) fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

pub(super) fn rounded<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(round(*value))
}

pub(super) fn rounded_or_null<S: Serializer>(
    value: &Option<f64>,
    to: S,
) -> Result<S::Ok, S::Error> {
    value.map(round).serialize(to)
}

pub(super) fn seconds<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    value
        .map(|duration| round(duration.as_secs_f64()))
        .serialize(to)
}
