// Posts in numbers: what tests and measurements of post.h run.
#include "post.h"

// Who posts as one.
#define KVX_BY_THREAD 1u
#define KVX_BY_WAVE 2u
#define KVX_BY_BLOCK 3u

template <kvx_u32 BY>
KVX_FN kvx_u32 kvx_post_by(const kvx_post_args &args, const kvx_move &move, kvx_u64 &ticket) {
  if (BY == KVX_BY_THREAD) {
    return kvx_post_thread(args.queue, move, args.op, ticket);
  }
  return BY == KVX_BY_WAVE ? kvx_post_wave(args.queue, move, args.op, ticket)
                           : kvx_post_block(args.queue, move, args.op, ticket);
}

template <kvx_u32 BY>
KVX_FN kvx_u32 kvx_await_by(const kvx_post_args &args, kvx_u64 ticket, kvx_u32 all) {
  if (BY == KVX_BY_THREAD) {
    return kvx_await_thread(args.queue, ticket, all);
  }
  return BY == KVX_BY_WAVE ? kvx_await_wave(args.queue, ticket, all)
                           : kvx_await_block(args.queue, ticket, all);
}

// What this poster's speaker has written is there for all who post with it.
template <kvx_u32 BY>
KVX_FN void kvx_together() {
  if (BY == KVX_BY_WAVE) {
    kvx_wave_barrier();
  } else if (BY == KVX_BY_BLOCK) {
    kvx_drain();
    kvx_barrier();
  }
}

// What a poster does at each of its steps, so that there is one place where it posts and one where it
// waits. `speaks` where this thread writes its results.
template <kvx_u32 BY>
KVX_FN void kvx_post_all(const kvx_post_args &args, kvx_u32 poster, kvx_u32 speaks) {
  const KVX_GLOBAL kvx_move *moves =
      (const KVX_GLOBAL kvx_move *)args.moves + (kvx_u64)poster * args.count;
  KVX_GLOBAL kvx_post_result *results =
      (KVX_GLOBAL kvx_post_result *)args.results + (kvx_u64)poster * args.count;
  kvx_u32 posted = 0, awaited = 0;
  kvx_u32 waits = args.until == KVX_POSTED ? 0 : args.until == KVX_IDLE ? 1 : args.count;
  kvx_u64 ticket = 0;
  kvx_u32 status = KVX_OK;
#pragma nounroll
  while (posted < args.count || awaited < waits) {
    kvx_u32 turn = args.until == KVX_EACH ? awaited == posted : posted < args.count;
    if (turn) {
      kvx_move move = {moves[posted].local, moves[posted].remote, moves[posted].len,
                       moves[posted].lkey,  moves[posted].rkey,   moves[posted].imm,
                       moves[posted].flags};
      ticket = 0;
      status = kvx_post_by<BY>(args, move, ticket);
      if (speaks) {
        results[posted].ticket = ticket;
        results[posted].posted = status;
        results[posted].ended = status;
      }
      ++posted;
      continue;
    }
    kvx_u32 at = args.until == KVX_IDLE ? args.count - 1 : awaited;
    if (args.until == KVX_ALL) {
      if (awaited == 0) {
        kvx_together<BY>();
      }
      status = results[at].posted;
      ticket = results[at].ticket;
    }
    if (args.until == KVX_IDLE || status == KVX_OK) {
      kvx_u32 ended = kvx_await_by<BY>(args, ticket, args.until == KVX_IDLE);
      if (speaks && args.count != 0) {
        results[at].ended = ended;
      }
    }
    ++awaited;
  }
}

#ifndef KVX_HOST
KVX_FN kvx_u32 kvx_number() { return kvx_group() * kvx_threads() + kvx_thread(); }

KVX_KERNEL void kvx_post_threads(kvx_post_args args) {
  kvx_u32 poster = kvx_number();
  if (poster < args.posters) {
    kvx_post_all<KVX_BY_THREAD>(args, poster, 1);
  }
}

KVX_KERNEL void kvx_post_waves(kvx_post_args args) {
  kvx_u32 poster = kvx_uniform(kvx_number() / KVX_WARP);
  if (poster < args.posters) {
    kvx_post_all<KVX_BY_WAVE>(args, poster, kvx_leads_wave());
  }
}

KVX_KERNEL void kvx_post_blocks(kvx_post_args args) {
  if (kvx_group() < args.posters) {
    kvx_post_all<KVX_BY_BLOCK>(args, kvx_group(), kvx_leads_block());
  }
}
#else
// Posters `first` to `end`, one after the other in the calling thread.
KVX_KERNEL void kvx_post_host(const kvx_post_args *args, kvx_u32 first, kvx_u32 end, kvx_u32) {
  for (kvx_u32 poster = first; poster < end && poster < args->posters; ++poster) {
    kvx_post_all<KVX_BY_THREAD>(*args, poster, 1);
  }
}
#endif
