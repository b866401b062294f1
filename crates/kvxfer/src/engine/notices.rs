//! Notices on the data plane (`enable_notification`): the end of a push is told with a SEND on one
//! of its own queue pairs, after all of its completions. It carries the `PushDone` of the control
//! connection; one that cannot be sent goes there instead.

use std::sync::Arc;

use kvxfer_hipmem::{ArenaOptions, HostArena, HostMemory, HugePages};
use kvxfer_verbs::{Access, Init, ProtectionDomain, QueuePair, RegionTable, Rts, Sge};

use crate::error::Error;
use crate::wire::{Message, MessageKind};

/// Bytes of the largest notice: a request's name and some numbers.
const NOTICE_BYTES: u32 = 2048;
/// Receives that each queue pair has posted. A sender that outruns them is held back by the device.
pub(crate) const RECEIVES: u32 = 16;
/// Receives' ids are the topmost, which no batch of a lane has.
const FIRST_ID: u64 = u64::MAX - 0xffff;

fn memory(slots: u32) -> Result<HostMemory, Error> {
    let bytes = u64::from(slots) * u64::from(NOTICE_BYTES);
    let options = ArenaOptions {
        huge: HugePages::Never,
        prefault: true,
    };
    Ok(HostArena::with_options(bytes, options)?.memory().clone())
}

/// The memory alone, registered.
fn table(
    pd: &ProtectionDomain,
    memory: &HostMemory,
    access: Access,
) -> Result<Arc<RegionTable>, Error> {
    let region = pd.register(memory.as_memory(), access)?;
    Ok(Arc::new(RegionTable::new(vec![region])))
}

fn offset(slot: u32) -> u64 {
    u64::from(slot) * u64::from(NOTICE_BYTES)
}

/// The receives of one queue pair.
#[derive(Debug)]
pub(crate) struct Inbox {
    memory: HostMemory,
    table: Arc<RegionTable>,
}

impl Inbox {
    /// Posts all receives of a queue pair that has yet to be joined.
    pub(crate) fn new(pd: &ProtectionDomain, qp: &QueuePair<Init>) -> Result<Self, Error> {
        let memory = memory(RECEIVES)?;
        let inbox = Self {
            table: table(pd, &memory, Access::LOCAL_WRITE)?,
            memory,
        };
        for slot in 0..RECEIVES {
            qp.post_recv(
                FIRST_ID + u64::from(slot),
                &[sge(slot, NOTICE_BYTES)],
                &inbox.table,
            )?;
        }
        Ok(inbox)
    }

    /// The receive that a completion's id means.
    pub(crate) fn slot(wr_id: u64) -> Option<u32> {
        wr_id
            .checked_sub(FIRST_ID)
            .and_then(|slot| u32::try_from(slot).ok())
    }

    /// Reads what has landed in a receive and posts it again.
    pub(crate) fn take(&self, qp: &QueuePair<Rts>, slot: u32, len: u32) -> Result<Message, Error> {
        let mut bytes = vec![0; len.min(NOTICE_BYTES) as usize];
        self.memory.read(offset(slot), &mut bytes)?;
        qp.post_recv(
            FIRST_ID + u64::from(slot),
            &[sge(slot, NOTICE_BYTES)],
            &self.table,
        )?;
        Ok(Message::decode(MessageKind::PushDone as u8, &bytes)?)
    }
}

fn sge(slot: u32, len: u32) -> Sge {
    Sge {
        region: 0,
        len,
        offset: offset(slot),
    }
}

/// A worker's notices that are on their way out.
#[derive(Debug)]
pub(crate) struct Outbox {
    memory: HostMemory,
    /// One for each rail.
    tables: Vec<Arc<RegionTable>>,
    free: Vec<u32>,
}

impl Outbox {
    const SLOTS: u32 = 64;

    /// For these rails' protection domains.
    pub(crate) fn new<'a>(pds: impl Iterator<Item = &'a ProtectionDomain>) -> Result<Self, Error> {
        let memory = memory(Self::SLOTS)?;
        Ok(Self {
            tables: pds
                .map(|pd| table(pd, &memory, Access::NONE))
                .collect::<Result<_, _>>()?,
            memory,
            free: (0..Self::SLOTS).collect(),
        })
    }

    /// What a rail's queue pairs post from.
    pub(crate) fn table(&self, rail: usize) -> Option<&Arc<RegionTable>> {
        self.tables.get(rail)
    }

    /// Puts a notice where the device can read it. `None`: it is too long, or no slot is free.
    pub(crate) fn put(&mut self, notice: &[u8]) -> Option<(u32, Sge)> {
        let len = u32::try_from(notice.len())
            .ok()
            .filter(|len| *len <= NOTICE_BYTES)?;
        let slot = self.free.pop()?;
        if self.memory.write(offset(slot), notice).is_err() {
            // Slots lie inside their memory.
            self.free.push(slot);
            return None;
        }
        Some((slot, sge(slot, len)))
    }

    pub(crate) fn give(&mut self, slot: u32) {
        self.free.push(slot);
    }
}
