//! Faults on purpose: a plan says how often what goes wrong, and a seed makes it the same each time.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::device::AsyncEvent;
use crate::wr::WcStatus;

/// What goes wrong on a software device, and how often. Work requests are numbered on each queue
/// pair from the first one posted, queue pairs in the order in which the context made them; the
/// seed and these two numbers decide, so the same program meets the same faults.
///
/// The text form is a list of items with commas between, each at most once:
///
/// | item | what happens to a work request, or to the device |
/// |---|---|
/// | `seed=N` | nothing; another seed is another history (0 if not given) |
/// | `delay=RATE:TIME` | it starts that much later, and what was posted after it on its queue pair too |
/// | `reorder=RATE:TIME` | the same by a random time up to `TIME`: queue pairs overtake each other |
/// | `drop=RATE` | it gets lost, and so does every retry: `RetryExc` once the queue pair's own retry time is over (a queue pair that tries for ever waits for ever) |
/// | `key=RATE` | READs and WRITEs: it names a key that is not valid, `RemAccess` |
/// | `stray=RATE` | READs and WRITEs of more than 64 bytes: it goes to the bytes 64 below those that it names and succeeds, so that data is wrong and nothing says so (`RemAccess` where they are outside the region) |
/// | `cut=RATE` | the stream to the peer is shut down: `RetryExc` with [`vendor::PEER_GONE`](super::vendor::PEER_GONE) |
/// | `wr-error=RATE:STATUS` | it fails with `STATUS` and [`vendor::PLANNED`](super::vendor::PLANNED) |
/// | `qp-fatal=RATE` | its queue pair fails with no completion that says why; [`AsyncEvent::QpFatal`](crate::AsyncEvent::QpFatal) |
/// | `qp-request=RATE` | the same with [`AsyncEvent::QpRequestError`](crate::AsyncEvent::QpRequestError) |
/// | `qp-access=RATE` | the same with [`AsyncEvent::QpAccessError`](crate::AsyncEvent::QpAccessError) |
/// | `no-qp=RATE` | a queue pair, not a work request, is not made: [`Error::Device`](crate::Error::Device) |
/// | `no-join=RATE` | a queue pair is not joined to its peer's: the same |
/// | `no-destroy=RATE` | a queue pair is not destroyed, and goes on as it was: the same, of [`QueuePair::destroy`](crate::QueuePair::destroy) |
/// | `port-down=AT:TIME` | that long after the device was opened, nothing starts for `TIME`; [`AsyncEvent::PortDown`](crate::AsyncEvent::PortDown), later [`PortUp`](crate::AsyncEvent::PortUp) |
/// | `cq-error=AT` | that long after the device was opened, its first completion queue fails with all its completions, and each queue pair that completes there, also one made later; [`AsyncEvent::CqError`](crate::AsyncEvent::CqError) |
/// | `device-fatal=AT` | that long after the device was opened, all queue pairs fail; [`AsyncEvent::DeviceFatal`](crate::AsyncEvent::DeviceFatal) |
/// | `event=AT:CODE` | that long after the device was opened, nothing but [`AsyncEvent::Other`](crate::AsyncEvent::Other) with this code |
/// | `event-lag=TIME` | events are told that much later than what they are about happens |
///
/// `RATE` is a share of all work requests, or of all queue pairs, from 0 to 1. `TIME` and `AT` are whole numbers with `ns`,
/// `us`, `ms` or `s`. `STATUS` is one of `loc-len`, `loc-qp-op`, `loc-prot`, `rem-inv-req`,
/// `rem-access`, `rem-op`, `retry-exc`, `rnr-retry-exc`. Faults act where work requests start; what a
/// peer asks of this context is served as ever.
///
/// ```
/// # use kvxfer_verbs::FaultPlan;
/// let plan: FaultPlan = "seed=7,delay=0.01:5ms,drop=0.001".parse()?;
/// assert_eq!(plan.to_string(), "seed=7,delay=0.01:5ms,drop=0.001");
/// # Ok::<(), kvxfer_verbs::FaultPlanError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct FaultPlan {
    /// Decides, with the numbers of queue pair and work request, what goes wrong.
    pub seed: u64,
    /// Share of work requests that start later, and by how much.
    pub delay: Option<(f64, Duration)>,
    /// Share of work requests that start later by a random time, and the longest such time.
    pub reorder: Option<(f64, Duration)>,
    /// Share that gets lost.
    pub drop: f64,
    /// Share that names a wrong key.
    pub key: f64,
    /// Share that goes to the wrong bytes.
    pub stray: f64,
    /// Share at which the stream is shut down.
    pub cut: f64,
    /// Share that fails, and how.
    pub wr_error: Option<(f64, WcStatus)>,
    /// Share at which the queue pair fails by itself.
    pub qp_fatal: f64,
    /// Share at which the queue pair fails over a request that came in.
    pub qp_request: f64,
    /// Share at which the queue pair fails over the rights of local memory.
    pub qp_access: f64,
    /// Share of queue pairs that are not made.
    pub no_qp: f64,
    /// Share of queue pairs that are not joined to their peers'.
    pub no_join: f64,
    /// Share of queue pairs that are not destroyed.
    pub no_destroy: f64,
    /// When, after the device was opened, its port goes down, and for how long.
    pub port_down: Option<(Duration, Duration)>,
    /// When, after the device was opened, its first completion queue fails.
    pub cq_error: Option<Duration>,
    /// When, after the device was opened, it fails as a whole.
    pub device_fatal: Option<Duration>,
    /// When, after the device was opened, another event comes, and its code.
    pub event: Option<(Duration, u32)>,
    /// How much later than what they are about events are told.
    pub event_lag: Option<Duration>,
}

