//! The blocks that producers have asked this rank to fetch, as far as they are still being fetched. Pure.

use std::collections::HashMap;

use crate::ids::{Nonce, RequestId};
use crate::transfer::PeerKey;

/// What a session may have open: a peer's jobs are fewer by far.
const MOST: usize = 4096;
/// Units of all of them.
const MOST_UNITS: u64 = 1 << 24;

#[derive(Debug, Default)]
struct OfPeer {
    /// By request and try.
    tries: HashMap<(RequestId, Nonce), usize>,
    open: usize,
    units: u64,
}

/// What is open, by session.
#[derive(Debug, Default)]
pub(crate) struct OpenTakes {
    peers: HashMap<PeerKey, OfPeer>,
}

impl OpenTakes {
    /// One more; false: there is no room.
    pub(crate) fn open(&mut self, peer: PeerKey, of: (RequestId, Nonce), units: u64) -> bool {
        let peer = self.peers.entry(peer).or_default();
        let all = peer.units.saturating_add(units);
        if peer.open >= MOST || all > MOST_UNITS {
            return false;
        }
        peer.open += 1;
        peer.units = all;
        *peer.tries.entry(of).or_default() += 1;
        true
    }

    /// One less.
    pub(crate) fn close(&mut self, peer: PeerKey, of: &(RequestId, Nonce), units: u64) {
        let Some(peer) = self.peers.get_mut(&peer) else {
            return;
        };
        let Some(count) = peer.tries.get_mut(of) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            peer.tries.remove(of);
        }
        peer.open -= 1;
        peer.units = peer.units.saturating_sub(units);
    }

    /// Whether blocks of a try are being fetched from this peer.
    pub(crate) fn any(&self, peer: PeerKey, of: &(RequestId, Nonce)) -> bool {
        let peer = self.peers.get(&peer);
        peer.is_some_and(|peer| peer.tries.contains_key(of))
    }

    /// A session is over.
    pub(crate) fn forget_peer(&mut self, peer: PeerKey) {
        self.peers.remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerKey = PeerKey(1);

    fn of(nonce: u64) -> (RequestId, Nonce) {
        ("r".into(), Nonce(nonce))
    }

    #[test]
    fn a_try_is_open_until_its_last_is_closed() {
        let mut takes = OpenTakes::default();
        assert!(takes.open(PEER, of(1), 5) && takes.open(PEER, of(1), 6));
        assert!(takes.open(PEER, of(2), 7));
        takes.close(PEER, &of(1), 5);
        assert!(takes.any(PEER, &of(1)) && takes.any(PEER, &of(2)));
        assert!(!takes.any(PeerKey(2), &of(1)));
        takes.close(PEER, &of(1), 6);
        // Once more says nothing.
        takes.close(PEER, &of(1), 6);
        assert!(!takes.any(PEER, &of(1)) && takes.any(PEER, &of(2)));
        takes.forget_peer(PEER);
        assert!(!takes.any(PEER, &of(2)));
        takes.close(PEER, &of(2), 7);
    }

    #[test]
    fn there_is_room_for_so_many_and_again_when_some_are_closed() {
        let mut takes = OpenTakes::default();
        assert!((0..MOST).all(|i| takes.open(PEER, of(i as u64), 0)));
        assert!(!takes.open(PEER, of(0), 0) && takes.open(PeerKey(2), of(0), 0));
        takes.close(PEER, &of(3), 0);
        assert!(takes.open(PEER, of(3), MOST_UNITS) && !takes.open(PEER, of(3), 0));
        takes.close(PEER, &of(3), MOST_UNITS);
        assert!(!takes.open(PEER, of(3), MOST_UNITS + 1) && takes.open(PEER, of(3), 1));
        assert!(!takes.open(PEER, of(4), u64::MAX));
    }
}
