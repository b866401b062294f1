//! `kvxfer bw`.

use std::hash::{BuildHasher, RandomState};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use kvxfer::bench::BenchClient;
use kvxfer::config::Config;
use kvxfer::{RdmaLink, SkippedRail};
use kvxfer_hipmem::gpu::Gpu;

use super::case::{self, Case, Room};
use super::initiator::{self, Initiator};
use super::limit::{Limit, Ways};
use super::mem::{self, Gpus};
use super::row::{Bench, Length};
use super::settings::{Flag, SOFT_NAME as SOFT, Settings};
use crate::args::{BwArgs, InitiatorChoice, OpChoice, QueueChoice};
use crate::output::schema::{self, BwConfig, BwReport, Difference, Op, Pages, Row};
use crate::output::{self, Format};
use crate::problem::{Exit, Problem};
use crate::progress::Progress;
use crate::say;
use crate::target::OwnTarget;

/// The time of a row's transfers: eight rows, their limits and their first passes are done within
/// half a minute.
const ROW: Duration = Duration::from_secs(1);
/// Limit of the set-up and of each transfer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// What a target takes beside the tests' memory.
const SLACK: u64 = 64 << 20;

/// `kvxfer bw`.
///
/// # Errors
///
/// A [`Problem`], or what the layers below say.
pub(crate) fn run_bw(args: &BwArgs) -> anyhow::Result<ExitCode> {
    let mut flags: Vec<Flag<'_>> = Vec::new();
    if let Some(path) = args.path {
        flags.push(("path", "--path", path.to_string()));
    }
    let settings = Settings::gather(&args.tuning, &args.trust, &flags, args.timeout, true)?;
    if args.tuning.explain_config {
        if args.json || args.csv {
            let cause = "--explain-config prints a table: it goes with neither --json nor --csv";
            return Err(Problem::new(Exit::Usage, cause).into());
        }
        settings.explain()?;
        return Ok(ExitCode::SUCCESS);
    }
    initiator::check(args)?;
    settings.check_secret()?;
    kvxfer::engine::check_device(&settings.config)?;
    let seed = args
        .work
        .seed
        // Short enough to be typed again.
        .unwrap_or_else(|| RandomState::new().hash_one(std::process::id()) & 0xffff_ffff);
    let gpus = Gpus::open(
        args.mem,
        args.peer_mem,
        &settings.config,
        args.host.is_none(),
    )?;
    let initiator = match args.initiator {
        InitiatorChoice::Host => None,
        InitiatorChoice::Gpu => {
            let queue = args.queue.unwrap_or(QueueChoice::Proxy);
            Some(Initiator::open(&settings.config, gpus.as_ref(), queue)?)
        }
    };
    let cases = cases(args, &settings.config, gpus.as_ref(), seed)?;
    let largest = cases.iter().map(|case| case.memory).max().unwrap_or(0);

    let timeout = args.timeout.unwrap_or(TIMEOUT);
    let target = match &args.host {
        Some(_) => None,
        None => Some(start_target(
            args,
            &settings,
            gpus.as_ref(),
            largest,
            timeout,
        )?),
    };
    let address = OwnTarget::or_host(target.as_ref(), args.host.as_ref());
    let mut run = Run {
        args,
        config: &settings.config,
        seed,
        timeout,
        address: &address,
        target: target.as_ref(),
        gpus: gpus.as_ref(),
        initiator: initiator.as_ref(),
        rows: Vec::new(),
        pages: None,
        way: Way::default(),
        differences: Vec::new(),
    };
    let measured = run.cases(&cases);
    let (rows, pages, way, differences) = (run.rows, run.pages, run.way, run.differences);
    let rdma = way.rails.first();
    let failed = match measured {
        Ok(()) => None,
        Err(error) => {
            let mut problem = Problem::of(&error);
            if problem.exit == Exit::Peer {
                problem = name_peer(problem, &address, target.as_ref());
            }
            // Only a failed check has a report to show.
            if problem.exit != Exit::Check || rows.is_empty() {
                return Err(problem.into());
            }
            Some(problem)
        }
    };
    let config = &settings.config;
    let report = BwReport::new(
        BwConfig {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peer: args.host.as_ref().map(ToString::to_string),
            device: rdma.map_or(SOFT, |rdma| &rdma.device).to_owned(),
            rdma: rdma.cloned(),
            rails: way.rails,
            skipped: way.skipped,
            path: settings.shown("path"),
            op: args.op.to_string(),
            initiator: match initiator {
                Some(_) => schema::Initiator::Gpu,
                None => schema::Initiator::Host,
            },
            sizes: match case::pattern(args) {
                Some(_) => None,
                None => Some(args.sizes().iter().map(|size| size.0).collect()),
            },
            pattern: case::pattern(args),
            seed,
            duration_s: match length(args) {
                Length::Time(time) => Some(time),
                Length::Transfers(_) => None,
            },
            iters: args.iters,
            timeout_s: Some(timeout),
            qp_per_transfer: config.qp_per_transfer,
            num_worker_threads: config.num_worker_threads,
            post_batch_size: i64::from(config.post_batch_size),
            max_send_wr: config.max_send_wr,
            max_cqe_num: config.max_cqe_num,
            max_msg_sge: config.max_msg_sge,
            enable_notification: config.enable_notification,
            authenticated: config.secret_file.is_some(),
            differences,
            memory: mem::shown(gpus.as_ref()),
            fence: config.fence.to_string(),
            gpu_workgroups: config.gpu_workgroups,
            pages: pages.unwrap_or_default(),
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        },
        rows,
    );
    let format = match (args.json, args.csv) {
        (true, _) => Format::Json,
        (_, true) => Format::Csv,
        _ => Format::Table,
    };
    let text = output::text(&report, format, say::width()).context("writing the report")?;
    let written = say::result(&text);
    // What was found wrong with the peer or the bytes matters more than where it was to be told.
    if let Some(problem) = failed {
        return Err(problem.into());
    }
    written?;
    too_slow(args, &report.rows)?;
    Ok(ExitCode::SUCCESS)
}

