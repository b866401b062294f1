//! The handle that an engine's author holds.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Inner;
use super::connect::{Target, connect, connect_ranks};
use super::instance::Instance;
use super::net;
use super::peer::Peer;
use super::runtime::Runtime;
use crate::blocks::GroupBlocks;
use crate::claims::Purpose;
use crate::config::Config;
use crate::error::Error;
use crate::event::{Event, PeerName};
use crate::expects::ExpectSpec;
use crate::ids::{EngineId, Generation, Rank, RequestId};
use crate::layout::{KvFormat, KvPlacement};
use crate::metadata::Metadata;
use crate::ticket::{LeaseRef, MAX_TTL, Ticket, TicketError, TicketKind};
use crate::transfer::Cause;
use crate::transport::{Opened, SkippedRail, open_rails};
use crate::wire::Role;

/// Shuts the engine down when the last handle goes.
#[derive(Debug)]
struct Owner {
    inner: Arc<Inner>,
    /// Whether the runtime is this engine's own.
    runs: bool,
    tags: AtomicU64,
}

impl Drop for Owner {
    fn drop(&mut self) {
        if self.inner.runtime.health.is_forked() {
            // The threads are not here, and what is registered is registered for the parent.
            return std::mem::forget(Arc::clone(&self.inner));
        }
        self.inner.shut_down();
        if self.runs {
            self.inner.runtime.shut_down();
        }
        self.inner.settle();
        self.inner.keep_what_kernels_write();
    }
}

/// One rank of an inference engine: its KV memory, registered, and what it exchanges with peers.
///
/// Clones are the same engine; when the last one goes, offers are retracted, expectations and
/// transfers end, and sessions are closed. All calls may be made from any thread. Those that submit
/// work never block on the network: [`connect`](Self::connect) and its like alone do, for as long as
/// they are told.
///
/// # Fork
///
/// An engine belongs to the process that made it. In a forked child every call on it or on what it
/// has given returns [`Error::Forked`] (or `false`, none, no events; a [`Transfer`](super::Transfer)
/// has failed with [`Cause::Forked`]), and dropping does nothing. The child holds the descriptors of
/// its parent's connections until it ends or calls `exec`; meanwhile peers notice the parent's death
/// by its silence only. A child that needs an engine makes its own.
///
/// # Panics of its threads
///
/// Should a worker thread panic, by a defect, its transfers fail with [`Cause::WorkerPanicked`], and
/// so do those with the same peers on other workers. A control connection whose thread panics ends,
/// and the transfers over it fail in the same way; so do all expectations, and offers end, if a thread
/// panics over their ledgers. Memory is released as after any failure. The engine takes no new work
/// then ([`Error::WorkerPanicked`]).
///
/// # Failures of the device
///
/// When the device says that it has failed as a whole, all transfers fail with
/// [`Cause::DeviceFatal`] and all sessions end. The engine takes no new work then
/// ([`Error::DeviceFailed`]), for as long as it lives: drop it and make another. An engine that stands on
/// several devices goes on over the others, until the last one fails.
#[derive(Debug, Clone)]
pub struct Engine {
    owner: Arc<Owner>,
}

impl Engine {
    /// An engine over this memory. Registers the memory, and starts the workers.
    ///
    /// # Errors
    ///
    /// A setting out of its range, a secret that cannot be read, a placement that does not fit the
    /// format, memory that is not the host's, memory that the device does not register, threads that cannot be started.
    pub fn new(config: Config, format: KvFormat, placement: KvPlacement) -> Result<Self, Error> {
        config.check()?;
        let opened = open_rails(&config)?;
        Self::over(opened, config, format, placement)
    }

    /// An engine that stands on these devices.
    pub(super) fn over(
        opened: Opened,
        config: Config,
        format: KvFormat,
        placement: KvPlacement,
    ) -> Result<Self, Error> {
        let runtime = Runtime::new(&config, opened)?;
        let inner = Inner::new(Arc::clone(&runtime), config, format, placement, None);
        if inner.is_err() {
            runtime.shut_down();
        }
        Ok(Self::owned(inner?, true))
    }

    pub(crate) fn owned(inner: Arc<Inner>, runs: bool) -> Self {
        Self {
            owner: Arc::new(Owner {
                inner,
                runs,
                tags: AtomicU64::new(0),
            }),
        }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.owner.inner
    }

