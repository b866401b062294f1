//! `kvxfer ping`.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use kvxfer::ping::{Ping, Pinger};
use nix::poll::{PollFd, PollFlags, poll};

use super::bw::name_peer;
use super::initiator;
use super::settings::{Flag, SOFT_NAME, Settings};
use crate::args::{InitiatorChoice, PingArgs, Tuning};
use crate::output::ping::{self as show, Ended, PeerConfig, PingConfig, PingReport, Samples};
use crate::output::schema::{Candidate, Initiator};
use crate::problem::{Exit, Problem};
use crate::say::{self, Heard};
use crate::signals::StopSignals;
use crate::target::OwnTarget;

/// Pings, unless told.
const COUNT: u64 = 5;
/// The time from one ping to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a ping is waited for.
const WAIT: Duration = Duration::from_secs(1);
/// Limit of the set-up.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a signal is looked for while the connection is made.
const LOOK: u8 = 50;

/// `kvxfer ping`.
///
/// # Errors
///
/// A [`Problem`], or what the layers below say.
pub(crate) fn run_ping(args: &PingArgs) -> anyhow::Result<ExitCode> {
    // First of all: threads started later inherit that the signals do not strike.
    let signals = StopSignals::take()
        .map_err(|errno| Problem::from_chain(Exit::Device, &errno))
        .context("taking the stop signals over")?;
    let mut flags: Vec<Flag<'_>> = Vec::new();
    if let Some(path) = args.path {
        flags.push(("path", "--path", path.to_string()));
    }
    let tuning = Tuning {
        nic: args.nic.clone(),
        ib_port: args.ib_port,
        kv_transfer_config: args.kv_transfer_config.clone(),
        ..Tuning::default()
    };
    // `--timeout` ends the pings: it is no setting.
    let settings = Settings::gather(&tuning, &args.trust, &flags, None, true)?;
    settings.check_secret()?;
    kvxfer::engine::check_device(&settings.config)?;

    let begun = Instant::now();
    let timeout = args.timeout.unwrap_or(TIMEOUT);
    let target = match &args.host {
        Some(_) => None,
        None => Some(start_target(&tuning, &settings, timeout)?),
    };
    let address = OwnTarget::or_host(target.as_ref(), args.host.as_ref());
    let named = |error: &anyhow::Error| {
        let problem = Problem::of(error);
        match problem.exit {
            Exit::Peer => name_peer(problem, &address, target.as_ref()),
            _ => problem,
        }
    };
    let left = timeout.saturating_sub(begun.elapsed());
    let watch = ConnectWatch::begin(&signals, &address)?;
    let pinger = Pinger::connect(&settings.config, &address, left);
    drop(watch);
    let mut pinger = pinger.map_err(|error| named(&error.into()))?;
    let executor = match args.initiator {
        InitiatorChoice::Host => None,
        InitiatorChoice::Gpu => {
            let gpu = initiator::first(&settings.config)?;
            initiator::warn_of_stand_in(&gpu);
            pinger.post_from(&gpu)?;
            Some(initiator::executor(&gpu))
        }
    };
    let stop = signals.as_fd().try_clone_to_owned();
    pinger.stop_on(stop.context("watching for Ctrl-C")?);

    let mut run = Run {
        args,
        wait: args.wait.unwrap_or(WAIT),
        until: args.timeout.map(|timeout| begun + timeout),
        heard: Heard::Yes,
        control: Samples::default(),
        write: Samples::default(),
        read: Samples::default(),
        sent: 0,
        answered: 0,
    };
    let peer = PeerConfig::of(&pinger);
    let path = pinger.path().clone();
    let mut greeting = show::greeting(&address, &peer, &path.path.to_string(), &path.reason);
    if let Some(executor) = executor {
        let name = executor.name();
        let by = format!(", each WRITE posted by a kernel ({name})\n");
        greeting = greeting.trim_end().to_owned() + &by;
    }
    run.say(&greeting)?;
    if let Some(rdma) = path.rails.first() {
        run.say(&format!("{rdma}\n"))?;
    }
    let pinging = Instant::now();
    let (ended, failed) = match run.pings(&mut pinger, &signals) {
        Ok(ended) => (ended, None),
        Err(error) => (Ended::Failed, Some(named(&error))),
    };
    let report = PingReport {
        schema: show::Schema::Ping1,
        config: PingConfig {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peer: args.host.as_ref().map(ToString::to_string),
            device: path
                .rails
                .first()
                .map_or(SOFT_NAME, |rdma| &rdma.device)
                .to_owned(),
            rdma: path.rails.into_iter().next(),
            path: settings.shown("path"),
            initiator: match executor {
                Some(_) => Initiator::Gpu,
                None => Initiator::Host,
            },
            executor,
            count: run.count(),
            interval_s: Some(args.interval.unwrap_or(INTERVAL)),
            wait_s: Some(run.wait),
            timeout_s: args.timeout,
        },
        peer,
        path: path.path.to_string(),
        path_reason: path.reason,
        candidates: path.candidates.iter().map(Candidate::from).collect(),
        sent: run.sent,
        answered: run.answered,
        lost_percent: match run.sent {
            0 => 0.0,
            sent => (sent - run.answered) as f64 * 100.0 / sent as f64,
        },
        time_s: pinging.elapsed().as_secs_f64(),
        control: run.control.part(),
        write: run.write.part(),
        read: run.read.part(),
        ended,
        failure: failed.as_ref().map(|problem| problem.cause.clone()),
    };
    drop(pinger);
    let written = match args.json {
        true => crate::output::line(&report)
            .context("writing the report")
            .map(|line| say::result(&line).map(drop))?,
        false => run.say(&show::summary(&address, &report)),
    };
    if let Some(problem) = failed {
        return Err(problem.into());
    }
    if let Some(problem) = verdict(&address, &report, run.wait) {
        return Err(name_peer(problem, &address, target.as_ref()).into());
    }
    written?;
    Ok(ExitCode::SUCCESS)
}

