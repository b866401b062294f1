//! The target's end of a bandwidth test.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use tracing::{debug, info, warn};

use super::memory::BenchMemory;
use super::message::{Answer, Ask, pack};
use super::side::BenchSide;
use crate::blocks::GroupBlocks;
use crate::config::{BenchPlace, Config, KvRole};
use crate::engine::{Engine, Inner, PeerSession, spawn};
use crate::error::Error;
use crate::event::Event;
use crate::ids::RequestId;
use crate::layout::{KvFormat, LayoutMismatch, PlacementDesc, Side, compare};
use crate::wire::{Blob, Describe, Refusal, limits};

/// A bandwidth-test client's engine, and the thread that does what the client asks. Everything ends
/// with the seat.
#[derive(Debug)]
pub(crate) struct BenchSeat {
    engine: Engine,
    side: BenchSide,
    inbox: Receiver<Vec<u8>>,
    /// Cut off when the seat goes.
    stop: Option<Sender<()>>,
    bytes: u64,
}

/// Has an engine refuse bandwidth tests of another format than its own. Without this it takes
/// every format: a test never touches the engine's own memory.
pub fn hold_to_format(engine: &Engine) {
    engine.inner().bench_held.store(true, Ordering::Release);
}

/// Whether the engine takes tests of this format.
fn held_to(host: &Inner, format: &KvFormat, placement: &PlacementDesc) -> Result<(), Refusal> {
    if !host.bench_held.load(Ordering::Acquire) {
        return Ok(());
    }
    let ours = Side {
        format: &host.format,
        placement: host.placement.desc(),
    };
    let theirs = Side { format, placement };
    let differences = compare(&ours, &theirs);
    if differences.is_empty() {
        return Ok(());
    }
    let detail = LayoutMismatch { differences }.to_string();
    Err(Refusal::FormatMismatch {
        detail: detail.chars().take(limits::TEXT / 4).collect(),
    })
}

impl BenchSeat {
    /// Allocates the counterpart of the client's layout, within the memory that is allowed for.
    pub(crate) fn new(
        host: &Arc<Inner>,
        describe: &Describe,
        format: &KvFormat,
        placement: &PlacementDesc,
    ) -> Result<Self, Refusal> {
        held_to(host, format, placement)?;
        let limit = host.config.max_memory.0;
        let bytes = placement
            .memory_len()
            .iter()
            .try_fold(0u64, |sum, len| sum.checked_add(*len));
        let full = || Refusal::Full {
            what: "memory of bandwidth tests (--max-memory)".into(),
            limit,
        };
        let bytes = bytes.filter(|bytes| *bytes <= limit).ok_or_else(full)?;
        let used = &host.runtime.bench_bytes;
        if used
            .fetch_add(bytes, Ordering::AcqRel)
            .saturating_add(bytes)
            > limit
        {
            used.fetch_sub(bytes, Ordering::AcqRel);
            return Err(full());
        }
        Self::allocate(host, describe, format, placement, bytes).map_err(|error| {
            used.fetch_sub(bytes, Ordering::AcqRel);
            warn!(%error, "bandwidth test refused");
            Refusal::BadDescription {
                detail: crate::error::chain(&error),
            }
        })
    }

    fn allocate(
        host: &Arc<Inner>,
        describe: &Describe,
        format: &KvFormat,
        placement: &PlacementDesc,
        bytes: u64,
    ) -> Result<Self, Error> {
        let on_gpu = match host.config.bench_memory {
            BenchPlace::Peer => describe.gpu.is_some(),
            BenchPlace::Host => false,
            BenchPlace::Gpu => true,
        };
        let kind = if on_gpu {
            BenchMemory::Gpu {
                runtime: host.config.gpu,
                ordinal: host.config.gpu_device,
            }
        } else if describe.fd_backed {
            BenchMemory::Arena
        } else {
            BenchMemory::Anonymous
        };
        let side = BenchSide::mirror(format, placement, kind)?;
        let mut config: Config = host.config.clone();
        config.kv_role = KvRole::Both;
        config.engine_id = Some(format!("{}/bench-{}", host.id, host.runtime.next_id()));
        let (sender, inbox) = unbounded();
        let inner = Inner::new(
            Arc::clone(&host.runtime),
            config,
            format.clone(),
            side.placement().clone(),
            Some(sender),
        )?;
        info!(client = %describe.engine, bytes, "bandwidth test");
        Ok(Self {
            engine: Engine::owned(inner, false),
            side,
            inbox,
            stop: None,
            bytes,
        })
    }

