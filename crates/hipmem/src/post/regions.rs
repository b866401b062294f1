//! The table that kernels look places up in (`kernels/regions.h`): what it is made of, and its bytes.

use std::collections::BTreeMap;

use crate::kernels::bytes_of;
use crate::kernels::queue::{ALL_TENSORS, MOST_PIECES};
use crate::kernels::regions::{Group, Layer, Piece, Regions, Tensor};

/// The most bytes of a piece: what a work request of any vendor takes.
const MOST_BYTES: u64 = (1 << 31) - 1;

/// One side of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionSide {
    /// Where block 0 has it.
    pub addr: u64,
    /// Bytes from one block to the next.
    pub stride: u64,
    /// The key of the memory that it is in.
    pub key: u32,
}

/// A stretch of a block that is contiguous on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionPiece {
    /// Here.
    pub local: RegionSide,
    /// At the peer.
    pub remote: RegionSide,
    /// Bytes.
    pub len: u64,
}

/// A layer of a cache group, of whose blocks kernels can speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionLayer {
    /// The group.
    pub group: u8,
    /// The layer.
    pub layer: u16,
    /// Blocks on this side.
    pub local_blocks: u32,
    /// Blocks at the peer.
    pub remote_blocks: u32,
    /// The pieces of a block, tensor by tensor. A post of all tensors is all of them, in this order.
    pub tensors: Vec<Vec<RegionPiece>>,
}

/// Why there is no table of such layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionFault {
    /// No layer at all.
    #[error("a table of no layers: kernels could name nothing")]
    Empty,
    /// The same layer twice.
    #[error("group {group} layer {layer} is there twice")]
    Twice {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
    },
    /// A place has no number for so many tensors, or for none.
    #[error("group {group} layer {layer} has {tensors} tensors: 1 to 255 have numbers")]
    Tensors {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
        /// How many it has.
        tensors: usize,
    },
    /// A tensor of no pieces, of which there is nothing to post.
    #[error("tensor {tensor} of group {group} layer {layer} has no pieces: leave it out")]
    NoPieces {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
        /// The tensor.
        tensor: usize,
    },
    /// More pieces than a post can have.
    #[error(
        "a block of group {group} layer {layer} is in {pieces} pieces, and a post has {MOST_PIECES} at most"
    )]
    Pieces {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
        /// Pieces of a block.
        pieces: usize,
    },
    /// A piece of no bytes, or of 2^31 and more.
    #[error(
        "a piece of {len} bytes in group {group} layer {layer}: a work request has 1 to {MOST_BYTES}"
    )]
    Length {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
        /// Its bytes.
        len: u64,
    },
    /// The last block ends behind the last address.
    #[error(
        "{blocks} blocks of {stride} bytes from {addr:#x} in group {group} layer {layer} end beyond the address space"
    )]
    Span {
        /// The group.
        group: u8,
        /// The layer.
        layer: u16,
        /// Where block 0 has the piece.
        addr: u64,
        /// Bytes from one block to the next.
        stride: u64,
        /// Blocks.
        blocks: u32,
    },
    /// More entries than a table's numbers reach.
    #[error("a table of 2^32 entries and more")]
    TooLarge,
}

/// A checked table, before it lies anywhere.
#[derive(Debug, Clone)]
pub(crate) struct Compiled {
    groups: Vec<Group>,
    layers: Vec<Layer>,
    tensors: Vec<Tensor>,
    pieces: Vec<Piece>,
}

impl Compiled {
    /// The table of these layers, in any order.
    pub(crate) fn new(rows: &[RegionLayer]) -> Result<Self, RegionFault> {
        let mut by_group: BTreeMap<u8, BTreeMap<u16, &RegionLayer>> = BTreeMap::new();
        for row in rows {
            let (group, layer) = (row.group, row.layer);
            let layers = by_group.entry(group).or_default();
            if layers.insert(layer, row).is_some() {
                return Err(RegionFault::Twice { group, layer });
            }
        }
        let (last, _) = by_group.last_key_value().ok_or(RegionFault::Empty)?;
        let mut table = Self {
            groups: Vec::new(),
            layers: Vec::new(),
            tensors: Vec::new(),
            pieces: Vec::new(),
        };
        for group in 0..=*last {
            let layers = by_group.get(&group);
            let behind = layers.and_then(|of| of.last_key_value());
            let count = behind.map_or(0, |(layer, _)| u32::from(*layer) + 1);
            table.groups.push(Group {
                first: number(table.layers.len())?,
                layers: count,
            });
            for layer in (0..=u16::MAX).take(count as usize) {
                let row = layers.and_then(|of| of.get(&layer));
                let layer = row.map_or(Ok(Layer::default()), |row| table.put(row))?;
                table.layers.push(layer);
            }
        }
        Ok(table)
    }

