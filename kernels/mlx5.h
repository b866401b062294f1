// What mlx5 devices want of a queue: WQEs, doorbells, completions. All that is mlx5's is here; another
// vendor's file has the same functions. crates/verbs/src/mlx5 says the same in Rust, and tests/abi
// compares that with mlx5dv.h. Numbers are big-endian.
#ifndef KVX_MLX5_H
#define KVX_MLX5_H

#include "device.h"
#include "queue.h"

#define KVX_MLX5_WRITE 0x08u
#define KVX_MLX5_WRITE_IMM 0x09u
#define KVX_MLX5_READ 0x10u
#define KVX_MLX5_CQ_UPDATE 0x08u
#define KVX_MLX5_MAX_LEN 0x7fffffffull
#define KVX_MLX5_REQ 0u
#define KVX_MLX5_REQ_ERR 13u
#define KVX_MLX5_INVALID 15u

KVX_FN kvx_u32 kvx_be32(kvx_u32 value) { return __builtin_bswap32(value); }
KVX_FN kvx_u64 kvx_be64(kvx_u64 value) { return __builtin_bswap64(value); }

KVX_FN kvx_u32 kvx_mlx5_opcode(kvx_u32 op) {
  return op == KVX_GET ? KVX_MLX5_READ : op == KVX_PUT_IMM ? KVX_MLX5_WRITE_IMM : KVX_MLX5_WRITE;
}

// Whether the device can do it, by addresses.
KVX_FN kvx_u32 kvx_nic_can(const kvx_move &move) {
  return move.len <= KVX_MLX5_MAX_LEN ? KVX_OK : KVX_BAD_LENGTH;
}

// Units of 16 bytes: no local segment where there are no bytes, for one of no bytes would be 2 GiB.
KVX_FN kvx_u32 kvx_mlx5_units(const kvx_move &move) { return move.len == 0 ? 2 : 3; }

// What the doorbell of a WQE says beside its number, in eight bits: out of what the WQE is made of.
KVX_FN kvx_u32 kvx_nic_says(const kvx_move &move, kvx_u32 op) {
  return kvx_mlx5_opcode(op) << 2 | kvx_mlx5_units(move);
}

// The first eight bytes of the WQE, which are the doorbell too.
KVX_FN kvx_u64 kvx_mlx5_head(const kvx_queue &queue, kvx_u64 n, kvx_u32 says) {
  kvx_u32 first = kvx_be32(((kvx_u32)n & 0xffff) << 8 | says >> 2);
  kvx_u32 second = kvx_be32(queue.qpn << 8 | (says & 3));
  return (kvx_u64)second << 32 | first;
}

// Writes WQE `n` into its slot. One that is not `told` makes a completion only if it fails.
KVX_FN void kvx_nic_write(const kvx_queue &queue, kvx_u64 at, kvx_u64 n, const kvx_move &move,
                          kvx_u32 op, kvx_u32 told) {
  kvx_u64 head = kvx_mlx5_head(queue, n, kvx_nic_says(move, op));
  kvx_u64 remote = kvx_be64(move.remote);
  kvx_u64 local = kvx_be64(move.local);
  KVX_GLOBAL kvx_v4 *to = (KVX_GLOBAL kvx_v4 *)at;
  kvx_v4 control = {(kvx_u32)head, (kvx_u32)(head >> 32), told ? KVX_MLX5_CQ_UPDATE << 24 : 0,
                    op == KVX_PUT_IMM ? kvx_be32(move.imm) : 0};
  kvx_v4 far = {(kvx_u32)remote, (kvx_u32)(remote >> 32), kvx_be32(move.rkey), 0};
  kvx_v4 near = {kvx_be32((kvx_u32)move.len), kvx_be32(move.lkey), (kvx_u32)local,
                 (kvx_u32)(local >> 32)};
  to[0] = control;
  to[1] = far;
  to[2] = near;
}

// The doorbell for WQE `n`: never out of the slot, which the device may have given back.
KVX_FN kvx_u64 kvx_nic_bell(const kvx_queue &queue, kvx_u64 n, kvx_u32 says) {
  return kvx_mlx5_head(queue, n, says);
}

// The doorbell record that says that WQEs below `next` are there.
KVX_FN kvx_u32 kvx_nic_record(kvx_u64 next) { return kvx_be32((kvx_u32)next & 0xffff); }

// The completion queue's record: completions below `taken` have been read.
KVX_FN kvx_u32 kvx_nic_cq_record(kvx_u64 taken) { return kvx_be32((kvx_u32)taken & 0xffffff); }

// A completion.
struct kvx_nic_end {
  kvx_u32 there;    // whether it has been written
  kvx_u32 counter;  // low 16 bits of the WQE that ended
  kvx_u32 status;   // KVX_OK or what failed
};

KVX_FN kvx_u32 kvx_mlx5_status(kvx_u32 syndrome) {
  switch (syndrome) {
    case 0x01:
      return KVX_BAD_LENGTH;
    case 0x02:
      return KVX_MALFORMED;
    case 0x04:
    case 0x11:
      return KVX_BAD_KEY;
    case 0x05:
      return KVX_FLUSHED;
    case 0x13:
      return KVX_BAD_RANGE;
    case 0x15:
    case 0x16:
      return KVX_PEER;
    default:
      return KVX_DEVICE;
  }
}

// Where completion `n` is.
KVX_FN kvx_u64 kvx_mlx5_cqe(const kvx_queue &queue, kvx_u64 n) {
  return queue.completions + (n & (queue.cq_depth - 1)) * 64;
}

// The word of completion `n` that says whether it is there: its last eight bytes. What they say of the
// owner, they say of themselves too.
KVX_FN kvx_u64 kvx_nic_peek(const kvx_queue &queue, kvx_u64 n) {
  return kvx_load_system_u64(kvx_mlx5_cqe(queue, n) + 56);
}

// Completion `n`, by its word.
KVX_FN kvx_nic_end kvx_nic_poll(const kvx_queue &queue, kvx_u64 n, kvx_u64 word) {
  kvx_u32 last = (kvx_u32)(word >> 56);
  kvx_u32 opcode = last >> 4;
  kvx_nic_end end = {0, 0, KVX_OK};
  if (opcode == KVX_MLX5_INVALID || (last & 1) != ((n & queue.cq_depth) != 0)) {
    return end;
  }
  end.there = 1;
  end.counter = __builtin_bswap16((unsigned short)(word >> 32));
  if (opcode == KVX_MLX5_REQ_ERR) {
    kvx_fence_acquire();
    kvx_u64 told = kvx_load_system_u64(kvx_mlx5_cqe(queue, n) + 48);
    end.status = kvx_mlx5_status((kvx_u32)(told >> 56));
  } else if (opcode != KVX_MLX5_REQ) {
    end.status = KVX_MALFORMED;
  }
  return end;
}

#endif
