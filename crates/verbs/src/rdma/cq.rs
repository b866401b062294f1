//! Completion queues of RDMA devices.
//!
//! Room is taken when work is posted, for unsignalled work too: it completes as well when it is flushed.
//! So the device's queue does not overflow.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{EIO, c_int, c_void};

use super::context::RdmaContext;
use super::handle::nonblocking;
use super::qp::RdmaQp;
use crate::cq::{Poll, Slots};
use crate::device::CqBackend;
use crate::error::Error;
use crate::region::RegionTable;
use crate::sync::{Mutex, lock};
use crate::sys::enums::{ibv_wc_opcode, ibv_wc_status};
use crate::sys::inline;
use crate::sys::types::{ibv_comp_channel, ibv_cq, ibv_wc};
use crate::wr::Completion;

/// Completions taken from the device at a time.
const BATCH: usize = 64;

/// What is polled into, which says nothing until a poll has filled it.
const EMPTY: ibv_wc = ibv_wc {
    wr_id: 0,
    status: ibv_wc_status(0),
    opcode: ibv_wc_opcode(0),
    vendor_err: 0,
    byte_len: 0,
    imm_data: 0,
    qp_num: 0,
    src_qp: 0,
    wc_flags: 0,
    pkey_index: 0,
    slid: 0,
    sl: 0,
    dlid_path_bits: 0,
};

struct State {
    /// The queue pairs that complete here, by number.
    qps: HashMap<u32, Arc<RdmaQp>>,
    /// Completions that were taken from the device and not asked for yet.
    stash: VecDeque<Completion>,
    wcs: [ibv_wc; BATCH],
    /// Tables that nothing uses any more, to be dropped without the lock.
    retired: Vec<Arc<RegionTable>>,
}

pub(super) struct RdmaCq {
    cq: NonNull<ibv_cq>,
    channel: Channel,
    number: u32,
    depth: u32,
    credits: Slots,
    /// Whether an event was asked for and not taken.
    armed: AtomicBool,
    state: Mutex<State>,
    device: Arc<RdmaContext>,
}

// SAFETY: libibverbs lets any thread use its objects (ibv_create_cq(3)); the queue is destroyed
// once, when this is dropped.
unsafe impl Send for RdmaCq {}
// SAFETY: as above.
unsafe impl Sync for RdmaCq {}

impl fmt::Debug for RdmaCq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaCq")
            .field("number", &self.number)
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

/// Where the events of one queue arrive.
struct Channel {
    channel: NonNull<ibv_comp_channel>,
    device: Arc<RdmaContext>,
}

