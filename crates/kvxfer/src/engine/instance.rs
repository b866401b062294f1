//! The ranks of one remote engine as their user sees them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handle::Transfer;
use super::net;
use super::peer::{Peer, PeerFacts, PullOptions};
use super::pull::Pull;
use super::push::{Push, PushOptions};
use crate::blocks::{GroupBlocks, GroupPairs};
use crate::error::Error;
use crate::ids::{EngineId, Rank, RequestId};
use crate::ticket::Ticket;
use crate::transport::PathInfo;

/// A remote engine: those of its ranks that were connected to, each a [`Peer`].
///
/// What a ticket is for says the ticket: [`pull`](Self::pull) and [`release`](Self::release) go to
/// the rank that made it. Where no ticket says it, a [`peer`](Self::peer) is to be chosen, unless
/// there is only one. Where the two engines are cut into ranks differently, a request's blocks are in
/// parts at several ranks: [`pull_ranks`](Self::pull_ranks) and
/// [`begin_push_ranks`](Self::begin_push_ranks) are for all of them at once.
///
/// Ranks are lost and come back each for itself. What is under way with the others goes on, more can
/// be asked of them, and a rank that is back works again through the same instance; the events of
/// peers name the rank. Each rank offers to as many readers as there are.
///
/// Clones are the same instance. The sessions close with the last of them, but for those whose `Peer`
/// somebody has cloned.
#[derive(Debug, Clone)]
pub struct Instance {
    /// At least one, by rank, each rank once, all of one engine.
    peers: Arc<[Peer]>,
}

impl Instance {
    /// Of one rank.
    pub(crate) fn of(peer: Peer) -> Self {
        Self {
            peers: Arc::new([peer]),
        }
    }

    /// Of the ranks at these addresses, which must be different ones of one engine.
    ///
    /// # Errors
    ///
    /// [`Error::NoRanks`], [`Error::OtherEngine`], [`Error::SameRank`].
    pub(crate) fn of_ranks(mut ranks: Vec<(String, Peer)>) -> Result<Self, Error> {
        let Some((first_address, first)) = ranks.first() else {
            return Err(Error::NoRanks);
        };
        let wanted = first.name().engine;
        for (address, peer) in &ranks {
            let name = peer.name();
            if name.engine != wanted {
                return Err(Error::OtherEngine {
                    address: address.clone(),
                    engine: name.engine,
                    rank: name.rank,
                    first: first_address.clone(),
                    wanted,
                });
            }
        }
        // Stable: of two that are the same rank, the one that was given first stays first.
        ranks.sort_by_key(|(_, peer)| peer.rank());
        for pair in ranks.windows(2) {
            if let [(first, peer), (second, same)] = pair
                && peer.rank() == same.rank()
            {
                return Err(Error::SameRank {
                    rank: peer.rank(),
                    first: first.clone(),
                    second: second.clone(),
                });
            }
        }
        Ok(Self {
            peers: ranks.into_iter().map(|(_, peer)| peer).collect(),
        })
    }

    /// The engine's name. Of an instance of one rank it can change as [`Peer::name`] can.
    #[must_use]
    pub fn engine_id(&self) -> EngineId {
        // There is at least one.
        let name = self.peers.first().map(Peer::name);
        name.map_or_else(|| EngineId::from(""), |name| name.engine)
    }

