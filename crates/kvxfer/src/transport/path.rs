//! Which way leads to a peer, which others were looked at, and why they were not taken.

use serde::{Deserialize, Serialize};
use tracing::debug;

use kvxfer_verbs::{Context, DeviceAddr, DeviceKind, GidChoice, SoftPath};

use super::{RdmaLink, SkippedRail};
use crate::config::PathSet;
use crate::error::{Error, chain};
use crate::wire::{Candidate, PathKind, clean};

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

/// Where a side's blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// In the host's memory.
    Host,
    /// In a GPU's, which all RDMA devices of the side have registered.
    Registered,
    /// In a GPU's, which none of its devices reaches.
    Unreached,
}

/// Where the blocks of two sides are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BothBlocks {
    pub(crate) here: Blocks,
    pub(crate) there: Blocks,
}

impl BothBlocks {
    pub(crate) const ON_HOSTS: Self = Self {
        here: Blocks::Host,
        there: Blocks::Host,
    };

    /// The same in the words of the other side.
    pub(crate) fn seen_from_there(self) -> Self {
        Self {
            here: self.there,
            there: self.here,
        }
    }

    /// Whether there is a GPU at one end at least.
    pub(crate) fn any_gpu(self) -> bool {
        self != Self::ON_HOSTS
    }

    /// Whether there is memory of the host at one end at least.
    pub(crate) fn any_host(self) -> bool {
        [self.here, self.there].contains(&Blocks::Host)
    }

    /// Whether one side at least has to stage its blocks, if they go over queue pairs.
    fn any_unreached(self) -> bool {
        [self.here, self.there].contains(&Blocks::Unreached)
    }

    /// The path that blocks have over queue pairs of this one.
    pub(crate) fn path_over(self, beneath: PathKind) -> PathKind {
        match beneath {
            PathKind::Ipc => PathKind::Ipc,
            _ if self.any_unreached() => PathKind::Staged,
            path => path,
        }
    }

    /// Why a path does not carry the blocks of these two.
    pub(crate) fn why_not(self, path: PathKind) -> Option<&'static str> {
        let on_gpu = |blocks| blocks != Blocks::Host;
        match path {
            PathKind::Staged if self.any_unreached() => None,
            PathKind::Staged if self.any_gpu() => Some("RDMA devices reach both sides' memory"),
            PathKind::Staged => Some("neither side's memory is a GPU's"),
            PathKind::Ipc if !self.any_gpu() => Some("neither side's memory is a GPU's"),
            PathKind::Ipc => None,
            PathKind::Rdma if self.here == Blocks::Unreached => Some(GPU_HERE),
            PathKind::Rdma if self.there == Blocks::Unreached => Some(GPU_THERE),
            PathKind::Rdma => None,
            _ if on_gpu(self.here) => Some(GPU_HERE),
            _ if on_gpu(self.there) => Some(GPU_THERE),
            _ => None,
        }
    }
}

const GPU_HERE: &str = "this side's memory is a GPU's";
const GPU_THERE: &str = "the peer's memory is a GPU's";

