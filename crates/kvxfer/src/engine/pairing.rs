//! Which rails of two engines are joined, and what is told of their queue pairs.
//!
//! Rails of the same place in both configurations are joined, as far as a way leads from one to the
//! other: a device that is missing on one side shifts no other. Where no place is on both sides, the i-th
//! that one describes is joined with the i-th of the other. A pair is left out whole or not at all.

use std::collections::HashSet;

use tracing::warn;

use kvxfer_verbs::{Context, DeviceAddr, GidChoice, QpEndpoint};

use super::lanes::Made;
use super::runtime::Runtime;
use crate::error::{Error, chain};
use crate::transport::{RdmaLink, SkippedRail, gid_towards};
use crate::wire::{Blob, RailDesc, RailEndpoint, RemoteSpan};

/// A rail as a peer has described it.
#[derive(Debug)]
pub(super) struct KnownRail {
    pub(super) place: u16,
    pub(super) device: DeviceAddr,
    pub(super) memories: Vec<RemoteSpan>,
    pub(super) leases: Option<RemoteSpan>,
    pub(super) staging: Option<RemoteSpan>,
}

impl KnownRail {
    /// The error says what cannot be read.
    pub(super) fn unpack(rails: &[RailDesc]) -> Result<Vec<Self>, String> {
        if rails.is_empty() {
            return Err("no device".to_owned());
        }
        let unpack = |rail: &RailDesc| {
            let device = rail.device.unpack("device address");
            Ok(Self {
                place: rail.place,
                device: device.map_err(|error| error.to_string())?,
                memories: rail.memories.clone(),
                leases: rail.leases,
                staging: rail.staging,
            })
        };
        let mut places: Vec<u16> = rails.iter().map(|rail| rail.place).collect();
        places.sort_unstable();
        if let Some(twice) = places.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two devices at place {}", twice[0]));
        }
        rails.iter().map(unpack).collect()
    }
}

/// A rail of this side and one of the peer.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    /// This side's in the runtime, and its place in what this side has described.
    pub(super) rail: usize,
    pub(super) own: u16,
    /// The peer's place in what it has described.
    pub(super) theirs: u16,
    /// The GID of this side, on an RDMA device.
    pub(super) gid: Option<GidChoice>,
}

/// A peer's queue pairs of one pair of rails, all of one port.
#[derive(Debug)]
pub(super) struct Ends {
    /// The rail of this side that they are to join, as this side has described it.
    pub(super) own: u16,
    /// The peer's.
    pub(super) theirs: u16,
    pub(super) ends: Vec<QpEndpoint>,
}