    pub(crate) fn engine(&self) -> &Arc<Inner> {
        self.engine.inner()
    }

    /// Transfers can run: begins to answer.
    pub(crate) fn serve(&mut self, peer: &Arc<PeerSession>) -> Result<(), Error> {
        let (stop, stopped) = bounded(0);
        self.stop = Some(stop);
        let target = Target {
            engine: self.engine.clone(),
            side: self.side.clone(),
            peer: Arc::clone(peer),
            armed: HashMap::new(),
        };
        let inbox = self.inbox.clone();
        spawn("kvx-bench", move || target.run(&inbox, &stopped))?;
        Ok(())
    }
}

impl Drop for BenchSeat {
    fn drop(&mut self) {
        self.engine
            .inner()
            .runtime
            .bench_bytes
            .fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Requests that are expected one after another.
#[derive(Debug, Clone)]
struct Armed {
    prefix: String,
    groups: Vec<GroupBlocks>,
    next: u64,
    end: u64,
    deadline: Duration,
}

#[derive(Debug)]
struct Target {
    engine: Engine,
    side: BenchSide,
    peer: Arc<PeerSession>,
    /// By the request that stands.
    armed: HashMap<RequestId, Armed>,
}

impl Target {
    fn run(mut self, inbox: &Receiver<Vec<u8>>, stopped: &Receiver<()>) {
        let engine = self.engine.clone();
        let events = engine.inner().events.receiver();
        loop {
            select! {
                recv(inbox) -> ask => match ask {
                    Ok(ask) => self.answer(&ask),
                    Err(_) => return,
                },
                recv(events) -> event => match event {
                    Ok(event) => self.event(&event),
                    Err(_) => return,
                },
                recv(stopped) -> _ => return,
            }
        }
    }

    fn answer(&mut self, ask: &[u8]) {
        let answer = match Blob(ask.to_vec()).unpack("benchmark message") {
            Ok(ask) => self.carry_out(ask).unwrap_or_else(|error| match error {
                Error::BenchWrong(wrong) => Answer::Wrong(wrong),
                error => Answer::failed(&error),
            }),
            Err(error) => Answer::failed(&error.into()),
        };
        match pack(&answer) {
            Ok(message) => self.peer.link.send(message),
            Err(error) => warn!(%error, "benchmark answer does not encode"),
        }
    }

    fn carry_out(&mut self, ask: Ask) -> Result<Answer, Error> {
        match ask {
            Ask::Fill { seed } => self.side.fill(seed)?,
            Ask::Poison => self.side.poison()?,
            Ask::Offer {
                request,
                groups,
                ttl_ms,
            } => {
                let ttl = Duration::from_millis(ttl_ms);
                let ticket = self.engine.offer(&request, &groups, 1, ttl)?;
                return Ok(Answer::Ticket(Blob(ticket.to_bytes()?)));
            }
            Ask::Retract { request } => {
                self.engine.retract(&request);
            }
            Ask::Arm {
                prefix,
                groups,
                first,
                end,
                deadline_ms,
            } => {
                let deadline = Duration::from_millis(deadline_ms);
                self.arm(Armed {
                    prefix,
                    groups,
                    next: first,
                    end,
                    deadline,
                })?;
            }
            Ask::Disarm { prefix } => {
                let armed = self.armed.extract_if(|_, armed| armed.prefix == prefix);
                let requests: Vec<RequestId> = armed.map(|(request, _)| request).collect();
                for request in requests {
                    self.engine.cancel_expect(&request);
                }
            }
            Ask::Verify { seed, pairs } => {
                return Ok(Answer::Verified {
                    bytes: self.side.verify(seed, &pairs)?,
                });
            }
        }
        Ok(Answer::Done)
    }

    fn arm(&mut self, mut armed: Armed) -> Result<(), Error> {
        if armed.next >= armed.end {
            return Ok(());
        }
        let request = RequestId::from(format!("{}.{}", armed.prefix, armed.next));
        armed.next += 1;
        self.engine
            .expect(&request, &armed.groups, 1, armed.deadline)?;
        self.armed.insert(request, armed);
        Ok(())
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Received { request, .. } => {
                if let Some(armed) = self.armed.remove(request)
                    && let Err(error) = self.arm(armed)
                {
                    warn!(%error, "bandwidth test cannot go on");
                }
            }
            Event::Failed {
                request,
                first_cause,
                ..
            } => {
                self.armed.remove(request);
                debug!(%request, %first_cause, "a push of a bandwidth test failed");
            }
            _ => {}
        }
    }
}