/// What is wrong with the text of a fault plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultPlanError {
    /// An item is not `name=value`, or its value has too few or too many parts.
    #[error("fault {item:?} is not of the form {form}")]
    Form {
        /// The item.
        item: String,
        /// How it should look.
        form: &'static str,
    },
    /// There is no such item.
    #[error("no fault is called {name:?}: there are {}", names())]
    Unknown {
        /// The name.
        name: String,
    },
    /// An item comes twice.
    #[error("fault {name:?} is given twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// A seed is not a number.
    #[error("seed {value:?} is not a whole number under 2^64")]
    Seed {
        /// The value.
        value: String,
    },
    /// A rate is not a number, or out of range.
    #[error("rate {value:?} of {name} is not a number from 0 to 1")]
    Rate {
        /// The item's name.
        name: String,
        /// The value.
        value: String,
    },
    /// A time is not a number with a unit, or too large.
    #[error("time {value:?} of {name} is not a whole number with ns, us, ms or s")]
    Time {
        /// The item's name.
        name: String,
        /// The value.
        value: String,
    },
    /// An event's code is not a number.
    #[error("event code {value:?} is not a whole number under 2^32")]
    Code {
        /// The value.
        value: String,
    },
    /// A status is none.
    #[error("status {value:?} of wr-error is none of {}", statuses())]
    Status {
        /// The value.
        value: String,
    },
}

const ITEMS: [(&str, &str); 19] = [
    ("seed", "seed=N"),
    ("delay", "delay=RATE:TIME"),
    ("reorder", "reorder=RATE:TIME"),
    ("drop", "drop=RATE"),
    ("key", "key=RATE"),
    ("stray", "stray=RATE"),
    ("cut", "cut=RATE"),
    ("wr-error", "wr-error=RATE:STATUS"),
    ("qp-fatal", "qp-fatal=RATE"),
    ("qp-request", "qp-request=RATE"),
    ("qp-access", "qp-access=RATE"),
    ("no-qp", "no-qp=RATE"),
    ("no-join", "no-join=RATE"),
    ("no-destroy", "no-destroy=RATE"),
    ("port-down", "port-down=AT:TIME"),
    ("cq-error", "cq-error=AT"),
    ("device-fatal", "device-fatal=AT"),
    ("event", "event=AT:CODE"),
    ("event-lag", "event-lag=TIME"),
];