/// Nothing is lost by chance here: both connections are reliable ones. So a single lost ping is a
/// peer that was stalled, and that is a failure.
fn verdict(address: &str, report: &PingReport, wait: Duration) -> Option<Problem> {
    let (sent, answered) = (report.sent, report.answered);
    let stalled = "look whether its process is stopped (`ps -o stat`: T) or its machine overloaded";
    if answered < sent {
        let cause = format!("{} of {sent} pings of {address} were lost", sent - answered);
        return Some(
            Problem::new(Exit::Peer, cause)
                .with_evidence(format!(
                    "the connection stands; what was lost had no answer within {wait:?}"
                ))
                .with_fix(format!("{stalled}; -W waits longer")),
        );
    }
    let short = report.config.count != 0 && sent < report.config.count;
    match report.ended {
        Ended::Timeout if short || sent == 0 => Some(
            Problem::new(
                Exit::Peer,
                format!("{answered} pings of {address} were done when --timeout passed"),
            )
            .with_fix("give it longer with --timeout, or ping less with -c"),
        ),
        Ended::Interrupted if sent == 0 => Some(
            Problem::new(Exit::Peer, format!("{address} had not answered a ping yet"))
                .with_evidence("interrupted")
                .with_fix(stalled),
        ),
        _ => None,
    }
}

/// Starts our own target.
fn start_target(
    tuning: &Tuning,
    settings: &Settings,
    timeout: Duration,
) -> anyhow::Result<OwnTarget> {
    let mut more = vec!["--threads".to_owned(), "1".to_owned()];
    if let Some(config) = &tuning.kv_transfer_config {
        more.extend(["--kv-transfer-config".to_owned(), config.clone()]);
    }
    if let Some(file) = &settings.config.secret_file {
        more.extend(["--secret-file".to_owned(), file.display().to_string()]);
    }
    more.extend(tuning.device_options());
    let path = settings.shown("path");
    OwnTarget::start(&more, &[("KVXFER_PATH", &path)], timeout)
}

