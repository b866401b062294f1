//! What a peer says of itself: whether it agrees with itself, and what can be planned with it.

use kvxfer_verbs::DeviceKind;

use super::bringup::{Step, cut, refuse};
use super::pairing::KnownRail;
use super::peer_session::Plans;
use crate::engine::Inner;
use crate::error::Error;
use crate::layout::{KvFormat, PlacementDesc, Side};
use crate::plan::{CompileError, Role as PlanRole};
use crate::wire::{Describe, GpuDesc, RailDesc, Refusal, RemoteSpan};

/// The plans for both directions, as far as the two roles allow them.
#[expect(clippy::result_large_err, reason = "once a session")]
pub(super) fn plans(
    engine: &Inner,
    describe: &Describe,
    format: &KvFormat,
    placement: &PlacementDesc,
) -> Result<(Option<Plans>, Option<Plans>), Step> {
    let ours = engine.config.kv_role;
    let theirs = describe.kv_role;
    let pulls = ours.consumes() && theirs.produces();
    let pushes = ours.produces() && theirs.consumes();
    if !pulls && !pushes {
        return Err(refuse(Refusal::SameRole { role: ours }));
    }
    let here = engine.side();
    let there = Side { format, placement };
    let compile = |wanted: bool, producer: &Side<'_>, consumer: &Side<'_>, role| {
        if !wanted {
            return Ok(None);
        }
        Plans::compile(producer, consumer, role)
            .map(Some)
            .map_err(|error| {
                let detail = cut(error.to_string());
                let error = match error {
                    CompileError::Mismatch(mismatch) => Error::Mismatch(mismatch),
                    other => Error::Compile(other),
                };
                Step::Refuse(Refusal::FormatMismatch { detail }, error)
            })
    };
    let pull = compile(pulls, &there, &here, PlanRole::Pull)?;
    let push = compile(pushes, &here, &there, PlanRole::Push)?;
    Ok((pull, push))
}

/// Whether what a description says of the layout agrees with itself; the error says what does not.
pub(super) fn agree(
    describe: &Describe,
    format: &KvFormat,
    placement: &PlacementDesc,
) -> Result<(), String> {
    if describe.fingerprint.0 != format.fingerprint().0 {
        return Err("the fingerprint is not that of the format".to_owned());
    }
    let rank = placement.topology().rank;
    if describe.rank != rank {
        return Err(format!(
            "rank {} with the placement of {rank}",
            describe.rank
        ));
    }
    placement
        .validate(format)
        .map_err(|error| error.to_string())
}

/// Whether all parts of a description agree with each other; the error says which do not.
pub(super) fn consistent(
    describe: &Describe,
    rails: &[KnownRail],
    format: &KvFormat,
    placement: &PlacementDesc,
) -> Result<(), String> {
    let registered = |gpu: &GpuDesc| gpu.unregistered.is_none();
    let cannot = |rail: &&KnownRail| rail.device.kind != DeviceKind::Rdma;
    if describe.gpu.as_ref().is_some_and(registered)
        && let Some(rail) = rails.iter().find(cannot)
    {
        let name = rail.device.name.escape_debug();
        return Err(format!(
            "memory of a GPU registered with {name}, which is no RDMA device"
        ));
    }
    if describe.gpu.is_some() && describe.shared.is_some() {
        return Err("files of the host's memory beside memory of a GPU".to_owned());
    }
    for rail in &describe.rails {
        of_rail(rail, placement)?;
    }
    agree(describe, format, placement)
}

/// Whether the memories of a rail are those of the placement.
fn of_rail(rail: &RailDesc, placement: &PlacementDesc) -> Result<(), String> {
    let lengths = rail.memories.iter().map(|m| m.len);
    if !lengths.eq(placement.memory_len().iter().copied()) {
        return Err("memories are not of the lengths that the placement says".to_owned());
    }
    // None of them reaches past the last address: that was checked when they were decoded.
    let mut spans: Vec<&RemoteSpan> = rail
        .memories
        .iter()
        .chain(&rail.leases)
        .chain(&rail.staging)
        .collect();
    spans.sort_unstable_by_key(|span| span.addr);
    if let Some((_, second)) = (spans.iter().zip(spans.iter().skip(1)))
        .find(|(first, second)| second.addr - first.addr < first.len)
    {
        return Err(format!("two memories share address {:#x}", second.addr));
    }
    Ok(())
}
