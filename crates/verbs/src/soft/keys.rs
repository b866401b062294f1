//! Remote keys. The owner keeps the truth in its own memory; a copy in a sealed memfd, which peers
//! map read-only, lets a READ's initiator check a key with no help from the owner.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::Error;
use crate::region::{Access, SegmentSpan};
use crate::soft::segment::{Mapping, new_memfd, seal, seals};
use crate::soft::{fill_random, vendor};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// One key as peers see it. `tag` is the whole key while it is live and 0 otherwise; the rest does
/// not change while the tag is live.
#[repr(C, align(64))]
pub(crate) struct Slot {
    tag: AtomicU32,
    access: AtomicU32,
    pd: AtomicU32,
    segment: AtomicU32,
    addr: AtomicU64,
    len: AtomicU64,
    offset: AtomicU64,
}

const SLOT: u64 = size_of::<Slot>() as u64;

impl Slot {
    /// Shows a key in a slot that shows none.
    fn show(&self, info: &KeyInfo) {
        self.access.store(info.access.bits(), Ordering::Relaxed);
        self.pd.store(info.pd, Ordering::Relaxed);
        self.segment.store(info.segment.id, Ordering::Relaxed);
        self.addr.store(info.addr, Ordering::Relaxed);
        self.len.store(info.len, Ordering::Relaxed);
        self.offset.store(info.segment.offset, Ordering::Relaxed);
        self.tag.store(info.rkey, Ordering::Release);
    }

    /// Shows no key any more.
    fn clear(&self) {
        self.tag.store(0, Ordering::Relaxed);
        // Peers see the tag gone before anything that is written to the memory, or to the slot's
        // other fields, from here on.
        fence(Ordering::SeqCst);
    }

    /// Whether it shows this key, now.
    #[inline]
    fn shows(&self, rkey: u32) -> bool {
        // A copy made before this call was made before the tag is looked at.
        fence(Ordering::Acquire);
        rkey != 0 && self.tag.load(Ordering::Acquire) == rkey
    }

    fn get(&self, rkey: u32) -> Option<KeyInfo> {
        if rkey == 0 || self.tag.load(Ordering::Acquire) != rkey {
            return None;
        }
        let info = KeyInfo {
            rkey,
            addr: self.addr.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            access: Access::from_bits_truncate(self.access.load(Ordering::Relaxed)),
            pd: self.pd.load(Ordering::Relaxed),
            segment: SegmentSpan {
                id: self.segment.load(Ordering::Relaxed),
                offset: self.offset.load(Ordering::Relaxed),
            },
        };
        // The fields belong together only if the key lived through the reading.
        self.shows(rkey).then_some(info)
    }
}

/// What a live key stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyInfo {
    pub(crate) rkey: u32,
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
    pub(crate) pd: u32,
    pub(crate) segment: SegmentSpan,
}

impl KeyInfo {
    /// Checks an access through a queue pair of domain `pd`; the error is a vendor code.
    #[inline]
    pub(crate) fn check(&self, pd: u32, want: Access, addr: u64, len: u64) -> Result<(), u32> {
        if self.pd != pd {
            return Err(vendor::BAD_KEY);
        }
        if !self.access.contains(want) {
            return Err(vendor::RIGHTS);
        }
        self.bounds(addr, len)
    }

    #[inline]
    pub(crate) fn bounds(&self, addr: u64, len: u64) -> Result<(), u32> {
        let inside = addr
            .checked_sub(self.addr)
            .and_then(|at| at.checked_add(len))
            .is_some_and(|end| end <= self.len);
        if inside { Ok(()) } else { Err(vendor::BOUNDS) }
    }
}

fn slot_at(map: &Mapping, slots: u32, index: u32) -> Option<&Slot> {
    if index >= slots {
        return None;
    }
    let at = map.base() + u64::from(index) * SLOT;
    // SAFETY: the mapping is at least slots × SLOT bytes (checked where it was made), page-aligned,
    // lives as long as the borrow, and its file cannot shrink. All fields are atomics, so another
    // process changing them is no data race, and any bits are a valid value.
    Some(unsafe { &*(at as *const Slot) })
}

/// The keys of another context.
#[derive(Debug)]
pub(crate) struct PeerKeys {
    map: Arc<Mapping>,
    slots: u32,
}

impl PeerKeys {
    pub(crate) fn new(map: Arc<Mapping>, slots: u32) -> Option<Self> {
        (u64::from(slots) * SLOT <= map.len()).then_some(Self { map, slots })
    }

    /// Whether the key is live, now.
    #[inline]
    pub(crate) fn live(&self, rkey: u32) -> bool {
        slot_at(&self.map, self.slots, rkey & 0xffff).is_some_and(|slot| slot.shows(rkey))
    }

    pub(crate) fn get(&self, rkey: u32) -> Option<KeyInfo> {
        slot_at(&self.map, self.slots, rkey & 0xffff)?.get(rkey)
    }
}

/// The keys of this context. Whoever holds it locked excludes deregistration: the responder copies
/// with the lock held, in short slices.
#[derive(Debug)]
pub(crate) struct KeyTable {
    /// By slot; `None` is dead. Slot 0 is never used.
    live: Vec<Option<KeyInfo>>,
    generation: Vec<u16>,
    /// Oldest first, so that a generation comes round as late as it can.
    free: VecDeque<u32>,
    map: Mapping,
    slots: u32,
}

