//! The device's side of a send queue and its completion queue.

use std::collections::VecDeque;
use std::ops::Range;
use std::task::Poll;

use super::super::bytes::Block;
use super::super::{
    CQE_BYTES, CqDepth, Cqe, CqeStatus, Doorbell, DoorbellRecord, Operation, OutsideQueue, Qpn,
    QueueMemory, SendWqe, SqDepth, Syndrome, WQEBB,
};
use super::keys::KeyTable;
use super::violation::Violation;

/// What consumed slots are filled with: no opcode, no size and no number that is ever valid.
const POISON: [u8; 8] = [0xa5; 8];

/// Where the queues lie.
#[derive(Debug, Clone)]
pub struct Queues<M> {
    /// WQEs: 64 bytes for each slot.
    pub sq: M,
    /// The queue pair's doorbell record: eight bytes, of which the send queue has the last four.
    pub sq_record: M,
    /// Completions: 64 bytes each. Their last bytes must say that none has been written.
    pub cq: M,
    /// The completion queue's record: eight bytes, of which the first four say what was taken.
    pub cq_record: M,
    /// The doorbell, or the word in its place: eight bytes.
    pub bell: M,
}

/// What a queue is.
#[derive(Debug, Clone)]
pub struct HcaSetup {
    /// The queue pair.
    pub qpn: Qpn,
    /// Slots of the send queue.
    pub sq_depth: SqDepth,
    /// Entries of the completion queue.
    pub cq_depth: CqDepth,
    /// The number of the first WQE, and of the first completion.
    pub first: u64,
    /// What may be touched.
    pub keys: KeyTable,
}

/// How far a WQE was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    /// To its end, and so many bytes were moved.
    Done(u32),
    /// It is under way, until [`Hca::complete`].
    UnderWay,
}

/// What carries out WQEs that have been found good.
pub trait Sink {
    /// Carries one out, or begins to.
    ///
    /// # Errors
    ///
    /// Why it failed; the queue then flushes what follows.
    fn execute(&mut self, n: u64, operation: &Operation) -> Result<Carried, Syndrome>;
}

/// A WQE that was consumed, and whose end has not been told.
#[derive(Debug)]
struct Consumed {
    qpn: Qpn,
    opcode: u8,
    /// Low 16 bits of its number.
    index: u16,
    signalled: bool,
    /// How it ended, if it has.
    ended: Option<Result<u32, Syndrome>>,
}

/// The device.
#[derive(Debug)]
pub struct Hca<M, S> {
    queues: Queues<M>,
    setup: HcaSetup,
    sink: S,
    /// WQEs consumed.
    consumed: u64,
    /// The last of them, as far as their ends have not been told: they are told in order.
    untold: VecDeque<Consumed>,
    /// Completions written.
    written: u64,
    /// Completions given back, as far as the record was read.
    taken: u64,
    /// The first bytes of the last WQE.
    head: Option<[u8; 8]>,
    /// WQEs that were taken out of their slots in one look.
    taken_out: Vec<Block>,
    /// Those that are being taken out of slots which have to be copied.
    copying: Option<Copying>,
    /// The doorbell as it was last seen in memory.
    bell: [u8; 8],
    /// A WQE has failed, or the next one is to.
    failed: Option<Failed>,
    /// A failure has been told: what is behind it was flushed.
    told_of_failure: bool,
    /// The first WQE that was not begun, and why.
    refused: Option<(u64, Syndrome)>,
}

/// WQEs that have been told of, and are on their way out of their slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copying {
    /// How many.
    pub count: u64,
    /// They have been read, and what overwrites their slots is under way.
    pub is_read: bool,
}

/// What becomes of the next WQE after a failure.
#[derive(Debug, Clone, Copy)]
enum Failed {
    /// It is flushed.
    Behind,
    /// It fails so, and those behind it are flushed.
    Next(Syndrome),
}

