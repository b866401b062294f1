// Where blocks lie on both sides, so that a kernel names a block by its place and the device finds the
// stretches that it is in. The host makes a table of it, checked, before any kernel looks; it stands
// still. The Rust mirror is crates/hipmem/src/kernels/regions.rs.
#ifndef KVX_REGIONS_H
#define KVX_REGIONS_H

#include "device.h"
#include "queue.h"

// A stretch of a block that is contiguous on both sides. Block `b` has its own at the address plus
// `b` times the stride.
struct kvx_region_piece {
  kvx_u64 local;
  kvx_u64 local_stride;
  kvx_u64 remote;
  kvx_u64 remote_stride;
  kvx_u64 len;         // bytes: 1 to 2^31 - 1
  kvx_u32 lkey;
  kvx_u32 rkey;
};

// The pieces of a block in one tensor of a layer, or in all of them together.
struct kvx_region_tensor {
  kvx_u64 bytes;       // of the pieces together
  kvx_u32 first;
  kvx_u32 count;       // never 0
};

// A layer of a group. Its tensors' entries lie one behind the other, and behind them the one for all.
struct kvx_region_layer {
  kvx_u32 first;
  kvx_u32 tensors;     // 0: there is no such layer
  kvx_u32 local_blocks;
  kvx_u32 remote_blocks;
  kvx_u32 expected;    // links of a push: the group's block 0 in kvx_queue.words
  kvx_u32 notes;       // and the layer's first note in kvx_queue.slots
};

struct kvx_region_group {
  kvx_u32 first;       // its layer 0
  kvx_u32 layers;
};

struct kvx_regions {
  kvx_u64 groups;      // kvx_region_group[groups_len]
  kvx_u64 layers;      // kvx_region_layer[]
  kvx_u64 tensors;     // kvx_region_tensor[]
  kvx_u64 pieces;      // kvx_region_piece[]
  kvx_u32 groups_len;
  kvx_u32 reserved;    // 0
};

KVX_SIZE(kvx_region_piece, 48);
KVX_AT(kvx_region_piece, local_stride, 8);
KVX_AT(kvx_region_piece, remote, 16);
KVX_AT(kvx_region_piece, remote_stride, 24);
KVX_AT(kvx_region_piece, len, 32);
KVX_AT(kvx_region_piece, lkey, 40);
KVX_AT(kvx_region_piece, rkey, 44);
KVX_SIZE(kvx_region_tensor, 16);
KVX_AT(kvx_region_tensor, first, 8);
KVX_AT(kvx_region_tensor, count, 12);
KVX_SIZE(kvx_region_layer, 24);
KVX_AT(kvx_region_layer, tensors, 4);
KVX_AT(kvx_region_layer, local_blocks, 8);
KVX_AT(kvx_region_layer, remote_blocks, 12);
KVX_AT(kvx_region_layer, expected, 16);
KVX_AT(kvx_region_layer, notes, 20);
KVX_SIZE(kvx_region_group, 8);
KVX_AT(kvx_region_group, layers, 4);
KVX_SIZE(kvx_regions, 40);
KVX_AT(kvx_regions, layers, 8);
KVX_AT(kvx_regions, tensors, 16);
KVX_AT(kvx_regions, pieces, 24);
KVX_AT(kvx_regions, groups_len, 32);
KVX_AT(kvx_regions, reserved, 36);

// What a place was found to be.
struct kvx_block {
  kvx_u64 pieces;      // the first kvx_region_piece
  kvx_u32 count;
  kvx_u32 local;       // the block's number here
  kvx_u32 remote;      // and at the peer
  kvx_u32 expected;    // as its layer has them
  kvx_u32 notes;
};

// Looks up what a move names by places. `move.len` must be the block's bytes, so that who believes
// something else of the layout moves nothing.
KVX_FN kvx_u32 kvx_find(const kvx_queue &queue, const kvx_move &move, kvx_block &block) {
  if (move.flags != (KVX_LOCAL_PLACE | KVX_REMOTE_PLACE) || queue.regions == 0) {
    return KVX_BAD_OP;
  }
  if ((move.local ^ move.remote) >> 32 != 0) {
    return KVX_BAD_RANGE;
  }
  const KVX_TABLE kvx_regions *regions = (const KVX_TABLE kvx_regions *)queue.regions;
  kvx_u32 group = (kvx_u32)(move.local >> 56);
  kvx_u32 tensor = (kvx_u32)(move.local >> 48) & 0xff;
  kvx_u32 layer = (kvx_u32)(move.local >> 32) & 0xffff;
  if (group >= regions->groups_len) {
    return KVX_BAD_KEY;
  }
  const KVX_TABLE kvx_region_group *of =
      (const KVX_TABLE kvx_region_group *)regions->groups + group;
  if (layer >= of->layers) {
    return KVX_BAD_KEY;
  }
  const KVX_TABLE kvx_region_layer *row =
      (const KVX_TABLE kvx_region_layer *)regions->layers + of->first + layer;
  kvx_u32 tensors = row->tensors;
  if (tensors == 0) {
    return KVX_BAD_KEY;
  }
  if (tensor == KVX_ALL_TENSORS) {
    tensor = tensors;
  } else if (tensor >= tensors) {
    return KVX_BAD_RANGE;
  }
  const KVX_TABLE kvx_region_tensor *span =
      (const KVX_TABLE kvx_region_tensor *)regions->tensors + row->first + tensor;
  if (move.len != span->bytes) {
    return KVX_BAD_LENGTH;
  }
  block.local = (kvx_u32)move.local;
  block.remote = (kvx_u32)move.remote;
  if (block.local >= row->local_blocks || block.remote >= row->remote_blocks) {
    return KVX_BAD_RANGE;
  }
  block.pieces = regions->pieces + span->first * sizeof(kvx_region_piece);
  block.count = span->count;
  block.expected = row->expected;
  block.notes = row->notes;
  return KVX_OK;
}

// A piece of it, by addresses.
KVX_FN kvx_move kvx_piece_of(const kvx_block &block, kvx_u32 i, kvx_u32 imm) {
  const KVX_TABLE kvx_region_piece *piece =
      (const KVX_TABLE kvx_region_piece *)block.pieces + i;
  kvx_move move = {piece->local + block.local * piece->local_stride,
                   piece->remote + block.remote * piece->remote_stride,
                   piece->len,
                   piece->lkey,
                   piece->rkey,
                   imm,
                   0};
  return move;
}

#endif
