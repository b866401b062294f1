//! Which peers are here, and in which order the engine's owner hears of it. Pure: sessions that
//! come and go in, events out.
//!
//! A peer is a rank by name, whatever number of sessions it has. Its owner hears, strictly in turn,
//! that it is here ([`Event::PeerUp`], or [`Event::PeerRestarted`] for another life than the last)
//! and that it is not ([`Event::PeerDown`]). A session that is over is `lost` first and `gone` when
//! every transfer that ran over it has told its outcome; nothing of the peer is told in between. So
//! the failures of a life come before its `PeerDown`, and that before the next `PeerUp`.
//!
//! What is told follows from what was told and from what is: whoever takes events late gets fewer
//! of them, not older ones.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::event::{Event, PeerName};
use crate::ids::Generation;
use crate::transfer::{Cause, PeerKey};

/// Names that are remembered; beyond that, only of those that are here.
const MAX_NAMES: usize = 4096;
/// Lives that are remembered of one name; one from before would count as new.
const MAX_LIVES: usize = 1024;

#[derive(Debug, Default)]
struct Record {
    /// Its lives in the order in which they were met. Only the last is honoured.
    lives: Vec<Generation>,
    /// Sessions that stand.
    up: Vec<(PeerKey, Generation)>,
    /// Sessions that are over, with transfers that have not told their outcomes.
    going: HashSet<PeerKey>,
    /// The life that the owner knows to be here.
    told: Option<Generation>,
    /// The life that the owner knew last.
    last: Option<Generation>,
    /// Why the life that was told has lost its last session, if it has.
    fell: Option<Cause>,
    /// Whether it stands in the line of those that may have news.
    queued: bool,
}

impl Record {
    fn is_here(&self) -> bool {
        !self.up.is_empty() || !self.going.is_empty() || self.told.is_some()
    }

    fn next(&mut self, name: &PeerName) -> Option<Event> {
        if !self.going.is_empty() {
            return None;
        }
        if let Some(generation) = self.told
            && let Some(cause) = self.fell.take()
        {
            self.told = None;
            self.last = Some(generation);
            return Some(Event::PeerDown {
                peer: name.clone(),
                generation,
                cause,
            });
        }
        let now = *self.lives.last()?;
        if self.told.is_some() || !self.up.iter().any(|(_, life)| *life == now) {
            return None;
        }
        self.told = Some(now);
        Some(match self.last.replace(now) {
            Some(old) if old != now => Event::PeerRestarted {
                peer: name.clone(),
                old,
                new: now,
            },
            _ => Event::PeerUp {
                peer: name.clone(),
                generation: now,
            },
        })
    }
}

/// A peer that has said who it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Met {
    /// A later life of it has been met before.
    Retired,
    /// It is welcome; these sessions of earlier lives are to be ended.
    Current(Vec<PeerKey>),
}

#[derive(Debug, Default)]
pub(crate) struct Presence {
    peers: HashMap<PeerName, Record>,
    news: VecDeque<PeerName>,
}

impl Presence {
    /// A peer has said which life of a name it is. The newest life takes the place of the others.
    pub(crate) fn meet(&mut self, name: &PeerName, generation: Generation) -> Met {
        if self.peers.len() >= MAX_NAMES && !self.peers.contains_key(name) {
            self.peers
                .retain(|_, record| record.is_here() || record.queued);
        }
        let record = self.peers.entry(name.clone()).or_default();
        match record.lives.iter().position(|life| *life == generation) {
            Some(at) if at + 1 < record.lives.len() => return Met::Retired,
            Some(_) => {}
            None => {
                if record.lives.len() >= MAX_LIVES {
                    record.lives.remove(0);
                }
                record.lives.push(generation);
            }
        }
        let old = record.up.iter().filter(|(_, life)| *life != generation);
        Met::Current(old.map(|(key, _)| *key).collect())
    }

    /// A session stands. False: a later life was met while it was set up.
    pub(crate) fn up(&mut self, name: &PeerName, key: PeerKey, generation: Generation) -> bool {
        let record = self.peers.entry(name.clone()).or_default();
        if record.lives.is_empty() {
            record.lives.push(generation);
        }
        let current = record.lives.last() == Some(&generation);
        record.up.push((key, generation));
        self.queue(name);
        current
    }

    /// A session is over; its transfers are about to end.
    pub(crate) fn lost(&mut self, name: &PeerName, key: PeerKey, cause: &Cause) {
        let Some(record) = self.peers.get_mut(name) else {
            return;
        };
        let Some(at) = record.up.iter().position(|(up, _)| *up == key) else {
            return;
        };
        let (_, generation) = record.up.swap_remove(at);
        record.going.insert(key);
        if record.told == Some(generation) && !record.up.iter().any(|(_, life)| *life == generation)
        {
            record.fell.get_or_insert_with(|| cause.clone());
        }
    }

