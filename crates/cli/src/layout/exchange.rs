//! Which rank gives what to which.

use kvxfer::layout::reshard::{self, Parallel};
use kvxfer::layout::{KvFormat, LayoutError, PlacementDesc, Side, Topology};
use kvxfer::plan::{CompileError, Compiled, Part, Role};

use super::source::Layout;
use crate::problem::{Exit, Problem};

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
    let parallel = |t: &Topology| Parallel { tp: t.tp, pp: t.pp };
    let (from, to) = (parallel(&producer.topology), parallel(&consumer.topology));
    let all = |layout: &Layout, parallel: Parallel, blocks| -> Result<Vec<PlacementDesc>, Problem> {
        let ranks = parallel.ranks(&layout.format);
        ranks.map(|topology| placed(layout, topology, blocks)).collect()
    };
    let (givers, takers) = (all(producer, from, src)?, all(consumer, to, dst)?);
    let mut out = Vec::new();
    for c in &takers {
        let sources = sources(&producer.format, from, c.topology()).map_err(usage)?;
        let sources = givers.iter().filter(|p| sources.contains(&p.topology().rank));
        for p in sources {
            let exchange = exchange((producer, p), (consumer, c), role)?;
            if !exchange.compiled.is_empty() {
                out.push(exchange);
            }
        }
    }
    Ok(out)
}
