//! One row: one operation over one case, verified first and then timed in turns with its limit.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kvxfer::bench::BenchClient;
use kvxfer::blocks::{GroupBlocks, GroupPairs};
use kvxfer::engine::{Outcome, PullOptions, Push, PushOptions, TransferReport};
use kvxfer::ids::RequestId;
use kvxfer::ticket::Ticket;
use kvxfer::{Peer, Transfer};

use super::case::Case;
use super::initiator::{Begun, Initiator};
use super::limit::Limit;
use crate::output::schema::{Candidate, Measured, Op, Row};
use crate::problem::{Exit, Problem};
use crate::progress::Progress;
use crate::stats::Kept;

/// Rounds of measured transfers and limit, in turns.
const ROUNDS: u32 = 9;
/// Fewer are no median.
const FEWEST_ROUNDS: u32 = 5;
/// How long an offer or an expectation of this command stands: it ends with the session.
const STANDING: Duration = Duration::from_secs(24 * 3600);
/// How long after its deadline a transfer's outcome is waited for. It comes by the deadline; this
/// is for a machine that is very busy.
const LATE: Duration = Duration::from_secs(10);

/// How long a row takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Length {
    /// So long, without its limit.
    Time(Duration),
    /// So many transfers.
    Transfers(u64),
}

/// What a row is measured with.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) client: &'a BenchClient,
    pub(crate) case: &'a Case,
    pub(crate) op: Op,
    /// What posts the blocks, where this process does not.
    pub(crate) by: Option<&'a Initiator>,
    pub(crate) seed: u64,
    pub(crate) length: Length,
    /// Whether the bytes of every round are compared, and not of the first pass alone.
    pub(crate) verify: bool,
    /// Each transfer's deadline.
    pub(crate) timeout: Duration,
    pub(crate) progress: &'a Progress,
}

/// A transfer that can be run again and again.
#[derive(Debug)]
enum Slot {
    Pull {
        ticket: Box<Ticket>,
        pairs: Vec<GroupPairs>,
    },
    Push {
        prefix: String,
        next: u64,
        pairs: Vec<GroupPairs>,
    },
}

/// What transfers have yielded.
#[derive(Debug, Default)]
struct Samples {
    rates: Vec<f64>,
    limits: Vec<f64>,
    reports: Kept<TransferReport>,
    /// From a kernel's launch to its transfer's outcome.
    by_kernels: Kept<Duration>,
}

