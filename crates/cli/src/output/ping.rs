//! `kvxfer.ping/1`, as docs/json.md describes it, and what people read of the same pings.

use std::fmt::Write;
use std::time::Duration;

use kvxfer::RdmaLink;
use kvxfer::ping::{Ping, Pinger, Probe};
use serde::Serialize;

use super::schema::{Candidate, Executor, Initiator, rounded, rounded_or_null, seconds};
use crate::stats::{Kept, percentile};

/// All of one run of `kvxfer ping`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PingReport {
    pub(crate) schema: Schema,
    pub(crate) config: PingConfig,
    pub(crate) peer: PeerConfig,
    pub(crate) path: String,
    pub(crate) path_reason: String,
    pub(crate) candidates: Vec<Candidate>,
    /// Pings that were sent.
    pub(crate) sent: u64,
    /// Those of which every part came back.
    pub(crate) answered: u64,
    #[serde(serialize_with = "rounded")]
    pub(crate) lost_percent: f64,
    #[serde(serialize_with = "rounded")]
    pub(crate) time_s: f64,
    pub(crate) control: Part,
    pub(crate) write: Part,
    pub(crate) read: Part,
    pub(crate) ended: Ended,
    /// Why the session ended before its time; null if it did not.
    pub(crate) failure: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) enum Schema {
    #[serde(rename = "kvxfer.ping/1")]
    Ping1,
}

/// What was run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PingConfig {
    pub(crate) version: String,
    /// The address; null if the command started its own target.
    pub(crate) peer: Option<String>,
    pub(crate) device: String,
    /// Ports and queue pairs of a way over NICs; null on another path.
    pub(crate) rdma: Option<RdmaLink>,
    /// What was asked for: `auto`, or a path.
    pub(crate) path: String,
    /// Who posted the WRITEs.
    pub(crate) initiator: Initiator,
    /// What ran the kernel that did; null where none did.
    pub(crate) executor: Option<Executor>,
    /// 0: until it was stopped.
    pub(crate) count: u64,
    #[serde(serialize_with = "seconds")]
    pub(crate) interval_s: Option<Duration>,
    #[serde(serialize_with = "seconds")]
    pub(crate) wait_s: Option<Duration>,
    /// Null if there was none.
    #[serde(serialize_with = "seconds")]
    pub(crate) timeout_s: Option<Duration>,
}

/// Who answered.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PeerConfig {
    pub(crate) engine: String,
    pub(crate) generation: String,
    pub(crate) dp: u32,
    pub(crate) pp: u32,
    pub(crate) tp: u32,
    pub(crate) kv_role: String,
    pub(crate) same_host: bool,
    pub(crate) authenticated: bool,
}

impl PeerConfig {
    pub(crate) fn of(pinger: &Pinger) -> Self {
        let peer = pinger.peer();
        let generation = peer.generation.0.iter();
        Self {
            engine: peer.name.engine.to_string(),
            generation: generation.map(|byte| format!("{byte:02x}")).collect(),
            dp: peer.name.rank.dp,
            pp: peer.name.rank.pp,
            tp: peer.name.rank.tp,
            kv_role: peer.kv_role.to_string(),
            same_host: peer.same_host,
            authenticated: peer.by_secret,
        }
    }
}

/// Why there were no more pings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Ended {
    /// All that were asked for have been sent.
    Finished,
    /// Ctrl-C, or SIGTERM.
    Interrupted,
    /// `--timeout` passed.
    Timeout,
    /// The session ended, or a value was wrong.
    Failed,
}

/// One of the three parts of a ping, over all pings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Part {
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) min_us: Option<f64>,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) avg_us: Option<f64>,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) p50_us: Option<f64>,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) p99_us: Option<f64>,
    #[serde(serialize_with = "rounded_or_null")]
    pub(crate) max_us: Option<f64>,
}

/// The times of one part, as they come.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples {
    sent: u64,
    sum_ns: u128,
    min_ns: u64,
    max_ns: u64,
    ns: Kept<u64>,
}