    /// Every transfer of a session that is over has told its outcome.
    pub(crate) fn gone(&mut self, name: &PeerName, key: PeerKey) {
        if let Some(record) = self.peers.get_mut(name)
            && record.going.remove(&key)
        {
            self.queue(name);
        }
    }

    fn queue(&mut self, name: &PeerName) {
        if let Some(record) = self.peers.get_mut(name)
            && !std::mem::replace(&mut record.queued, true)
        {
            self.news.push_back(name.clone());
        }
    }

    /// The next event. One that is taken must be told.
    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        while let Some(name) = self.news.front() {
            if let Some(record) = self.peers.get_mut(name) {
                if let Some(event) = record.next(name) {
                    return Some(event);
                }
                record.queued = false;
            }
            self.news.pop_front();
        }
        None
    }

    /// Whether there may be something to tell.
    pub(crate) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{EngineId, Rank};

    const OLD: Generation = Generation([1; 16]);
    const NEW: Generation = Generation([2; 16]);

    fn name() -> PeerName {
        PeerName {
            engine: EngineId::from("e"),
            rank: Rank::default(),
        }
    }

    fn up(generation: Generation) -> Event {
        Event::PeerUp {
            peer: name(),
            generation,
        }
    }

    fn down(generation: Generation, cause: Cause) -> Event {
        Event::PeerDown {
            peer: name(),
            generation,
            cause,
        }
    }

    fn told(presence: &mut Presence) -> Vec<Event> {
        std::iter::from_fn(|| presence.poll_event()).collect()
    }

    fn here(generation: Generation, key: u64) -> Presence {
        let mut presence = Presence::default();
        assert_eq!(presence.meet(&name(), generation), Met::Current(Vec::new()));
        assert!(presence.up(&name(), PeerKey(key), generation));
        assert_eq!(told(&mut presence), [up(generation)]);
        presence
    }

    #[test]
    fn a_new_session_is_told_after_the_end_of_the_old_one() {
        let mut presence = here(OLD, 1);
        presence.lost(&name(), PeerKey(1), &Cause::PeerDead);
        assert!(presence.up(&name(), PeerKey(2), OLD));
        // Transfers of the first session have yet to tell how they ended.
        assert_eq!(told(&mut presence), []);
        presence.gone(&name(), PeerKey(1));
        assert_eq!(told(&mut presence), [down(OLD, Cause::PeerDead), up(OLD)]);
    }

    #[test]
    fn a_peer_with_another_session_is_here() {
        let mut presence = here(OLD, 1);
        assert!(presence.up(&name(), PeerKey(2), OLD));
        assert_eq!(told(&mut presence), []);
        presence.lost(&name(), PeerKey(1), &Cause::PeerDead);
        presence.gone(&name(), PeerKey(1));
        assert_eq!(told(&mut presence), []);
        presence.lost(&name(), PeerKey(2), &Cause::PeerClosed);
        presence.gone(&name(), PeerKey(2));
        assert_eq!(told(&mut presence), [down(OLD, Cause::PeerClosed)]);
    }

    #[test]
    fn a_new_life_takes_the_place_of_the_old_one_for_ever() {
        let mut presence = here(OLD, 1);
        assert_eq!(presence.meet(&name(), NEW), Met::Current(vec![PeerKey(1)]));
        assert!(presence.up(&name(), PeerKey(2), NEW));
        assert_eq!(told(&mut presence), []);
        presence.lost(&name(), PeerKey(1), &Cause::PeerRestarted);
        presence.gone(&name(), PeerKey(1));
        let restarted = Event::PeerRestarted {
            peer: name(),
            old: OLD,
            new: NEW,
        };
        assert_eq!(
            told(&mut presence),
            [down(OLD, Cause::PeerRestarted), restarted]
        );
        assert_eq!(presence.meet(&name(), OLD), Met::Retired);
        // One of its sessions was already on its way up.
        assert!(!presence.up(&name(), PeerKey(3), OLD));
        assert_eq!(told(&mut presence), []);
    }

    #[test]
    fn what_was_not_told_in_time_is_told_as_it_is() {
        let mut presence = here(OLD, 1);
        for key in 1..100 {
            presence.lost(&name(), PeerKey(key), &Cause::PeerDead);
            presence.gone(&name(), PeerKey(key));
            assert!(presence.up(&name(), PeerKey(key + 1), OLD));
        }
        assert!(presence.has_news());
        assert_eq!(told(&mut presence), [down(OLD, Cause::PeerDead), up(OLD)]);
        assert!(!presence.has_news());
    }

    #[test]
    fn names_of_those_who_have_left_are_not_kept_for_ever() {
        let mut presence = here(OLD, 1);
        for i in 0..3 * MAX_NAMES {
            let engine = EngineId::from(format!("stranger-{i}").as_str());
            let rank = Rank::default();
            presence.meet(&PeerName { engine, rank }, NEW);
        }
        assert!(presence.peers.len() <= MAX_NAMES);
        assert!(presence.peers.contains_key(&name()));
    }
}
