//! What a layout comes to: bytes, blocks and time.

use serde::Serialize;

use kvxfer::layout::{AxisKind, CacheGroup, GroupKind, LayoutError, PlacementDesc, Shard};

use super::source::Layout;

/// One tensor of a rank, placed densely.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Region {
    pub(super) group: u32,
    pub(super) layer: u32,
    pub(super) tensor: String,
    pub(super) dtype: &'static str,
    /// Bytes of one block of it.
    pub(super) bytes_per_block: u64,
    /// This rank's extents, outermost first.
    pub(super) axes: Vec<Extent>,
    /// The part of its sharded axis that the rank keeps; null for all of it on every rank.
    pub(super) shard: Option<Shard>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Extent {
    pub(super) kind: AxisKind,
    /// How many of these the rank has.
    pub(super) extent: u64,
    /// How many the whole model has.
    pub(super) of: u64,
    /// Bytes of one of them.
    pub(super) bytes: u64,
}

/// What one rank keeps.
#[derive(Debug, Clone)]
pub(super) struct Figures {
    pub(super) regions: Vec<Region>,
    /// By group: bytes of one of its blocks, all layers of the rank.
    pub(super) block_bytes: Vec<u64>,
}

impl Figures {
    pub(super) fn of(layout: &Layout) -> Result<Self, LayoutError> {
        let placed = layout.placed()?;
        let regions = regions(layout, &placed);
        let mut block_bytes = vec![0_u64; layout.format.groups().len()];
        for region in &regions {
            if let Some(sum) = block_bytes.get_mut(region.group as usize) {
                *sum = sum.saturating_add(region.bytes_per_block);
            }
        }
        Ok(Self {
            regions,
            block_bytes,
        })
    }

    /// A token that every group keeps; slots do not count.
    pub(super) fn bytes_per_token(&self, layout: &Layout) -> u64 {
        let groups = layout.format.groups().iter().zip(&self.block_bytes);
        let per_token = groups.map(|(group, bytes)| match group.block_tokens {
            0 => 0,
            tokens => bytes.div_ceil(u64::from(tokens)),
        });
        per_token.fold(0, u64::saturating_add)
    }

    /// One block in each group.
    pub(super) fn bytes_per_block(&self) -> u64 {
        self.block_bytes.iter().fold(0, |n, b| n.saturating_add(*b))
    }

    /// The blocks of a request of `tokens` tokens.
    pub(super) fn request_bytes(&self, layout: &Layout, tokens: u64) -> u64 {
        let groups = layout.format.groups().iter().zip(&self.block_bytes);
        groups.fold(0, |n, (group, bytes)| {
            n.saturating_add(bytes.saturating_mul(request_blocks(group, tokens)))
        })
    }
}

/// The most blocks of a group that a request of `tokens` tokens holds. A window that does not begin at
/// a block's first token touches one more.
pub(super) fn request_blocks(group: &CacheGroup, tokens: u64) -> u64 {
    let block = u64::from(group.block_tokens);
    match group.kind {
        _ if block == 0 => 1,
        GroupKind::SlidingWindow { tokens: window } => {
            let most = u64::from(window).div_ceil(block).saturating_add(1);
            tokens.div_ceil(block).min(most)
        }
        _ => tokens.div_ceil(block),
    }
}

/// What all ranks hold of a request together, what several of them keep counted as often.
pub(super) fn request_bytes_all_ranks(layout: &Layout, tokens: u64) -> Result<u64, LayoutError> {
    let mut sum = 0_u64;
    for pp in 0..layout.topology.pp {
        let rank = layout.rank(pp);
        // Ranks of one stage keep parts of one size.
        let bytes = Figures::of(&rank)?.request_bytes(&rank, tokens);
        sum = sum.saturating_add(bytes.saturating_mul(u64::from(layout.topology.tp)));
    }
    Ok(sum)
}

fn regions(layout: &Layout, placed: &PlacementDesc) -> Vec<Region> {
    let region = |t: &kvxfer::layout::PlacedTensor| {
        let format = layout.format.tensor(t.group, t.layer, t.tensor)?;
        let extents = t.extents(format);
        let axes = format.axes.iter().zip(extents).zip(&t.strides);
        let axes = axes.map(|((axis, extent), stride)| Extent {
            kind: axis.kind,
            extent,
            of: axis.extent,
            bytes: *stride,
        });
        Some(Region {
            group: t.group,
            layer: t.layer,
            tensor: format.name.clone(),
            dtype: format.dtype.name(),
            bytes_per_block: t.block_stride,
            axes: axes.collect(),
            shard: t.shard_of(format),
        })
    };
    placed.tensors().iter().filter_map(region).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::args::Shape;

    fn layout(name: &str, shape: &Shape) -> Layout {
        Layout::named(name, shape).expect("built in")
    }

    #[test]
    fn a_rank_keeps_its_share() {
        let shape = Shape {
            tp: Some(4),
            ..Shape::default()
        };
        let layout = layout("llama-3.1-70b", &shape);
        let figures = Figures::of(&layout).expect("it fits");
        assert_eq!(figures.regions.len(), 160);
        assert_eq!(figures.bytes_per_token(&layout), 327_680 / 4);
        assert_eq!(figures.bytes_per_block(), 327_680 / 4 * 16);
        assert_eq!(figures.request_bytes(&layout, 17), 327_680 / 4 * 32);
        let all = request_bytes_all_ranks(&layout, 17);
        assert_eq!(all, Ok(327_680 * 32));
    }

    #[test]
    fn what_every_rank_has_is_counted_on_every_rank() {
        let shape = Shape {
            tp: Some(16),
            pp: Some(3),
            ..Shape::default()
        };
        let layout = layout("llama-3.1-70b", &shape);
        // Eight heads on sixteen ranks: each is there twice.
        assert_eq!(request_bytes_all_ranks(&layout, 16), Ok(327_680 * 16 * 2));
        let mla = self::layout("deepseek-v3", &shape);
        let figures = Figures::of(&mla).expect("it fits");
        assert_eq!(figures.regions.len(), 21, "of 61 layers");
        assert!(figures.regions.iter().all(|r| r.shard.is_none()));
    }

    #[test]
    fn a_window_keeps_no_more_than_it_needs() {
        let group = |kind, block_tokens| CacheGroup {
            name: "g".to_owned(),
            kind,
            block_tokens,
            layers: Vec::new(),
        };
        let window = group(GroupKind::SlidingWindow { tokens: 1000 }, 16);
        let counts = [1, 16, 17, 100_000].map(|tokens| request_blocks(&window, tokens));
        assert_eq!(counts, [1, 1, 2, 64]);
        let full = group(GroupKind::Full, 16);
        assert_eq!(request_blocks(&full, 100_000), 6250);
        assert_eq!(request_blocks(&group(GroupKind::StateSlots, 0), 9), 1);
    }
}
