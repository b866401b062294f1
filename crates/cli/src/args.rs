//! The command line. Short options of `bw` mean what they mean in perftest.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::layout::LayoutCommand;
use crate::run::mem::Mem;
use crate::size::{self, Address, Size};

/// Moves KV-cache blocks between processes and says how fast, over which path, and why not faster.
///
/// Exit codes: 0 fine, 1 a check failed (bytes or layouts differ, below a wanted figure) or kvxfer
/// itself has a defect, 2 usage, 3 the peer or a deadline, 4 the device, its driver or memory.
#[derive(Debug, Parser)]
#[command(
    name = "kvxfer",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Measure how fast blocks move, against the limit of the same path measured in the same run.
    ///
    /// Without HOST it starts its own target process on this machine and stops it again. Without
    /// any option: 4K, 16K, 64K and 1M, READ and WRITE, done within half a minute.
    Bw(Box<BwArgs>),
    /// Look whether an engine answers, and how fast: its control connection, an 8-byte WRITE with a
    /// notification, and an 8-byte READ.
    ///
    /// Any live engine answers, and uses a scratch region for it: KV memory is never touched. Without
    /// HOST it starts its own target process. The exit code is 3 if a single ping is lost: both
    /// connections are reliable ones, so a lost ping is a peer that was stalled.
    Ping(Box<PingArgs>),
    /// Be the other side of `bw`, for many clients, until SIGTERM.
    ///
    /// Prints `listening ADDR` when ready.
    Serve(Box<ServeArgs>),
    /// Show what a model's KV cache looks like, or compare two.
    Layout {
        #[command(subcommand)]
        command: LayoutCommand,
    },
    /// Show the NICs of this machine with their ports and GIDs, which an engine would take and why, and
    /// why not the others; the software device, which is always there; the GPUs, or what is missing of
    /// their runtime; and what can be moved between which memory.
    ///
    /// It opens each NIC for a moment, and sends nothing. It loads HIP or else CUDA, or what KVXFER_GPU
    /// names (hip, cuda, host), and tries 2 MiB of each GPU's memory with each NIC that can be used. The exit code is 4 if a NIC that was asked for, by
    /// KVXFER_RDMA_DEVICES or an option, is not there or cannot be used.
    Devices(DevicesArgs),
}

