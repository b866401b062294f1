//! Which rank gives what to which.

use kvxfer::layout::{LayoutError, Parallel, PlacementDesc, Side, Topology, reshard};
use kvxfer::plan::{Compiled, Part, Role};

use super::source::Layout;
use crate::problem::{Exit, Problem};

/// The most pairs of ranks that are looked at.
const MOST_PAIRS: u64 = 1 << 16;

/// A producer rank and a consumer rank between which something moves.
pub(super) struct Exchange {
    pub(super) producer: Topology,
    pub(super) consumer: Topology,
    pub(super) compiled: Compiled,
}

/// Which ranks are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ranks {
    /// The two that are named.
    Named,
    /// All of both sides.
    All,
}

/// What ranks exchange, the consumer's in order; with so many blocks on both sides. Two that are
/// named are there even if nothing moves between them.
pub(super) fn exchanges(
    (producer, consumer): (&Layout, &Layout),
    ranks: Ranks,
    role: Role,
    (src, dst): (u32, u32),
) -> Result<Vec<Exchange>, Problem> {
    let usage = |error: LayoutError| Problem::from_chain(Exit::Usage, &error);
    let placed = |layout: &Layout, topology, blocks| {
        let layout = Layout {
            format: layout.format.clone(),
            topology,
        };
        layout.placed_with(blocks).map_err(usage)
    };
    if ranks == Ranks::Named {
        let p = placed(producer, producer.topology, src)?;
        let c = placed(consumer, consumer.topology, dst)?;
        return Ok(vec![exchange((producer, &p), (consumer, &c), role)?]);
    }
    let parallel = |t: &Topology| Parallel {
        tp: t.tp,
        pp: t.pp,
        dp: t.rank.dp,
    };
    let (from, to) = (parallel(&producer.topology), parallel(&consumer.topology));
    let all =
        |layout: &Layout, parallel: Parallel, blocks| -> Result<Vec<PlacementDesc>, Problem> {
            let ranks = parallel.ranks(&layout.format);
            ranks
                .map(|topology| placed(layout, topology, blocks))
                .collect()
        };
    let count = |of: Parallel| u64::from(of.tp).saturating_mul(u64::from(of.pp));
    let pairs = count(from).saturating_mul(count(to));
    if pairs > MOST_PAIRS {
        return Err(Problem::usage(format!(
            "{pairs} pairs of ranks are more than the {MOST_PAIRS} that are looked at"
        )));
    }
    let (givers, takers) = (all(producer, from, src)?, all(consumer, to, dst)?);
    let mut out = Vec::new();
    for c in &takers {
        let (p_side, c_side) = ((&producer.format, from), (&consumer.format, c.topology()));
        let sources = reshard::sources(p_side, c_side).map_err(usage)?;
        let sources = givers
            .iter()
            .filter(|p| sources.contains(&p.topology().rank));
        for p in sources {
            let exchange = exchange((producer, p), (consumer, c), role)?;
            if !exchange.compiled.is_empty() {
                out.push(exchange);
            }
        }
    }
    Ok(out)
}

fn exchange(
    (producer, p): (&Layout, &PlacementDesc),
    (consumer, c): (&Layout, &PlacementDesc),
    role: Role,
) -> Result<Exchange, Problem> {
    let side = |layout, placement| Side {
        format: layout,
        placement,
    };
    let (p_side, c_side) = (side(&producer.format, p), side(&consumer.format, c));
    let compiled = Compiled::compile(&p_side, &c_side, role, Part::Share)
        .map_err(|error| Problem::from_chain(Exit::Usage, &error))?;
    Ok(Exchange {
        producer: *p.topology(),
        consumer: *c.topology(),
        compiled,
    })
}
