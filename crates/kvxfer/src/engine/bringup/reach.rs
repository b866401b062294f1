//! Blocks on GPUs: whether this side's reaches the peer's memory, and what the devices of both reach.

use std::sync::atomic::Ordering;
use std::time::Instant;

use kvxfer_verbs::{PeerMapping, SoftPath};

use super::Bringup;
use crate::engine::Inner;
use crate::engine::gpu::GpuPeer;
use crate::engine::pairing::KnownRail;
use crate::engine::rail::Rail;
use crate::error::chain;
use crate::transport::{Blocks, BothBlocks, Unregistered};
use crate::wire::{Describe, GpuDesc, RemoteSpan, limits};

impl Bringup {
    /// Opens the peer's memory for the GPU that this side fetches blocks by, if blocks are to be fetched out of it
    /// and there is a GPU at either end; the error says why that cannot be.
    pub(super) fn reach_gpu(&mut self, engine: &Inner) -> Result<(), String> {
        self.gpu = None;
        let deadline = self.deadline;
        let Some(known) = &self.known else {
            return Ok(());
        };
        let theirs = known.describe.gpu.as_ref();
        if engine.gpu.is_none() && theirs.is_none() {
            return Ok(());
        }
        let device = self.rails.first();
        let device = device.and_then(|at| engine.runtime.rail(*at).ok());
        let devices = device.zip(known.rails.first());
        let same = |(own, theirs): &(&Rail, &KnownRail)| own.context.shares_host(&theirs.device);
        let Some(devices) = devices.filter(same) else {
            return Err("the peer is on another host".to_owned());
        };
        let Some(plans) = &known.pull else {
            return Ok(());
        };
        let lengths = known.layout.1.memory_len();
        let gpu = match (&engine.gpu, theirs, &engine.host) {
            (Some(own), Some(theirs), _) => GpuPeer::open(own, (theirs, lengths), plans),
            // What is wrong with the devices is said where the path is chosen.
            _ if engine.runtime.is_rdma() => return Ok(()),
            (Some(own), None, _) => {
                let go_on = || in_time(engine, deadline);
                let mapped = map_peer(&known.describe, lengths, devices, (&go_on, deadline))?;
                go_on()?;
                GpuPeer::of_host(own, &mapped, plans)
            }
            (None, Some(theirs), Some(own)) => {
                // Before anything is pinned.
                let (own_rail, their_rail) = devices;
                let probed = own_rail.context.probe(&their_rail.device, SoftPath::Arena);
                probed.map_err(|error| chain(&error))?;
                in_time(engine, deadline)?;
                own.reach(&engine.config, (theirs, lengths), plans)
            }
            _ => return Ok(()),
        };
        self.gpu = Some(gpu.map_err(|error| chain(&error))?);
        Ok(())
    }

    /// Why blocks cannot be staged: a side whose memory is a GPU's that its devices do not reach needs buffers.
    pub(super) fn unstaged(&self, engine: &Inner) -> Option<String> {
        let own = engine.gpu.as_ref().filter(|gpu| !gpu.is_registered());
        if let Some(Err(reason)) = own.map(|gpu| gpu.staging()) {
            return Some(format!("no pinned memory: {reason}"));
        }
        let known = self.known.as_ref()?;
        let theirs = known.describe.gpu.as_ref();
        let theirs = theirs.filter(|gpu| gpu.unregistered.is_some())?;
        let spans = known.describe.rails.iter().map(|rail| rail.staging);
        let bytes = |span: Option<RemoteSpan>| span.map_or(0, |span| span.len);
        // No fewer, or operations would be cut to nothing.
        let enough = theirs.staged >= limits::LEAST_STAGED;
        match enough && spans.map(bytes).all(|bytes| bytes >= theirs.staged) {
            true => None,
            false => Some("the peer has no pinned memory to stage blocks in".to_owned()),
        }
    }

    /// Where the blocks of the two sides are.
    pub(super) fn blocks(&self, engine: &Inner) -> BothBlocks {
        let own = engine.gpu.as_ref().map(|gpu| gpu.shown());
        let of = |gpu: Option<&GpuDesc>| match gpu.map(|gpu| &gpu.unregistered) {
            None => Blocks::Host,
            Some(None) => Blocks::Registered,
            Some(Some(_)) => Blocks::Unreached,
        };
        BothBlocks {
            here: of(own),
            there: of(self.their_gpu()),
        }
    }

    /// Why those that are a GPU's are not registered.
    pub(super) fn unregistered<'a>(&'a self, engine: &'a Inner) -> Unregistered<'a> {
        let own = engine.gpu.as_ref().map(|gpu| gpu.shown());
        let of = |gpu: Option<&'a GpuDesc>| gpu?.unregistered.as_deref();
        Unregistered {
            here: of(own),
            there: of(self.their_gpu()),
        }
    }

    fn their_gpu(&self) -> Option<&GpuDesc> {
        self.known.as_ref()?.describe.gpu.as_ref()
    }
}

/// Whether the session may go on to set itself up. Steps that nothing interrupts are many, where a peer has many
/// memories, and whoever drops the engine waits for this thread.
fn in_time(engine: &Inner, deadline: Instant) -> Result<(), String> {
    if engine.runtime.stopping.load(Ordering::Acquire) {
        return Err("the engine is shut down".to_owned());
    }
    match Instant::now() < deadline {
        true => Ok(()),
        false => Err("it has taken longer than a session may take to come up".to_owned()),
    }
}

/// Maps a peer's memories, which are the host's, to be read, as long as `go_on` says so.
fn map_peer(
    describe: &Describe,
    lengths: &[u64],
    (own, theirs): (&Rail, &KnownRail),
    (go_on, deadline): (&dyn Fn() -> Result<(), String>, Instant),
) -> Result<Vec<PeerMapping>, String> {
    let none = || "the peer shares no files of its memory with GPUs".to_owned();
    let token = describe.shared.as_ref().ok_or_else(none)?;
    let token = <[u8; 16]>::try_from(token.0.as_slice()).map_err(|_| none())?;
    let map = |(index, len): (u32, &u64)| {
        go_on()?;
        let of = (index, *len);
        let mapped = (own.context).map_shared(&theirs.device, token, of, deadline);
        mapped.map_err(|error| chain(&error))
    };
    (0..).zip(lengths).map(map).collect()
}