const STATUSES: [(&str, WcStatus); 8] = [
    ("loc-len", WcStatus::LocLen),
    ("loc-qp-op", WcStatus::LocQpOp),
    ("loc-prot", WcStatus::LocProt),
    ("rem-inv-req", WcStatus::RemInvReq),
    ("rem-access", WcStatus::RemAccess),
    ("rem-op", WcStatus::RemOp),
    ("retry-exc", WcStatus::RetryExc),
    ("rnr-retry-exc", WcStatus::RnrRetryExc),
];

const UNITS: [(&str, u64); 4] = [
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

fn names() -> String {
    ITEMS.map(|i| i.0).join(", ")
}

fn statuses() -> String {
    STATUSES.map(|s| s.0).join(", ")
}

/// One item while it is read.
struct Item<'a> {
    name: &'a str,
    value: &'a str,
    form: &'static str,
}

impl<'a> Item<'a> {
    fn pair(&self) -> Result<(&'a str, &'a str), FaultPlanError> {
        self.value.split_once(':').ok_or(FaultPlanError::Form {
            item: format!("{}={}", self.name, self.value),
            form: self.form,
        })
    }

    fn rate(&self, text: &str) -> Result<f64, FaultPlanError> {
        let rate = text.parse().ok().filter(|r| (0.0..=1.0).contains(r));
        rate.ok_or_else(|| FaultPlanError::Rate {
            name: self.name.to_owned(),
            value: text.to_owned(),
        })
    }

    fn time(&self, text: &str) -> Result<Duration, FaultPlanError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let nanos = text.split_at_checked(digits).and_then(|(number, unit)| {
            let unit = UNITS.iter().find(|u| u.0 == unit)?.1;
            number.parse::<u64>().ok()?.checked_mul(unit)
        });
        nanos
            .map(Duration::from_nanos)
            .ok_or_else(|| FaultPlanError::Time {
                name: self.name.to_owned(),
                value: text.to_owned(),
            })
    }

    fn rate_and_time(&self) -> Result<(f64, Duration), FaultPlanError> {
        let (rate, time) = self.pair()?;
        Ok((self.rate(rate)?, self.time(time)?))
    }
}

impl FromStr for FaultPlan {
    type Err = FaultPlanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut plan = Self::default();
        let mut seen = Vec::new();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| FaultPlanError::Form {
                item: item.to_owned(),
                form: "name=value",
            })?;
            let known = ITEMS.iter().find(|i| i.0 == name);
            let (name, form) = *known.ok_or_else(|| FaultPlanError::Unknown {
                name: name.to_owned(),
            })?;
            if seen.contains(&name) {
                let name = name.to_owned();
                return Err(FaultPlanError::Twice { name });
            }
            seen.push(name);
            let item = Item { name, value, form };
            match name {
                "seed" => {
                    plan.seed = value.parse().map_err(|_| FaultPlanError::Seed {
                        value: value.to_owned(),
                    })?;
                }
                "delay" => plan.delay = Some(item.rate_and_time()?),
                "reorder" => plan.reorder = Some(item.rate_and_time()?),
                "drop" => plan.drop = item.rate(value)?,
                "key" => plan.key = item.rate(value)?,
                "stray" => plan.stray = item.rate(value)?,
                "cut" => plan.cut = item.rate(value)?,
                "wr-error" => {
                    let (rate, status) = item.pair()?;
                    let found = STATUSES.iter().find(|s| s.0 == status);
                    let found = found.ok_or_else(|| FaultPlanError::Status {
                        value: status.to_owned(),
                    })?;
                    plan.wr_error = Some((item.rate(rate)?, found.1));
                }
                "qp-fatal" => plan.qp_fatal = item.rate(value)?,
                "qp-request" => plan.qp_request = item.rate(value)?,
                "qp-access" => plan.qp_access = item.rate(value)?,
                "no-qp" => plan.no_qp = item.rate(value)?,
                "no-join" => plan.no_join = item.rate(value)?,
                "no-destroy" => plan.no_destroy = item.rate(value)?,
                "port-down" => {
                    let (at, time) = item.pair()?;
                    plan.port_down = Some((item.time(at)?, item.time(time)?));
                }
                "cq-error" => plan.cq_error = Some(item.time(value)?),
                "device-fatal" => plan.device_fatal = Some(item.time(value)?),
                "event" => {
                    let (at, code) = item.pair()?;
                    let code = code.parse().map_err(|_| FaultPlanError::Code {
                        value: code.to_owned(),
                    })?;
                    plan.event = Some((item.time(at)?, code));
                }
                // The table has no other name.
                _ => plan.event_lag = Some(item.time(value)?),
            }
        }
        Ok(plan)
    }
}