    /// The ranks, in their order. There is at least one.
    #[must_use]
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The peer of that rank.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`].
    pub fn peer(&self, rank: Rank) -> Result<&Peer, Error> {
        let at = self.peers.binary_search_by_key(&rank, Peer::rank);
        at.ok()
            .and_then(|at| self.peers.get(at))
            .ok_or_else(|| Error::NoSuchRank {
                engine: self.engine_id(),
                rank,
                ranks: self.ranks(),
            })
    }

    /// The peer, where there is only one.
    fn only(&self, operation: &'static str) -> Result<&Peer, Error> {
        match &*self.peers {
            [peer] => Ok(peer),
            _ => Err(Error::SeveralRanks {
                operation,
                engine: self.engine_id(),
                ranks: self.ranks(),
            }),
        }
    }

    fn ranks(&self) -> Vec<Rank> {
        self.peers.iter().map(Peer::rank).collect()
    }

    /// Whether a session with every rank stands now. [`Peer::is_up`] says it of one.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.peers.iter().all(Peer::is_up)
    }

    /// Waits until a session with every rank stands, for at most `timeout`; says whether they do.
    #[must_use]
    pub fn wait_up(&self, timeout: Duration) -> bool {
        let until = net::after(timeout);
        loop {
            let left = || until.saturating_duration_since(Instant::now());
            if !self.peers.iter().all(|peer| peer.wait_up(left())) {
                return false;
            }
            // One may have been lost while another was waited for.
            if self.is_up() {
                return true;
            }
        }
    }

    /// The path to the only rank: [`Peer::path`].
    ///
    /// # Errors
    ///
    /// [`Error::SeveralRanks`], [`Error::NotConnected`].
    pub fn path(&self) -> Result<PathInfo, Error> {
        self.only("path")?.path()
    }

    /// The queue pairs to the only rank, and how many workers drive them: [`Peer::lanes`].
    ///
    /// # Errors
    ///
    /// [`Error::SeveralRanks`], [`Error::NotConnected`].
    pub fn lanes(&self) -> Result<(usize, usize), Error> {
        self.only("lanes")?.lanes()
    }

    /// What the only rank has told of itself: [`Peer::facts`].
    ///
    /// # Errors
    ///
    /// [`Error::SeveralRanks`], [`Error::NotConnected`].
    pub fn facts(&self) -> Result<PeerFacts, Error> {
        self.only("facts")?.facts()
    }

    /// Reads blocks of an offer of one of the ranks: [`Peer::pull`] of the one that the ticket is of.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`], [`Error::WrongInstance`], and as [`Peer::pull`].
    pub fn pull(
        &self,
        ticket: &Ticket,
        pairs: &[GroupPairs],
        options: PullOptions,
    ) -> Result<Transfer, Error> {
        self.maker_of(ticket)?.pull(ticket, pairs, options)
    }

    /// Begins a pull of an offer of one of the ranks whose blocks kernels ask for: [`Peer::begin_pull`] of the one that
    /// the ticket is of.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchRank`], [`Error::WrongInstance`], and as [`Peer::begin_pull`].
    pub fn begin_pull(
        &self,
        ticket: &Ticket,
        into: &[GroupBlocks],
        options: PullOptions,
    ) -> Result<Pull, Error> {
        self.maker_of(ticket)?.begin_pull(ticket, into, options)
    }

    /// Tells the rank that the ticket is of that this reader needs its blocks no more:
    /// [`Peer::release`].
    ///
    /// # Errors
    ///
    /// As [`pull`](Self::pull) for the ticket and the connection.
    pub fn release(&self, ticket: &Ticket) -> Result<(), Error> {
        self.maker_of(ticket)?.release(ticket)
    }

    /// Begins to push a request to the only rank: [`Peer::begin_push`]. Where there are several, each
    /// of those that take a part of the request gets a push of its own, through
    /// [`peer`](Self::peer).
    ///
    /// # Errors
    ///
    /// [`Error::SeveralRanks`], and as [`Peer::begin_push`].
    pub fn begin_push(&self, request: &RequestId) -> Result<Push, Error> {
        self.only("begin_push")?.begin_push(request)
    }

    /// The same with settings. A ticket among them says which rank it is, also where there are several.
    ///
    /// # Errors
    ///
    /// [`Error::SeveralRanks`] without a ticket; [`Error::NoSuchRank`], [`Error::WrongInstance`]; and
    /// as [`Peer::begin_push_with`].
    pub fn begin_push_with(
        &self,
        request: &RequestId,
        options: PushOptions,
    ) -> Result<Push, Error> {
        let peer = match &options.ticket {
            Some(ticket) => self.maker_of(ticket)?,
            None => self.only("begin_push")?,
        };
        peer.begin_push_with(request, options)
    }

    /// The peer that a ticket is of by its rank. Whether it is of that engine, the peer looks.
    pub(super) fn maker_of(&self, ticket: &Ticket) -> Result<&Peer, Error> {
        self.peer(ticket.rank).map_err(|error| {
            let here = self.engine_id();
            if ticket.engine == here {
                return error;
            }
            Error::WrongInstance {
                ticket: format!("{} {}", ticket.engine, ticket.rank),
                here: here.to_string(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PathKind;
    use crate::engine::panic_tests::pair;
    use crate::engine::tether::Tether;
    use crate::transfer::Cause;

    /// Ranks that come up one after another do not each have the whole time.
    #[test]
    fn the_wait_for_all_ranks_has_one_limit() {
        const STEP: Duration = Duration::from_secs(1);
        // The second rank is up by then, the last one is not.
        const LIMIT: Duration = Duration::from_millis(2500);
        let (_producer, consumer, instance, _) = pair(PathKind::Arena);
        let session = instance.peers()[0].session().expect("a session");
        let tethers: Vec<Arc<Tether>> = (0..4).map(|_| Tether::new().0).collect();
        let peer = |tether: &Arc<Tether>| {
            let engine = Arc::clone(consumer.engine.inner());
            let peer = Peer::connected(engine, Arc::clone(&session), Arc::clone(tether));
            tether.lost(Cause::PeerDead);
            peer
        };
        let ranks = Instance {
            peers: tethers.iter().map(peer).collect(),
        };
        assert!(!ranks.wait_up(Duration::ZERO));
        let again = Arc::clone(&session);
        let coming = std::thread::spawn(move || {
            for tether in tethers {
                std::thread::sleep(STEP);
                tether.up(Arc::clone(&again));
            }
        });
        assert!(!ranks.wait_up(LIMIT), "each rank had a limit of its own");
        coming.join().expect("all come up");
        assert!(ranks.wait_up(Duration::ZERO));
    }
}
