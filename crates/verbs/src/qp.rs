//! Queue pairs and how they are brought up: the state is in the type, so a call in the wrong state
//! does not compile.

use std::fmt;
use std::marker::PhantomData;
use std::net::TcpStream;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::device::{DeviceAddr, PdHandle};
use crate::error::{Error, PostError, StateFault};
use crate::region::{Access, RegionTable};
use crate::sys::types::ibv_qp;
use crate::wr::{SendChain, Sge};

pub(crate) trait QpBackend: Send + Sync + fmt::Debug {
    fn init(&self, attr: &InitAttr) -> Result<(), Error>;
    fn endpoint(&self) -> QpEndpoint;
    fn rtr(&self, attr: RtrAttr) -> Result<(), Error>;
    fn rts(&self, attr: &RtsAttr) -> Result<(), Error>;
    fn post_send(&self, chain: &SendChain, table: &Arc<RegionTable>) -> Result<(), PostError>;
    fn post_recv(
        &self,
        wr_id: u64,
        sges: &[Sge],
        table: &Arc<RegionTable>,
    ) -> Result<(), PostError>;
    fn send_credits(&self) -> u32;
    fn qp_num(&self) -> u32;
    fn state(&self) -> QpState;
    fn to_error(&self);
    /// Called once, last; but for what refuses, it is as if it had never been then.
    fn destroy(&self) -> Result<(), Error>;
    /// What it is to libibverbs, if it is anything.
    fn ibv(&self) -> Option<NonNull<ibv_qp>> {
        None
    }
}

/// The state of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum QpState {
    /// Made.
    Reset = 0,
    /// Takes receives.
    Init = 1,
    /// Ready to receive.
    Rtr = 2,
    /// Ready to send.
    Rts = 3,
    /// Everything flushes.
    Err = 4,
}

impl QpState {
    pub(crate) fn from_u8(v: u8) -> Self {
        match v {
            0 => Self::Reset,
            1 => Self::Init,
            2 => Self::Rtr,
            3 => Self::Rts,
            _ => Self::Err,
        }
    }
}

impl fmt::Display for QpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reset => "RESET",
            Self::Init => "INIT",
            Self::Rtr => "RTR",
            Self::Rts => "RTS",
            Self::Err => "ERR",
        })
    }
}

/// How big a queue pair's queues are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QpCaps {
    /// Work requests in the send queue.
    pub max_send_wr: u32,
    /// Receives in the receive queue.
    pub max_recv_wr: u32,
    /// Scatter/gather elements of a send work request.
    pub max_send_sge: u32,
    /// Scatter/gather elements of a receive.
    pub max_recv_sge: u32,
}

impl Default for QpCaps {
    fn default() -> Self {
        Self {
            max_send_wr: 1024,
            max_recv_wr: 64,
            max_send_sge: 4,
            max_recv_sge: 4,
        }
    }
}

/// Attributes of RESET → INIT.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct InitAttr {
    /// What the peer may do through this queue pair (`REMOTE_READ`, `REMOTE_WRITE`).
    pub access: Access,
    /// The GID of an RDMA device's port that it uses, as
    /// [`Context::gid_towards`](crate::Context::gid_towards) chooses it; `None`: the one that the
    /// device takes towards a peer that nothing is known of. Other devices have none.
    pub gid_index: Option<u32>,
}

impl InitAttr {
    /// Attributes with this access, and the rest left to the device.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self {
            access,
            gid_index: None,
        }
    }
}

/// What a peer must know of a queue pair, to be sent over the control connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct QpEndpoint {
    /// Queue pair number.
    pub qpn: u32,
    /// First packet sequence number (24 bits).
    pub psn: u32,
    /// A secret that binds a soft stream to this queue pair.
    pub token: [u8; 16],
    /// Where it is on an RDMA network; `None` on other devices.
    #[serde(default)]
    pub port: Option<PortAddr>,
}

/// Where a queue pair of an RDMA device is on its network, and what it takes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortAddr {
    /// The address that packets come from and go to.
    pub gid: [u8; 16],
    /// Whether the port is on Ethernet, and not on InfiniBand.
    pub ethernet: bool,
    /// The version of RoCE that the address is for, 1 or 2; `None` where nobody tells.
    pub roce: Option<u8>,
    /// The local address of InfiniBand; 0 on Ethernet.
    pub lid: u16,
    /// Bytes of the longest packet.
    pub mtu: u32,
    /// READs that it answers at a time.
    pub reads_in: u8,
    /// READs that it has under way at a time.
    pub reads_out: u8,
}