/// Options of `kvxfer bw`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BwArgs {
    /// The server: a name or address, with a port if it is not 7301
    #[arg(value_name = "HOST[:PORT]")]
    pub(crate) host: Option<Address>,

    #[command(flatten)]
    pub(crate) work: Work,

    /// Which way the blocks go: `read` pulls from the server, `write` pushes to it
    #[arg(long, value_enum, default_value_t = OpChoice::Both)]
    pub(crate) op: OpChoice,

    /// Who names the blocks: this process, or a kernel that posts each of them by itself. Where there is no GPU, the host
    /// build of the same kernel is run, and the rows say so
    #[arg(long, value_enum, default_value_t = InitiatorChoice::Host)]
    pub(crate) initiator: InitiatorChoice,

    /// What the kernel posts to: `proxy`, a ring that this process's workers carry out; `gpu-wqe` and `direct`, an mlx5
    /// queue of a model of a NIC, with and without the CPU at the doorbell; `links`, nothing: it copies the blocks into
    /// the target's GPU memory itself (with --mem gpu; a `serve` needs KVXFER_GPU_LINKS_IN=true) [default: proxy]
    #[arg(long, value_enum)]
    pub(crate) queue: Option<QueueChoice>,

    /// How the bytes go; `auto` takes the best that can be used and says why [default: auto]
    #[arg(long, value_enum)]
    pub(crate) path: Option<PathChoice>,

    /// Measure each row for this long, its limit not counted (30, 1.5s, 500ms) [default: 1]
    #[arg(long, short = 'D', value_name = "TIME", value_parser = size::duration)]
    #[arg(conflicts_with = "iters")]
    pub(crate) duration: Option<Duration>,

    /// Compare every byte again after each round that is measured; without this it is done once for each
    /// row, before anything is timed. Figures of small blocks suffer, for caches are cold then
    #[arg(long)]
    pub(crate) verify: bool,

    /// Measure this many transfers a row
    #[arg(long, short = 'n', value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) iters: Option<u64>,

    /// Where this side's blocks lie: in the host's memory, or a GPU's (the N-th that it sees). KVXFER_GPU
    /// says by which runtime: hip, cuda, or host for a stand-in [default: host]
    #[arg(long, value_name = "host|gpu[:N]")]
    pub(crate) mem: Option<Mem>,

    /// Where those of the target lie that is started where no host is named [default: as --mem, on the
    /// next GPU]
    #[arg(long, value_name = "host|gpu[:N]", conflicts_with = "host")]
    pub(crate) peer_mem: Option<Mem>,

    #[command(flatten)]
    pub(crate) tuning: Tuning,

    /// Exit with 1 if a row is slower than this many gigabits a second
    #[arg(long, value_name = "GBPS", value_parser = size::rate)]
    pub(crate) min_gbps: Option<f64>,

    #[command(flatten)]
    pub(crate) trust: Trust,

    /// Give up on connecting, on an answer or on a transfer after this long; on a server that falls
    /// silent after this long or 15 seconds, whichever is sooner, or, where heartbeat_timeout or
    /// heartbeat_interval is set, after three times heartbeat_timeout [default: 30]
    #[arg(long, value_name = "TIME", value_parser = size::duration)]
    pub(crate) timeout: Option<Duration>,

    /// One line of JSON on standard output, all else on standard error
    #[arg(long)]
    pub(crate) json: bool,

    /// Comma-separated values on standard output, all else on standard error
    #[arg(long, conflicts_with = "json")]
    pub(crate) csv: bool,
}

/// `--initiator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum InitiatorChoice {
    Host,
    Gpu,
}

/// `--queue`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum QueueChoice {
    Proxy,
    GpuWqe,
    Direct,
    Links,
}

/// Options of `kvxfer ping`. Short ones mean what they mean in ping(8).
#[derive(Debug, Clone, Args)]
pub(crate) struct PingArgs {
    /// The engine: a name or address, with a port if it is not 7301
    #[arg(value_name = "HOST[:PORT]")]
    pub(crate) host: Option<Address>,

    /// Stop after this many pings; 0 goes on until Ctrl-C [default: 5]
    #[arg(long, short = 'c', value_name = "N")]
    pub(crate) count: Option<u64>,

    /// The time from one ping to the next (1, 0.2, 10ms) [default: 1]
    #[arg(long, short = 'i', value_name = "TIME", value_parser = size::duration)]
    pub(crate) interval: Option<Duration>,

    /// How long a ping is waited for, all its parts together [default: 1]
    #[arg(long, short = 'W', value_name = "TIME", value_parser = size::duration)]
    pub(crate) wait: Option<Duration>,

    /// End all of it after this long [default: 30 for connecting, none for pings]
    #[arg(long, value_name = "TIME", value_parser = size::duration)]
    pub(crate) timeout: Option<Duration>,

    /// Who posts the WRITE of each ping: this process, or a kernel, which waits for its end. Where there is no GPU, the
    /// host build of the same kernel is run
    #[arg(long, value_enum, default_value_t = InitiatorChoice::Host)]
    pub(crate) initiator: InitiatorChoice,

    /// How the bytes go; `auto` takes the path that the engine's real peers would [default: auto]
    #[arg(long, value_enum)]
    pub(crate) path: Option<PathChoice>,

    #[command(flatten)]
    pub(crate) nic: Nic,

    /// The NIC's port [default: the best that is active]
    #[arg(long, value_name = "N")]
    pub(crate) ib_port: Option<u8>,

    /// An engine's kv-transfer-config: JSON, or @FILE
    #[arg(long, value_name = "JSON|@FILE")]
    pub(crate) kv_transfer_config: Option<String>,

    #[command(flatten)]
    pub(crate) trust: Trust,