/// What to measure.
fn cases(
    args: &BwArgs,
    config: &Config,
    gpus: Option<&Gpus>,
    seed: u64,
) -> anyhow::Result<Vec<Case>> {
    let (memory, most) = match gpus {
        Some(gpus) if gpus.stands_in() => (gpus.memory(), case::ON_HOST),
        Some(gpus) => (gpus.memory(), case::ON_GPU),
        None => (None, case::ON_HOST),
    };
    let memory = memory.unwrap_or_else(|| mem::of_host(config));
    // Ours, the limit's, and that of a target of our own.
    let sides = if args.host.is_none() { 3 } else { 2 };
    let room = Room {
        memory,
        most,
        sides,
        // A GPU says itself what it does not have.
        available: available_memory().filter(|_| gpus.is_none_or(Gpus::is_on_host)),
    };
    if let Some(pattern) = case::pattern(args) {
        return Ok(vec![Case::of_model(&pattern, seed, room)?]);
    }
    args.sizes()
        .iter()
        .map(|size| Case::of_size(size.0, args.work.blocks, seed, room))
        .collect()
}

fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Starts our own target with the settings of this side.
fn start_target(
    args: &BwArgs,
    settings: &Settings,
    gpus: Option<&Gpus>,
    largest: u64,
    timeout: Duration,
) -> anyhow::Result<OwnTarget> {
    // A session's memory may still be on its way out when the next one asks.
    let memory = largest.saturating_mul(2).saturating_add(SLACK);
    let mut more = vec!["--max-memory".to_owned(), memory.to_string()];
    let mut add = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            more.extend([flag.to_owned(), value]);
        }
    };
    let config = &settings.config;
    add(
        "--qp-per-transfer",
        Some(config.qp_per_transfer.to_string()),
    );
    add("--threads", Some(config.num_worker_threads.to_string()));
    let place = |target: &Gpu| format!("gpu:{}", target.info().ordinal);
    let of_target = |gpus: &Gpus| gpus.target().map_or_else(|| "host".to_owned(), place);
    add("--mem", gpus.map(of_target));
    add("--fence", Some(config.fence.to_string()));
    add("--gpu-workgroups", Some(config.gpu_workgroups.to_string()));
    add(
        "--post-batch-size",
        args.tuning.post_batch_size.map(|n| n.to_string()),
    );
    add("--tx-depth", args.tuning.tx_depth.map(|n| n.to_string()));
    add(
        "--kv-transfer-config",
        args.tuning.kv_transfer_config.clone(),
    );
    add(
        "--secret-file",
        config
            .secret_file
            .as_ref()
            .map(|file| file.display().to_string()),
    );
    more.extend(args.tuning.device_options());
    let path = settings.shown("path");
    let mut variables = vec![("KVXFER_PATH", path.as_str())];
    if args.queue == Some(QueueChoice::Links) {
        // It has nothing to lose that this side could keep.
        variables.push(("KVXFER_GPU_LINKS_IN", "true"));
    }
    OwnTarget::start(&more, &variables, timeout)
}

fn length(args: &BwArgs) -> Length {
    match (args.iters, args.duration) {
        (Some(iters), _) => Length::Transfers(iters),
        (None, duration) => Length::Time(duration.unwrap_or(ROW)),
    }
}

/// Says in a problem whom it was with.
pub(super) fn name_peer(problem: Problem, address: &str, target: Option<&OwnTarget>) -> Problem {
    match target {
        None if problem.to_string().contains(address) => problem,
        None => problem.with_evidence(format!("the server is {address}")),
        Some(target) => problem.with_evidence(format!(
            "the server is the target process that was started for this run, {} at {address}{}",
            target.pid(),
            match target.ended() {
                Some(status) => format!(", which has ended: {status}"),
                None => String::new(),
            }
        )),
    }
}

