//! A producer's offers: which blocks are being held for whom, and until when. Pure: time goes in,
//! [`LeaseOutput`]s come out.
//!
//! Every offer owns a 64-byte *slot* of a table in registered memory. A reader copies the blocks,
//! then reads the slot with the same one-sided operation, and trusts what it copied only if the
//! slot still shows the word of its ticket. So an offer ends in two steps, in this order: the slot
//! is turned over ([`LeaseOutput::Flip`]), and only then the blocks go back
//! ([`LeaseOutput::Released`]). Whoever applies the outputs in their order keeps that promise.
//!
//! A reader that is lost does not end an offer: it may still be reading, and it may come back. The
//! lease runs out instead.
//!
//! A reader is a rank of an engine, by name: over whatever session its releases come, and also after
//! a restart under its name, it counts once. A reader whose engine was given no name (`engine_id`)
//! has another at each start, and only a restart can make it count again.
//!
//! # The slot
//! ```text
//! bytes  0..8   word       little-endian u64
//! bytes  8..16  !word      its complement, while the offer stands; 0 afterwards
//! bytes 16..64  0
//! ```
//! The word is unique to one offer in the life of the table. A reader that sees the two halves at
//! different moments sees either the live pair, or a pair that does not match: between two live
//! pairs there is always a dead one, and halves of two different live pairs are no complements.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::collections::{VecDeque, hash_map};
use std::time::Duration;

use crate::block_set::{BlocksError, check_groups};
use crate::blocks::GroupBlocks;
use crate::event::{PeerName, ReleaseReason};
use crate::ids::{Nonce, RequestId};
use crate::recent::Recent;
use crate::ticket::{LeaseRef, MAX_PARTIES};
use crate::time::Time;

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 64;

/// How many ended offers are remembered to tell a late release from a wrong one.
const REMEMBERED: usize = 4096;

/// The two words that stand at the start of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeaseWord {
    /// Bytes 0..8.
    pub word: u64,
    /// Bytes 8..16.
    pub check: u64,
}

impl LeaseWord {
    /// A slot that shows no offer; also what fresh, zeroed memory shows.
    pub const DEAD: LeaseWord = LeaseWord { word: 0, check: 0 };

    /// A slot that shows the offer with this word.
    #[must_use]
    pub const fn live(word: u64) -> LeaseWord {
        LeaseWord { word, check: !word }
    }

    /// What the slot shows.
    #[must_use]
    pub fn decode(slot: &[u8; SLOT_BYTES]) -> LeaseWord {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&slot[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        LeaseWord {
            word: word(0),
            check: word(8),
        }
    }

    /// The slot's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(&self.word.to_le_bytes());
        slot[8..16].copy_from_slice(&self.check.to_le_bytes());
        slot
    }

    /// Whether the offer with this word stands.
    #[must_use]
    pub const fn is_live_for(self, word: u64) -> bool {
        self.word == word && self.check == !word
    }
}

/// What to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseOutput {
    /// Write the two words to the slot. What follows must not be done before they are visible to
    /// remote readers.
    Flip {
        /// The slot's index.
        slot: u32,
        /// What it shall show: [`LeaseWord::DEAD`].
        word: LeaseWord,
    },
    /// The blocks are the owner's again.
    Released {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
        /// Why.
        reason: ReleaseReason,
        /// The blocks, as offered.
        groups: Vec<GroupBlocks>,
    },
}

/// Why an offer was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// Nobody could ever release it.
    #[error(
        "request {request} is offered to {readers} readers, from 1 to {MAX_PARTIES} are allowed"
    )]
    Readers {
        /// The request.
        request: RequestId,
        /// The number given.
        readers: u32,
    },
    /// A lease that runs out at once.
    #[error("request {request} is offered with a ttl of 0")]
    NoTime {
        /// The request.
        request: RequestId,
    },
    /// The block lists are unusable.
    #[error("blocks offered for request {request}")]
    Blocks {
        /// The request.
        request: RequestId,
        /// What is wrong with them.
        source: BlocksError,
    },
    /// Another try of the request is on offer.
    #[error(
        "request {request} is already offered with nonce {held:?}, not {given:?}; retract it first"
    )]
    OtherNonce {
        /// The request.
        request: RequestId,
        /// The nonce on offer.
        held: Nonce,
        /// The nonce given.
        given: Nonce,
    },
    /// The same try is on offer with other blocks or readers.
    #[error(
        "request {request} with nonce {nonce:?} is already offered with other blocks or readers"
    )]
    Differs {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
    },
    /// The same try was offered before and has ended.
    #[error(
        "request {request} with nonce {nonce:?} was offered before and has ended; a new try needs a new nonce"
    )]
    Ended {
        /// The request.
        request: RequestId,
        /// The try.
        nonce: Nonce,
    },
    /// Every slot is taken, by an offer that stands or one whose outputs were not taken yet.
    #[error("all {slots} lease slots are taken")]
    NoSlot {
        /// Slots of the table.
        slots: u32,
    },
}