struct Time(Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        let unit = UNITS.iter().find(|u| nanos.is_multiple_of(u.1));
        let (unit, size) = unit.copied().unwrap_or(("ns", 1));
        write!(f, "{}{unit}", nanos / size)
    }
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed={}", self.seed)?;
        for (name, timed) in [("delay", self.delay), ("reorder", self.reorder)] {
            if let Some((rate, time)) = timed {
                write!(f, ",{name}={rate}:{}", Time(time))?;
            }
        }
        let rates = [
            ("drop", self.drop),
            ("key", self.key),
            ("stray", self.stray),
            ("cut", self.cut),
        ];
        for (name, rate) in rates.into_iter().filter(|r| r.1 > 0.0) {
            write!(f, ",{name}={rate}")?;
        }
        if let Some((rate, status)) = self.wr_error {
            let name = STATUSES.iter().find(|s| s.1 == status);
            write!(f, ",wr-error={rate}:{}", name.map_or("rem-op", |n| n.0))?;
        }
        let rates = [
            ("qp-fatal", self.qp_fatal),
            ("qp-request", self.qp_request),
            ("qp-access", self.qp_access),
            ("no-qp", self.no_qp),
            ("no-join", self.no_join),
            ("no-destroy", self.no_destroy),
        ];
        for (name, rate) in rates.into_iter().filter(|r| r.1 > 0.0) {
            write!(f, ",{name}={rate}")?;
        }
        if let Some((at, time)) = self.port_down {
            write!(f, ",port-down={}:{}", Time(at), Time(time))?;
        }
        if let Some(at) = self.cq_error {
            write!(f, ",cq-error={}", Time(at))?;
        }
        if let Some(at) = self.device_fatal {
            write!(f, ",device-fatal={}", Time(at))?;
        }
        if let Some((at, code)) = self.event {
            write!(f, ",event={}:{code}", Time(at))?;
        }
        if let Some(lag) = self.event_lag {
            write!(f, ",event-lag={}", Time(lag))?;
        }
        Ok(())
    }
}

/// What happens where a work request would start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    Delay(Duration),
    Drop,
    Cut,
    Error(WcStatus),
    /// The queue pair fails, with an event and no completion that says why.
    QueuePair(QpFault),
}

/// How a queue pair fails by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum QpFault {
    Fatal,
    Request,
    Access,
}

impl QpFault {
    pub(crate) fn event(self, qp_num: u32) -> AsyncEvent {
        match self {
            Self::Fatal => AsyncEvent::QpFatal { qp_num },
            Self::Request => AsyncEvent::QpRequestError { qp_num },
            Self::Access => AsyncEvent::QpAccessError { qp_num },
        }
    }
}

/// What a plan has for one work request.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Fate {
    /// It names a wrong key.
    pub(crate) key: bool,
    /// It goes to the wrong bytes.
    pub(crate) stray: bool,
    pub(crate) delay: Option<Fault>,
    pub(crate) end: Option<Fault>,
}

/// What is refused to a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Refusals {
    pub(crate) made: bool,
    pub(crate) joined: bool,
    pub(crate) destroyed: bool,
}

