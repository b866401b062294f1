//! The queue pairs of a session on their way up: joined with the peer's, by pairs of rails, and numbered. A pair
//! of rails of which one cannot be made or joined is left out whole, as long as another is left.

use std::sync::Arc;

use tracing::warn;

use kvxfer_verbs::{Init, Link as QpLink, QpEndpoint, QueuePair, RtrAttr, Rts, RtsAttr};

use super::async_events::Watched;
use super::books::pack_cause;
use super::notices::Inbox;
use super::peer_lanes::LanePlace;
use super::worker::{Joined, errno_of};
use crate::error::{Error, chain};
use crate::transfer::{Cause, LocalOperation};
use crate::wire::QpReset;

const MIN_RNR_TIMER: u8 = 12;

/// A queue pair in INIT.
#[derive(Debug)]
pub(crate) struct Made {
    /// The rail that it is on.
    pub(crate) rail: usize,
    /// The worker that has its completions.
    pub(crate) worker: u16,
    pub(crate) qp: QueuePair<Init>,
    pub(crate) inbox: Option<Inbox>,
    pub(crate) watched: Arc<Watched>,
}

/// A queue pair, the peer's that it is to be joined with, and the way there.
pub(super) type Joining = (Made, QpEndpoint, QpLink);

/// A pair of rails that was left out when the peer counted on it.
#[derive(Debug)]
pub(super) struct LeftOut {
    pub(super) pair: usize,
    pub(super) error: Error,
}

/// The lanes of a session that are up, and the places of all: both sides number them in the same way.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    up: Vec<Joined>,
    places: Vec<LanePlace>,
    /// The number of the first place; and whether these succeed others.
    first: u16,
    rebuilds: bool,
    left_out: Vec<LeftOut>,
}

impl Lanes {
    /// Successors, from a number on.
    pub(super) fn from_number(first: u16) -> Self {
        Self {
            first,
            rebuilds: true,
            ..Self::default()
        }
    }

    /// Joins all lanes of a pair of rails, which get the next numbers, or none. Gives the error that leaves the
    /// pair out: they have no numbers then.
    ///
    /// # Errors
    ///
    /// A queue pair that was joined and is not to be cannot be destroyed: the session cannot be.
    pub(super) fn join(
        &mut self,
        pair: usize,
        joining: Vec<Joining>,
        retries: RtsAttr,
    ) -> Result<Option<Error>, Error> {
        let first = self.up.len();
        let mut places = Vec::with_capacity(joining.len());
        for (made, remote, link) in joining {
            let Made {
                rail,
                worker,
                qp,
                inbox,
                watched,
            } = made;
            // Cards take up to four times what they are told (InfiniBand, volume 1, 9.7.6.1.3).
            let times = if matches!(link, QpLink::Rdma) { 4 } else { 1 };
            match joined(qp, remote, link, retries) {
                Ok(qp) => self.up.push(Joined {
                    rail,
                    worker,
                    pair,
                    number: self.number(self.places.len() + places.len()),
                    qp,
                    inbox,
                    watched,
                    tried: retries.retry_time().map(|time| time * times),
                    rebuilt: self.rebuilds,
                }),
                Err(error) => {
                    // The peer may send on them already.
                    for joined in self.up.drain(first..) {
                        joined.qp.destroy()?;
                    }
                    return Ok(Some(error));
                }
            }
            places.push(LanePlace::new(worker, pair));
        }
        self.places.append(&mut places);
        Ok(None)
    }

    fn number(&self, at: usize) -> u16 {
        self.first
            .saturating_add(u16::try_from(at).unwrap_or(u16::MAX))
    }

    /// A pair of rails is left out of what both sides number already: the next lanes, of these workers, are
    /// down from the beginning.
    pub(super) fn leave_out(&mut self, pair: usize, workers: &[u16], error: Error) {
        let reason = chain(&error);
        warn!(pair, reason, "a pair of devices is left out");
        let places = workers.iter().map(|worker| LanePlace::down(*worker, pair));
        self.places.extend(places);
        self.left_out.push(LeftOut { pair, error });
    }

    /// # Errors
    ///
    /// Why the first pair was left out, if all were.
    pub(super) fn some_up(&mut self) -> Result<(), Error> {
        match self.left_out.is_empty() || !self.up.is_empty() {
            true => Ok(()),
            false => Err(self.left_out.swap_remove(0).error),
        }
    }

    /// What the peer is to be told of lanes that it counts on and that are not there.
    pub(super) fn resets(&self) -> Vec<QpReset> {
        let reset = |left: &LeftOut| {
            let of_pair = (0_u16..).zip(&self.places);
            let of_pair = of_pair.filter(|(_, place)| place.pair == left.pair);
            gone(of_pair.map(|(number, _)| number).collect(), &left.error)
        };
        self.left_out.iter().map(reset).collect()
    }

    /// Those that are up, the places of all, and the pairs that are left out.
    pub(super) fn into_parts(self) -> (Vec<Joined>, Vec<LanePlace>, Vec<LeftOut>) {
        (self.up, self.places, self.left_out)
    }

    /// The only lane.
    pub(super) fn pop(&mut self) -> Option<Joined> {
        self.up.pop()
    }
}

/// What the peer is told of queue pairs that it counts on and that have not come up.
pub(super) fn gone(lanes: Vec<u16>, error: &Error) -> QpReset {
    let errno = match error {
        Error::Verbs(error) => errno_of(error),
        _ => 0,
    };
    QpReset {
        lanes,
        cause: pack_cause(&Cause::LocalDevice {
            operation: LocalOperation::QueuePair,
            errno,
        }),
    }
}

fn joined(
    qp: QueuePair<Init>,
    remote: QpEndpoint,
    link: QpLink,
    retries: RtsAttr,
) -> Result<QueuePair<Rts>, Error> {
    let attr = RtrAttr {
        remote,
        link,
        min_rnr_timer: MIN_RNR_TIMER,
    };
    Ok(qp.rtr(attr)?.rts(retries)?)
}
