//! Queue pairs of RDMA devices: bring-up, and posting.

use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use libc::{ENOMEM, c_int, c_uint};

use super::context::RdmaContext;
use super::cq::RdmaCq;
use super::ring::Ring;
use super::{GidKind, LinkLayer, mtu_code, transition};
use crate::cq::Slots;
use crate::error::{Error, PostCause, PostError, StateFault};
use crate::null::{PostLimits, take_credits};
use crate::qp::{
    InitAttr, Link, PortAddr, QpBackend, QpCaps, QpEndpoint, QpState, RtrAttr, RtsAttr,
};
use crate::region::RegionTable;
use crate::soft::fill_random;
use crate::sync::{Mutex, lock};
use crate::sys::enums::{
    IBV_SEND_SIGNALED, IBV_WC_WITH_IMM, ibv_mtu, ibv_qp_state, ibv_qp_type, ibv_wc_opcode,
    ibv_wr_opcode,
};
use crate::sys::inline;
use crate::sys::types::{
    ibv_ah_attr, ibv_gid, ibv_global_route, ibv_mw_bind_info, ibv_pd, ibv_qp, ibv_qp_attr,
    ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_send_wr_bind_mw, ibv_send_wr_rdma,
    ibv_send_wr_wr, ibv_send_wr_xrc, ibv_sge, ibv_wc,
};
use crate::wr::{Completion, Op, SendChain, Sge, WcOpcode, WcStatus, WrEntry};

/// A work request of which a device reads only what posting sets.
const EMPTY: ibv_send_wr = ibv_send_wr {
    wr_id: 0,
    next: ptr::null_mut(),
    sg_list: ptr::null_mut(),
    num_sge: 0,
    opcode: ibv_wr_opcode::IBV_WR_RDMA_WRITE,
    send_flags: 0,
    imm_data: 0,
    wr: ibv_send_wr_wr {
        rdma: ibv_send_wr_rdma {
            remote_addr: 0,
            rkey: 0,
        },
    },
    qp_type: ibv_send_wr_xrc { remote_srqn: 0 },
    bind_mw: ibv_send_wr_bind_mw {
        mw: ptr::null_mut(),
        rkey: 0,
        bind_info: ibv_mw_bind_info {
            mr: ptr::null_mut(),
            addr: 0,
            length: 0,
            mw_access_flags: 0,
        },
    },
};

/// No span of memory.
const NO_SPAN: ibv_sge = ibv_sge {
    addr: 0,
    length: 0,
    lkey: 0,
};

/// The send queue, and where a chain is put into the words of C. The memory is used again.
struct Sends {
    ring: Ring,
    wrs: Vec<ibv_send_wr>,
    sges: Vec<ibv_sge>,
}

// SAFETY: the pointers in it lead into its own vectors, and mean something during a post alone.
unsafe impl Send for Sends {}

/// What is known of the way to the peer.
#[derive(Debug, Clone, Copy)]
struct Local {
    gid_index: u8,
    grh_required: bool,
    addr: PortAddr,
}

pub(super) struct RdmaQp {
    qp: NonNull<ibv_qp>,
    number: u32,
    psn: u32,
    token: [u8; 16],
    caps: QpCaps,
    state: AtomicU8,
    local: OnceLock<Local>,
    /// READs that the peer answers at a time.
    peer_reads_in: AtomicU8,
    send_slots: Slots,
    recv_slots: Slots,
    sends: Mutex<Sends>,
    recvs: Mutex<Ring>,
    send_cq: Arc<RdmaCq>,
    recv_cq: Arc<RdmaCq>,
    device: Arc<RdmaContext>,
}

// SAFETY: libibverbs lets any thread use its objects (ibv_create_qp(3)); the queue pair is destroyed
// once, by `destroy`, which its owner calls last.
unsafe impl Send for RdmaQp {}
// SAFETY: as above.
unsafe impl Sync for RdmaQp {}