/// An offer that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offered {
    /// For the ticket.
    pub lease: LeaseRef,
    /// Write this to the slot before the ticket leaves.
    pub flip: LeaseWord,
    /// False when the same offer stood already: nothing was changed, its lease was not extended.
    pub fresh: bool,
    /// When the lease runs out.
    pub expires: Time,
}

/// What a release did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseAnswer {
    /// Counted; so many readers are still to come.
    Waiting {
        /// Readers that have not released.
        left: u32,
    },
    /// It was the last one: the offer has ended.
    Ended,
    /// This reader had released before.
    Repeated,
    /// The offer had ended before, for whatever reason.
    Late,
    /// No such request, or another try of it.
    Unknown,
}

#[derive(Debug)]
struct Offer {
    nonce: Nonce,
    groups: Vec<GroupBlocks>,
    readers: u32,
    done: HashSet<PeerName>,
    lease: LeaseRef,
    expires: Time,
}

/// The offers of one producer rank.
#[derive(Debug)]
pub struct Leases {
    slots: u32,
    /// Slots that have been used and are free; those from `touched` on never were.
    free: Vec<u32>,
    touched: u32,
    granted: u64,
    offers: HashMap<RequestId, Offer>,
    expiry: BTreeSet<(Time, RequestId)>,
    ended: Recent,
    outputs: VecDeque<LeaseOutput>,
    /// The slots behind the `Released` outputs still queued. A slot is free again only when its
    /// `Released` is taken, for by then its flip has been carried out and cannot hit a new offer.
    ending: VecDeque<u32>,
}

impl Leases {
    /// No offers, over a table of `slots` zeroed slots.
    #[must_use]
    pub fn new(slots: u32) -> Leases {
        Leases {
            slots,
            free: Vec::new(),
            touched: 0,
            granted: 0,
            offers: HashMap::new(),
            expiry: BTreeSet::new(),
            ended: Recent::new(REMEMBERED),
            outputs: VecDeque::new(),
            ending: VecDeque::new(),
        }
    }

    /// Holds the blocks of a request for `readers` readers, for at most `ttl`. Offering the same
    /// again is fine and changes nothing.
    ///
    /// # Errors
    /// The offer makes no sense, contradicts one that stands or has ended, or no slot is free.
    /// Nothing is changed then.
    pub fn offer(
        &mut self,
        now: Time,
        request: &RequestId,
        nonce: Nonce,
        groups: &[GroupBlocks],
        readers: u32,
        ttl: Duration,
    ) -> Result<Offered, OfferError> {
        if readers == 0 || readers > MAX_PARTIES {
            return Err(OfferError::Readers {
                request: request.clone(),
                readers,
            });
        }
        if ttl.is_zero() {
            return Err(OfferError::NoTime {
                request: request.clone(),
            });
        }
        if let Some(held) = self.offers.get(request) {
            if held.nonce != nonce {
                return Err(OfferError::OtherNonce {
                    request: request.clone(),
                    held: held.nonce,
                    given: nonce,
                });
            }
            if held.groups != groups || held.readers != readers {
                return Err(OfferError::Differs {
                    request: request.clone(),
                    nonce,
                });
            }
            return Ok(Offered {
                lease: held.lease,
                flip: LeaseWord::live(held.lease.word),
                fresh: false,
                expires: held.expires,
            });
        }
        if self.ended.contains(request, nonce) {
            return Err(OfferError::Ended {
                request: request.clone(),
                nonce,
            });
        }
        check_groups(groups).map_err(|source| OfferError::Blocks {
            request: request.clone(),
            source,
        })?;
        let slot = self
            .take_slot()
            .ok_or(OfferError::NoSlot { slots: self.slots })?;
        let lease = LeaseRef {
            slot,
            word: self.next_word(nonce),
        };
        let expires = now.saturating_add(ttl);
        self.expiry.insert((expires, request.clone()));
        self.offers.insert(
            request.clone(),
            Offer {
                nonce,
                groups: groups.to_vec(),
                readers,
                done: HashSet::new(),
                lease,
                expires,
            },
        );
        Ok(Offered {
            lease,
            flip: LeaseWord::live(lease.word),
            fresh: true,
            expires,
        })
    }

