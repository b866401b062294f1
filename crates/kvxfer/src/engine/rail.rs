//! A rail: one of the devices that an engine stands on, and what is its own of everything that belongs to
//! a device.

use std::sync::Arc;

use kvxfer_verbs::{Access, Context, Memory, MemoryRegion, ProtectionDomain, RegionTable};

use super::Clock;
use super::async_events::AsyncEvents;
use super::gpu::Staging;
use super::health::Health;
use super::loopback::Loopback;
use crate::error::Error;

/// An open device, and a completion queue of it for each worker.
#[derive(Debug)]
pub(crate) struct Rail {
    /// Among the devices that the configuration names.
    pub(crate) place: u16,
    pub(crate) context: Context,
    pub(crate) pd: ProtectionDomain,
    pub(crate) events: Arc<AsyncEvents>,
}

impl Rail {
    /// # Errors
    ///
    /// Those of the device.
    pub(crate) fn new(
        (place, context): (u16, Context),
        clock: Clock,
        health: &Arc<Health>,
        (workers, depth): (u16, u32),
    ) -> Result<Self, Error> {
        let pd = context.alloc_pd()?;
        let cqs = (0..workers)
            .map(|_| context.create_cq(depth))
            .collect::<Result<Vec<_>, _>>()?;
        let events = AsyncEvents::new(context.clone(), clock, Arc::clone(health), cqs);
        Ok(Self {
            place,
            context,
            pd,
            events: Arc::new(events),
        })
    }
}

/// A placement's memories on one rail, in their order; none where only a GPU moves them.
#[derive(Debug, Default)]
pub(crate) struct RailBlocks {
    pub(crate) regions: Vec<MemoryRegion>,
    /// Where the device has to read what it has written before a GPU may.
    pub(crate) loopback: Option<Loopback>,
}

/// Registers a placement's memories on each rail.
///
/// # Errors
///
/// What a device does not register.
pub(crate) fn register_blocks(
    rails: &[Rail],
    (memories, access): (&[Arc<dyn Memory>], Access),
) -> Result<Vec<RailBlocks>, Error> {
    let on_rail = |rail: &Rail| {
        let register = |memory: &Arc<dyn Memory>| rail.pd.register(Arc::clone(memory), access);
        let regions = memories.iter().map(register).collect::<Result<_, _>>()?;
        Ok(RailBlocks {
            regions,
            loopback: None,
        })
    };
    rails.iter().map(on_rail).collect()
}

/// An engine's memory as it is registered on one rail.
#[derive(Debug)]
pub(crate) struct RailMemory {
    /// The placement's memories, then the landing slots; then where what is staged is read into.
    pub(crate) regions: Arc<RegionTable>,
    /// The lease slots.
    pub(crate) leases: RegionTable,
    /// Where peers read what is staged for them.
    pub(crate) staging: Option<RegionTable>,
    /// See [`RailBlocks`].
    pub(crate) loopback: Option<Arc<Loopback>>,
}

impl RailMemory {
    /// # Errors
    ///
    /// What the device does not register.
    pub(crate) fn register(
        pd: &ProtectionDomain,
        blocks: RailBlocks,
        landings: Arc<dyn Memory>,
        leases: Arc<dyn Memory>,
        staging: Option<&Staging>,
    ) -> Result<Self, Error> {
        let mut regions = blocks.regions;
        regions.push(pd.register(landings, Access::LOCAL_WRITE)?);
        let mut out = None;
        if let Some(staging) = staging {
            regions.push(pd.register(staging.into.memory(), Access::LOCAL_WRITE)?);
            let staged = pd.register(staging.out.memory(), Access::REMOTE_READ)?;
            out = Some(RegionTable::new(vec![staged]));
        }
        Ok(Self {
            loopback: blocks.loopback.map(Arc::new),
            staging: out,
            regions: Arc::new(RegionTable::new(regions)),
            leases: RegionTable::new(vec![pd.register(leases, Access::REMOTE_READ)?]),
        })
    }
}