    /// RDMA devices that the configuration names and that the engine does without, with the reasons.
    #[must_use]
    pub fn skipped_devices(&self) -> &[SkippedRail] {
        &self.inner().runtime.skipped
    }

    /// The engine's name.
    #[must_use]
    pub fn id(&self) -> &EngineId {
        &self.inner().id
    }

    /// This life of it.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.inner().generation
    }

    /// This rank's position.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.inner().rank()
    }

    /// The configured lease (`lease_ttl`): how long offered blocks are held unless their readers
    /// release them earlier.
    #[must_use]
    pub fn lease_ttl(&self) -> Duration {
        self.inner().config.lease_ttl
    }

    /// Takes sessions, and their data streams, at `HOST:PORT`, `HOST` (at the configured port) or
    /// `HOST:0` (at a port that the system chooses). Returns the address in use.
    ///
    /// # Errors
    ///
    /// [`Error::Resolve`], [`Error::Listen`] (the port is busy), [`Error::Listening`],
    /// [`Error::Unauthenticated`].
    pub fn listen(&self, address: &str) -> Result<SocketAddr, Error> {
        let inner = self.inner();
        inner.runtime.health.check()?;
        inner.runtime.listen(inner, address, inner.config.port)
    }

    /// Connects to the rank that listens at `address` and brings queue pairs up, by `deadline`
    /// from now; resolving a name counts. The session is kept up from then on: it reconnects by
    /// itself until the instance and its clones are dropped. The instance has this one rank;
    /// [`connect_ranks`](Self::connect_ranks) makes one of several.
    ///
    /// # Errors
    ///
    /// [`Error::Resolve`], [`Error::Unreachable`] (nobody listens, or no answer in time, be it to the
    /// name), [`Error::Session`] (not kvxfer, another version, a wrong secret, …),
    /// [`Error::Mismatch`] with every field in which the layouts differ, [`Error::NoPath`] with the
    /// reason for each path, [`Error::Deadline`].
    pub fn connect(&self, address: &str, deadline: Duration) -> Result<Instance, Error> {
        self.inner().runtime.health.check()?;
        let target = Target::address(address, Role::Engine);
        connect(self.inner(), target, deadline).map(Instance::of)
    }

    /// Connects to several ranks of one engine at once, all by `deadline` from now; their order does
    /// not matter. They know themselves as one engine by their `engine_id`, which must be set. Each
    /// session is kept up for itself, and takes no other rank or engine that should come to its address
    /// later.
    ///
    /// All of them or none: when one fails, those that have been opened are closed, after their
    /// [`PeerUp`](Event::PeerUp) perhaps.
    ///
    /// # Errors
    ///
    /// [`Error::ConnectRank`] with the address that failed first and what [`connect`](Self::connect)
    /// says of it; [`Error::OtherEngine`], [`Error::SameRank`], [`Error::NoRanks`].
    pub fn connect_ranks<A: AsRef<str>>(
        &self,
        addresses: &[A],
        deadline: Duration,
    ) -> Result<Instance, Error> {
        self.inner().runtime.health.check()?;
        let target = |address: &A| Target::address(address.as_ref(), Role::Engine);
        let targets = addresses.iter().map(target).collect();
        connect_ranks(self.inner(), targets, deadline)
    }

    /// What a peer needs to connect to this rank, as bytes that an engine's own control plane can
    /// carry: who it is and where it listens.
    ///
    /// # Errors
    ///
    /// [`Error::NotListening`], [`Error::NoAddress`].
    pub fn metadata(&self) -> Result<Vec<u8>, Error> {
        let inner = self.inner();
        inner.runtime.health.check()?;
        let address = self.address()?;
        let metadata = Metadata {
            engine: inner.id.clone(),
            generation: inner.generation,
            rank: inner.rank(),
            address,
        };
        Ok(metadata.to_bytes()?)
    }

    /// Connects to the rank whose [`metadata`](Self::metadata) this is.
    ///
    /// # Errors
    ///
    /// [`Error::Metadata`], and as [`connect`](Self::connect); [`Error::Session`] or
    /// [`Error::Refused`] if another engine or rank is at the address.
    pub fn connect_with(&self, metadata: &[u8], deadline: Duration) -> Result<Instance, Error> {
        self.inner().runtime.health.check()?;
        let target = Target::metadata(metadata)?;
        connect(self.inner(), target, deadline).map(Instance::of)
    }

    /// Connects to the ranks of one engine whose [`metadata`](Self::metadata) these are, as
    /// [`connect_ranks`](Self::connect_ranks) does.
    ///
    /// # Errors
    ///
    /// [`Error::RankMetadata`] with the place of the first that is bad, before anybody is connected
    /// to; and as [`connect_ranks`](Self::connect_ranks).
    pub fn connect_ranks_with<M: AsRef<[u8]>>(
        &self,
        metadata: &[M],
        deadline: Duration,
    ) -> Result<Instance, Error> {
        self.inner().runtime.health.check()?;
        let target = |(index, metadata): (usize, &M)| {
            Target::metadata(metadata.as_ref())
                .map_err(|source| Error::RankMetadata { index, source })
        };
        let targets = metadata
            .iter()
            .enumerate()
            .map(target)
            .collect::<Result<_, _>>()?;
        connect_ranks(self.inner(), targets, deadline)
    }

    /// The rank of that name, if a session with it stands, whichever side has opened it: a producer can
    /// push to a consumer that has connected to it. When the session is lost and the rank comes back,
    /// the peer works again. It keeps no session up itself.
    #[must_use]
    pub fn peer_of(&self, name: &PeerName) -> Option<Peer> {
        if self.is_forked() {
            return None;
        }
        let session = self.inner().peer_named(name)?;
        Some(Peer::accepted(Arc::clone(self.inner()), session))
    }

    fn is_forked(&self) -> bool {
        self.inner().runtime.health.is_forked()
    }

    /// Where peers reach this rank.
    fn address(&self) -> Result<String, Error> {
        let inner = self.inner();
        let at = inner.runtime.listens_on().ok_or(Error::NotListening)?;
        let ip = match inner.config.host_ip {
            Some(ip) => ip,
            None if at.ip().is_unspecified() => {
                net::outward(at).map_err(|source| Error::NoAddress {
                    listening: at,
                    source,
                })?
            }
            None => at.ip(),
        };
        Ok(SocketAddr::new(ip, at.port()).to_string())
    }

    // ---- READ mode, producer -----------------------------------------------------------------

    /// Holds the blocks of a request for `readers` readers, for at most `ttl`. The ticket is for
    /// whoever decodes; relay it. The blocks must not be changed until [`Event::Released`] says
    /// that they are free.
    ///
    /// # Errors
    ///
    /// [`Error::Lease`]: already on offer, no readers, a block twice, no free slot;
    /// [`Error::InUse`]: a block that this rank is being written to; [`Error::NoSuchBlock`];
    /// [`Error::WrongRole`].
    pub fn offer(
        &self,
        request: &RequestId,
        groups: &[GroupBlocks],
        readers: u32,
        ttl: Duration,
    ) -> Result<Ticket, Error> {
        let inner = self.inner();
        if !inner.config.kv_role.produces() {
            return Err(Error::WrongRole {
                role: "kv_consumer",
                operation: "offer",
            });
        }
        inner.runtime.health.check()?;
        inner.check_blocks(request, groups)?;
        check_ttl(ttl)?;
        let nonce = Inner::nonce()?;
        let claim = inner.claim_source(request, Purpose::Offer, || groups.to_vec())?;
        let lease: LeaseRef = inner.books.with(inner, |books, now| {
            let offered = books
                .leases
                .offer(now, request, nonce, groups, readers, ttl)?;
            inner.lease_table.flip(offered.lease.slot, offered.flip)?;
            if let Some(claim) = claim {
                books.offered.insert((request.clone(), nonce), claim);
            }
            Ok::<_, Error>(offered.lease)
        })?;
        Ok(self.ticket(
            TicketKind::Offer,
            request,
            nonce,
            groups,
            Some(lease),
            readers,
            ttl,
        ))
    }

    /// Takes an offer back: its blocks are free with the [`Event::Released`] that follows, and a
    /// pull that has not finished fails. `false`: there was no such offer.
    pub fn retract(&self, request: &RequestId) -> bool {
        if self.is_forked() {
            return false;
        }
        let inner = self.inner();
        inner
            .books
            .with(inner, |books, _| books.leases.retract(request))
    }

    // ---- WRITE mode, consumer ----------------------------------------------------------------

    /// Lets `senders` producers write the blocks of a request, by `deadline` from now. The blocks
    /// must not be used until [`Event::Received`], or after a failure until [`Event::Released`].
    /// The ticket goes by itself to a producer that asks for it
    /// ([`Peer::begin_push`]); it can be relayed as well.
    ///
    /// # Errors
    ///
    /// [`Error::Expect`]: already expected, a block that is in anything else whose memory has not been
    /// released, no senders; [`Error::NoSuchBlock`]; [`Error::WrongRole`].
    pub fn expect(
        &self,
        request: &RequestId,
        groups: &[GroupBlocks],
        senders: u32,
        deadline: Duration,
    ) -> Result<Ticket, Error> {
        self.expect_tagged(request, groups, senders, deadline, 0)
    }

    /// The same; `tag` comes back with the events.
    ///
    /// # Errors
    ///
    /// As [`expect`](Self::expect).
    pub fn expect_tagged(
        &self,
        request: &RequestId,
        groups: &[GroupBlocks],
        senders: u32,
        deadline: Duration,
        tag: u64,
    ) -> Result<Ticket, Error> {
        let inner = self.inner();
        if !inner.config.kv_role.consumes() {
            return Err(Error::WrongRole {
                role: "kv_producer",
                operation: "expect",
            });
        }
        inner.runtime.health.check()?;
        inner.check_blocks(request, groups)?;
        check_ttl(deadline)?;
        let nonce = Inner::nonce()?;
        let ticket = self.ticket(
            TicketKind::Expect,
            request,
            nonce,
            groups,
            None,
            senders,
            deadline,
        );
        inner.books.with(inner, |books, now| {
            let deadline = now.saturating_add(deadline);
            let spec = ExpectSpec {
                request,
                nonce,
                groups,
                senders,
                deadline,
                tag,
            };
            books.expects.expect(now, spec)?;
            books.announce(inner, &ticket);
            Ok::<_, Error>(())
        })?;
        Ok(ticket)
    }

    /// Wants an expected request no more. Its outcome is a failure with [`Cause::Cancelled`].
    /// `false`: it was not expected.
    pub fn cancel_expect(&self, request: &RequestId) -> bool {
        if self.is_forked() {
            return false;
        }
        let inner = self.inner();
        inner.books.with(inner, |books, now| {
            books.expects.cancel(now, request, Cause::Cancelled)
        })
    }

    // ---- events ------------------------------------------------------------------------------

    /// Appends what has happened since the last call; returns how many events that were.
    ///
    /// Events wait until they are polled. Those of requests answer this engine's own calls, so their
    /// number is bounded by what was asked for. Those of peers are bounded: when 1024 of them wait,
    /// further ones are held back, and told as things then stand when there is room again.
    pub fn poll_events(&self, events: &mut Vec<Event>) -> usize {
        if self.is_forked() {
            return 0;
        }
        let n = self.inner().events.drain(events);
        self.inner().catch_up();
        n
    }

    /// The same, and waits for an event for at most `timeout` where there is none.
    pub fn wait_events(&self, events: &mut Vec<Event>, timeout: Duration) -> usize {
        if self.is_forked() {
            return 0;
        }
        let n = self.inner().events.wait(events, timeout);
        self.inner().catch_up();
        n
    }

    /// Readable while there are events to poll: for an event loop of the engine's own.
    #[must_use]
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.inner().events.fd()
    }

    /// A number that no earlier call has given: for tags and request names.
    #[must_use]
    pub fn unique(&self) -> u64 {
        self.owner.tags.fetch_add(1, Ordering::Relaxed)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of a ticket, in its order"
    )]
    fn ticket(
        &self,
        kind: TicketKind,
        request: &RequestId,
        nonce: crate::ids::Nonce,
        groups: &[GroupBlocks],
        lease: Option<LeaseRef>,
        parties: u32,
        ttl: Duration,
    ) -> Ticket {
        let inner = self.inner();
        Ticket {
            kind,
            engine: inner.id.clone(),
            generation: inner.generation,
            rank: inner.rank(),
            addr: self.address().ok(),
            request: request.clone(),
            nonce,
            groups: groups.to_vec(),
            lease,
            format: inner.fingerprint(),
            parties,
            ttl,
        }
    }
}

/// A ticket that nobody could decode is not made.
fn check_ttl(ttl: Duration) -> Result<(), Error> {
    if ttl > MAX_TTL {
        let ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        return Err(TicketError::Ttl { ms }.into());
    }
    Ok(())
}
