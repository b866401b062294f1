//! Which way leads to a peer, which others were looked at, and why they were not taken.

use serde::{Deserialize, Serialize};
use tracing::debug;

use kvxfer_verbs::{Context, DeviceAddr, DeviceKind, GidChoice, SoftPath};

use super::{RdmaLink, SkippedRail};
use crate::config::PathSet;
use crate::error::{Error, chain};
use crate::wire::{Candidate, PathKind};

/// The paths that are looked at, the preferred first. The first is for memory of GPUs alone.
const PREFERENCE: [PathKind; 5] = [
    PathKind::Ipc,
    PathKind::Rdma,
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
];

/// The path in use, and how it came to be chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// The path.
    pub path: PathKind,
    /// Why this one.
    pub reason: String,
    /// Every path that was looked at, the preferred first.
    pub candidates: Vec<Candidate>,
    /// Ports and queue pairs of a way over RDMA devices, one for each pair of rails that is joined.
    #[serde(default)]
    pub rails: Vec<RdmaLink>,
    /// Devices of this side that the configuration names and that the way does without, and why.
    #[serde(default)]
    pub skipped: Vec<SkippedRail>,
}

/// The soft device's name for a path inside a host. Where blocks go from GPU to GPU, lease slots and notices go by
/// shared memory.
pub(crate) fn soft_path(path: PathKind) -> Option<SoftPath> {
    match path {
        PathKind::Arena | PathKind::Ipc => Some(SoftPath::Arena),
        PathKind::ProcessVm => Some(SoftPath::ProcessVm),
        _ => None,
    }
}

fn is_rdma(kind: DeviceKind) -> bool {
    kind == DeviceKind::Rdma
}

/// Whether a device is the one that a path goes over.
pub(crate) fn goes_over(path: PathKind, context: &Context) -> bool {
    is_rdma(context.device().kind) == (path == PathKind::Rdma)
}

/// Of this side's GIDs the one for these of the peer; `None` on the software device.
///
/// # Errors
///
/// [`Error::Verbs`] where none leads there.
pub(crate) fn gid_towards(
    context: &Context,
    peer: &[[u8; 16]],
) -> Result<Option<GidChoice>, Error> {
    let choice = context.gid_towards(peer)?;
    if let Some(choice) = &choice {
        let GidChoice { index, reason, .. } = choice;
        debug!(device = context.device().name, index, reason, "GID");
    }
    Ok(choice)
}

/// Which of two sides have their blocks on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OnGpu {
    pub(crate) here: bool,
    pub(crate) there: bool,
}

impl OnGpu {
    pub(crate) const NONE: Self = Self {
        here: false,
        there: false,
    };

    /// The same in the words of the other side.
    pub(crate) fn seen_from_there(self) -> Self {
        Self {
            here: self.there,
            there: self.here,
        }
    }

    /// Why a path does not carry the blocks of these two.
    pub(crate) fn why_not(self, path: PathKind) -> Option<&'static str> {
        let ipc = path == PathKind::Ipc;
        match (self.here == ipc, self.there == ipc) {
            (true, true) => None,
            (false, _) if ipc => Some("this side's memory is the host's"),
            (false, _) => Some("this side's memory is a GPU's"),
            (true, false) if ipc => Some("the peer's memory is the host's"),
            (true, false) => Some("the peer's memory is a GPU's"),
        }
    }
}

/// What one side knows of both when it chooses.
#[derive(Debug)]
pub(crate) struct Choice<'a> {
    /// The first pair of rails, one of this side and one of the peer.
    pub(crate) context: &'a Context,
    pub(crate) peer: &'a DeviceAddr,
    /// And the others.
    pub(crate) others: &'a [(&'a Context, &'a DeviceAddr)],
    /// Whether all memory of this side, and of the peer, has a file that the other may map.
    pub(crate) local_shareable: bool,
    pub(crate) peer_shareable: bool,
    pub(crate) on_gpu: OnGpu,
    /// Why this side cannot fetch blocks out of the peer's GPU, if it has to.
    pub(crate) unreachable: Option<String>,
    /// The paths that the configuration allows.
    pub(crate) allowed: &'a PathSet,
}

