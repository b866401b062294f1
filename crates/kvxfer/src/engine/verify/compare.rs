//! Where two sides' sums differ.

use super::Unverified;
use super::summing::List;
use crate::engine::Inner;
use crate::ids::RequestId;
use crate::sums::Summed;
use crate::transfer::{Cause, Corrupt};

/// Compares the sums of a request's units on both sides, the consumer's lists being `lists`. `None`: they
/// are the same, and as many.
pub(super) fn compare(
    engine: &Inner,
    request: &RequestId,
    (lists, summed): (&[List], &Summed),
    (here, there): (&[u64], &[u64]),
) -> Option<Unverified> {
    if here == there {
        return None;
    }
    let mut sums = here.iter().zip(there);
    let mut first = None;
    let mut blocks = Vec::new();
    for list in lists {
        let tensors = list.tensors(summed);
        for unit in &list.units {
            for tensor in tensors {
                let Some((here, there)) = sums.next() else {
                    break;
                };
                if here == there {
                    continue;
                }
                let block = tensor.block_of(*unit);
                first.get_or_insert((list.group, tensor, block, *here, *there));
                blocks.push((list.group, block));
            }
        }
    }
    blocks.sort_unstable();
    blocks.dedup();
    // As many are there on both sides, which was seen when they came.
    let (group, tensor, block, here, there) = first?;
    let format = engine.format.tensor(group, tensor.layer, tensor.tensor);
    let corrupt = Corrupt {
        request: request.clone(),
        group,
        layer: tensor.layer,
        tensor: format.map_or_else(String::new, |tensor| tensor.name.to_string()),
        block,
        here,
        there,
        blocks: blocks.len() as u64,
    };
    let cause = Cause::Corrupt(Box::new(corrupt));
    Some(Unverified { cause, blocks })
}