/// `--min-gbps`.
fn too_slow(args: &BwArgs, rows: &[Row]) -> Result<(), Problem> {
    let Some(least) = args.min_gbps else {
        return Ok(());
    };
    let slow: Vec<String> = rows
        .iter()
        .filter(|row| row.gb_per_s * 8.0 < least)
        .map(|row| {
            format!(
                "{} of {}: {:.3} gigabits a second",
                row.op.name(),
                crate::size::Size(row.block_bytes),
                row.gb_per_s * 8.0
            )
        })
        .collect();
    if slow.is_empty() {
        return Ok(());
    }
    let cause = format!("below the wanted {least} gigabits a second");
    let mut problem = Problem::new(Exit::Check, cause);
    for row in slow {
        problem = problem.with_evidence(row);
    }
    Err(problem)
}

/// The NICs that a connection goes over, and those that it does without.
#[derive(Default)]
struct Way {
    rails: Vec<RdmaLink>,
    skipped: Vec<SkippedRail>,
}

/// A run under way.
struct Run<'a> {
    args: &'a BwArgs,
    config: &'a Config,
    seed: u64,
    timeout: Duration,
    address: &'a str,
    target: Option<&'a OwnTarget>,
    gpus: Option<&'a Gpus>,
    initiator: Option<&'a Initiator>,
    rows: Vec<Row>,
    pages: Option<Pages>,
    /// Of the last connection.
    way: Way,
    differences: Vec<Difference>,
}

impl Run<'_> {
    fn cases(&mut self, cases: &[Case]) -> anyhow::Result<()> {
        let ops: &[Op] = match self.args.op {
            OpChoice::Read => &[Op::Read],
            OpChoice::Write => &[Op::Write],
            // Kernels that copy blocks themselves write the target's.
            OpChoice::Both if self.args.queue == Some(QueueChoice::Links) => &[Op::Write],
            OpChoice::Both => &[Op::Read, Op::Write],
        };
        let progress = Progress::new((cases.len() * ops.len()) as u64);
        for case in cases {
            progress.at(format!("{}: connecting", case.name));
            let client =
                BenchClient::connect(self.config.clone(), &case.shape, self.address, self.timeout)?;
            self.note(&client)?;
            for op in ops {
                progress.at(format!("{} {}", op.name(), case.name));
                let limit = Limit::new(self.ways(&client, *op)?, case, client.side())?;
                let bench = Bench {
                    client: &client,
                    case,
                    op: *op,
                    by: self.initiator,
                    // The second operation is not to find the first one's bytes in place.
                    seed: self.seed ^ (*op as u64),
                    length: length(self.args),
                    verify: self.args.verify,
                    timeout: self.timeout,
                    progress: &progress,
                };
                self.rows.push(bench.run(limit.as_ref())?);
            }
        }
        Ok(())
    }

    fn ways(&self, client: &BenchClient, op: Op) -> Result<Ways<'_>, kvxfer::Error> {
        let peer = client.peer();
        let (lanes, workers) = peer.lanes()?;
        let (facts, path) = (peer.facts()?, peer.path()?);
        let target = self.target.and_then(|target| {
            let span = facts.memory.first()?;
            Some((i32::try_from(target.pid()).ok()?, span.addr))
        });
        Ok(Ways {
            path: path.path,
            beneath: path.beneath(),
            op,
            lanes,
            workers,
            same_host: facts.same_host,
            target,
            target_gpu: self.gpus.and_then(Gpus::target),
        })
    }

    /// Keeps what is the same for all rows.
    fn note(&mut self, client: &BenchClient) -> Result<(), kvxfer::Error> {
        if let Some(pages) = client.side().pages() {
            // The largest memory has the best chances of large pages: the last case's are told.
            self.pages = Some(Pages::from(&pages));
        }
        let path = client.peer().path()?;
        self.way = Way {
            rails: path.rails,
            skipped: path.skipped,
        };
        let facts = client.peer().facts()?;
        let here = self.config;
        let number = u64::from;
        let both = [
            // The side that connects makes as many queue pairs as it is told.
            (
                "qp_per_transfer",
                number(here.qp_per_transfer),
                number(facts.qp_per_transfer),
                Some(number(here.qp_per_transfer)),
            ),
            // Each side has its own.
            (
                "num_worker_threads",
                number(here.num_worker_threads),
                number(facts.num_worker_threads),
                None,
            ),
        ];
        self.differences = both
            .into_iter()
            .filter(|(_, here, there, _)| here != there)
            .map(|(key, here, there, used)| Difference {
                key: key.to_owned(),
                here,
                there,
                used,
            })
            .collect();
        Ok(())
    }
}