impl Samples {
    pub(crate) fn add(&mut self, probe: Probe) {
        match probe {
            Probe::Answered(time) => {
                self.sent += 1;
                self.note(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
            }
            Probe::Lost => self.sent += 1,
            Probe::NotTried => {}
        }
    }

    fn note(&mut self, ns: u64) {
        self.min_ns = match self.ns.seen() {
            0 => ns,
            _ => self.min_ns.min(ns),
        };
        self.max_ns = self.max_ns.max(ns);
        self.sum_ns += u128::from(ns);
        self.ns.add(ns);
    }

    pub(crate) fn part(&self) -> Part {
        let mut sorted = self.ns.samples().to_vec();
        sorted.sort_unstable();
        let us = |ns: u64| ns as f64 / 1e3;
        let answered = self.ns.seen();
        let any = answered > 0;
        Part {
            sent: self.sent,
            answered,
            min_us: any.then(|| us(self.min_ns)),
            avg_us: any.then(|| self.sum_ns as f64 / answered as f64 / 1e3),
            p50_us: percentile(&sorted, 500).map(us),
            p99_us: percentile(&sorted, 990).map(us),
            max_us: any.then(|| us(self.max_ns)),
        }
    }
}

/// What is said before the first ping.
pub(crate) fn greeting(address: &str, peer: &PeerConfig, path: &str, reason: &str) -> String {
    let PeerConfig {
        engine, dp, pp, tp, ..
    } = peer;
    let rank = match (dp, pp, tp) {
        (0, 0, 0) => String::new(),
        _ => format!(" dp {dp} pp {pp} tp {tp}"),
    };
    format!("PING {address}: {engine}{rank}, over {path} ({reason})\n")
}

/// A ping's line.
pub(crate) fn line(ping: &Ping, wait: Duration) -> String {
    let mut line = format!("seq={}", ping.sequence);
    let mut add = |name: &str, probe: Probe, lost: &str| match probe {
        // Writing to a string does not fail.
        Probe::Answered(time) => {
            let _ = write!(line, "  {name} {:.1} us", time.as_nanos() as f64 / 1e3);
        }
        Probe::Lost => {
            let _ = write!(line, "  {name}: {lost}");
        }
        Probe::NotTried => {}
    };
    let silent = format!(
        "no answer in {wait:?}: the peer is stalled (its connection stands, nothing comes)"
    );
    add("control", ping.control, &silent);
    let out = format!("not done in {wait:?}: the peer's device does not take it");
    add("write", ping.write, &out);
    add("read", ping.read, &out);
    if ping.control.time().is_some() && ping.read == Probe::NotTried && ping.write != Probe::Lost {
        line.push_str("  (an earlier operation is still out)");
    }
    line.push('\n');
    line
}

/// ping(8)'s summary.
pub(crate) fn summary(address: &str, report: &PingReport) -> String {
    let mut out = format!(
        "\n--- {address} ping ---\n{} sent, {} answered, {:.0} % lost, time {:.1} s\n",
        report.sent, report.answered, report.lost_percent, report.time_s
    );
    let _ = writeln!(
        out,
        "{:7} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "us", "answered", "min", "avg", "p50", "p99", "max"
    );
    let parts = [
        ("control", &report.control),
        ("write", &report.write),
        ("read", &report.read),
    ];
    for (name, part) in parts {
        let times = [
            part.min_us,
            part.avg_us,
            part.p50_us,
            part.p99_us,
            part.max_us,
        ];
        let times = times.map(|us| us.map_or("-".to_owned(), |us| format!("{us:.1}")));
        let answered = format!("{}/{}", part.answered, part.sent);
        let _ = write!(out, "{name:7} {answered:>11}");
        for time in times {
            let _ = write!(out, " {time:>9}");
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::KEPT;

    const US: Duration = Duration::from_micros(1);

    fn part(times: &[u64]) -> Part {
        let mut samples = Samples::default();
        for us in times {
            samples.add(Probe::Answered(US * u32::try_from(*us).unwrap_or(0)));
        }
        samples.part()
    }

    fn report() -> PingReport {
        let mut lost = Samples::default();
        lost.add(Probe::Answered(US * 3));
        lost.add(Probe::Lost);
        lost.add(Probe::NotTried);
        PingReport {
            schema: Schema::Ping1,
            config: PingConfig {
                version: "0.1.0".into(),
                peer: Some("node7:7301".into()),
                device: "soft".into(),
                rdma: None,
                path: "auto".into(),
                initiator: Initiator::Host,
                executor: None,
                count: 3,
                interval_s: Some(Duration::from_secs(1)),
                wait_s: Some(Duration::from_millis(500)),
                timeout_s: None,
            },
            peer: PeerConfig {
                engine: "decode".into(),
                generation: "00ff".into(),
                dp: 0,
                pp: 0,
                tp: 1,
                kv_role: "kv_consumer".into(),
                same_host: true,
                authenticated: false,
            },
            path: "arena".into(),
            path_reason: "same host".into(),
            candidates: vec![Candidate {
                path: "rdma".into(),
                usable: false,
                why_not: Some("none".into()),
            }],
            sent: 3,
            answered: 2,
            lost_percent: 100.0 / 3.0,
            time_s: 2.5,
            control: part(&[10, 30, 20]),
            write: part(&[]),
            read: lost.part(),
            ended: Ended::Finished,
            failure: None,
        }
    }

    #[test]
    fn a_part_has_its_smallest_its_mean_and_its_largest() {
        let part = part(&[10, 30, 20, 1000]);
        assert_eq!((part.sent, part.answered), (4, 4));
        assert_eq!(
            (part.min_us, part.avg_us, part.p50_us),
            (Some(10.0), Some(265.0), Some(20.0))
        );
        assert_eq!((part.p99_us, part.max_us), (Some(1000.0), Some(1000.0)));
        let read = report().read;
        assert_eq!((read.sent, read.answered, read.max_us), (2, 1, Some(3.0)));
        assert_eq!(report().write.avg_us, None);
    }

    #[test]
    fn what_is_counted_is_exact_though_not_all_is_kept() {
        let mut samples = Samples::default();
        let all = 2 * KEPT as u64;
        for us in 1..=all {
            samples.add(Probe::Answered(Duration::from_micros(us)));
        }
        let part = samples.part();
        let mean = (1 + all) as f64 / 2.0;
        assert_eq!((part.sent, part.answered), (all, all));
        assert_eq!(
            (part.min_us, part.avg_us, part.max_us),
            (Some(1.0), Some(mean), Some(all as f64))
        );
    }

    #[test]
    fn the_json_is_one_line_and_documented() {
        let line = crate::output::line(&report()).unwrap_or_default();
        assert!(line.starts_with("{\"schema\":\"kvxfer.ping/1\",\"config\":{"));
        assert_eq!(line.matches('\n').count(), 1);
        crate::output::tests::is_documented(serde_json::to_value(report()).unwrap_or_default());
    }

    #[test]
    fn lines_say_what_is_lost_and_what_still_works() {
        let mut ping = Ping {
            sequence: 4,
            control: Probe::Answered(US * 80),
            write: Probe::Answered(US * 20),
            read: Probe::Answered(US),
        };
        let wait = Duration::from_secs(1);
        assert_eq!(
            line(&ping, wait),
            "seq=4  control 80.0 us  write 20.0 us  read 1.0 us\n"
        );
        ping.control = Probe::Lost;
        ping.write = Probe::NotTried;
        let text = line(&ping, wait);
        assert!(
            text.contains("no answer in 1s") && text.contains("stalled"),
            "{text}"
        );
        assert!(
            text.contains("read 1.0 us") && !text.contains("write"),
            "{text}"
        );
    }

    #[test]
    fn the_summary_shows_the_same() {
        let text = summary("node7:7301", &report());
        let wanted = "
--- node7:7301 ping ---
3 sent, 2 answered, 33 % lost, time 2.5 s
us         answered       min       avg       p50       p99       max
control         3/3      10.0      20.0      20.0      30.0      30.0
write           0/0         -         -         -         -         -
read            1/2       3.0       3.0       3.0       3.0       3.0
";
        assert_eq!(text, wanted);
    }
}
