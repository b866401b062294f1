//! The checksums of pushes that have arrived before they can be compared. Pure.

use std::collections::HashMap;

use super::thread::MOST_SUMS;
use crate::ids::{Nonce, RequestId};
use crate::transfer::PeerKey;
use crate::wire::{Blob, PushSums, SumsOf};

/// The room of a session, in sums: of what has come and of what is being compared.
const ROOM: u64 = 4 * MOST_SUMS;
/// What a message takes beside its sums. (It has no more units than sums.)
const MESSAGE: u64 = 16;

/// One sender's sums of one try.
#[derive(Debug, Default)]
struct Arrived {
    lists: Vec<(SumsOf, Blob)>,
    count: u64,
    weight: u64,
    /// How many there are to be, once the sender has said that it is done.
    total: Option<u64>,
    /// There was no room for all.
    dropped: bool,
    /// All have come, and were handed out.
    taken: bool,
}

/// What follows from news of one sender's sums.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// There is more to come.
    Wait,
    /// All are here, and the sender has written everything. With the room that they take until
    /// [`ArrivedSums::compared`].
    Compare(Vec<(SumsOf, Blob)>, u64),
    /// The sender has written everything, and there was no room for all its sums.
    NoRoom,
    /// There are more than it has said.
    Lie,
}

/// The sums that have come for expectations that stand.
#[derive(Debug, Default)]
pub(crate) struct ArrivedSums {
    of: HashMap<(RequestId, Nonce), HashMap<PeerKey, Arrived>>,
    held: HashMap<PeerKey, u64>,
}

impl ArrivedSums {
    /// Some sums of a sender that is bound.
    pub(crate) fn add(&mut self, peer: PeerKey, sums: PushSums) -> Next {
        let of_try = self.of.entry((sums.request, sums.nonce)).or_default();
        let arrived = of_try.entry(peer).or_default();
        if arrived.taken {
            return Next::Lie;
        }
        let count = sums.sums.len() as u64 / 8;
        let held = self.held.entry(peer).or_default();
        arrived.count = arrived.count.saturating_add(count);
        if !arrived.dropped && *held + count + MESSAGE <= ROOM {
            *held += count + MESSAGE;
            arrived.weight += count + MESSAGE;
            arrived.lists.push((sums.of, sums.sums));
        } else {
            arrived.dropped = true;
            *held -= std::mem::take(&mut arrived.weight);
            arrived.lists = Vec::new();
        }
        arrived.look()
    }

    /// The sender has written everything, and told so many sums.
    pub(crate) fn done(
        &mut self,
        peer: PeerKey,
        request: &RequestId,
        nonce: Nonce,
        total: u64,
    ) -> Next {
        let of_try = self.of.entry((request.clone(), nonce)).or_default();
        let arrived = of_try.entry(peer).or_default();
        arrived.total = Some(total);
        arrived.look()
    }

    /// Whether a sender has told any sums of a try.
    pub(crate) fn has(&self, peer: PeerKey, request: &RequestId, nonce: Nonce) -> bool {
        let of_try = self.of.get(&(request.clone(), nonce));
        of_try.is_some_and(|of_try| of_try.contains_key(&peer))
    }

    /// What was handed out has been compared.
    pub(crate) fn compared(&mut self, peer: PeerKey, weight: u64) {
        if let Some(held) = self.held.get_mut(&peer) {
            *held = held.saturating_sub(weight);
        }
    }

    /// A try has ended.
    pub(crate) fn forget(&mut self, request: &RequestId, nonce: Nonce) {
        let of_try = self.of.remove(&(request.clone(), nonce));
        for (peer, arrived) in of_try.into_iter().flatten() {
            self.compared(peer, arrived.weight);
        }
    }

    /// A sender has closed its push, or is lost. Whether it had written everything and not told all sums.
    pub(crate) fn forget_sender(
        &mut self,
        peer: PeerKey,
        request: &RequestId,
        nonce: Nonce,
    ) -> bool {
        let key = (request.clone(), nonce);
        let Some(of_try) = self.of.get_mut(&key) else {
            return false;
        };
        let arrived = of_try.remove(&peer);
        if of_try.is_empty() {
            self.of.remove(&key);
        }
        arrived.is_some_and(|arrived| {
            self.compared(peer, arrived.weight);
            arrived.total.is_some() && !arrived.taken
        })
    }