impl fmt::Debug for QpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The token is a secret, not for logs.
        f.debug_struct("QpEndpoint")
            .field("qpn", &self.qpn)
            .field("psn", &self.psn)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// The soft device's ways to a peer on the same host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SoftPath {
    /// The source's memory is mapped; memory without a file falls back on `process_vm_readv`.
    Arena,
    /// `process_vm_readv` for all memory.
    ProcessVm,
}

impl fmt::Display for SoftPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Arena => "arena",
            Self::ProcessVm => "process_vm",
        })
    }
}

/// How the two queue pairs are joined. On one host one side dials and the other awaits; over TCP
/// the caller connects two streams, and one side's `requester` is the other's `responder`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Link {
    /// Dials the peer's Unix socket. The peer's queue pair must be at least in INIT.
    SoftDial {
        /// The peer's context.
        peer: DeviceAddr,
        /// The path.
        path: SoftPath,
        /// When to give up.
        deadline: Instant,
    },
    /// The peer dials. Does not wait for it: what is posted earlier waits in the queue.
    SoftAwait {
        /// The path that the peer must dial.
        path: SoftPath,
    },
    /// Connected TCP streams, made and authenticated by the caller.
    SoftTcp {
        /// Carries this side's requests.
        requester: TcpStream,
        /// Carries the peer's requests.
        responder: TcpStream,
    },
    /// The network of an RDMA device: the endpoints say it all.
    Rdma,
}

/// Attributes of INIT → RTR.
#[derive(Debug)]
pub struct RtrAttr {
    /// The peer's queue pair.
    pub remote: QpEndpoint,
    /// The way to it.
    pub link: Link,
    /// How long a peer is told to wait for a receive, as the verbs code (0 to 31; 12 is 640 us).
    pub min_rnr_timer: u8,
}

/// Attributes of RTR → RTS.
#[derive(Debug, Clone, Copy)]
pub struct RtsAttr {
    /// Time for an answer, as the verbs code: 4.096 us × 2^timeout (0 to 31, 0 is for ever).
    pub timeout: u8,
    /// Tries after the first (0 to 7). `timeout` × (`retry_cnt` + 1) without progress ends in
    /// `RetryExc`.
    pub retry_cnt: u8,
    /// Tries after the first where the peer had no receive (0 to 7, 7 is for ever).
    pub rnr_retry: u8,
}

impl RtsAttr {
    /// How long a request is tried in all; `None`: for ever. Devices may take some times longer.
    #[must_use]
    pub fn retry_time(&self) -> Option<Duration> {
        let once = Duration::from_nanos(4096 << self.timeout.min(31));
        (self.timeout > 0).then(|| once * (u32::from(self.retry_cnt) + 1))
    }

    /// Whether every value fits its field.
    pub(crate) fn check(&self) -> Result<(), StateFault> {
        let ranges = [
            ("timeout", self.timeout, 31),
            ("retry_cnt", self.retry_cnt, 7),
            ("rnr_retry", self.rnr_retry, 7),
        ];
        let over = ranges.into_iter().find(|(_, value, max)| value > max);
        over.map_or(Ok(()), |(attribute, value, max)| {
            Err(StateFault::Range {
                attribute,
                value: value.into(),
                max: max.into(),
            })
        })
    }
}

impl Default for RtsAttr {
    fn default() -> Self {
        Self {
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
        }
    }
}

/// State: made.
#[derive(Debug)]
pub struct Reset;
/// State: takes receives, has an endpoint.
#[derive(Debug)]
pub struct Init;
/// State: ready to receive.
#[derive(Debug)]
pub struct Rtr;
/// State: ready to send.
#[derive(Debug)]
pub struct Rts;

/// A queue pair. Dropping it destroys it, unless the device refuses ([`destroy`](Self::destroy) tells): afterwards nothing moves through it in either direction,
/// and its completions that nobody has polled are gone.
#[derive(Debug)]
pub struct QueuePair<S> {
    inner: Owner,
    state: PhantomData<fn() -> S>,
}

/// Destroys the queue pair when the last state of it goes.
#[derive(Debug)]
struct Owner {
    qp: Arc<dyn QpBackend>,
    /// Whether its end was asked for, whatever the answer.
    ended: bool,
    // Keeps the device open, and the protection domain.
    _pd: Arc<PdHandle>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = self.qp.destroy()
        {
            tracing::warn!(qp = self.qp.qp_num(), %error, "a queue pair stays until the device is closed");
        }
    }
}

impl<S> QueuePair<S> {
    /// The queue pair number.
    #[must_use]
    pub fn qp_num(&self) -> u32 {
        self.inner.qp.qp_num()
    }