    /// Puts a layer's tensors and pieces.
    fn put(&mut self, row: &RegionLayer) -> Result<Layer, RegionFault> {
        let (group, layer) = (row.group, row.layer);
        let tensors = row.tensors.len();
        if tensors == 0 || tensors > usize::from(ALL_TENSORS) {
            return Err(RegionFault::Tensors {
                group,
                layer,
                tensors,
            });
        }
        let pieces = row.tensors.iter().map(Vec::len).sum();
        if pieces > MOST_PIECES as usize {
            return Err(RegionFault::Pieces {
                group,
                layer,
                pieces,
            });
        }
        let first = number(self.tensors.len())?;
        let mut all = Tensor {
            first: number(self.pieces.len())?,
            ..Tensor::default()
        };
        for (tensor, of) in row.tensors.iter().enumerate() {
            if of.is_empty() {
                return Err(RegionFault::NoPieces {
                    group,
                    layer,
                    tensor,
                });
            }
            let mut one = Tensor {
                first: number(self.pieces.len())?,
                ..Tensor::default()
            };
            for piece in of {
                self.pieces.push(checked(row, piece)?);
                // 256 of less than 2^31.
                one.bytes += piece.len;
                one.count += 1;
            }
            all.bytes += one.bytes;
            all.count += one.count;
            self.tensors.push(one);
        }
        self.tensors.push(all);
        Ok(Layer {
            first,
            // At most 255.
            tensors: tensors as u32,
            local_blocks: row.local_blocks,
            remote_blocks: row.remote_blocks,
            ..Layer::default()
        })
    }

    /// Says of a layer where its group's blocks and its notes are, among the words of a queue of a push.
    pub(crate) fn note(&mut self, group: u8, layer: u16, (expected, notes): (u32, u32)) {
        let of = self.groups.get(usize::from(group));
        let at = of.filter(|of| u32::from(layer) < of.layers);
        let at = at.map(|of| of.first as usize + usize::from(layer));
        if let Some(row) = at.and_then(|at| self.layers.get_mut(at)) {
            row.expected = expected;
            row.notes = notes;
        }
    }

    /// How many bytes it takes.
    pub(crate) fn len(&self) -> u64 {
        self.bytes(0).len() as u64
    }

    /// Its bytes for this address, a multiple of 16: the head first.
    pub(crate) fn bytes(&self, at: u64) -> Vec<u8> {
        let mut bytes = vec![0; size_of::<Regions>()];
        let mut put = |table: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let addr = at + bytes.len() as u64;
            bytes.extend_from_slice(table);
            addr
        };
        let head = Regions {
            groups: put(bytes_of(&self.groups)),
            layers: put(bytes_of(&self.layers)),
            tensors: put(bytes_of(&self.tensors)),
            pieces: put(bytes_of(&self.pieces)),
            // At most 256.
            groups_len: self.groups.len() as u32,
            reserved: 0,
        };
        let head = bytes_of(std::slice::from_ref(&head));
        for (to, from) in bytes.iter_mut().zip(head) {
            *to = *from;
        }
        bytes
    }
}

/// A piece as the table has it.
fn checked(row: &RegionLayer, piece: &RegionPiece) -> Result<Piece, RegionFault> {
    let (group, layer, len) = (row.group, row.layer, piece.len);
    if len == 0 || len > MOST_BYTES {
        return Err(RegionFault::Length { group, layer, len });
    }
    for (side, blocks) in [
        (piece.local, row.local_blocks),
        (piece.remote, row.remote_blocks),
    ] {
        let RegionSide { addr, stride, .. } = side;
        let last = stride.checked_mul(blocks.saturating_sub(1).into());
        let end = last.and_then(|last| addr.checked_add(last)?.checked_add(len));
        if end.is_none() {
            return Err(RegionFault::Span {
                group,
                layer,
                addr,
                stride,
                blocks,
            });
        }
    }
    Ok(Piece {
        local: piece.local.addr,
        local_stride: piece.local.stride,
        remote: piece.remote.addr,
        remote_stride: piece.remote.stride,
        len,
        lkey: piece.local.key,
        rkey: piece.remote.key,
    })
}

fn number(n: usize) -> Result<u32, RegionFault> {
    u32::try_from(n).map_err(|_| RegionFault::TooLarge)
}

