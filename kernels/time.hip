// What measurements run: one thread that posts, with the device's clock around it.
#include "post.h"

// Each put and its wait: `ticket` of a result is the ticks of both.
KVX_FN void kvx_time_waits_all(const kvx_post_args &args) {
  const KVX_GLOBAL kvx_move *moves = (const KVX_GLOBAL kvx_move *)args.moves;
  KVX_GLOBAL kvx_post_result *results = (KVX_GLOBAL kvx_post_result *)args.results;
#pragma nounroll
  for (kvx_u32 i = 0; i < args.count; ++i) {
    kvx_move move = {moves[i].local, moves[i].remote, moves[i].len, moves[i].lkey,
                     moves[i].rkey,  moves[i].imm,    moves[i].flags};
    kvx_u64 ticket = 0, since = kvx_clock();
    kvx_u32 posted = kvx_post_one(args.queue, move, args.op, ticket);
    kvx_u32 ended = posted == KVX_OK ? kvx_await_one(args.queue, ticket, 0) : posted;
    results[i].ticket = kvx_clock() - since;
    results[i].posted = posted;
    results[i].ended = ended;
  }
}

// A flag to the host, at `bell`, and what the host answers, at `words`: as short as a way there and back
// can be.
KVX_FN void kvx_time_echo_all(const kvx_post_args &args) {
  KVX_GLOBAL kvx_post_result *results = (KVX_GLOBAL kvx_post_result *)args.results;
#pragma nounroll
  for (kvx_u64 i = 1; i <= args.count; ++i) {
    kvx_vigil vigil = kvx_vigil_begin(args.queue);
    kvx_u32 status = KVX_OK;
    kvx_store_release_u64(args.queue.bell, i);
    while (kvx_load_acquire_u64(args.queue.words) != i && status == KVX_OK) {
      status = kvx_clock() - vigil.since > args.queue.patience ? KVX_TIMEOUT : KVX_OK;
    }
    results[i - 1].ticket = kvx_clock() - vigil.since;
    results[i - 1].posted = status;
    results[i - 1].ended = status;
  }
}

// `count` WQEs, one slot after the other, of which nobody is told: the ticks of all of them, first as they
// are, then each with the release that goes behind it.
KVX_FN void kvx_time_wqes_all(const kvx_post_args &args) {
  const KVX_GLOBAL kvx_move *moves = (const KVX_GLOBAL kvx_move *)args.moves;
  KVX_GLOBAL kvx_post_result *results = (KVX_GLOBAL kvx_post_result *)args.results;
  kvx_move move = {moves[0].local, moves[0].remote, moves[0].len, moves[0].lkey,
                   moves[0].rkey,  moves[0].imm,    0};
#pragma nounroll
  for (kvx_u32 fenced = 0; fenced < 2; ++fenced) {
    kvx_u64 since = kvx_clock();
#pragma nounroll
    for (kvx_u32 n = 0; n < args.count; ++n) {
      move.local += move.len;
      move.remote += move.len;
      kvx_u64 at = args.queue.slots + (n & (args.queue.depth - 1)) * 64;
      kvx_nic_write(args.queue, at, n, move, args.op, 1);
      if (fenced) {
        kvx_fence_release();
      }
    }
    results[fenced].ticket = kvx_clock() - since;
    results[fenced].posted = KVX_OK;
    results[fenced].ended = KVX_OK;
  }
}

#ifndef KVX_HOST
KVX_KERNEL void kvx_time_waits(kvx_post_args args) {
  if (kvx_group() == 0 && kvx_thread() == 0) {
    kvx_time_waits_all(args);
  }
}

KVX_KERNEL void kvx_time_echo(kvx_post_args args) {
  if (kvx_group() == 0 && kvx_thread() == 0) {
    kvx_time_echo_all(args);
  }
}

KVX_KERNEL void kvx_time_wqes(kvx_post_args args) {
  if (kvx_group() == 0 && kvx_thread() == 0) {
    kvx_time_wqes_all(args);
  }
}
#else
KVX_KERNEL void kvx_time_waits(const kvx_post_args *args, kvx_u32, kvx_u32) {
  kvx_time_waits_all(*args);
}

KVX_KERNEL void kvx_time_echo(const kvx_post_args *args, kvx_u32, kvx_u32) {
  kvx_time_echo_all(*args);
}

KVX_KERNEL void kvx_time_wqes(const kvx_post_args *args, kvx_u32, kvx_u32) {
  kvx_time_wqes_all(*args);
}
#endif
