// What the kernels take and give, as the host lays it out. Fixed-width integers only; an address is
// a u64 that the device running the kernel can reach. The Rust mirror is
// crates/hipmem/src/kernels/args.rs; a test compares the two field by field.
#ifndef KVX_ARGS_H
#define KVX_ARGS_H

typedef unsigned char kvx_u8;
typedef unsigned int kvx_u32;
typedef unsigned long long kvx_u64;

static_assert(sizeof(kvx_u32) == 4 && sizeof(kvx_u64) == 8, "fixed widths");

// Block 0 of one tensor on both sides.
struct kvx_tensor {
  kvx_u64 src;
  kvx_u64 dst;
};

// A stretch of a block that is contiguous on both sides, with offsets in bytes from where the block
// begins. Merged runs are pieces too: with the one pair (0, 0), offsets count from block 0.
struct kvx_piece {
  kvx_u64 src;
  kvx_u64 dst;
  kvx_u64 len;
};

// Block ids.
struct kvx_pair {
  kvx_u32 src;
  kvx_u32 dst;
};

// Tensors that lie alike, and the blocks wanted of them: tensors_len x pairs_len x pieces_len
// stretches. Each of the four counts is below 2^31; where one is 0 there is nothing to do.
struct kvx_section {
  kvx_u64 tensors;     // kvx_tensor[tensors_len]
  kvx_u64 pairs;       // kvx_pair[pairs_len]
  kvx_u64 pieces;      // kvx_piece[pieces_len]
  kvx_u64 src_stride;  // bytes from one block to the next
  kvx_u64 dst_stride;
  kvx_u32 tensors_len;
  kvx_u32 pairs_len;
  kvx_u32 pieces_len;
  kvx_u32 chunks;      // chunks of the longest piece
  kvx_u32 chunk;       // the most bytes that one warp copies at a time: 16..=2^30
  kvx_u32 first;       // which warp of the grid takes the first chunk, modulo their number
};

struct kvx_gather_args {
  kvx_u64 sections;     // kvx_section[sections_len]
  kvx_u64 slots;        // kvx_gather_slot[workgroups]: written when a workgroup has ended
  kvx_u64 abort;        // kvx_u32: not 0 ends the launch
  kvx_u64 sequence;     // what the slots shall hold
  kvx_u32 sections_len;
  kvx_u32 poll_bytes;   // a warp looks at the abort word after copying so many bytes; 0: every chunk
};

// kvx_gather_slot.state
#define KVX_WHOLE 1u
#define KVX_ABORTED 2u

struct kvx_gather_slot {
  kvx_u64 bytes;     // bytes copied
  kvx_u64 ticks;     // of the device's steady clock, from the workgroup's first to its last
  kvx_u32 state;     // KVX_WHOLE or KVX_ABORTED
  kvx_u32 unit;      // where it ran: XCC (AMD), multiprocessor (NVIDIA), 0 (host)
  kvx_u64 sequence;  // stored last, with system-scope release
};

// For kvx_acquire and kvx_release.
struct kvx_fence_args {
  kvx_u64 slots;     // kvx_fence_slot[workgroups]
  kvx_u64 sequence;
};

struct kvx_fence_slot {
  kvx_u64 sequence;
  kvx_u64 unit;      // as in kvx_gather_slot
};

// kvx_verify_args.side
#define KVX_SOURCE 0u
#define KVX_DESTINATION 1u

struct kvx_verify_args {
  kvx_u64 sections;     // kvx_section[sections_len]; chunks, chunk and first are not looked at
  kvx_u64 sums;         // kvx_u64[]: for each section, tensor and pair, in this order
  kvx_u64 abort;        // as in kvx_gather_args; blocks not reached keep the sum that was there
  kvx_u32 sections_len;
  kvx_u32 side;         // KVX_SOURCE or KVX_DESTINATION: whose blocks are read
};

#define KVX_AT(type, field, at) \
  static_assert(__builtin_offsetof(type, field) == (at), #type "." #field)
#define KVX_SIZE(type, size) static_assert(sizeof(type) == (size), #type)
KVX_SIZE(kvx_tensor, 16);
KVX_AT(kvx_tensor, dst, 8);
KVX_SIZE(kvx_piece, 24);
KVX_AT(kvx_piece, dst, 8);
KVX_AT(kvx_piece, len, 16);
KVX_SIZE(kvx_pair, 8);
KVX_AT(kvx_pair, dst, 4);
KVX_SIZE(kvx_section, 64);
KVX_AT(kvx_section, pairs, 8);
KVX_AT(kvx_section, pieces, 16);
KVX_AT(kvx_section, src_stride, 24);
KVX_AT(kvx_section, dst_stride, 32);
KVX_AT(kvx_section, tensors_len, 40);
KVX_AT(kvx_section, pairs_len, 44);
KVX_AT(kvx_section, pieces_len, 48);
KVX_AT(kvx_section, chunks, 52);
KVX_AT(kvx_section, chunk, 56);
KVX_AT(kvx_section, first, 60);
KVX_SIZE(kvx_gather_args, 40);
KVX_AT(kvx_gather_args, slots, 8);
KVX_AT(kvx_gather_args, abort, 16);
KVX_AT(kvx_gather_args, sequence, 24);
KVX_AT(kvx_gather_args, sections_len, 32);
KVX_AT(kvx_gather_args, poll_bytes, 36);
KVX_SIZE(kvx_gather_slot, 32);
KVX_AT(kvx_gather_slot, ticks, 8);
KVX_AT(kvx_gather_slot, state, 16);
KVX_AT(kvx_gather_slot, unit, 20);
KVX_AT(kvx_gather_slot, sequence, 24);
KVX_SIZE(kvx_fence_args, 16);
KVX_AT(kvx_fence_args, sequence, 8);
KVX_SIZE(kvx_fence_slot, 16);
KVX_AT(kvx_fence_slot, unit, 8);
KVX_SIZE(kvx_verify_args, 32);
KVX_AT(kvx_verify_args, sums, 8);
KVX_AT(kvx_verify_args, abort, 16);
KVX_AT(kvx_verify_args, sections_len, 24);
KVX_AT(kvx_verify_args, side, 28);

#endif