impl KeyTable {
    /// A table for `max` keys, and the file that peers map.
    pub(crate) fn new(max: u32) -> Result<(Self, OwnedFd), Error> {
        let slots = max + 1;
        let fd = new_memfd(c"kvxfer-keys", u64::from(slots) * SLOT)?;
        let map = Mapping::new(fd.as_fd(), u64::from(slots) * SLOT, true)?;
        // From here on nobody, with whatever descriptor, can write the file or map it writable.
        seal(
            fd.as_fd(),
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE,
        )?;
        let mut seed = vec![0u8; slots as usize * 2];
        fill_random(&mut seed)?;
        let generation = seed
            .as_chunks::<2>()
            .0
            .iter()
            .map(|c| u16::from_le_bytes(*c))
            .collect();
        let table = Self {
            live: vec![None; slots as usize],
            generation,
            free: (1..slots).collect(),
            map,
            slots,
        };
        Ok((table, fd))
    }

    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Makes a key; `None` when all are in use. `info.rkey` is ignored.
    pub(crate) fn insert(&mut self, mut info: KeyInfo) -> Option<u32> {
        let index = self.free.pop_front()?;
        let generation = self.generation.get_mut(index as usize)?;
        *generation = generation.wrapping_add(1).max(1);
        let rkey = u32::from(*generation) << 16 | index;
        info.rkey = rkey;
        slot_at(&self.map, self.slots, index)?.show(&info);
        *self.live.get_mut(index as usize)? = Some(info);
        Some(rkey)
    }

    /// Kills a key; answers what it stood for.
    pub(crate) fn remove(&mut self, rkey: u32) -> Option<KeyInfo> {
        let index = rkey & 0xffff;
        let place = self.live.get_mut(index as usize)?;
        let info = place.take_if(|k| k.rkey == rkey)?;
        if let Some(slot) = slot_at(&self.map, self.slots, index) {
            slot.clear();
        }
        self.free.push_back(index);
        Some(info)
    }

    #[inline]
    pub(crate) fn get(&self, rkey: u32) -> Option<&KeyInfo> {
        let info = self.live.get((rkey & 0xffff) as usize)?.as_ref()?;
        (info.rkey == rkey).then_some(info)
    }

    /// Checks a remote access; the error is a vendor code.
    #[inline]
    pub(crate) fn check(
        &self,
        rkey: u32,
        pd: u32,
        want: Access,
        addr: u64,
        len: u64,
    ) -> Result<(), u32> {
        self.get(rkey)
            .ok_or(vendor::BAD_KEY)?
            .check(pd, want, addr, len)
    }
}

/// Maps a peer's key table after checking that nobody can change its size or write it.
pub(crate) fn table_is_sealed(fd: BorrowedFd<'_>) -> bool {
    let want = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE;
    seals(fd).is_ok_and(|s| s & want == want)
}

#[cfg(all(loom, test))]
mod loom_tests {
    use kvxfer_loom::{model, thread, weak_model};

    use super::*;

    const OLD: u32 = 1 << 16 | 1;
    const NEW: u32 = 2 << 16 | 1;

    fn info(rkey: u32) -> KeyInfo {
        KeyInfo {
            rkey,
            addr: rkey.into(),
            len: rkey.into(),
            access: Access::REMOTE_READ,
            pd: rkey,
            segment: SegmentSpan {
                id: rkey,
                offset: rkey.into(),
            },
        }
    }

    fn fresh() -> Slot {
        let (word, long) = (|| AtomicU32::new(0), || AtomicU64::new(0));
        Slot {
            tag: word(),
            access: word(),
            pd: word(),
            segment: word(),
            addr: long(),
            len: long(),
            offset: long(),
        }
    }

    /// The owner uses a slot for another key while a peer reads the first one.
    fn fields_belong_together() {
        let slot = Arc::new(fresh());
        slot.show(&info(OLD));
        let owners = Arc::clone(&slot);
        let owner = thread::spawn(move || {
            owners.clear();
            owners.show(&info(NEW));
        });
        for rkey in [OLD, NEW] {
            if let Some(found) = slot.get(rkey) {
                let fields = (found.addr, found.len, found.pd, found.segment.id);
                assert_eq!(fields, (rkey.into(), rkey.into(), rkey, rkey));
                assert_eq!(found.segment.offset, u64::from(rkey));
            }
        }
        owner.join().expect("changed");
        assert!(slot.get(OLD).is_none() && slot.get(NEW).is_some());
    }

    /// The owner uses the memory for something else after deregistering it, while a peer copies.
    fn a_live_key_means_the_copy_is_good() {
        let slot = Arc::new(fresh());
        let bytes = Arc::new(AtomicU64::new(1));
        slot.show(&info(OLD));
        let (owners, memory) = (Arc::clone(&slot), Arc::clone(&bytes));
        let owner = thread::spawn(move || {
            owners.clear();
            memory.store(2, Ordering::Relaxed);
        });
        // A copy has no order of its own.
        let copied = bytes.load(Ordering::Relaxed);
        if slot.shows(OLD) {
            assert_eq!(copied, 1);
        }
        owner.join().expect("changed");
    }

    #[test]
    fn a_key_that_lived_through_the_reading_is_whole() {
        model(fields_belong_together);
    }

    #[test]
    #[should_panic(expected = "left == right")]
    fn planted_a_key_without_order() {
        weak_model(fields_belong_together);
    }

    #[test]
    fn bytes_of_a_live_key_are_its_own() {
        model(a_live_key_means_the_copy_is_good);
    }

    #[test]
    #[should_panic(expected = "left == right")]
    fn planted_a_copy_without_order() {
        weak_model(a_live_key_means_the_copy_is_good);
    }
}