impl Channel {
    fn new(device: Arc<RdmaContext>) -> Result<Self, Error> {
        let context = device.device().context();
        // SAFETY: the device is open.
        let made = unsafe { (device.device().functions().ibv_create_comp_channel)(context) };
        let channel = device.device().made("ibv_create_comp_channel", made)?;
        let channel = Self { channel, device };
        nonblocking(channel.fd()).map_err(|source| Error::Device {
            device: channel.device.info().name.clone(),
            call: "fcntl",
            source,
        })?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is there, and its number is set when it is made.
        let fd = unsafe { (*self.channel.as_ptr()).fd };
        // SAFETY: the descriptor is the channel's, which goes when this is dropped.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Takes all events that are there, and acknowledges them: who destroys the queue waits for that.
    fn drain(&self) {
        let functions = self.device.device().functions();
        loop {
            let mut cq: *mut ibv_cq = ptr::null_mut();
            let mut context: *mut c_void = ptr::null_mut();
            // SAFETY: the channel is there and does not block; two pointers are written.
            let code = unsafe {
                (functions.ibv_get_cq_event)(self.channel.as_ptr(), &raw mut cq, &raw mut context)
            };
            if code != 0 || cq.is_null() {
                return;
            }
            // SAFETY: the event is of this queue, and is acknowledged once.
            unsafe { (functions.ibv_ack_cq_events)(cq, 1) };
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.device.device().is_inherited() {
            return;
        }
        // SAFETY: it is destroyed once, and its queue has gone before.
        let code = unsafe {
            (self.device.device().functions().ibv_destroy_comp_channel)(self.channel.as_ptr())
        };
        self.device.device().freed("ibv_destroy_comp_channel", code);
    }
}

impl Drop for RdmaCq {
    fn drop(&mut self) {
        if self.device.device().is_inherited() {
            return;
        }
        // SAFETY: it is destroyed once; queue pairs that complete here hold it.
        let code = unsafe { (self.device.device().functions().ibv_destroy_cq)(self.cq.as_ptr()) };
        self.device.device().freed("ibv_destroy_cq", code);
    }
}

impl RdmaCq {
    pub(super) fn new(device: Arc<RdmaContext>, depth: u32) -> Result<Self, Error> {
        let max = device.info().max_cqe;
        if depth == 0 || depth > max {
            return Err(Error::Limit {
                what: "completion queue depth",
                asked: depth.into(),
                max: max.into(),
            });
        }
        let channel = Channel::new(Arc::clone(&device))?;
        let vector = device.next_comp_vector();
        let context = device.device().context();
        // SAFETY: the device is open, and the channel goes after the queue.
        let made = unsafe {
            (device.device().functions().ibv_create_cq)(
                context,
                depth.cast_signed(),
                ptr::null_mut(),
                channel.channel.as_ptr(),
                vector,
            )
        };
        let cq = device.device().made("ibv_create_cq", made)?;
        // SAFETY: it was made just now, and its number does not change.
        let number = unsafe { cq.as_ref().handle };
        Ok(Self {
            cq,
            channel,
            number,
            depth,
            credits: Slots::new(depth),
            armed: AtomicBool::new(false),
            state: Mutex::new(State {
                qps: HashMap::new(),
                stash: VecDeque::new(),
                wcs: [EMPTY; BATCH],
                retired: Vec::new(),
            }),
            device,
        })
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn credits(&self) -> &Slots {
        &self.credits
    }

    pub(super) fn pointer(&self) -> *mut ibv_cq {
        self.cq.as_ptr()
    }

    /// The completions of a queue pair are its from now on.
    pub(super) fn join(&self, qp: &Arc<RdmaQp>) {
        lock(&self.state).qps.insert(qp.number(), Arc::clone(qp));
    }

    /// Forgets a queue pair that is about to be destroyed, and its completions that nobody has polled.
    pub(super) fn leave(&self, qp: &RdmaQp) {
        let mut state = lock(&self.state);
        let here = state.qps.get(&qp.number());
        if here.is_some_and(|here| ptr::eq(Arc::as_ptr(here), qp)) {
            let gone = state.qps.remove(&qp.number());
            state.stash.retain(|c| c.qp_num != qp.number());
            drop(state);
            drop(gone);
        }
    }

    /// Takes all completions out of the device's queue: it may have left those of a queue pair that was
    /// destroyed there, whose room is given back.
    pub(super) fn sweep(&self) {
        let mut state = lock(&self.state);
        while let Ok(BATCH) = self.take(&mut state, BATCH) {}
        let retired = std::mem::take(&mut state.retired);
        drop(state);
        drop(retired);
    }

    /// Moves up to `max` completions, no more than a batch, from the device to the stash; how many the
    /// device had.
    fn take(&self, state: &mut State, max: usize) -> Result<usize, Error> {
        let max = max.min(BATCH);
        // A batch is small.
        let ask = max as c_int;
        // SAFETY: the queue is there, and there is room for a batch.
        let got = unsafe { inline::poll_cq(self.cq.as_ptr(), ask, state.wcs.as_mut_ptr()) };
        let Ok(got) = usize::try_from(got) else {
            // Drivers answer with numbers of their own.
            tracing::error!(cq = self.number, got, "ibv_poll_cq");
            return Err(self.device.device().failure("ibv_poll_cq", EIO));
        };
        let State {
            qps,
            stash,
            wcs,
            retired,
        } = state;
        let mut last: Option<&Arc<RdmaQp>> = None;
        for wc in wcs.iter().take(got) {
            let qp = match last {
                Some(qp) if qp.number() == wc.qp_num => Some(qp),
                _ => qps.get(&wc.qp_num),
            };
            // Of a queue pair that is gone where there is none.
            let Some(qp) = qp else {
                continue;
            };
            stash.extend(qp.ended(wc, retired));
            last = Some(qp);
        }
        Ok(got)
    }
}

impl CqBackend for RdmaCq {
    fn ibv(&self) -> Option<NonNull<ibv_cq>> {
        Some(self.cq)
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn poll(&self, out: &mut Vec<Completion>, max: usize) -> Result<Poll, Error> {
        if self.armed.load(Ordering::Acquire) && self.armed.swap(false, Ordering::AcqRel) {
            self.channel.drain();
        }
        let mut state = lock(&self.state);
        let mut left = max;
        let mut more = true;
        let mut result = Ok(());
        loop {
            let n = state.stash.len().min(left);
            out.extend(state.stash.drain(..n));
            left -= n;
            if left == 0 || !more {
                break;
            }
            match self.take(&mut state, left) {
                Ok(taken) => more = taken == left.min(BATCH),
                Err(error) => {
                    result = Err(error);
                    more = false;
                }
            }
        }
        more |= !state.stash.is_empty();
        let retired = std::mem::take(&mut state.retired);
        drop(state);
        drop(retired);
        result.map(|()| Poll { more })
    }

    fn arm(&self) -> Result<bool, Error> {
        self.channel.drain();
        // SAFETY: the queue is there.
        let code = unsafe { inline::req_notify_cq(self.cq.as_ptr(), 0) };
        self.device.device().check("ibv_req_notify_cq", code)?;
        self.armed.store(true, Ordering::Release);
        // What came before gives no event.
        let mut state = lock(&self.state);
        let taken = match state.stash.is_empty() {
            true => self.take(&mut state, BATCH)?,
            false => 0,
        };
        // Behind a whole batch of queue pairs that are gone there may be more.
        let idle = state.stash.is_empty() && taken < BATCH;
        let retired = std::mem::take(&mut state.retired);
        drop(state);
        drop(retired);
        Ok(idle)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}
