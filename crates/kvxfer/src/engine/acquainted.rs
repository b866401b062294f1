//! A peer comes into being: of what it has said of itself, and of the queue pairs that are joined with its own.

use std::sync::Arc;

use tracing::{info, warn};

use kvxfer_verbs::{DeviceAddr, PeerLife};

use super::farewell::Untold;
use super::gpu::{GpuPeer, LinkedMemory, StagedPeer};
use super::lanes::Lanes;
use super::link::Link;
use super::pairing::{KnownRail, Pair};
use super::peer_lanes::PeerRail;
use super::peer_session::{PeerSession, Plans, Standing, SummedParts};
use super::worker::Joined;
use crate::engine::Inner;
use crate::error::{Error, chain};
use crate::event::PeerName;
use crate::layout::{KvFormat, PlacementDesc};
use crate::plan::PlanLimits;
use crate::transfer::PeerKey;
use crate::transport::{PathInfo, RdmaLink};
use crate::wire::{Describe, LinksRefused, PathKind};

/// What is known of the peer before it is one.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) describe: Describe,
    pub(super) layout: (KvFormat, PlacementDesc),
    pub(super) rails: Vec<KnownRail>,
    pub(super) pull: Option<Plans>,
    pub(super) push: Option<Plans>,
}

/// All that a peer is made of.
pub(super) struct Acquainted {
    pub(super) key: PeerKey,
    pub(super) known: Known,
    pub(super) path: PathInfo,
    /// What can be fetched out of its GPU.
    pub(super) gpu: Option<GpuPeer>,
    pub(super) notices: bool,
    /// The pairs of rails that both sides count, and the ways over them on RDMA devices.
    pub(super) pairs: Vec<Pair>,
    pub(super) links: Vec<Option<RdmaLink>>,
    pub(super) lanes: Lanes,
}

/// Whether kernels of a producer that has this device may be let to write this rank's blocks: by what it is known that
/// its process has ended.
fn links_in(engine: &Inner, device: &DeviceAddr) -> Result<Arc<PeerLife>, LinksRefused> {
    if !engine.config.gpu_links_in {
        return Err(LinksRefused::NotAllowed);
    }
    let rail = engine.runtime.rails().first();
    let rail = rail.ok_or(LinksRefused::Unseen)?;
    rail.context.life_of(device).map(Arc::new).map_err(|error| {
        warn!(
            error = chain(&error),
            "gpu_links_in: the peer's process is not seen"
        );
        LinksRefused::Unseen
    })
}

impl Acquainted {
    /// Makes the peer, and gives its lanes to the workers.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceFailed`] where a pair names a rail that is not there.
    pub(super) fn into_peer(
        self,
        engine: &Arc<Inner>,
        link: &Arc<Link>,
    ) -> Result<Arc<PeerSession>, Error> {
        let runtime = &engine.runtime;
        let rails = self.rails(engine);
        let (up, places, left_out) = self.lanes.into_parts();
        // Lanes name them by their places: none may be missing.
        let Some(rails) = rails else {
            return Err(Error::DeviceFailed);
        };
        for left in left_out {
            if let Some(rail) = rails.get(left.pair) {
                rail.leave_out(chain(&left.error));
            }
        }
        let mut workers: Vec<u16> = up.iter().map(|lane: &Joined| lane.worker).collect();
        workers.sort_unstable();
        workers.dedup();
        let known = self.known;
        let first = known.rails.first().zip(runtime.rails().first());
        let same_host = first.is_some_and(|(peer, own)| own.context.shares_host(&peer.device));
        info!(
            peer = %known.describe.engine,
            path = %self.path.path,
            reason = %self.path.reason,
            rails = rails.len(),
            queue_pairs = up.len(),
            "peer is up"
        );
        let life = match known.rails.first() {
            Some(rail) if self.path.path == PathKind::Ipc && known.pull.is_some() => {
                links_in(engine, &rail.device)
            }
            _ => Err(LinksRefused::NotAllowed),
        };
        let describe = known.describe;
        let staged = (self.path.path == PathKind::Staged).then(|| {
            StagedPeer::new(
                engine.gpu.as_deref(),
                describe.gpu.as_ref(),
                &known.layout.1,
            )
        });
        let peer = Arc::new(PeerSession {
            key: self.key,
            name: PeerName {
                engine: describe.engine,
                rank: describe.rank,
            },
            generation: describe.generation,
            rails,
            path: self.path,
            gpu: self.gpu,
            handles: describe.gpu.map(LinkedMemory::new),
            life,
            staged,
            notices: self.notices,
            facts: describe.facts,
            same_host,
            standing: Standing::new(workers.len()),
            untold: Untold::default(),
            workers,
            lanes: places,
            pull: known.pull,
            push: known.push,
            layout: known.layout,
            summing: SummedParts::default(),
            limits: PlanLimits {
                max_msg_bytes: runtime.max_msg_bytes(),
                max_sge: runtime.max_sge(),
            },
            link: Arc::clone(link),
            engine: Arc::downgrade(engine),
            all_workers: runtime.workers().to_vec(),
        });
        runtime.add_lanes(&peer, up);
        Ok(peer)
    }

    fn rails(&self, engine: &Inner) -> Option<Vec<PeerRail>> {
        let links = self.links.iter().map(Option::as_ref);
        let links = links.chain(std::iter::repeat(None));
        let rails = self.pairs.iter().zip(links).map(|(pair, link)| {
            let theirs = self.known.rails.get(usize::from(pair.theirs))?;
            let own = engine.runtime.rail(pair.rail).ok()?;
            let remote = theirs.memories.iter().chain(&theirs.staging).copied();
            let memory = (engine.rails.get(pair.rail)?, remote.collect());
            let device = &own.context.device().name;
            Some(PeerRail::new(device, link, memory, theirs.leases))
        });
        rails.collect()
    }
}