    /// A session is over. Gives the tries of which its sender had written everything and not told all
    /// sums.
    pub(crate) fn forget_peer(&mut self, peer: PeerKey) -> Vec<(RequestId, Nonce)> {
        let tries = self.of.iter().filter(|(_, of)| of.contains_key(&peer));
        let mut tries: Vec<(RequestId, Nonce)> = tries.map(|(key, _)| key.clone()).collect();
        tries.sort_unstable_by(|a, b| (&a.0, a.1.0).cmp(&(&b.0, b.1.0)));
        tries.retain(|(request, nonce)| self.forget_sender(peer, request, *nonce));
        // What is being compared is no more than it was.
        self.held.remove(&peer);
        tries
    }
}

impl Arrived {
    fn look(&mut self) -> Next {
        match self.total {
            Some(total) if self.count > total => Next::Lie,
            Some(total) if self.count == total && !self.taken => {
                self.taken = true;
                match self.dropped {
                    true => Next::NoRoom,
                    false => {
                        let weight = std::mem::take(&mut self.weight);
                        Next::Compare(std::mem::take(&mut self.lists), weight)
                    }
                }
            }
            _ => Next::Wait,
        }
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
            Next::Compare(lists, _) => lists.len(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sums_and_the_end_may_come_in_any_order() {
        let mut arrived = ArrivedSums::default();
        assert_eq!(arrived.add(PEER, sums(2)), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(3)), Next::Wait);
        assert!(arrived.has(PEER, &request(), NONCE) && !arrived.has(OTHER, &request(), NONCE));
        assert_eq!(lists(arrived.done(PEER, &request(), NONCE, 5)), 2);
        assert_eq!(arrived.done(OTHER, &request(), NONCE, 5), Next::Wait);
        assert_eq!(arrived.add(OTHER, sums(4)), Next::Wait);
        assert_eq!(lists(arrived.add(OTHER, sums(1))), 2);
        arrived.forget(&request(), NONCE);
        assert!(arrived.of.is_empty());
    }

    #[test]
    fn more_than_was_said_is_a_lie() {
        let mut arrived = ArrivedSums::default();
        assert_eq!(arrived.add(PEER, sums(2)), Next::Wait);
        assert_eq!(arrived.done(PEER, &request(), NONCE, 1), Next::Lie);
        arrived.forget(&request(), NONCE);
        assert_eq!(arrived.done(PEER, &request(), NONCE, 2), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(3)), Next::Lie);
        // Nor is there anything to be told when all has been.
        assert_eq!(lists(arrived.add(OTHER, sums(2)).and_done(&mut arrived)), 1);
        assert_eq!(arrived.add(OTHER, sums(1)), Next::Lie);
    }

    impl Next {
        /// The other sender has told its two, and says so.
        fn and_done(self, arrived: &mut ArrivedSums) -> Self {
            assert_eq!(self, Next::Wait);
            arrived.done(OTHER, &request(), NONCE, 2)
        }
    }

    #[test]
    fn a_session_has_so_much_room() {
        let mut arrived = ArrivedSums::default();
        let chunk = 1 << 20;
        let weight = chunk + MESSAGE;
        let fits = ROOM / weight;
        for _ in 0..fits {
            assert_eq!(arrived.add(PEER, sums(chunk as usize)), Next::Wait);
        }
        assert_eq!(arrived.held[&PEER], fits * weight);
        // Another session has its own.
        assert_eq!(arrived.add(OTHER, sums(1)), Next::Wait);
        assert_eq!(arrived.add(PEER, sums(chunk as usize)), Next::Wait);
        assert_eq!(arrived.held[&PEER], 0);
        assert_eq!(arrived.add(PEER, sums(1)), Next::Wait);
        let total = (fits + 1) * chunk + 1;
        assert_eq!(arrived.done(PEER, &request(), NONCE, total), Next::NoRoom);
        assert_eq!(lists(arrived.done(OTHER, &request(), NONCE, 1)), 1);
    }

    /// What is handed out takes room until it has been compared, and the same once.
    #[test]
    fn room_comes_back() {
        let mut arrived = ArrivedSums::default();
        assert_eq!(arrived.add(PEER, sums(4)), Next::Wait);
        let Next::Compare(_, weight) = arrived.done(PEER, &request(), NONCE, 4) else {
            panic!("all are there");
        };
        assert_eq!((weight, arrived.held[&PEER]), (4 + MESSAGE, 4 + MESSAGE));
        arrived.forget(&request(), NONCE);
        assert_eq!(arrived.held[&PEER], weight);
        arrived.compared(PEER, weight);
        assert_eq!(arrived.held[&PEER], 0);
        assert_eq!(arrived.add(PEER, sums(4)), Next::Wait);
        arrived.forget(&request(), NONCE);
        assert_eq!(arrived.held[&PEER], 0);
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
        assert!(arrived.forget_sender(OTHER, &other, NONCE));
        assert!(!arrived.forget_sender(OTHER, &other, NONCE));
        assert!(arrived.of.is_empty());
    }
}