    /// The summary as one line of JSON on standard output, and no lines of pings
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `kvxfer devices`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DevicesArgs {
    /// The NICs that may be used, the preferred first (mlx5_0,mlx5_1), or ^ and those that may not
    /// [default: KVXFER_RDMA_DEVICES, or all]
    #[arg(long, short = 'd', value_name = "LIST")]
    pub(crate) device: Option<String>,

    /// The index of the GID to use on RoCE [default: chosen]
    #[arg(long, short = 'x', value_name = "N")]
    pub(crate) gid_index: Option<u8>,

    /// Choose for this peer: the name or address of its NIC
    #[arg(long, value_name = "HOST")]
    pub(crate) peer: Option<String>,

    /// Choose the nearest to this PCI device (0000:41:00.0, a GPU say) or NUMA node (1)
    #[arg(long, value_name = "PCI|NODE")]
    pub(crate) near: Option<String>,

    /// One line of JSON on standard output, all else on standard error
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is moved: scattered blocks of given sizes, or an engine's real pattern.
#[derive(Debug, Clone, Args)]
pub(crate) struct Work {
    /// Block sizes, such as 4K,64KiB,1M [default: 4K,16K,64K,1M]
    #[arg(
        long,
        short = 's',
        value_name = "LIST",
        value_delimiter = ',',
        num_args = 1
    )]
    pub(crate) size: Vec<Size>,

    /// Every power of two from 2 bytes to 8 MiB
    #[arg(long, short = 'a', conflicts_with = "size")]
    pub(crate) all: bool,

    /// Blocks a transfer, four of which run at once [default: as many as make 64 MiB, at most 4096]
    #[arg(long, value_name = "N", conflicts_with = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) blocks: Option<u32>,

    /// Where the blocks lie is drawn from this number, so that a run can be repeated
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    #[command(flatten)]
    pub(crate) pattern: Pattern,
}

/// An engine's pattern of transfers.
#[derive(Debug, Clone, Args)]
pub(crate) struct Pattern {
    /// Move the KV cache of this model: the path of its config.json, or llama-3.1-8b, llama-3.1-70b,
    /// qwen3-235b-a22b or deepseek-v3
    #[arg(long, value_name = "PATH|NAME", conflicts_with_all = ["size", "all"])]
    pub(crate) model: Option<String>,

    /// Ranks that share the model's heads [default: 1]
    #[arg(long, value_name = "N", requires = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tp: Option<u32>,

    /// Tokens a block [default: 16]
    #[arg(long, value_name = "N", requires = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) block_size: Option<u32>,

    /// Tokens a request [default: 4096]
    #[arg(long, value_name = "N", requires = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tokens: Option<u32>,
}

/// The device, and how a NIC's packets go. Short options mean what they mean in perftest.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Nic {
    /// The device to use: soft, or a NIC such as mlx5_0; of a list (mlx5_0,mlx5_1) the first that can
    /// be used
    #[arg(long, short = 'd', value_name = "NAME")]
    pub(crate) device: Option<String>,

    /// The index of the NIC's GID on RoCE [default: chosen for the peer]
    #[arg(long, short = 'x', value_name = "N")]
    pub(crate) gid_index: Option<u8>,

    /// The service level of the NIC's packets, 0 to 15
    #[arg(long, short = 'S', value_name = "N")]
    pub(crate) sl: Option<u8>,

    /// The traffic class of the NIC's packets (on RoCE v2 the DSCP times 4)
    #[arg(long, value_name = "N")]
    pub(crate) tclass: Option<u8>,

    /// Bytes of the NIC's longest packet: 256, 512, 1024, 2048 or 4096 [default: the link's]
    #[arg(long, short = 'm', value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
}

