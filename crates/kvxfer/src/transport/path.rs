//! Which way leads to a peer, which others were looked at, and why they were not taken.

use serde::{Deserialize, Serialize};
use tracing::debug;

use kvxfer_verbs::{Context, DeviceAddr, DeviceKind, GidChoice, SoftPath};

use super::{RdmaLink, SkippedRail};
use crate::config::PathSet;
use crate::error::{Error, chain};
use crate::wire::{Candidate, PathKind};

/// The paths that are looked at, the preferred first. The first and the last are for memory of GPUs alone.
const PREFERENCE: [PathKind; 6] = [
    PathKind::Ipc,
    PathKind::Rdma,
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Staged,
];

/// Those that what is staged may go over, the preferred first.
const BENEATH: [PathKind; 4] = [
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
    /// By which the queue pairs go, where blocks are staged.
    #[serde(default)]
    pub over: Option<PathKind>,
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

impl PathInfo {
    /// What the queue pairs go by, whatever moves the blocks of GPUs.
    #[must_use]
    pub fn beneath(&self) -> PathKind {
        self.over.unwrap_or(self.path)
    }
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

    /// The path that blocks have over queue pairs of this one.
    pub(crate) fn path_over(self, beneath: PathKind) -> PathKind {
        match (self, beneath) {
            (Self::NONE, path) | (_, path @ PathKind::Ipc) => path,
            _ => PathKind::Staged,
        }
    }

    /// Why a path does not carry the blocks of these two.
    pub(crate) fn why_not(self, path: PathKind) -> Option<&'static str> {
        if path == PathKind::Staged {
            return (self == Self::NONE).then_some("neither side's memory is a GPU's");
        }
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
    /// Why blocks cannot be staged between the two, if they cannot.
    pub(crate) unstaged: Option<String>,
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
        let of_gpus = |path| self.on_gpu != OnGpu::NONE || forced == Some(path);
        let candidates: Vec<Candidate> = PREFERENCE
            .into_iter()
            .filter(|path| match path {
                PathKind::Ipc | PathKind::Staged => of_gpus(*path),
                _ => true,
            })
            .map(|path| Candidate {
                path,
                why_not: self.why_not(path),
            })
            .collect();
        let chosen = candidates.iter().find(|c| c.usable()).map(|c| c.path);
        let Some(path) = chosen else {
            return Err(Error::NoPath { forced, candidates });
        };
        let over = match path {
            PathKind::Staged => self.beneath().ok(),
            _ => None,
        };
        let of_ipc = candidates.iter().find(|c| c.path == PathKind::Ipc);
        let no_link = of_ipc.and_then(|c| c.why_not.as_deref());
        let reason = match path {
            PathKind::Staged => format!(
                "through pinned host memory over {}; not by GPU links: {}",
                over.map_or("nothing", PathKind::name),
                no_link.unwrap_or("not asked for")
            ),
            _ if forced.is_some() => format!("{path} was asked for"),
            PathKind::Arena => "same host, and both sides' memory can be mapped".to_owned(),
            PathKind::ProcessVm => "same host, memory registered by address".to_owned(),
            PathKind::Tcp => "no faster path leads to the peer".to_owned(),
            PathKind::Rdma => "both sides use RDMA devices".to_owned(),
            PathKind::Ipc => "same node, and this side's GPU reaches the peer's memory".to_owned(),
        };
        Ok(PathInfo {
            path,
            over,
            reason,
            candidates,
            rails: Vec::new(),
            skipped: Vec::new(),
        })
    }

    fn why_not(&self, path: PathKind) -> Option<String> {
        if !self.allowed.allows(path) {
            return Some("the configuration does not allow it".to_owned());
        }
        if let Some(why_not) = self.on_gpu.why_not(path) {
            return Some(why_not.to_owned());
        }
        match path {
            PathKind::Staged if self.unstaged.is_some() => self.unstaged.clone(),
            PathKind::Staged => self.beneath().err(),
            path => self.why_not_there(path),
        }
    }

    /// The path by which queue pairs carry what is staged; or why none does.
    fn beneath(&self) -> Result<PathKind, String> {
        let mut reasons = Vec::new();
        for path in BENEATH {
            let why_not = match self.allowed.allows_beneath(path) {
                true => self.why_not_there(path),
                false => Some("the configuration does not allow it".to_owned()),
            };
            match why_not {
                None => return Ok(path),
                Some(why_not) => reasons.push(format!("{path}: {why_not}")),
            }
        }
        Err(reasons.join("; "))
    }

    /// Why a path that may be used does not lead to the peer, whose memory it is not asked about.
    fn why_not_there(&self, path: PathKind) -> Option<String> {
        match path {
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