    /// A reader needs the blocks no more. May come any number of times, in any order, late, and
    /// over any session: a reader counts by its name, once.
    pub fn release(
        &mut self,
        request: &RequestId,
        nonce: Nonce,
        reader: &PeerName,
    ) -> ReleaseAnswer {
        match self.offers.get_mut(request) {
            Some(offer) if offer.nonce == nonce => {
                if !offer.done.insert(reader.clone()) {
                    return ReleaseAnswer::Repeated;
                }
                let left = offer
                    .readers
                    .saturating_sub(u32::try_from(offer.done.len()).unwrap_or(u32::MAX));
                if left > 0 {
                    return ReleaseAnswer::Waiting { left };
                }
                self.end(request, ReleaseReason::AllRead);
                ReleaseAnswer::Ended
            }
            _ if self.ended.contains(request, nonce) => ReleaseAnswer::Late,
            _ => ReleaseAnswer::Unknown,
        }
    }

    /// The owner takes the offer back, read or not. False when there is none.
    pub fn retract(&mut self, request: &RequestId) -> bool {
        self.end(request, ReleaseReason::Retracted)
    }

    /// Takes all offers back: the engine is shutting down.
    pub fn retract_all(&mut self) {
        let mut requests: Vec<RequestId> = self.offers.keys().cloned().collect();
        requests.sort_unstable();
        for request in &requests {
            self.end(request, ReleaseReason::Retracted);
        }
    }

    /// Ends the offers whose leases have run out.
    pub fn on_time(&mut self, now: Time) {
        while let Some((expires, request)) = self.expiry.first() {
            if *expires > now {
                break;
            }
            let request = request.clone();
            self.end(&request, ReleaseReason::Expired);
        }
    }

    /// When [`on_time`](Self::on_time) next has something to do.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.expiry.first().map(|(expires, _)| *expires)
    }

    /// The next thing to do. Each output must be carried out before the next is asked for.
    pub fn poll_output(&mut self) -> Option<LeaseOutput> {
        let output = self.outputs.pop_front()?;
        if matches!(output, LeaseOutput::Released { .. }) {
            self.free.extend(self.ending.pop_front());
        }
        Some(output)
    }

    /// Offers that stand.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offers.len()
    }

    /// Whether no offer stands.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.offers.is_empty()
    }

    /// The blocks of a try that is on offer.
    #[must_use]
    pub fn holds(&self, request: &RequestId, nonce: Nonce) -> Option<&[GroupBlocks]> {
        let offer = self.offers.get(request)?;
        (offer.nonce == nonce).then_some(offer.groups.as_slice())
    }

    /// The nonce and the lease under which a request is on offer.
    #[must_use]
    pub fn get(&self, request: &RequestId) -> Option<(Nonce, LeaseRef)> {
        self.offers
            .get(request)
            .map(|offer| (offer.nonce, offer.lease))
    }

    fn end(&mut self, request: &RequestId, reason: ReleaseReason) -> bool {
        let hash_map::Entry::Occupied(entry) = self.offers.entry(request.clone()) else {
            return false;
        };
        let (request, offer) = entry.remove_entry();
        self.expiry.remove(&(offer.expires, request.clone()));
        self.ended.push(&request, offer.nonce);
        self.ending.push_back(offer.lease.slot);
        self.outputs.push_back(LeaseOutput::Flip {
            slot: offer.lease.slot,
            word: LeaseWord::DEAD,
        });
        self.outputs.push_back(LeaseOutput::Released {
            request,
            nonce: offer.nonce,
            reason,
            groups: offer.groups,
        });
        true
    }

    fn take_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = (self.touched < self.slots).then_some(self.touched)?;
        self.touched += 1;
        Some(slot)
    }

    /// A word that no other offer of this table had: for one nonce the counter makes it different
    /// each time, and nonces are random.
    fn next_word(&mut self, nonce: Nonce) -> u64 {
        self.granted += 1;
        // An odd factor is one-to-one on 64 bits; this one (2^64 / golden ratio) spreads them.
        nonce.0 ^ self.granted.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}