impl<M: QueueMemory, S: Sink> Hca<M, S> {
    /// A device for these queues.
    ///
    /// # Errors
    ///
    /// [`Violation::Memory`] where one is too small for its queue.
    pub fn new(queues: Queues<M>, setup: HcaSetup, sink: S) -> Result<Self, Violation> {
        queues.sq.load(setup.sq_depth.bytes() - 8)?;
        queues.cq.load(setup.cq_depth.bytes() - 8)?;
        queues.sq_record.load(0)?;
        queues.cq_record.load(0)?;
        let bell = queues.bell.load(0)?;
        let first = setup.first;
        Ok(Self {
            queues,
            setup,
            sink,
            consumed: first,
            untold: VecDeque::new(),
            written: first,
            taken: first,
            head: None,
            taken_out: Vec::new(),
            copying: None,
            bell,
            failed: None,
            told_of_failure: false,
            refused: None,
        })
    }

    /// The number of the WQE that comes next.
    #[must_use]
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// All WQEs below this one have ended, and that was told.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.consumed - self.untold.len() as u64
    }

    /// The first WQE that was not begun for what it says, by its keys or its [`Sink`], and why.
    #[must_use]
    pub fn refused(&self) -> Option<(u64, Syndrome)> {
        self.refused
    }

    /// The WQEs that a look has found and that are not there yet, for their memory has to be copied: the next look goes
    /// on with them.
    #[must_use]
    pub fn copying(&self) -> Option<Copying> {
        self.copying
    }

    /// What carries out WQEs.
    #[must_use]
    pub fn sink(&self) -> &S {
        &self.sink
    }

    /// The same, to change it.
    pub fn sink_mut(&mut self) -> &mut S {
        &mut self.sink
    }

    /// A WQE that was [under way](Carried::UnderWay) has ended. In any order; that is told in the WQEs' order. After a
    /// failure what is behind it is flushed, however it ends. Gives whether it was under way.
    ///
    /// # Errors
    ///
    /// [`Violation::NoRoom`] and [`Violation::Taken`], from the completion queue.
    pub fn complete(&mut self, n: u64, ended: Result<u32, Syndrome>) -> Result<bool, Violation> {
        let at = n.checked_sub(self.ended());
        let at = at.and_then(|at| usize::try_from(at).ok());
        let Some(one) = at.and_then(|at| self.untold.get_mut(at)) else {
            return Ok(false);
        };
        if one.ended.is_some() {
            return Ok(false);
        }
        one.ended = Some(ended);
        if ended.is_err() {
            self.failed = Some(Failed::Behind);
        }
        self.tell()?;
        Ok(true)
    }

    /// The queue has failed as a whole: the first WQE that is under way ends so, or the next one that comes, and what is
    /// behind it is flushed. Nothing is carried out any more.
    ///
    /// # Errors
    ///
    /// As [`complete`](Self::complete).
    pub fn fail(&mut self, why: Syndrome) -> Result<(), Violation> {
        let mut open = self.untold.iter_mut().filter(|one| one.ended.is_none());
        let next = match open.next() {
            Some(first) => {
                first.ended = Some(Err(why));
                open.for_each(|one| one.ended = Some(Err(Syndrome::FLUSHED)));
                Failed::Behind
            }
            None => Failed::Next(why),
        };
        self.failed.get_or_insert(next);
        self.tell()
    }

    /// Looks into memory as a device that is told of nothing else: consumes what the record tells of, but `most` WQEs at
    /// most; what is left is there for the next look. Gives how many that were: none while they are
    /// [copied](Self::copying).
    ///
    /// # Errors
    ///
    /// The first [`Violation`]; the queue is then of no more use.
    pub fn look(&mut self, most: u64) -> Result<u64, Violation> {
        let bell = self.queues.bell.load(0)?;
        if bell != self.bell {
            self.bell = bell;
            let bell = self.doorbell(bell)?;
            self.same_queue_pair(bell.qpn().get())?;
        }
        self.see(most)
    }

    /// Reads the record, as a device may at any time, and consumes all that it tells of, as [`look`](Self::look). Gives
    /// how many WQEs that were.
    ///
    /// # Errors
    ///
    /// The first [`Violation`].
    pub fn see_record(&mut self) -> Result<u64, Violation> {
        self.see(u64::MAX)
    }

    fn see(&mut self, most: u64) -> Result<u64, Violation> {
        let count = match self.copying {
            Some(copying) => copying.count,
            None => self.ahead()?.min(most),
        };
        if count == 0 || !self.take_out(count)? {
            return Ok(0);
        }
        let blocks = std::mem::take(&mut self.taken_out);
        let done = blocks.iter().try_for_each(|block| self.consume(block));
        self.taken_out = blocks;
        done.map(|()| count)
    }

    /// How many WQEs there are, by the record.
    fn ahead(&self) -> Result<u64, Violation> {
        let record = self.record()?;
        let ahead = u64::from(record.wrapping_sub(self.consumed as u16));
        let depth = self.setup.sq_depth.get();
        // A slot is used again when the end of what was in it has been told.
        if ahead + self.untold.len() as u64 > depth.into() {
            return Err(Violation::RecordSpan {
                record,
                consumed: self.consumed,
                depth,
            });
        }
        Ok(ahead)
    }

    /// Takes so many WQEs out of their slots, and overwrites those: in one go where they have to be copied, and before
    /// anybody is told that they may be used again. `false` while that is under way.
    fn take_out(&mut self, count: u64) -> Result<bool, Violation> {
        let depth = self.setup.sq_depth;
        let (sq, from) = (&self.queues.sq, depth.offset(self.consumed));
        let (bytes, all) = (count * WQEBB as u64, depth.bytes());
        // Over the queue's end in two.
        let first = from..(from + bytes).min(all);
        let rest = 0..bytes - (first.end - first.start);
        let both = [first, rest];
        let spans = match both[1].is_empty() {
            true => &both[..1],
            false => &both[..],
        };
        let is_read = self.copying.is_some_and(|copying| copying.is_read);
        if !is_read {
            let Poll::Ready(fetched) = sq.fetch(spans) else {
                self.copying = Some(Copying { count, is_read });
                return Ok(false);
            };
            fetched?;
            read_out(sq, spans, &mut self.taken_out)?;
        }
        let Poll::Ready(flushed) = sq.flush(spans) else {
            let is_read = true;
            self.copying = Some(Copying { count, is_read });
            return Ok(false);
        };
        flushed?;
        self.copying = None;
        Ok(true)
    }

    /// The doorbell is rung in this moment: checks it, against the record and the last WQE too, and
    /// consumes what the record tells of. Gives how many WQEs that were.
    ///
    /// # Errors
    ///
    /// The first [`Violation`].
    pub fn ring(&mut self, bytes: [u8; 8]) -> Result<u64, Violation> {
        let bell = self.doorbell(bytes)?;
        self.same_queue_pair(bell.qpn().get())?;
        let record = self.record()?;
        // Posters take turns, so that nobody's record is there but this one's.
        if bell.next() != record {
            return Err(Violation::RecordBehind {
                doorbell: bell.next(),
                record,
            });
        }
        let seen = self.see_record()?;
        // What has to be copied may be there in part only.
        let is_all = self.consumed as u16 == bell.next();
        let wanted = self
            .head
            .filter(|_| matches!(bell, Doorbell::LastWqe { .. }) && is_all);
        match wanted {
            Some(head) if head != bytes => Err(Violation::NotTheLast {
                wanted: u64::from_be_bytes(head),
                found: u64::from_be_bytes(bytes),
            }),
            _ => Ok(seen),
        }
    }

    fn doorbell(&self, bytes: [u8; 8]) -> Result<Doorbell, Violation> {
        Doorbell::decode(bytes).map_err(|fault| Violation::Doorbell { fault })
    }

    fn same_queue_pair(&self, found: u32) -> Result<(), Violation> {
        let wanted = self.setup.qpn.get();
        if found == wanted {
            Ok(())
        } else {
            Err(Violation::QueuePair { wanted, found })
        }
    }

    /// Low 16 bits of the number that comes next, by the record.
    fn record(&self) -> Result<u16, Violation> {
        let [_, _, _, _, a, b, c, d] = self.queues.sq_record.load(0)?;
        let record = DoorbellRecord::decode([a, b, c, d]);
        Ok(record.map_err(|fault| Violation::Record { fault })?.0)
    }

    /// Carries one WQE out.
    fn consume(&mut self, block: &Block) -> Result<(), Violation> {
        let n = self.consumed;
        self.head = block.first_chunk().copied();
        let wqe = SendWqe::decode(block).map_err(|fault| Violation::Wqe { n, fault })?;
        // Low 16 bits.
        if wqe.index != n as u16 {
            let found = wqe.index;
            return Err(Violation::Number { n, found });
        }
        self.same_queue_pair(wqe.qpn.get())?;
        self.consumed += 1;
        let ended = match self.failed {
            Some(Failed::Behind) => Err(Syndrome::FLUSHED),
            Some(Failed::Next(why)) => Err(why),
            None => {
                let allowed = self.setup.keys.check(&wqe);
                let begun = allowed.and_then(|()| self.sink.execute(n, &wqe.operation));
                self.refused = self.refused.or(begun.err().map(|why| (n, why)));
                begun
            }
        };
        if ended.is_err() {
            self.failed = Some(Failed::Behind);
        }
        let [_, _, _, opcode, ..] = *block;
        self.untold.push_back(Consumed {
            qpn: wqe.qpn,
            opcode,
            index: wqe.index,
            signalled: wqe.flags.signalled,
            ended: match ended {
                Ok(Carried::Done(bytes)) => Some(Ok(bytes)),
                Ok(Carried::UnderWay) => None,
                Err(syndrome) => Some(Err(syndrome)),
            },
        });
        self.tell()
    }

    /// Tells of what has ended, in order.
    fn tell(&mut self) -> Result<(), Violation> {
        while let Some(one) = self.untold.front()
            && let Some(ended) = one.ended
        {
            let vendor = 0;
            let status = match ended {
                _ if self.told_of_failure => CqeStatus::Failed {
                    syndrome: Syndrome::FLUSHED,
                    vendor,
                },
                Ok(byte_count) => CqeStatus::Done { byte_count },
                Err(syndrome) => CqeStatus::Failed { syndrome, vendor },
            };
            let failed = matches!(status, CqeStatus::Failed { .. });
            if one.signalled || failed {
                self.write(&Cqe {
                    qpn: one.qpn,
                    opcode: one.opcode,
                    counter: one.index,
                    status,
                })?;
            }
            self.told_of_failure |= failed;
            self.untold.pop_front();
        }
        Ok(())
    }

    /// Writes a completion, its last bytes last.
    fn write(&mut self, cqe: &Cqe) -> Result<(), Violation> {
        let (n, depth) = (self.written, self.setup.cq_depth);
        if n - self.taken >= depth.get().into() {
            self.look_taken()?;
        }
        if n - self.taken >= depth.get().into() {
            return Err(Violation::NoRoom {
                n,
                taken: self.taken,
                depth: depth.get(),
            });
        }
        let block = cqe.encode(n, depth);
        let at = depth.offset(n);
        let (words, _) = block.as_chunks::<8>();
        for (word, offset) in words.iter().zip((at..at + CQE_BYTES as u64).step_by(8)) {
            self.queues.cq.store(offset, *word)?;
        }
        self.written += 1;
        Ok(())
    }

    /// How many completions have been given back.
    fn look_taken(&mut self) -> Result<(), Violation> {
        let [_, a, b, c, ..] = self.queues.cq_record.load(0)?;
        let taken = u32::from_be_bytes([0, a, b, c]);
        // 24 bits.
        let ahead = taken.wrapping_sub(self.taken as u32) & 0x00ff_ffff;
        if u64::from(ahead) > self.written - self.taken {
            return Err(Violation::Taken {
                taken,
                written: self.written,
            });
        }
        self.taken += u64::from(ahead);
        Ok(())
    }
}

/// Reads the WQEs in these spans, and overwrites them.
fn read_out<M: QueueMemory>(
    sq: &M,
    spans: &[Range<u64>],
    blocks: &mut Vec<Block>,
) -> Result<(), OutsideQueue> {
    blocks.clear();
    for at in spans.iter().flat_map(|span| span.clone().step_by(WQEBB)) {
        let mut block: Block = [0; WQEBB];
        let (words, _) = block.as_chunks_mut::<8>();
        for (word, offset) in words.iter_mut().zip((at..).step_by(8)) {
            *word = sq.load(offset)?;
        }
        for offset in (at..).step_by(8).take(WQEBB / 8) {
            sq.store(offset, POISON)?;
        }
        blocks.push(block);
    }
    Ok(())
}
