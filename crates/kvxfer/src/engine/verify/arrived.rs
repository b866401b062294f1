//! The checksums of pushes that have arrived before they can be compared. Pure.

use std::collections::HashMap;

use super::thread::MOST_SUMS;
use crate::ids::{Nonce, RequestId};
use crate::transfer::PeerKey;
use crate::wire::{Blob, PushSums, SumsOf};

/// One sender's sums of one try.
#[derive(Debug, Default)]
struct Arrived {
    lists: Vec<(SumsOf, Blob)>,
    count: u64,
    /// How many there are to be, once the sender has said that it is done.
    total: Option<u64>,
    /// There was no room for all.
    dropped: bool,
}

/// What follows from news of one sender's sums.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// There is more to come.
    Wait,
    /// All are here, and the sender has written everything.
    Compare(Vec<(SumsOf, Blob)>),
    /// The sender has written everything, and there was no room for all its sums.
    NoRoom,
    /// There are more than it has said.
    Lie,
}

/// The sums that have come for expectations that stand. Each session has room for
/// [`MOST_SUMS`](super::MOST_SUMS).
#[derive(Debug, Default)]
pub(crate) struct ArrivedSums {
    of: HashMap<(PeerKey, RequestId, Nonce), Arrived>,
}

impl ArrivedSums {
    /// Some sums of a sender that is bound.
    pub(crate) fn add(&mut self, peer: PeerKey, sums: PushSums) -> Next {
        let of_peer = self.of.iter().filter(|(key, _)| key.0 == peer);
        let held: u64 = of_peer
            .filter(|(_, arrived)| !arrived.dropped)
            .map(|(_, arrived)| arrived.count)
            .sum();
        let count = sums.sums.len() as u64 / 8;
        let key = (peer, sums.request, sums.nonce);
        let arrived = self.of.entry(key.clone()).or_default();
        arrived.count = arrived.count.saturating_add(count);
        arrived.dropped |= held.saturating_add(count) > MOST_SUMS;
        match arrived.dropped {
            true => arrived.lists = Vec::new(),
            false => arrived.lists.push((sums.of, sums.sums)),
        }
        self.look(&key)
    }

    /// The sender has written everything, and told so many sums.
    pub(crate) fn done(
        &mut self,
        peer: PeerKey,
        request: &RequestId,
        nonce: Nonce,
        total: u64,
    ) -> Next {
        let key = (peer, request.clone(), nonce);
        self.of.entry(key.clone()).or_default().total = Some(total);
        self.look(&key)
    }

    fn look(&mut self, key: &(PeerKey, RequestId, Nonce)) -> Next {
        let Some(arrived) = self.of.get(key) else {
            return Next::Wait;
        };
        match arrived.total {
            Some(total) if arrived.count >= total => {}
            _ => return Next::Wait,
        }
        match self.of.remove(key) {
            Some(arrived) if Some(arrived.count) != arrived.total => Next::Lie,
            Some(arrived) if arrived.dropped => Next::NoRoom,
            Some(arrived) => Next::Compare(arrived.lists),
            None => Next::Wait,
        }
    }

    /// A sender's push has ended otherwise.
    pub(crate) fn forget(&mut self, peer: PeerKey, request: &RequestId, nonce: Nonce) {
        self.of.remove(&(peer, request.clone(), nonce));
    }

    /// A session is over. Gives the tries of which the sender had written everything and not told all
    /// sums.
    pub(crate) fn forget_peer(&mut self, peer: PeerKey) -> Vec<(RequestId, Nonce)> {
        let gone = self.of.extract_if(|key, _| key.0 == peer);
        let written = gone.filter(|(_, arrived)| arrived.total.is_some());
        let mut written: Vec<_> = written
            .map(|((_, request, nonce), _)| (request, nonce))
            .collect();
        written.sort_unstable_by(|a, b| (&a.0, a.1.0).cmp(&(&b.0, b.1.0)));
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerKey = PeerKey(1);
    const OTHER: PeerKey = PeerKey(2);
    const NONCE: Nonce = Nonce(7);

    fn request() -> RequestId {
        "r".into()
    }

    fn sums(count: usize) -> PushSums {
        let of = SumsOf {
            group: 0,
            layer: None,
            units: (0..count as u32).collect(),
        };
        PushSums {
            request: request(),
            nonce: NONCE,
            of,
            sums: Blob(vec![0; count * 8]),
        }
    }

    fn lists(next: Next) -> usize {
        match next {
            Next::Compare(lists) => lists.len(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sums_and_the_end_may_come_in_any_order() {
        let mut arrived = ArrivedSums::default();
        assert_eq!(arrived.add(PEER, sums(2)), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(3)), Next::Wait);
        assert_eq!(lists(arrived.done(PEER, &request(), NONCE, 5)), 2);
        assert_eq!(arrived.done(PEER, &request(), NONCE, 5), Next::Wait);
        assert_eq!(arrived.add(OTHER, sums(3)), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(4)), Next::Wait);
        assert_eq!(lists(arrived.add(PEER, sums(1))), 2);
        assert_eq!(lists(arrived.done(OTHER, &request(), NONCE, 3)), 1);
        assert!(arrived.of.is_empty());
    }

    #[test]
    fn more_than_was_said_is_a_lie() {
        let mut arrived = ArrivedSums::default();
        assert_eq!(arrived.add(PEER, sums(2)), Next::Wait);
        assert_eq!(arrived.done(PEER, &request(), NONCE, 1), Next::Lie);
        assert_eq!(arrived.done(PEER, &request(), NONCE, 2), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(3)), Next::Lie);
    }

    #[test]
    fn a_session_has_so_much_room() {
        let mut arrived = ArrivedSums::default();
        let chunk = 1 << 20;
        let fits = MOST_SUMS / chunk;
        for _ in 0..fits {
            assert_eq!(arrived.add(PEER, sums(chunk as usize)), Next::Wait);
        }
        // Another session's has its own.
        assert_eq!(arrived.add(OTHER, sums(1)), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(1)), Next::Wait);
        let total = fits * chunk + 1;
        assert_eq!(arrived.done(PEER, &request(), NONCE, total), Next::NoRoom);
        assert_eq!(lists(arrived.done(OTHER, &request(), NONCE, 1)), 1);
    }

    #[test]
    fn what_a_lost_session_owes_is_named() {
        let mut arrived = ArrivedSums::default();
        let other = RequestId::from("s");
        assert_eq!(arrived.done(PEER, &other, NONCE, 1), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(1)), Next::Wait);
        assert_eq!(arrived.done(OTHER, &other, NONCE, 1), Next::Wait);
        assert_eq!(arrived.forget_peer(PEER), [(other.clone(), NONCE)]);
        assert_eq!(arrived.forget_peer(PEER), []);
        arrived.forget(OTHER, &other, NONCE);
        assert!(arrived.of.is_empty());
    }
}