/// Why the memory of a GPU is not registered with a side's RDMA devices, at either end where it is not.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unregistered<'a> {
    pub(crate) here: Option<&'a str>,
    pub(crate) there: Option<&'a str>,
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
    pub(crate) blocks: BothBlocks,
    pub(crate) unregistered: Unregistered<'a>,
    /// Why this side cannot fetch blocks out of the peer's GPU, if it has to.
    pub(crate) unreachable: Option<String>,
    /// Why blocks cannot be staged between the two, if they cannot.
    pub(crate) unstaged: Option<String>,
    /// A path that the peer has declined, and why.
    pub(crate) declined: Option<&'a Candidate>,
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
        let of_gpus = |path| self.blocks.any_gpu() || forced == Some(path);
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
        let why_not = |path| {
            let candidate = candidates.iter().find(|c| c.path == path);
            let why_not = candidate.and_then(|c| c.why_not.as_deref());
            why_not.unwrap_or("not asked for")
        };
        let reason = match path {
            PathKind::Staged => {
                let beneath = over.map_or("nothing", PathKind::name);
                let no_link = why_not(PathKind::Ipc);
                let mut reason = format!(
                    "through pinned host memory over {beneath}; not by GPU links: {no_link}"
                );
                if over == Some(PathKind::Rdma) {
                    let no_key = why_not(PathKind::Rdma);
                    reason.push_str(&format!("; not by RDMA alone: {no_key}"));
                }
                reason
            }
            _ if forced.is_some() => format!("{path} was asked for"),
            PathKind::Arena => "same host, and both sides' memory can be mapped".to_owned(),
            PathKind::ProcessVm => "same host, memory registered by address".to_owned(),
            PathKind::Tcp => "no faster path leads to the peer".to_owned(),
            PathKind::Rdma if self.blocks.any_gpu() => {
                "both sides use RDMA devices, which reach the GPU's memory".to_owned()
            }
            PathKind::Rdma => "both sides use RDMA devices".to_owned(),
            PathKind::Ipc if self.blocks.any_host() => {
                "same node, and the GPU reaches the host's memory".to_owned()
            }
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
        if let Some(declined) = self.declined.filter(|of| of.path == path) {
            return declined.why_not.clone();
        }
        if let Some(why_not) = self.blocks.why_not(path) {
            return Some(match path {
                PathKind::Rdma => self.no_keys(why_not),
                _ => why_not.to_owned(),
            });
        }
        match path {
            PathKind::Staged if self.unstaged.is_some() => self.unstaged.clone(),
            PathKind::Staged => self.beneath().err(),
            path => self.why_not_there(path),
        }
    }

    /// Why queue pairs of RDMA devices do not carry the blocks themselves: there are none, or some memory is not
    /// registered with them.
    fn no_keys(&self, whose: &str) -> String {
        if !is_rdma(self.context.device().kind) || !is_rdma(self.peer.kind) {
            return self.why_not_there(PathKind::Rdma).unwrap_or_default();
        }
        let here = self.unregistered.here.map(str::to_owned);
        // A text of the peer's.
        let there = || Some(self.unregistered.there?.escape_debug().to_string());
        match here.or_else(there) {
            Some(reason) => clean(&format!("{whose}, and not registered: {reason}")),
            None => whose.to_owned(),
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
            // Over GPU links queue pairs reach no blocks: what a GPU needs is looked at where it is opened.
            PathKind::Arena if !self.local_shareable => {
                Some("this side's memory has no file that the peer could map".to_owned())
            }
            PathKind::Arena if !self.peer_shareable => {
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

#[cfg(test)]
mod tests {
    use super::*;
    use Blocks::{Host, Registered, Unreached};

    const ALL: [Blocks; 3] = [Host, Registered, Unreached];

    fn each() -> impl Iterator<Item = BothBlocks> {
        ALL.into_iter()
            .flat_map(|here| ALL.map(|there| BothBlocks { here, there }))
    }

    /// The side that chooses and the one that is asked come to the same path from the same descriptions.
    #[test]
    fn both_sides_see_the_same_way() {
        for blocks in each() {
            for beneath in BENEATH {
                let there = blocks.seen_from_there().path_over(beneath);
                assert_eq!(
                    blocks.path_over(beneath),
                    there,
                    "{blocks:?} over {beneath}"
                );
            }
            for path in PREFERENCE {
                let there = blocks.seen_from_there().why_not(path).is_none();
                assert_eq!(
                    blocks.why_not(path).is_none(),
                    there,
                    "{blocks:?} by {path}"
                );
            }
        }
    }

    /// A path that carries the blocks of two sides is what they have over it, or staged is.
    #[test]
    fn blocks_are_staged_where_one_side_is_not_reached() {
        for blocks in each() {
            let unreached = [blocks.here, blocks.there].contains(&Unreached);
            let staged = blocks.why_not(PathKind::Staged).is_none();
            assert_eq!(staged, unreached, "{blocks:?}");
            let straight = blocks.why_not(PathKind::Rdma).is_none();
            assert_eq!(straight, !unreached, "{blocks:?}");
            let over = blocks.path_over(PathKind::Rdma);
            let is = if unreached {
                PathKind::Staged
            } else {
                PathKind::Rdma
            };
            assert_eq!(over, is, "{blocks:?}");
            // The software device registers no memory of a GPU.
            let hosts = blocks == BothBlocks::ON_HOSTS;
            for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
                assert_eq!(
                    blocks.why_not(path).is_none(),
                    hosts,
                    "{blocks:?} by {path}"
                );
            }
            // A GPU reaches another's memory, and the host's.
            assert_eq!(
                blocks.why_not(PathKind::Ipc).is_none(),
                !hosts,
                "{blocks:?}"
            );
        }
    }
}