/// Pings under way.
struct Run<'a> {
    args: &'a PingArgs,
    wait: Duration,
    /// When all is to be over.
    until: Option<Instant>,
    heard: Heard,
    control: Samples,
    write: Samples,
    read: Samples,
    sent: u64,
    answered: u64,
}

impl Run<'_> {
    fn count(&self) -> u64 {
        self.args.count.unwrap_or(COUNT)
    }

    /// A line for people.
    fn say(&mut self, text: &str) -> Result<(), Problem> {
        if !self.args.json && self.heard == Heard::Yes {
            self.heard = say::result(text)?;
        }
        Ok(())
    }

    fn pings(&mut self, pinger: &mut Pinger, signals: &StopSignals) -> anyhow::Result<Ended> {
        let interval = self.args.interval.unwrap_or(INTERVAL);
        let mut next = Instant::now();
        loop {
            let wait = match self.until {
                Some(until) => self
                    .wait
                    .min(until.saturating_duration_since(Instant::now())),
                None => self.wait,
            };
            let ping = pinger.ping(wait)?;
            let over = self.until.is_some_and(|until| Instant::now() >= until);
            match ping {
                None => return Ok(Ended::Interrupted),
                // Its time was cut short.
                Some(ping) if over && !ping.answered() && wait < self.wait => {
                    return Ok(Ended::Timeout);
                }
                Some(ping) => self.note(&ping)?,
            }
            if self.heard == Heard::No {
                // Nobody is left to ping for.
                return Ok(Ended::Interrupted);
            }
            if self.count() != 0 && self.sent >= self.count() {
                return Ok(Ended::Finished);
            }
            next = (next + interval).max(Instant::now());
            let pause = self.until.map_or(next, |until| until.min(next));
            pinger.idle(pause)?;
            if stopped(signals)? {
                return Ok(Ended::Interrupted);
            }
            if self.until.is_some_and(|until| Instant::now() >= until) {
                return Ok(Ended::Timeout);
            }
        }
    }

    fn note(&mut self, ping: &Ping) -> Result<(), Problem> {
        self.sent += 1;
        self.answered += u64::from(ping.answered());
        self.control.add(ping.control);
        self.write.add(ping.write);
        self.read.add(ping.read);
        self.say(&show::line(ping, self.wait))
    }
}

fn stopped(signals: &StopSignals) -> anyhow::Result<bool> {
    let signal = signals
        .wait(Some(Duration::ZERO))
        .map_err(|errno| Problem::from_chain(Exit::Device, &errno))
        .context("looking for Ctrl-C")?;
    Ok(signal.is_some())
}

/// Ends the command on Ctrl-C while a name is looked up or a connection is made, which waits in
/// calls that nothing else interrupts.
struct ConnectWatch {
    over: Arc<AtomicBool>,
}

impl ConnectWatch {
    fn begin(signals: &StopSignals, address: &str) -> anyhow::Result<Self> {
        let fd = signals.as_fd().try_clone_to_owned();
        let fd = fd.context("watching for Ctrl-C")?;
        let over = Arc::new(AtomicBool::new(false));
        let (ended, address) = (Arc::clone(&over), address.to_owned());
        let watch = move || {
            while !ended.load(Ordering::Acquire) {
                let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
                if matches!(poll(&mut fds, LOOK), Ok(n) if n > 0) && !ended.load(Ordering::Acquire)
                {
                    say::aside(format_args!(
                        "kvxfer: interrupted before {address} had answered"
                    ));
                    std::process::exit(Exit::Peer as i32);
                }
            }
        };
        std::thread::Builder::new()
            .spawn(watch)
            .context("watching for Ctrl-C")?;
        Ok(Self { over })
    }
}

impl Drop for ConnectWatch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}
