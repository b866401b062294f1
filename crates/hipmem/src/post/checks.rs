//! What a post may name.

use std::collections::HashMap;

use super::descriptor::{Descriptor, End, Place, PostOp};
use super::status::Status;

/// The bytes that a key names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first one's address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it may be written: here by gets, at the peer by puts.
    pub writable: bool,
}

/// The blocks of a cache group, by how many there are of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Layers.
    pub layers: u16,
    /// Tensors of a layer.
    pub tensors: u8,
    /// Blocks of a tensor.
    pub blocks: u32,
    /// Bytes of a block.
    pub bytes: u64,
}

/// What posts may name on both sides. What is not in it is refused.
#[derive(Debug, Clone, Default)]
pub struct Checks {
    /// By this side's keys.
    pub local: HashMap<u32, Span>,
    /// By the peer's keys.
    pub remote: HashMap<u32, Span>,
    /// This side's cache groups.
    pub local_blocks: Vec<Blocks>,
    /// The peer's.
    pub remote_blocks: Vec<Blocks>,
    /// The most bytes of a post.
    pub max_len: u64,
}

impl Checks {
    /// Whether a post stays inside.
    ///
    /// # Errors
    ///
    /// What the kernel is told.
    pub fn check(&self, post: &Descriptor) -> Result<(), Status> {
        if post.len > self.max_len {
            return Err(Status::BadLength);
        }
        let gets = matches!(post.op, PostOp::Get);
        let here = (&self.local, &self.local_blocks);
        let there = (&self.remote, &self.remote_blocks);
        side(&post.local, post.len, here, gets)?;
        side(&post.remote, post.len, there, !gets)
    }
}

fn side(
    end: &End,
    len: u64,
    (keys, groups): (&HashMap<u32, Span>, &Vec<Blocks>),
    written: bool,
) -> Result<(), Status> {
    match end {
        // Where nothing is moved, nothing is looked at: a notice has no memory.
        _ if len == 0 => Ok(()),
        End::Address { addr, key } => {
            let span = keys.get(key).ok_or(Status::BadKey)?;
            let from = addr.checked_sub(span.addr);
            let end = from.and_then(|from| from.checked_add(len));
            if end.is_none_or(|end| end > span.len) {
                return Err(Status::BadRange);
            }
            if written && !span.writable {
                return Err(Status::BadRights);
            }
            Ok(())
        }
        End::Place(Place {
            group,
            tensor,
            layer,
            block,
        }) => {
            let group = groups.get(usize::from(*group)).ok_or(Status::BadKey)?;
            let inside = *layer < group.layers
                && *tensor < group.tensors
                && *block < group.blocks
                && len <= group.bytes;
            if inside {
                Ok(())
            } else {
                Err(Status::BadRange)
            }
        }
    }
}