    /// What it is to libibverbs, if it is anything, as long as this value is there.
    pub(crate) fn ibv(&self) -> Option<NonNull<ibv_qp>> {
        self.inner.qp.ibv()
    }

    /// The state it is in; [`QpState::Err`] after an error, whatever the type says.
    #[must_use]
    pub fn state(&self) -> QpState {
        self.inner.qp.state()
    }

    /// Moves it to ERR: everything posted flushes. On the software device no WRITE of the peer lands
    /// through it any more when the call returns; on an RDMA device that is sure when the queue pair
    /// has been destroyed, for one may be on its way through the card, and a card that takes no orders any
    /// more does not stop.
    pub fn to_error(&self) {
        self.inner.qp.to_error();
    }

    /// Destroys it, as dropping it does, and says whether that is so.
    ///
    /// # Errors
    ///
    /// [`Error::Device`]: the device has refused. The queue pair may go on: what the peer sends on it may
    /// land, and what was posted on it may be carried out, until the device is closed.
    pub fn destroy(mut self) -> Result<(), Error> {
        self.inner.ended = true;
        self.inner.qp.destroy()
    }

    fn into_state<T>(self) -> QueuePair<T> {
        QueuePair {
            inner: self.inner,
            state: PhantomData,
        }
    }
}

impl QueuePair<Reset> {
    pub(crate) fn new(qp: Arc<dyn QpBackend>, pd: Arc<PdHandle>) -> Self {
        Self {
            inner: Owner {
                qp,
                ended: false,
                _pd: pd,
            },
            state: PhantomData,
        }
    }

    /// RESET → INIT.
    ///
    /// # Errors
    ///
    /// [`Error::Transition`].
    pub fn init(self, attr: InitAttr) -> Result<QueuePair<Init>, Error> {
        self.inner.qp.init(&attr)?;
        Ok(self.into_state())
    }
}

impl QueuePair<Init> {
    /// What the peer must know of it.
    #[must_use]
    pub fn endpoint(&self) -> QpEndpoint {
        self.inner.qp.endpoint()
    }

    /// INIT → RTR: joins it to the peer's.
    ///
    /// # Errors
    ///
    /// [`Error::Transition`] names the attribute at fault; [`Error::Path`] and
    /// [`Error::DialDeadline`] where the peer cannot be reached.
    pub fn rtr(self, attr: RtrAttr) -> Result<QueuePair<Rtr>, Error> {
        self.inner.qp.rtr(attr)?;
        Ok(self.into_state())
    }

    /// Posts a receive. Same as [`QueuePair::<Rts>::post_recv`].
    ///
    /// # Errors
    ///
    /// See there.
    pub fn post_recv(
        &self,
        wr_id: u64,
        sges: &[Sge],
        table: &Arc<RegionTable>,
    ) -> Result<(), PostError> {
        self.inner.qp.post_recv(wr_id, sges, table)
    }
}

impl QueuePair<Rtr> {
    /// RTR → RTS.
    ///
    /// # Errors
    ///
    /// [`Error::Transition`].
    pub fn rts(self, attr: RtsAttr) -> Result<QueuePair<Rts>, Error> {
        self.inner.qp.rts(&attr)?;
        Ok(self.into_state())
    }

    /// Posts a receive. Same as [`QueuePair::<Rts>::post_recv`].
    ///
    /// # Errors
    ///
    /// See there.
    pub fn post_recv(
        &self,
        wr_id: u64,
        sges: &[Sge],
        table: &Arc<RegionTable>,
    ) -> Result<(), PostError> {
        self.inner.qp.post_recv(wr_id, sges, table)
    }
}

impl QueuePair<Rts> {
    /// Posts a chain. The chain may be reused at once; the table is held until the last of the
    /// work requests has ended. In ERR the work requests are taken and flushed.
    ///
    /// A send-queue slot is free again when the completion of its work request, or of a later
    /// signalled one, has been polled: signal at least once per queue depth.
    ///
    /// # Errors
    ///
    /// [`PostError`] says how many were posted before the first that was not, and why.
    pub fn post_send(&self, chain: &SendChain, table: &Arc<RegionTable>) -> Result<(), PostError> {
        self.inner.qp.post_send(chain, table)
    }

    /// Posts a receive.
    ///
    /// # Errors
    ///
    /// [`PostError`] with `posted` 0.
    pub fn post_recv(
        &self,
        wr_id: u64,
        sges: &[Sge],
        table: &Arc<RegionTable>,
    ) -> Result<(), PostError> {
        self.inner.qp.post_recv(wr_id, sges, table)
    }

    /// How many work requests the send queue takes now.
    #[must_use]
    pub fn send_credits(&self) -> u32 {
        self.inner.qp.send_credits()
    }
}