/// How the engine is set up. What is not given comes from the environment, the file or the defaults.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Tuning {
    #[command(flatten)]
    pub(crate) nic: Nic,

    /// The NIC's port [default: the best that is active]
    #[arg(long, short = 'i', value_name = "N")]
    pub(crate) ib_port: Option<u8>,

    /// Queue pairs to the peer
    #[arg(long, short = 'q', value_name = "N")]
    pub(crate) qp_per_transfer: Option<u32>,

    /// Work requests a post; -1 chooses
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = batch_size)]
    pub(crate) post_batch_size: Option<i64>,

    /// Depth of a send queue (max_send_wr); 0 chooses
    #[arg(long, short = 't', value_name = "N")]
    pub(crate) tx_depth: Option<u32>,

    /// Worker threads
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u32>,

    /// Fences around what GPUs read and write: on, off, or verify, which compares checksums as well
    #[arg(long, value_name = "WHEN")]
    pub(crate) fence: Option<String>,

    /// Most workgroups of a kernel that moves blocks; 0 chooses
    #[arg(long, value_name = "N")]
    pub(crate) gpu_workgroups: Option<u32>,

    /// An engine's kv-transfer-config: JSON, or @FILE
    #[arg(long, value_name = "JSON|@FILE")]
    pub(crate) kv_transfer_config: Option<String>,

    /// Show every setting and where it came from, and stop
    #[arg(long)]
    pub(crate) explain_config: bool,
}

/// Whom to trust.
#[derive(Debug, Clone, Args)]
pub(crate) struct Trust {
    /// The shared secret, in a file that only its owner may read (or KVXFER_SECRET_FILE)
    #[arg(long, value_name = "FILE")]
    pub(crate) secret_file: Option<PathBuf>,

    /// Talk to anybody beyond this machine without a secret
    #[arg(long, conflicts_with = "secret_file")]
    pub(crate) allow_unauthenticated: bool,
}

/// Options of `kvxfer serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen; port 0 takes a free one [default: 127.0.0.1:7301]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<Address>,

    #[command(flatten)]
    pub(crate) pattern: ServePattern,

    /// Where clients' blocks lie on this side: in the host's memory, or a GPU's (the N-th that this process
    /// sees) [default: as the client's, on gpu:0]
    #[arg(long, value_name = "host|gpu[:N]")]
    pub(crate) mem: Option<Mem>,

    /// The most memory to give to all clients together [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_memory: Option<Size>,

    #[command(flatten)]
    pub(crate) tuning: Tuning,

    #[command(flatten)]
    pub(crate) trust: Trust,

    /// Give up on a client that does not finish connecting, or on a transfer, after this long; on a
    /// client that falls silent after this long or 15 seconds, whichever is sooner, or, where
    /// heartbeat_timeout or heartbeat_interval is set, after three times heartbeat_timeout
    #[arg(long, value_name = "TIME", value_parser = size::duration)]
    pub(crate) timeout: Option<Duration>,

    /// End when this process, our parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) exit_with_parent: Option<i32>,
}

/// What a server holds. Without a model it takes what the clients ask for.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServePattern {
    /// Hold the KV cache of this model, as of `bw --model`, and refuse clients with another
    #[arg(long, value_name = "PATH|NAME")]
    pub(crate) model: Option<String>,

    /// Ranks that share the model's heads [default: 1]
    #[arg(long, value_name = "N", requires = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tp: Option<u32>,

    /// Tokens a block [default: 16]
    #[arg(long, value_name = "N", requires = "model")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) block_size: Option<u32>,
}

/// Which operations to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OpChoice {
    Read,
    Write,
    Both,
}

/// Which path to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PathChoice {
    /// Soft device, this machine, shared arenas
    Arena,
    /// Soft device, this machine, memory of any kind
    ProcessVm,
    /// Soft device, any machine
    Tcp,
    /// A network card with RDMA
    Rdma,
    /// GPU links, this machine
    Ipc,
    /// GPU memory through pinned host memory, any machine
    Staged,
    /// The best that can be used
    Auto,
}

impl fmt::Display for OpChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Both => "both",
        })
    }
}

impl fmt::Display for PathChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Arena => "arena",
            Self::ProcessVm => "process-vm",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Ipc => "ipc",
            Self::Staged => "staged",
            Self::Auto => "auto",
        })
    }
}