impl FaultPlan {
    /// A number from 0 to just under 1 for one decision.
    fn draw(&self, qp: u64, wr: u64, what: u64) -> f64 {
        // SplitMix64's finisher, over each word in turn.
        let mut x = self.seed;
        for word in [qp, wr, what] {
            x = x.wrapping_add(word.wrapping_mul(0xd605_bbb5_8c8a_bbcd));
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^= x >> 31;
        }
        (x >> 11) as f64 / (1u64 << 53) as f64
    }

    /// What is refused to the context's queue pair `qp`.
    pub(crate) fn refusals(&self, qp: u64) -> Refusals {
        let hit = |rate: f64, what| rate > 0.0 && self.draw(qp, u64::MAX, what) < rate;
        Refusals {
            made: hit(self.no_qp, 11),
            joined: hit(self.no_join, 12),
            destroyed: hit(self.no_destroy, 13),
        }
    }

    /// What becomes of work request `wr` of the context's queue pair `qp`.
    pub(crate) fn fate(&self, qp: u64, wr: u64) -> Fate {
        let hit = |rate: f64, what| rate > 0.0 && self.draw(qp, wr, what) < rate;
        let fixed = self.delay.filter(|d| hit(d.0, 0)).map(|d| d.1);
        let random = self.reorder.filter(|d| hit(d.0, 1));
        let random = random.map(|d| d.1.mul_f64(self.draw(qp, wr, 2)));
        let later = fixed.unwrap_or_default() + random.unwrap_or_default();
        let end = if hit(self.drop, 3) {
            Some(Fault::Drop)
        } else if hit(self.cut, 4) {
            Some(Fault::Cut)
        } else if let Some((_, status)) = self.wr_error.filter(|e| hit(e.0, 5)) {
            Some(Fault::Error(status))
        } else {
            let fails = [
                (self.qp_fatal, 6, QpFault::Fatal),
                (self.qp_request, 8, QpFault::Request),
                (self.qp_access, 9, QpFault::Access),
            ];
            let fails = fails.into_iter().find(|f| hit(f.0, f.1));
            fails.map(|f| Fault::QueuePair(f.2))
        };
        Fate {
            key: hit(self.key, 7),
            stray: hit(self.stray, 10),
            delay: (later > Duration::ZERO).then_some(Fault::Delay(later)),
            end,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn err(text: &str) -> FaultPlanError {
        text.parse::<FaultPlan>().unwrap_err()
    }

    #[test]
    fn a_bad_item_is_named() {
        let name = |n: &str| n.to_owned();
        assert!(matches!(err("seed=7,drop"), FaultPlanError::Form { item, .. } if item == "drop"));
        assert!(
            matches!(err("delay=0.1"), FaultPlanError::Form { item, form } if item == "delay=0.1" && form == "delay=RATE:TIME")
        );
        assert_eq!(
            err("dorp=1"),
            FaultPlanError::Unknown { name: name("dorp") }
        );
        assert!(err("dorp=1").to_string().contains("port-down"));
        assert_eq!(
            err("drop=0.1,drop=0.1"),
            FaultPlanError::Twice { name: name("drop") }
        );
        assert_eq!(err("seed=-1"), FaultPlanError::Seed { value: name("-1") });
        for bad in ["1.1", "-0.1", "NaN", "", "x", "inf"] {
            let (name, value) = (name("cut"), name(bad));
            assert_eq!(
                err(&format!("cut={bad}")),
                FaultPlanError::Rate { name, value }
            );
        }
        for bad in [
            "5",
            "ms",
            "",
            "-5ms",
            "5 ms",
            "1.5ms",
            "5min",
            "99999999999999s",
        ] {
            let (name, value) = (name("device-fatal"), name(bad));
            let got = err(&format!("device-fatal={bad}"));
            assert_eq!(got, FaultPlanError::Time { name, value });
        }
        let got = err("event=1s:gid");
        assert_eq!(got, FaultPlanError::Code { value: name("gid") });
        let got = err("wr-error=0.1:success");
        assert!(matches!(&got, FaultPlanError::Status { value } if value == "success"));
    }

    #[test]
    fn nothing_is_a_plan_without_faults() {
        for text in ["", " ", ",", "seed=0"] {
            assert_eq!(text.parse(), Ok(FaultPlan::default()));
        }
        assert_eq!(FaultPlan::default().fate(3, 4), Fate::default());
    }

    fn timed() -> impl Strategy<Value = Option<(f64, Duration)>> {
        prop::option::of((0.0..=1.0, time()))
    }

    fn time() -> impl Strategy<Value = Duration> {
        prop_oneof![
            any::<u64>().prop_map(Duration::from_nanos),
            (0..10_000u64).prop_map(Duration::from_millis),
        ]
    }

    proptest! {
        #[test]
        fn a_plan_comes_back_from_its_text(
            seed in any::<u64>(),
            (delay, reorder) in (timed(), timed()),
            rates in prop::array::uniform7(prop_oneof![Just(0.0), 0.0..=1.0, Just(1e-9)]),
            refusals in prop::array::uniform3(prop_oneof![Just(0.0), 0.0..=1.0, Just(1e-9)]),
            wr_error in prop::option::of((0.0..=1.0, 0..STATUSES.len())),
            port_down in prop::option::of((time(), time())),
            (cq_error, device_fatal, event_lag) in (
                prop::option::of(time()),
                prop::option::of(time()),
                prop::option::of(time()),
            ),
            event in prop::option::of((time(), any::<u32>())),
        ) {
            let [drop, key, stray, cut, qp_fatal, qp_request, qp_access] = rates;
            let [no_qp, no_join, no_destroy] = refusals;
            let wr_error = wr_error.map(|(rate, s)| (rate, STATUSES[s].1));
            let plan = FaultPlan {
                seed, delay, reorder, drop, key, stray, cut, wr_error, qp_fatal, qp_request, qp_access,
                no_qp, no_join, no_destroy, port_down, cq_error, device_fatal, event, event_lag,
            };
            prop_assert_eq!(plan.to_string().parse(), Ok(plan));
        }

        #[test]
        fn any_text_is_a_plan_or_an_error(text in "[a-z=:,.0-9-]{0,40}") {
            if let Ok(plan) = text.parse::<FaultPlan>() {
                prop_assert_eq!(plan.to_string().parse(), Ok(plan));
            }
        }
    }

    #[test]
    fn faults_come_as_often_as_planned_and_the_same_each_time() {
        let text = "seed=7,delay=0.1:5ms,reorder=0.2:1ms,drop=0.01,key=0.3,stray=0.15,cut=0.02,wr-error=0.05:rem-op,qp-fatal=0.01";
        let plan: FaultPlan = text.parse().unwrap();
        let n = 50_000u32;
        let fates: Vec<Fate> = (0..n)
            .map(|i| plan.fate((i % 4).into(), i.into()))
            .collect();
        let share = |of: &dyn Fn(&Fate) -> bool| {
            f64::from(fates.iter().filter(|f| of(f)).count() as u32) / f64::from(n)
        };
        let near = |got: f64, want: f64| (got - want).abs() < 0.2 * want;
        assert!(near(share(&|f| f.key), 0.3));
        assert!(near(share(&|f| f.stray), 0.15));
        assert!(near(share(&|f| f.end == Some(Fault::Drop)), 0.01));
        assert!(near(share(&|f| f.end == Some(Fault::Cut)), 0.02));
        assert!(near(
            share(&|f| matches!(f.end, Some(Fault::Error(_)))),
            0.05
        ));
        let fatal = Some(Fault::QueuePair(QpFault::Fatal));
        assert!(near(share(&|f| f.end == fatal), 0.01));
        assert!(near(share(&|f| f.delay.is_some()), 1.0 - 0.9 * 0.8));
        let again: Vec<Fate> = (0..n)
            .map(|i| plan.fate((i % 4).into(), i.into()))
            .collect();
        assert!(fates == again);
        let other = FaultPlan { seed: 8, ..plan };
        assert!((0..n).any(|i| other.fate(0, i.into()) != plan.fate(0, i.into())));
        assert!((0..n).any(|i| plan.fate(1, i.into()) != plan.fate(0, i.into())));
    }
}