impl Bench<'_> {
    /// Verifies a first pass byte by byte, then measures.
    ///
    /// # Errors
    ///
    /// [`kvxfer::Error::BenchWrong`] if a byte differs; a transfer that fails or comes too late; a
    /// target that is gone.
    pub(crate) fn run(&self, limit: Option<&Limit>) -> anyhow::Result<Row> {
        let peer = self.client.peer();
        let path = peer.path()?;
        let mut slots = self.prepare()?;
        let count = slots.len();

        let mut first = Samples::default();
        self.round(&mut slots, &mut first, |started, _| started < count as u64)?;
        let mut verified_bytes = self.check(&self.case.all_pairs(self.op), count)?;
        if let Some(limit) = limit {
            // Its memory and connections are to be warm too.
            limit.run(count)?;
        }
        let samples = self.measure(&mut slots, limit, &mut verified_bytes)?;
        self.finish(slots)?;

        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let reports = samples.reports.samples();
        let of = |part: fn(&TransferReport) -> Duration| -> Vec<u64> {
            reports.iter().map(|r| ns(part(r))).collect()
        };
        let by_kernels = samples.by_kernels.samples();
        let row = Measured {
            op: self.op,
            by: self.by.map(|by| by.shown(path.path)),
            path: path.path.to_string(),
            path_reason: path.reason.clone(),
            candidates: path.candidates.iter().map(Candidate::from).collect(),
            block_bytes: self.case.block_bytes,
            blocks: self.case.blocks,
            bytes: self.case.bytes(),
            transfers: samples.reports.seen(),
            operations: reports.first().map_or(0, |r| r.operations),
            latency_ns: match self.op {
                // The queue was made before.
                _ if self.by.is_some() => by_kernels.iter().map(|took| ns(*took)).collect(),
                Op::Read => of(|r| r.prepare + r.wire),
                // A push is submitted when it begins: it is planned within that time.
                Op::Write => of(|r| r.wire),
            },
            prepare_ns: of(|r| r.prepare),
            post_ns: of(|r| r.post),
            wire_ns: of(|r| r.wire),
            rates: samples.rates,
            limits: samples.limits,
            verified_bytes,
        };
        row.into_row()
            .ok_or_else(|| Problem::new(Exit::Check, "nothing was timed").into())
    }

    /// Compares every byte of these slots' destinations with what it must be; returns how many.
    fn check(&self, pairs: &[GroupPairs], slots: usize) -> anyhow::Result<u64> {
        let verified = match self.op {
            Op::Read => self.client.side().verify(self.seed, pairs)?,
            Op::Write => self.client.verify_target(self.seed, pairs)?,
        };
        let wanted = self.case.bytes() * slots as u64;
        if verified != wanted {
            let cause = format!("{verified} bytes were verified and {wanted} moved");
            return Err(Problem::new(Exit::Check, cause).into());
        }
        Ok(verified)
    }

    /// Fills all destinations with what no pattern holds, so that what is not moved is noticed.
    fn poison(&self) -> Result<(), kvxfer::Error> {
        match self.op {
            Op::Read => self.client.side().poison(),
            Op::Write => self.client.poison_target(),
        }
    }

    /// Fills and poisons, and has the target offer or expect every slot's blocks.
    fn prepare(&self) -> Result<Vec<Slot>, kvxfer::Error> {
        let slots = 0..self.case.slots.len();
        match self.op {
            Op::Read => self.client.fill_target(self.seed)?,
            Op::Write => self.client.side().fill(self.seed)?,
        }
        self.poison()?;
        slots
            .map(|slot| {
                let blocks = self.case.remote_blocks(slot);
                let pairs = self.case.pairs(self.op, slot);
                Ok(match self.op {
                    Op::Read => {
                        let request = RequestId::from(format!("read-{slot}"));
                        let ticket = self.client.offer(&request, &blocks, STANDING)?;
                        let ticket = Box::new(ticket);
                        Slot::Pull { ticket, pairs }
                    }
                    Op::Write => {
                        let prefix = format!("write-{slot}");
                        self.client.arm(&prefix, &blocks, 0..u64::MAX, STANDING)?;
                        Slot::Push {
                            prefix,
                            next: 0,
                            pairs,
                        }
                    }
                })
            })
            .collect()
    }

    /// Rounds of transfers, in turns with the limit. With `--verify` the bytes of each are compared and
    /// added to `verified`, outside the time that is measured.
    fn measure(
        &self,
        slots: &mut [Slot],
        limit: Option<&Limit>,
        verified: &mut u64,
    ) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let rounds = match self.length {
            Length::Time(_) => ROUNDS,
            // Every round has a transfer for each slot, where there are so many.
            Length::Transfers(n) => {
                let full = n / slots.len().max(1) as u64;
                u32::try_from(full).unwrap_or(ROUNDS).clamp(1, ROUNDS)
            }
        };
        let mut spent = Duration::ZERO;
        let mut left = match self.length {
            Length::Transfers(n) => n,
            Length::Time(_) => 0,
        };
        for round in 0..rounds {
            if self.verify {
                self.poison()?;
            }
            let least = slots.len() as u64;
            let (transfers, time) = match self.length {
                Length::Time(total) => {
                    if round >= FEWEST_ROUNDS && spent >= total {
                        break;
                    }
                    let slice = total / ROUNDS;
                    self.round(slots, &mut samples, |started, elapsed| {
                        started < least || elapsed < slice
                    })?
                }
                Length::Transfers(_) => {
                    let share = left.div_ceil(u64::from(rounds - round));
                    left -= share;
                    self.round(slots, &mut samples, |started, _| started < share)?
                }
            };
            spent += time;
            if self.verify {
                // They begin in order: fewer transfers than slots are those of the first slots.
                let moved = usize::try_from(transfers).map_or(slots.len(), |n| n.min(slots.len()));
                for slot in 0..moved {
                    *verified += self.check(&self.case.pairs(self.op, slot), 1)?;
                }
            }
            let bytes = self.case.bytes() as f64 * transfers as f64;
            samples.rates.push(bytes / time.as_secs_f64());
            if let Some(limit) = limit {
                let time = limit.run(usize::try_from(transfers).unwrap_or(usize::MAX))?;
                samples.limits.push(bytes / time.as_secs_f64());
            }
            self.progress.round_done(round + 1, rounds);
        }
        self.progress.row_done();
        Ok(samples)
    }

    /// Starts transfers as long as `more` says (of how many were started, and the time since the
    /// first), all slots at once and each again when it is done. Returns how many there were and the time
    /// until the last one's end.
    fn round(
        &self,
        slots: &mut [Slot],
        samples: &mut Samples,
        more: impl Fn(u64, Duration) -> bool,
    ) -> anyhow::Result<(u64, Duration)> {
        if let Some(by) = self.by {
            return self.round_by_kernels(by, slots, samples, more);
        }
        let peer = self.client.peer();
        let mut running: VecDeque<(usize, Transfer)> = VecDeque::new();
        let begun = Instant::now();
        let mut started = 0;
        for (at, slot) in slots.iter_mut().enumerate() {
            if more(started, begun.elapsed()) {
                running.push_back((at, self.start(peer, slot)?));
                started += 1;
            }
        }
        while let Some((at, transfer)) = running.pop_front() {
            self.await_done(&transfer)?;
            samples.reports.add(transfer.report());
            if more(started, begun.elapsed())
                && let Some(slot) = slots.get_mut(at)
            {
                running.push_back((at, self.start(peer, slot)?));
                started += 1;
            }
        }
        Ok((started, begun.elapsed()))
    }

    /// The same with transfers whose blocks a kernel names: one after the other, and without the time that their queues
    /// take to be made.
    fn round_by_kernels(
        &self,
        by: &Initiator,
        slots: &mut [Slot],
        samples: &mut Samples,
        more: impl Fn(u64, Duration) -> bool,
    ) -> anyhow::Result<(u64, Duration)> {
        let (mut started, mut spent) = (0, Duration::ZERO);
        let count = slots.len().max(1) as u64;
        while more(started, spent) {
            let at = usize::try_from(started % count).unwrap_or(0);
            let peer = self.client.peer();
            let (work, pairs) = match slots.get_mut(at) {
                Some(Slot::Pull { ticket, pairs }) => {
                    let pull = peer.begin_pull(ticket, &destinations(pairs), self.pulls())?;
                    (Begun::Pull(pull), pairs)
                }
                Some(Slot::Push {
                    prefix,
                    next,
                    pairs,
                }) => (Begun::Push(self.begin(peer, prefix, next)?), pairs),
                None => break,
            };
            let format = self.client.side().format();
            let ended = by.run(work, format, pairs, self.timeout)?;
            if let Some(cause) = ended.failed {
                return Err(Failed {
                    op: self.op,
                    cause,
                    timeout: self.timeout,
                }
                .into());
            }
            samples.reports.add(ended.report);
            samples.by_kernels.add(ended.took);
            spent += ended.there;
            started += 1;
        }
        Ok((started, spent))
    }

    fn pulls(&self) -> PullOptions {
        PullOptions {
            deadline: Some(self.timeout),
            hold: true,
            ..PullOptions::default()
        }
    }

    /// Begins the next push of a slot.
    fn begin(&self, peer: &Peer, prefix: &str, next: &mut u64) -> Result<Push, kvxfer::Error> {
        let request = RequestId::from(format!("{prefix}.{next}"));
        *next += 1;
        let options = PushOptions {
            deadline: Some(self.timeout),
            ..PushOptions::default()
        };
        peer.begin_push_with(&request, options)
    }

    fn start(&self, peer: &Peer, slot: &mut Slot) -> Result<Transfer, kvxfer::Error> {
        match slot {
            Slot::Pull { ticket, pairs } => peer.pull(ticket, pairs, self.pulls()),
            Slot::Push {
                prefix,
                next,
                pairs,
            } => {
                let push = self.begin(peer, prefix, next)?;
                push.all_layers(pairs, None)?;
                push.commit()
            }
        }
    }

    fn await_done(&self, transfer: &Transfer) -> anyhow::Result<()> {
        match transfer.wait(self.timeout + LATE) {
            Some(Outcome::Done) => Ok(()),
            Some(outcome) => {
                let cause = outcome.failure().map(|failure| failure.first_cause.clone());
                Err(Failed {
                    op: self.op,
                    cause: cause.unwrap_or(kvxfer::transfer::Cause::LaneFailed),
                    timeout: self.timeout,
                }
                .into())
            }
            None => Err(Problem::new(
                Exit::Peer,
                format!("a transfer has no outcome {LATE:?} after its deadline"),
            )
            .with_fix("this is a defect of kvxfer: please report it")
            .into()),
        }
    }

    /// The target need hold its blocks no longer.
    fn finish(&self, slots: Vec<Slot>) -> Result<(), kvxfer::Error> {
        for slot in slots {
            match slot {
                Slot::Pull { ticket, .. } => self.client.peer().release(&ticket)?,
                Slot::Push { prefix, .. } => self.client.disarm(&prefix)?,
            }
        }
        Ok(())
    }
}

/// This side's blocks of a pull.
fn destinations(pairs: &[GroupPairs]) -> Vec<GroupBlocks> {
    let of = |of: &GroupPairs| GroupBlocks {
        group: of.group,
        blocks: of.pairs.iter().map(|pair| pair.dst).collect(),
    };
    pairs.iter().map(of).collect()
}

/// A transfer of a row has failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("a {} transfer failed", self.op.name())]
pub(crate) struct Failed {
    pub(crate) op: Op,
    pub(crate) timeout: Duration,
    #[source]
    pub(crate) cause: kvxfer::transfer::Cause,
}