impl BwArgs {
    /// The block sizes to measure; none where a model says what is moved.
    pub(crate) fn sizes(&self) -> Vec<Size> {
        let work = &self.work;
        if work.pattern.model.is_some() {
            Vec::new()
        } else if work.all {
            (1..=23).map(|power| Size(1 << power)).collect()
        } else if work.size.is_empty() {
            [4 << 10, 16 << 10, 64 << 10, 1 << 20].map(Size).to_vec()
        } else {
            work.size.clone()
        }
    }
}

fn batch_size(text: &str) -> Result<i64, String> {
    match text.parse::<i64>() {
        Ok(n) if n == -1 || (1..=i64::from(u32::MAX)).contains(&n) => Ok(n),
        _ => Err("say -1 (choose), or 1 and more".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn bw(args: &[&str]) -> Result<BwArgs, clap::Error> {
        let cli = Cli::try_parse_from(["kvxfer", "bw"].iter().chain(args))?;
        match cli.command {
            Command::Bw(args) => Ok(*args),
            _ => panic!("bw was asked for"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bare_bw_has_the_promised_sizes() -> Result<(), clap::Error> {
        let args = bw(&[])?;
        assert_eq!(args.sizes(), [4096, 16384, 65536, 1 << 20].map(Size));
        assert_eq!(
            (args.op, args.path, args.timeout),
            (OpChoice::Both, None, None)
        );
        assert!(bw(&["--model", "llama-3.1-8b"])?.sizes().is_empty());
        assert_eq!(bw(&["-a"])?.sizes().last(), Some(&Size(8 << 20)));
        Ok(())
    }

    #[test]
    fn perftests_short_options_keep_their_meaning() -> Result<(), clap::Error> {
        let args = bw(&[
            "node7", "-s", "4K,1M", "-n", "100", "-q", "8", "-t", "512", "-d", "mlx5_0", "-i", "2",
            "-x", "3", "-S", "5", "-m", "2048",
        ])?;
        assert_eq!(
            args.host.as_ref().map(ToString::to_string).as_deref(),
            Some("node7:7301")
        );
        assert_eq!(args.sizes(), [4096, 1 << 20].map(Size));
        assert_eq!(args.iters, Some(100));
        assert_eq!(args.tuning.qp_per_transfer, Some(8));
        assert_eq!(args.tuning.tx_depth, Some(512));
        let nic = &args.tuning.nic;
        assert_eq!(nic.device.as_deref(), Some("mlx5_0"));
        assert_eq!(
            (args.tuning.ib_port, nic.gid_index, nic.sl, nic.mtu),
            (Some(2), Some(3), Some(5), Some(2048))
        );
        assert_eq!(bw(&["-D", "5"])?.duration, Some(Duration::from_secs(5)));
        assert_eq!(
            bw(&["--post-batch-size", "-1"])?.tuning.post_batch_size,
            Some(-1)
        );
        Ok(())
    }

    #[test]
    fn contradictions_are_usage_errors() {
        for args in [
            &["-D", "1", "-n", "1"][..],
            &["--json", "--csv"],
            &["-a", "-s", "4K"],
            &["--model", "deepseek-v3", "-s", "4K"],
            &["--model", "deepseek-v3", "-a"],
            &["--model", "deepseek-v3", "--blocks", "3"],
            &["--tp", "2"],
            &["--tokens", "2"],
            &["--block-size", "2"],
            &["--secret-file", "f", "--allow-unauthenticated"],
            &["--blocks", "0"],
            &["-n", "0"],
            &["--post-batch-size", "0"],
            &["-s", "4K,,8K"],
            &["-s", ""],
            &["--op", "both,read"],
            &["--path", "shm"],
            &["--timeout", "0"],
            &["--min-gbps", "-1"],
            &["a", "b"],
            &["-x", "300"],
            &["-X", "3"],
        ] {
            assert_eq!(
                bw(args).map_err(|e| e.exit_code()).err(),
                Some(2),
                "{args:?}"
            );
        }
    }
}
