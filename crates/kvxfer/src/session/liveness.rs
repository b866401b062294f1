//! Heartbeats: when to ping, and what silence means.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Time;

/// Pings that may be unanswered before the oldest is forgotten.
const OUTSTANDING: usize = 64;

/// What the passing of time has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing new.
    Quiet,
    /// Silence has lasted long enough to be a stall.
    Stalled(Duration),
    /// Silence has lasted too long.
    Dead(Duration),
}

#[derive(Debug)]
struct Outstanding {
    sequence: u64,
    sent: Time,
    /// Whether somebody asked for it and wants to know.
    wanted: bool,
}

/// The heartbeat of an authenticated session.
#[derive(Debug)]
pub(super) struct Liveness {
    interval: Duration,
    stall_after: Duration,
    dead_after: Duration,
    heard: Time,
    stalled: bool,
    next_ping: Time,
    sequence: u64,
    pings: VecDeque<Outstanding>,
    /// When this machine was to be looked at next, as of the last look.
    due: Time,
}

impl Liveness {
    pub(super) fn new(
        now: Time,
        interval: Duration,
        stall_after: Duration,
        dead_after: Duration,
    ) -> Self {
        // A zero interval would have the driver spin.
        let interval = interval.max(Duration::from_millis(1));
        let mut this = Liveness {
            interval,
            stall_after,
            dead_after: dead_after.max(stall_after),
            heard: now,
            stalled: false,
            next_ping: now + interval,
            sequence: 0,
            pings: VecDeque::new(),
            due: now,
        };
        this.due = this.next_timeout();
        this
    }

    /// Notes that the machine is looked at. If it should have been looked at much earlier, this
    /// process itself was stopped or starved: it could not have heard the peer in that time, so the
    /// time is not held against it.
    pub(super) fn look(&mut self, now: Time) {
        let late = now.since(self.due);
        if late > self.interval {
            self.heard = (self.heard + late).min(now);
        }
    }

    /// Notes when the next look is due. Call it at the end of each input.
    pub(super) fn looked(&mut self, now: Time) {
        self.due = self.next_timeout().max(now);
    }

    /// Notes a sign of life; returns how long the peer was silent if it was stalled.
    pub(super) fn heard(&mut self, now: Time) -> Option<Duration> {
        let silent = now.since(self.heard);
        self.heard = self.heard.max(now);
        std::mem::take(&mut self.stalled).then_some(silent)
    }

    /// Judges the silence.
    pub(super) fn judge(&mut self, now: Time) -> Verdict {
        let silent = now.since(self.heard);
        if silent >= self.dead_after {
            Verdict::Dead(silent)
        } else if silent >= self.stall_after && !self.stalled {
            self.stalled = true;
            Verdict::Stalled(silent)
        } else {
            Verdict::Quiet
        }
    }

    /// Whether a heartbeat is due; the next one is then an interval away.
    pub(super) fn ping_due(&mut self, now: Time) -> bool {
        let due = now >= self.next_ping;
        if due {
            self.next_ping = now + self.interval;
        }
        due
    }

    /// Numbers a ping that is sent now.
    pub(super) fn ping(&mut self, now: Time, wanted: bool) -> u64 {
        let sequence = self.sequence;
        self.sequence += 1;
        if self.pings.len() == OUTSTANDING {
            self.pings.pop_front();
        }
        self.pings.push_back(Outstanding {
            sequence,
            sent: now,
            wanted,
        });
        sequence
    }

    /// Takes an answer; returns the round trip if somebody wants to know it.
    pub(super) fn pong(&mut self, now: Time, sequence: u64, echo: u64) -> Option<Duration> {
        // An unknown number is an answer to a forgotten ping, or a lie that changes nothing.
        let at = self
            .pings
            .iter()
            .position(|p| p.sequence == sequence && p.sent.0 == echo)?;
        let ping = self.pings.remove(at)?;
        ping.wanted.then(|| now.since(ping.sent))
    }

    pub(super) fn next_timeout(&self) -> Time {
        let silence = if self.stalled {
            self.dead_after
        } else {
            self.stall_after
        };
        self.next_ping.min(self.heard + silence)
    }
}