/// Pairs the rails of two descriptions. What no way leads to is left out, and told of.
///
/// # Errors
///
/// [`Error::Verbs`] where none is left: why not the first.
pub(super) fn pair_up(
    runtime: &Runtime,
    rails: &[usize],
    peers: &[KnownRail],
) -> Result<(Vec<Pair>, Vec<SkippedRail>), Error> {
    let (mut pairs, mut skipped, mut first) = (Vec::new(), Vec::new(), None);
    let mut places = Vec::with_capacity(rails.len());
    for rail in rails {
        places.push(runtime.rail(*rail)?.place);
    }
    let theirs: Vec<u16> = peers.iter().map(|peer| peer.place).collect();
    for (own, their) in joined(&places, &theirs) {
        let (Some(&rail), Some(peer)) = (rails.get(own), peers.get(their)) else {
            continue;
        };
        let context = &runtime.rail(rail)?.context;
        match gid_towards(context, &peer.device.gids) {
            Ok(gid) => pairs.push(Pair {
                rail,
                own: u16::try_from(own).unwrap_or(u16::MAX),
                theirs: u16::try_from(their).unwrap_or(u16::MAX),
                gid,
            }),
            Err(error) => {
                skipped.push(left_out(context, &error));
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) if pairs.is_empty() => Err(error),
        _ => Ok((pairs, skipped)),
    }
}

/// Which rails of two sides are joined, by their places.
fn joined(ours: &[u16], theirs: &[u16]) -> Vec<(usize, usize)> {
    let same = |(own, place): (usize, &u16)| {
        let their = theirs.iter().position(|their| their == place)?;
        Some((own, their))
    };
    let same: Vec<_> = ours.iter().enumerate().filter_map(same).collect();
    match same.is_empty() {
        true => (0..ours.len().min(theirs.len()))
            .map(|at| (at, at))
            .collect(),
        false => same,
    }
}

/// A rail that has no way to the peer's.
pub(super) fn left_out(context: &Context, error: &Error) -> SkippedRail {
    let (device, reason) = (context.device().name.clone(), chain(error));
    warn!(device, reason, "not joined with the peer's device");
    SkippedRail { device, reason }
}

/// What the peer is told of queue pairs of a pair of rails.
pub(super) fn pack(pair: &Pair, qps: &[Made]) -> Result<Vec<RailEndpoint>, Error> {
    let pack = |made: &Made| {
        Ok(RailEndpoint {
            rail: pair.own,
            peer_rail: pair.theirs,
            endpoint: Blob::pack("endpoint", &made.qp.endpoint())?,
        })
    };
    qps.iter().map(pack).collect()
}

/// How many queue pairs the pair of rails has that has most.
pub(super) fn most(endpoints: &[RailEndpoint]) -> usize {
    let same = |a: &RailEndpoint, b: &RailEndpoint| (a.rail, a.peer_rail) == (b.rail, b.peer_rail);
    let chunks = endpoints.chunk_by(same);
    chunks.map(<[RailEndpoint]>::len).max().unwrap_or(0)
}

/// The peer's queue pairs, by pairs of rails; the error says what is wrong with them.
pub(super) fn unpack(endpoints: &[RailEndpoint]) -> Result<Vec<Ends>, String> {
    let pair = |e: &RailEndpoint| (e.peer_rail, e.rail);
    let mut all: Vec<Ends> = Vec::new();
    let mut tokens = HashSet::new();
    for chunk in endpoints.chunk_by(|a, b| pair(a) == pair(b)) {
        let Some((own, theirs)) = chunk.first().map(pair) else {
            continue;
        };
        if all.iter().any(|e| e.own == own || e.theirs == theirs) {
            return Err(format!("a rail is joined twice: {theirs} with {own}"));
        }
        let mut numbers = HashSet::new();
        let mut ends: Vec<QpEndpoint> = Vec::with_capacity(chunk.len());
        for packed in chunk {
            let end: Result<QpEndpoint, _> = packed.endpoint.unpack("endpoint");
            let end = end.map_err(|error| error.to_string())?;
            if !numbers.insert(end.qpn) || !tokens.insert(end.token) {
                return Err(format!("queue pair {} is there twice", end.qpn));
            }
            if ends.first().is_some_and(|first| first.port != end.port) {
                return Err(format!("queue pair {} is on another port", end.qpn));
            }
            ends.push(end);
        }
        all.push(Ends { own, theirs, ends });
    }
    Ok(all)
}

/// What the way over a pair of rails is, on RDMA devices.
pub(super) fn rdma_link(
    runtime: &Runtime,
    pair: &Pair,
    own: &[Made],
    ends: &[QpEndpoint],
) -> Option<RdmaLink> {
    let context = &runtime.rail(pair.rail).ok()?.context;
    let own = own.iter().map(|made| made.qp.endpoint());
    let joined: Vec<_> = own.zip(ends.iter().copied()).collect();
    RdmaLink::new(context, pair.gid.as_ref(), &joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(rail: u16, peer_rail: u16, qpn: u32) -> RailEndpoint {
        let mut token = [0; 16];
        token[..2].copy_from_slice(&rail.to_le_bytes());
        token[2..6].copy_from_slice(&qpn.to_le_bytes());
        let end = QpEndpoint {
            qpn,
            psn: 0,
            token,
            port: None,
        };
        RailEndpoint {
            rail,
            peer_rail,
            endpoint: Blob::pack("endpoint", &end).expect("packs"),
        }
    }

    #[test]
    fn queue_pairs_come_by_pairs_of_rails() {
        // Two devices may give the same number.
        let ends = [(0, 0, 7), (0, 0, 8), (1, 2, 7)];
        let ends = unpack(&ends.map(|(a, b, n)| endpoint(a, b, n))).expect("fine");
        let seen: Vec<_> = ends
            .iter()
            .map(|e| (e.theirs, e.own, e.ends.len()))
            .collect();
        assert_eq!(seen, [(0, 0, 2), (1, 2, 1)]);
    }

    #[test]
    fn a_rail_is_joined_once() {
        for bad in [
            [(0, 0, 1), (0, 1, 2), (1, 2, 3)],
            [(0, 0, 1), (1, 0, 2), (2, 1, 3)],
            [(0, 0, 1), (1, 1, 2), (0, 0, 3)],
        ] {
            let error = unpack(&bad.map(|(a, b, n)| endpoint(a, b, n))).expect_err("twice");
            assert!(error.contains("joined twice"), "{error}");
        }
        let twice = [endpoint(0, 0, 1), endpoint(0, 0, 1)];
        let error = unpack(&twice).expect_err("twice");
        assert!(error.contains("queue pair 1 is there twice"), "{error}");
    }

    #[test]
    fn rails_of_one_place_are_joined() {
        assert_eq!(joined(&[0, 1], &[0, 1]), [(0, 0), (1, 1)]);
        // One that is missing shifts no other.
        assert_eq!(joined(&[1], &[0, 1]), [(0, 1)]);
        assert_eq!(joined(&[0, 2, 3], &[3, 1, 0]), [(0, 2), (2, 0)]);
        assert_eq!(joined(&[0, 1, 2], &[0]), [(0, 0)]);
        // Better any way than none.
        assert_eq!(joined(&[1], &[0]), [(0, 0)]);
        assert_eq!(joined(&[0, 1], &[2, 3, 4]), [(0, 0), (1, 1)]);
        assert!(joined(&[], &[0]).is_empty());
    }
}