/// The bytes of a table that lies at this address, a multiple of 16, for who has the memory of a queue himself: tests
/// and demonstrations by the host build.
///
/// # Errors
///
/// [`RegionFault`].
pub fn region_table(rows: &[RegionLayer], at: u64) -> Result<Vec<u8>, RegionFault> {
    Compiled::new(rows).map(|table| table.bytes(at))
}

#[cfg(test)]
mod tests {
    use super::{Compiled, RegionFault, RegionLayer, RegionPiece, RegionSide};

    fn side(addr: u64) -> RegionSide {
        RegionSide {
            addr,
            stride: 0x1000,
            key: 1,
        }
    }

    fn piece(len: u64) -> RegionPiece {
        RegionPiece {
            local: side(0x10_0000),
            remote: side(0x20_0000),
            len,
        }
    }

    fn row(group: u8, layer: u16, tensors: Vec<Vec<RegionPiece>>) -> RegionLayer {
        RegionLayer {
            group,
            layer,
            local_blocks: 4,
            remote_blocks: 8,
            tensors,
        }
    }

    fn fault(rows: &[RegionLayer]) -> Option<RegionFault> {
        Compiled::new(rows).err()
    }

    #[test]
    fn groups_and_layers_that_are_not_there_are_empty() {
        let table = Compiled::new(&[
            row(2, 3, vec![vec![piece(64)], vec![piece(32), piece(16)]]),
            row(0, 1, vec![vec![piece(8)]]),
        ])
        .expect("a table");
        let counts: Vec<_> = table.groups.iter().map(|g| (g.first, g.layers)).collect();
        assert_eq!(counts, [(0, 2), (2, 0), (2, 4)]);
        let layers: Vec<_> = table.layers.iter().map(|l| (l.first, l.tensors)).collect();
        assert_eq!(layers, [(0, 0), (0, 1), (0, 0), (0, 0), (0, 0), (2, 2)]);
        let tensors: Vec<_> = table
            .tensors
            .iter()
            .map(|t| (t.first, t.count, t.bytes))
            .collect();
        assert_eq!(
            tensors,
            [(0, 1, 8), (0, 1, 8), (1, 1, 64), (2, 2, 48), (1, 3, 112)]
        );
        assert_eq!(table.len(), table.bytes(4096).len() as u64);
    }

    #[test]
    fn what_kernels_could_not_post_is_refused() {
        let (group, layer) = (7, 9);
        assert_eq!(fault(&[]), Some(RegionFault::Empty));
        let one = || row(group, layer, vec![vec![piece(1)]]);
        assert_eq!(
            fault(&[one(), one()]),
            Some(RegionFault::Twice { group, layer })
        );
        for tensors in [0, 256] {
            let wanted = RegionFault::Tensors {
                group,
                layer,
                tensors,
            };
            let all = vec![vec![piece(1)]; tensors];
            assert_eq!(fault(&[row(group, layer, all)]), Some(wanted));
        }
        assert_eq!(fault(&[row(1, 1, vec![vec![piece(1)]; 255])]), None);
        assert_eq!(
            fault(&[row(group, layer, vec![vec![piece(1)], vec![]])]),
            Some(RegionFault::NoPieces {
                group,
                layer,
                tensor: 1
            })
        );
        assert_eq!(
            fault(&[row(
                group,
                layer,
                vec![vec![piece(1); 200], vec![piece(1); 57]]
            )]),
            Some(RegionFault::Pieces {
                group,
                layer,
                pieces: 257
            })
        );
        for len in [0, 1 << 31, u64::MAX] {
            assert_eq!(
                fault(&[row(group, layer, vec![vec![piece(len)]])]),
                Some(RegionFault::Length { group, layer, len })
            );
        }
        assert_eq!(fault(&[row(1, 1, vec![vec![piece((1 << 31) - 1)]])]), None);
    }

    #[test]
    fn a_last_block_beyond_the_address_space_is_refused() {
        // Eight blocks at the peer: the last one begins seven strides on.
        let last = u64::MAX - 7 * 0x1000 - 64;
        for (addr, good) in [(last, true), (last + 1, false), (u64::MAX, false)] {
            let mut far = piece(64);
            far.remote.addr = addr;
            let found = fault(&[row(0, 0, vec![vec![far]])]);
            assert_eq!(found.is_none(), good, "{addr:#x}: {found:?}");
        }
        let mut wide = piece(64);
        wide.local.stride = u64::MAX / 2;
        let found = fault(&[row(0, 0, vec![vec![wide]])]);
        assert!(matches!(found, Some(RegionFault::Span { blocks: 4, .. })));
        // Where there are no blocks none ends anywhere.
        let mut none = row(0, 0, vec![vec![wide]]);
        none.local_blocks = 0;
        assert_eq!(fault(&[none]), None);
    }
}