impl fmt::Debug for RdmaQp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaQp")
            .field("number", &self.number)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl RdmaQp {
    pub(super) fn create(
        device: Arc<RdmaContext>,
        pd: NonNull<ibv_pd>,
        caps: &QpCaps,
        send_cq: Arc<RdmaCq>,
        recv_cq: Arc<RdmaCq>,
    ) -> Result<Arc<Self>, Error> {
        let (mut start, mut psn, mut token) = ([0; 8], [0; 4], [0; 16]);
        fill_random(&mut start)?;
        fill_random(&mut psn)?;
        fill_random(&mut token)?;
        let start = u64::from_ne_bytes(start);
        let mut attr = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: send_cq.pointer(),
            recv_cq: recv_cq.pointer(),
            srq: ptr::null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: caps.max_send_wr,
                max_recv_wr: caps.max_recv_wr,
                max_send_sge: caps.max_send_sge,
                max_recv_sge: caps.max_recv_sge,
                max_inline_data: 0,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queues are there: the handles that were given hold them.
        let made =
            unsafe { (device.device().functions().ibv_create_qp)(pd.as_ptr(), &raw mut attr) };
        let qp = device.device().made("ibv_create_qp", made)?;
        // SAFETY: it was made just now, and its number does not change.
        let number = unsafe { qp.as_ref().qp_num };
        let made = Arc::new(Self {
            qp,
            number,
            psn: u32::from_ne_bytes(psn) & 0x00ff_ffff,
            token,
            caps: *caps,
            state: AtomicU8::new(QpState::Reset as u8),
            local: OnceLock::new(),
            peer_reads_in: AtomicU8::new(0),
            send_slots: Slots::new(caps.max_send_wr),
            recv_slots: Slots::new(caps.max_recv_wr),
            sends: Mutex::new(Sends {
                ring: Ring::sends(caps.max_send_wr, start),
                wrs: Vec::new(),
                sges: Vec::new(),
            }),
            recvs: Mutex::new(Ring::receives(caps.max_recv_wr, start)),
            send_cq,
            recv_cq,
            device,
        });
        made.send_cq.join(&made);
        made.recv_cq.join(&made);
        Ok(made)
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// A work request of it has ended, as the device says; `None` if it is not of this life.
    pub(super) fn ended(
        &self,
        wc: &ibv_wc,
        retired: &mut Vec<Arc<RegionTable>>,
    ) -> Option<Completion> {
        let receive = Ring::is_receive(wc.wr_id);
        let ended = if receive {
            let ended = lock(&self.recvs).end(wc.wr_id, retired)?;
            self.recv_slots.give(ended.slots);
            self.recv_cq.credits().give(ended.slots);
            ended
        } else {
            let ended = lock(&self.sends).ring.end(wc.wr_id, retired)?;
            self.send_slots.give(ended.slots);
            self.send_cq.credits().give(ended.slots);
            ended
        };
        let status = WcStatus::from_raw(wc.status.0);
        let good = status == WcStatus::Success;
        if !good {
            self.set_state(QpState::Err);
        }
        let with_imm = wc.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM;
        let imm = receive && good && wc.wc_flags & IBV_WC_WITH_IMM != 0;
        Some(Completion {
            wr_id: ended.wr_id,
            status,
            qp_num: self.number,
            vendor_err: if good { 0 } else { wc.vendor_err },
            opcode: if receive && good && with_imm {
                WcOpcode::RecvWriteImm
            } else {
                ended.opcode
            },
            byte_len: wc.byte_len,
            imm: imm.then(|| u32::from_be(wc.imm_data)),
        })
    }

    fn set_state(&self, state: QpState) {
        self.state.store(state as u8, Ordering::Release);
    }

    fn fault(&self, to: QpState, fault: StateFault) -> Error {
        Error::Transition {
            qpn: self.number,
            from: self.state(),
            to,
            fault,
        }
    }

    fn expect(&self, from: QpState, to: QpState) -> Result<(), Error> {
        match self.state() {
            state if state == from => Ok(()),
            state => Err(self.fault(to, StateFault::State(state))),
        }
    }

    fn modify(&self, to: QpState, attr: &mut ibv_qp_attr, mask: c_uint) -> Result<(), Error> {
        let from = self.state();
        let functions = self.device.device().functions();
        let mask = mask.cast_signed();
        // SAFETY: the queue pair is there until `destroy`, and the attributes are whole.
        let code = unsafe { (functions.ibv_modify_qp)(self.qp.as_ptr(), attr, mask) };
        if code != 0 {
            let error = self.device.device().failure("ibv_modify_qp", code);
            let Error::Device { source, .. } = error else {
                return Err(error);
            };
            let errno = source.raw_os_error().unwrap_or(0);
            let fault = StateFault::Device {
                errno,
                meaning: transition::meaning(to, errno),
                told: transition::told(to, attr),
            };
            return Err(self.fault(to, fault));
        }
        // A completion may have told of an error meanwhile, which stays.
        let (from, to) = (from as u8, to as u8);
        let order = (Ordering::AcqRel, Ordering::Acquire);
        let _ = self.state.compare_exchange(from, to, order.0, order.1);
        Ok(())
    }

    /// What no endpoint of a peer on this network can have. A driver need not look, and packets would go
    /// to whoever has that address.
    fn senseless(&self, local: &Local, remote: &QpEndpoint, port: &PortAddr) -> Option<StateFault> {
        if port.ethernet != local.addr.ethernet {
            return Some(StateFault::LinkLayer);
        }
        if let (Some(here), Some(there)) = (local.addr.roce, port.roce)
            && here != there
        {
            return Some(StateFault::RoceVersion { here, there });
        }
        // The first two numbers are for management, the last is for everybody; no packet goes back to
        // the unspecified address or to a group.
        if remote.qpn < 2 || remote.qpn == MAX_24 {
            return Some(StateFault::EmptyEndpoint);
        }
        let nobody = port.gid == [0; 16] || port.gid[0] == 0xff;
        let to_group = !port.ethernet && (port.lid == 0 || port.lid >= FIRST_MULTICAST_LID);
        if (port.ethernet && nobody) || to_group {
            return Some(StateFault::EmptyEndpoint);
        }
        if port.reads_in == 0 || port.reads_out == 0 {
            return Some(StateFault::NoReads);
        }
        over(&[("psn", remote.psn, MAX_24), ("qpn", remote.qpn, MAX_24)])
    }

    /// The way to the peer's port.
    fn address(&self, local: &Local, remote: &PortAddr) -> ibv_ah_attr {
        let config = self.device.config();
        let ethernet = local.addr.ethernet;
        // InfiniBand needs the header beyond its subnet alone, which is the first half of a GID.
        let other_subnet = local.addr.gid[..8] != remote.gid[..8];
        ibv_ah_attr {
            grh: ibv_global_route {
                dgid: ibv_gid { raw: remote.gid },
                flow_label: 0,
                sgid_index: local.gid_index,
                hop_limit: config.hop_limit,
                traffic_class: config.traffic_class,
            },
            dlid: remote.lid,
            sl: config.service_level,
            src_path_bits: 0,
            static_rate: 0,
            is_global: u8::from(ethernet || local.grh_required || other_subnet),
            port_num: self.device.info().port,
        }
    }
}

impl Sends {
    /// Posts the first `n` of the chain, for which there is room; how many the device took, and its
    /// answer where it did not take all.
    fn post(
        &mut self,
        qp: NonNull<ibv_qp>,
        chain: &SendChain,
        n: usize,
        table: &Arc<RegionTable>,
    ) -> Result<(), Refused> {
        let entries = table.entries();
        if self.wrs.len() < n {
            self.wrs.resize(n, EMPTY);
        }
        if self.sges.len() < chain.sges.len() {
            self.sges.resize(chain.sges.len(), NO_SPAN);
        }
        // Those within the limits are the chain's first.
        let wrs = chain.wrs.get(..n).unwrap_or(&chain.wrs);
        let numbers = self
            .ring
            .push(wrs.iter().map(|wr| (wr.wr_id, wr.op.opcode())));
        // One pointer leads to all of each: no other reference is made.
        let (first, places) = (self.wrs.as_mut_ptr(), self.sges.as_mut_ptr());
        let put = |at: usize, span: &Sge| {
            // A length of 0 means 2 GiB to some devices. The regions were looked at before.
            let (false, Some(region)) = (span.len == 0, entries.get(span.region as usize)) else {
                return 0;
            };
            let sge = ibv_sge {
                addr: region.addr.wrapping_add(span.offset),
                length: span.len,
                lkey: region.lkey,
            };
            // SAFETY: there is a place for each of the chain's.
            unsafe { places.wrapping_add(at).write(sge) };
            1
        };
        let fill = |at: usize, entry: &WrEntry, begin: usize, count: usize| {
            // SAFETY: there are `n` of them at least.
            let wr = unsafe { &mut *first.wrapping_add(at) };
            wr.wr_id = numbers.at(at);
            wr.next = first.wrapping_add(at + 1);
            // The vector has room for all of the chain's, and does not move.
            wr.sg_list = places.wrapping_add(begin);
            // No more than the queue pair takes, which was looked at before.
            wr.num_sge = count as c_int;
            wr.opcode = opcode(entry.op);
            wr.send_flags = if entry.signaled { IBV_SEND_SIGNALED } else { 0 };
            wr.imm_data = entry.imm.to_be();
            wr.wr = ibv_send_wr_wr {
                rdma: ibv_send_wr_rdma {
                    remote_addr: entry.addr,
                    rkey: entry.rkey,
                },
            };
        };
        if chain.max_nsge == 1 && chain.sges.len() == chain.wrs.len() {
            // One span each, as it is most of the time.
            for (at, (entry, span)) in wrs.iter().zip(&chain.sges).enumerate() {
                fill(at, entry, at, put(at, span));
            }
        } else {
            let (mut spans, mut used) = (chain.sges.as_slice(), 0);
            for (at, entry) in wrs.iter().enumerate() {
                let begin = used;
                let own = spans.split_at_checked(entry.nsge as usize);
                let (own, others) = own.unwrap_or((spans, &[]));
                spans = others;
                for span in own {
                    used += put(used, span);
                }
                fill(at, entry, begin, used - begin);
            }
        }
        // SAFETY: there are `n` of them at least, and not none.
        unsafe { (*first.wrapping_add(n - 1)).next = ptr::null_mut() };
        let mut bad: *mut ibv_send_wr = ptr::null_mut();
        // SAFETY: the queue pair is there until `destroy`, the list and its spans are in two
        // vectors that are not touched meanwhile, and the regions stay while `table` is held.
        let code = unsafe { inline::post_send(qp.as_ptr(), first, &raw mut bad) };
        if code == 0 {
            self.ring.hold(table);
            return Ok(());
        }
        let at = (bad as usize).wrapping_sub(first as usize) / size_of::<ibv_send_wr>();
        if bad.is_null() || at >= n {
            // soft-RoCE's library does so when it has queued them all and cannot ring the doorbell.
            self.ring.hold(table);
            return Err(Refused::Unsaid { code });
        }
        self.ring.unpush(n - at);
        if at > 0 {
            self.ring.hold(table);
        }
        Err(Refused::From { at, code })
    }
}

/// What a driver did not post.
#[derive(Debug)]
enum Refused {
    /// The work requests from this one on.
    From { at: usize, code: c_int },
    /// It does not say which: any may be in the queue.
    Unsaid { code: c_int },
}

fn opcode(op: Op) -> ibv_wr_opcode {
    match op {
        Op::Read => ibv_wr_opcode::IBV_WR_RDMA_READ,
        Op::Write => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        Op::WriteImm => ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
        Op::Send => ibv_wr_opcode::IBV_WR_SEND,
        Op::SendImm => ibv_wr_opcode::IBV_WR_SEND_WITH_IMM,
    }
}

/// The largest queue pair number and packet sequence number.
const MAX_24: u32 = 0x00ff_ffff;
/// Local addresses from here on are of groups.
const FIRST_MULTICAST_LID: u16 = 0xc000;

/// The first attribute that is more than its field holds.
fn over(attributes: &[(&'static str, u32, u32)]) -> Option<StateFault> {
    let (attribute, value, max) = *attributes.iter().find(|(_, value, max)| value > max)?;
    Some(StateFault::Range {
        attribute,
        value,
        max,
    })
}

/// What a driver's answer to a post means.
fn refused(code: c_int) -> PostCause {
    match code.saturating_abs() {
        ENOMEM => PostCause::QueueFull,
        errno => PostCause::Device { errno },
    }
}

impl QpBackend for RdmaQp {
    fn ibv(&self) -> Option<NonNull<ibv_qp>> {
        Some(self.qp)
    }

    fn init(&self, attr: &InitAttr) -> Result<(), Error> {
        self.expect(QpState::Reset, QpState::Init)?;
        let device = &self.device;
        // As it is now: addresses come and go.
        let port = device.query_port()?;
        let choice = device.choose(&port, attr.gid_index, &[])?;
        let (index, gid) = (choice.index, choice.gid);
        let gid_index = u8::try_from(index).map_err(|_| {
            let (attribute, max) = ("gid_index", u8::MAX.into());
            let value = index;
            let range = StateFault::Range {
                attribute,
                value,
                max,
            };
            self.fault(QpState::Init, range)
        })?;
        let mut attrs = ibv_qp_attr {
            qp_state: ibv_qp_state::IBV_QPS_INIT,
            pkey_index: device.config().pkey_index,
            port_num: device.info().port,
            qp_access_flags: attr.access.bits(),
            ..ibv_qp_attr::default()
        };
        self.modify(QpState::Init, &mut attrs, transition::INIT)?;
        let local = Local {
            gid_index,
            grh_required: port.grh_required,
            addr: PortAddr {
                gid,
                ethernet: port.link_layer == LinkLayer::Ethernet,
                roce: match choice.kind {
                    Some(GidKind::RoceV1) => Some(1),
                    Some(GidKind::RoceV2) => Some(2),
                    _ => None,
                },
                lid: port.lid,
                mtu: device.mtu_of(&port),
                reads_in: device.reads_in(),
                reads_out: device.reads_out(),
            },
        };
        // Set once: the state says that this is the first time.
        let _ = self.local.set(local);
        Ok(())
    }

    fn endpoint(&self) -> QpEndpoint {
        QpEndpoint {
            qpn: self.number,
            psn: self.psn,
            token: self.token,
            port: self.local.get().map(|local| local.addr),
        }
    }

    fn rtr(&self, attr: RtrAttr) -> Result<(), Error> {
        self.expect(QpState::Init, QpState::Rtr)?;
        let to = QpState::Rtr;
        if !matches!(attr.link, Link::Rdma) {
            return Err(self.fault(to, StateFault::LinkKind("software")));
        }
        let (Some(local), Some(remote)) = (self.local.get(), attr.remote.port) else {
            return Err(self.fault(to, StateFault::NoPort));
        };
        let rnr = ("min_rnr_timer", u32::from(attr.min_rnr_timer), 31);
        if let Some(fault) = over(&[rnr]).or_else(|| self.senseless(local, &attr.remote, &remote)) {
            return Err(self.fault(to, fault));
        }
        let mtu = local.addr.mtu.min(remote.mtu);
        let Some(path_mtu) = mtu_code(mtu) else {
            return Err(self.fault(to, StateFault::Mtu(remote.mtu)));
        };
        let mut attrs = ibv_qp_attr {
            qp_state: ibv_qp_state::IBV_QPS_RTR,
            path_mtu: ibv_mtu(path_mtu),
            dest_qp_num: attr.remote.qpn,
            rq_psn: attr.remote.psn,
            max_dest_rd_atomic: self.device.reads_in().min(remote.reads_out),
            min_rnr_timer: attr.min_rnr_timer,
            ah_attr: self.address(local, &remote),
            ..ibv_qp_attr::default()
        };
        self.modify(to, &mut attrs, transition::RTR)?;
        self.peer_reads_in.store(remote.reads_in, Ordering::Release);
        Ok(())
    }

    fn rts(&self, attr: &RtsAttr) -> Result<(), Error> {
        self.expect(QpState::Rtr, QpState::Rts)?;
        attr.check()
            .map_err(|fault| self.fault(QpState::Rts, fault))?;
        let peer = self.peer_reads_in.load(Ordering::Acquire);
        let mut attrs = ibv_qp_attr {
            qp_state: ibv_qp_state::IBV_QPS_RTS,
            timeout: attr.timeout,
            retry_cnt: attr.retry_cnt.min(self.device.max_retry_cnt()),
            rnr_retry: attr.rnr_retry,
            sq_psn: self.psn,
            max_rd_atomic: self.device.reads_out().min(peer),
            ..ibv_qp_attr::default()
        };
        self.modify(QpState::Rts, &mut attrs, transition::RTS)
    }

    fn post_send(&self, chain: &SendChain, table: &Arc<RegionTable>) -> Result<(), PostError> {
        let state = self.state();
        if state != QpState::Rts && state != QpState::Err {
            let cause = PostCause::State(state);
            return Err(PostError { posted: 0, cause });
        }
        let info = self.device.info();
        let sges = match chain.reads {
            0 => self.caps.max_send_sge,
            _ => self.caps.max_send_sge.min(info.max_sge_rd),
        };
        let limits = PostLimits {
            sges,
            len: info.max_msg_sz,
            table,
        };
        let (want, limited) = limits.check(chain);
        let mut sends = lock(&self.sends);
        let (n, full) = take_credits(want, &self.send_slots, self.send_cq.credits());
        let refusal = match n {
            0 => None,
            _ => sends.post(self.qp, chain, n, table).err(),
        };
        drop(sends);
        match refusal {
            None => {}
            Some(Refused::From { at, code }) => {
                let left = u32::try_from(n - at).unwrap_or(0);
                self.send_slots.give(left);
                self.send_cq.credits().give(left);
                let cause = refused(code);
                return Err(PostError { posted: at, cause });
            }
            Some(Refused::Unsaid { code }) => {
                // What is in the queue is flushed, and so accounted for.
                tracing::error!(
                    qp = self.number,
                    code,
                    "a post failed, and nobody says where"
                );
                self.to_error();
            }
        }
        match full.or(limited) {
            Some(cause) => Err(PostError { posted: n, cause }),
            None => Ok(()),
        }
    }

    fn post_recv(
        &self,
        wr_id: u64,
        sges: &[Sge],
        table: &Arc<RegionTable>,
    ) -> Result<(), PostError> {
        let limits = PostLimits {
            sges: self.caps.max_recv_sge,
            len: u64::MAX,
            table,
        };
        let len = sges.iter().map(|s| u64::from(s.len)).sum();
        let cause = match self.state() {
            QpState::Reset => Some(PostCause::State(QpState::Reset)),
            _ => limits.fault(sges, len),
        };
        if let Some(cause) = cause {
            return Err(PostError { posted: 0, cause });
        }
        let entries = table.entries();
        let mut spans: Vec<ibv_sge> = sges
            .iter()
            .filter(|s| s.len > 0)
            .filter_map(|s| {
                let region = entries.get(s.region as usize)?;
                Some(ibv_sge {
                    addr: region.addr.wrapping_add(s.offset),
                    length: s.len,
                    lkey: region.lkey,
                })
            })
            .collect();
        let mut ring = lock(&self.recvs);
        if let (_, Some(cause)) = take_credits(1, &self.recv_slots, self.recv_cq.credits()) {
            return Err(PostError { posted: 0, cause });
        }
        let mut wr = ibv_recv_wr {
            wr_id: ring.push([(wr_id, WcOpcode::Recv)].into_iter()).at(0),
            next: ptr::null_mut(),
            sg_list: spans.as_mut_ptr(),
            // No more than the queue pair takes.
            num_sge: spans.len() as c_int,
        };
        let mut bad: *mut ibv_recv_wr = ptr::null_mut();
        // SAFETY: the queue pair is there until `destroy`, the request and its spans are whole, and
        // the regions stay while `table` is held.
        let code = unsafe { inline::post_recv(self.qp.as_ptr(), &raw mut wr, &raw mut bad) };
        if code != 0 {
            ring.unpush(1);
            drop(ring);
            self.recv_slots.give(1);
            self.recv_cq.credits().give(1);
            let cause = refused(code);
            return Err(PostError { posted: 0, cause });
        }
        ring.hold(table);
        Ok(())
    }

    fn send_credits(&self) -> u32 {
        self.send_slots.free().min(self.send_cq.credits().free())
    }

    fn qp_num(&self) -> u32 {
        self.number
    }

    fn state(&self) -> QpState {
        QpState::from_u8(self.state.load(Ordering::Acquire))
    }

    fn to_error(&self) {
        let mut attrs = ibv_qp_attr {
            qp_state: ibv_qp_state::IBV_QPS_ERR,
            ..ibv_qp_attr::default()
        };
        if let Err(error) = self.modify(QpState::Err, &mut attrs, transition::ERR) {
            // A device that has gone takes no orders, and nothing moves on it.
            tracing::warn!(%error, "a queue pair was not stopped");
            self.set_state(QpState::Err);
        }
    }

    fn destroy(&self) -> Result<(), Error> {
        if self.device.device().is_inherited() {
            return Ok(());
        }
        let functions = self.device.device().functions();
        // Before the device can give its number to another.
        self.send_cq.leave(self);
        self.recv_cq.leave(self);
        // SAFETY: it is destroyed once: its owner calls this last, and nobody else has it but its
        // completion queues, which do not use the pointer.
        let code = unsafe { (functions.ibv_destroy_qp)(self.qp.as_ptr()) };
        if let Err(error) = self.device.device().check("ibv_destroy_qp", code) {
            // It may go on: its memory and its room in the queues are never given back.
            let mut kept = Vec::new();
            lock(&self.sends).ring.clear(&mut kept);
            lock(&self.recvs).clear(&mut kept);
            std::mem::forget(kept);
            return Err(error);
        }
        self.send_cq.sweep();
        self.recv_cq.sweep();
        let mut retired = Vec::new();
        let sent = lock(&self.sends).ring.clear(&mut retired);
        let received = lock(&self.recvs).clear(&mut retired);
        self.send_cq.credits().give(sent);
        self.recv_cq.credits().give(received);
        Ok(())
    }
}