impl Choice<'_> {
    /// Looks at every path and takes the first that is usable.
    ///
    /// # Errors
    ///
    /// [`Error::NoPath`] with every candidate's reason.
    pub(crate) fn choose(&self) -> Result<PathInfo, Error> {
        let forced = self.allowed.forced();
        let of_gpus = self.on_gpu != OnGpu::NONE || forced == Some(PathKind::Ipc);
        let candidates: Vec<Candidate> = PREFERENCE
            .into_iter()
            .filter(|path| *path != PathKind::Ipc || of_gpus)
            .map(|path| Candidate {
                path,
                why_not: self.why_not(path),
            })
            .collect();
        let chosen = candidates.iter().find(|c| c.usable()).map(|c| c.path);
        let Some(path) = chosen else {
            return Err(Error::NoPath { forced, candidates });
        };
        let reason = match path {
            _ if forced.is_some() => format!("{path} was asked for"),
            PathKind::Arena => "same host, and both sides' memory can be mapped".to_owned(),
            PathKind::ProcessVm => "same host, memory registered by address".to_owned(),
            PathKind::Tcp => "no faster path leads to the peer".to_owned(),
            PathKind::Rdma => "both sides use RDMA devices".to_owned(),
            PathKind::Ipc => "same node, and this side's GPU reaches the peer's memory".to_owned(),
            other => format!("{other} leads to the peer"),
        };
        Ok(PathInfo {
            path,
            reason,
            candidates,
            rails: Vec::new(),
            skipped: Vec::new(),
        })
    }

    fn why_not(&self, path: PathKind) -> Option<String> {
        match path {
            _ if !self.allowed.allows(path) => {
                Some("the configuration does not allow it".to_owned())
            }
            _ if self.on_gpu.why_not(path).is_some() => {
                self.on_gpu.why_not(path).map(ToOwned::to_owned)
            }
            PathKind::Ipc if self.unreachable.is_some() => self.unreachable.clone(),
            PathKind::Rdma if !is_rdma(self.context.device().kind) => Some(
                "this engine uses the software device: name RDMA devices, or this path alone"
                    .to_owned(),
            ),
            PathKind::Rdma if !is_rdma(self.peer.kind) => {
                Some("the peer uses its software device".to_owned())
            }
            PathKind::Rdma => {
                let leads = |(own, peer): &(&Context, &DeviceAddr)| own.gid_towards(&peer.gids);
                let first = leads(&(self.context, self.peer)).err()?;
                // One pair of rails is enough.
                let other = self.others.iter().any(|pair| leads(pair).is_ok());
                (!other).then(|| chain(&first))
            }
            _ if is_rdma(self.context.device().kind) => {
                let name = &self.context.device().name;
                Some(format!("this engine uses the RDMA device {name}"))
            }
            _ if is_rdma(self.peer.kind) => {
                let name = self.peer.name.escape_debug();
                Some(format!("the peer uses its RDMA device {name}"))
            }
            PathKind::Tcp => None,
            PathKind::Arena | PathKind::Ipc if !self.local_shareable => {
                Some("this side's memory has no file that the peer could map".to_owned())
            }
            PathKind::Arena | PathKind::Ipc if !self.peer_shareable => {
                Some("the peer's memory has no file that could be mapped".to_owned())
            }
            PathKind::Arena | PathKind::ProcessVm | PathKind::Ipc => {
                let soft = soft_path(path)?;
                self.context
                    .probe(self.peer, soft)
                    .err()
                    .map(|error| chain(&error))
            }
            _ => Some("this version does not know it".to_owned()),
        }
    }
}
