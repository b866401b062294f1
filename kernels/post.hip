// What tests, measurements and the example of post.h run: posts in numbers, and a producer that pushes.
#include "post.h"
#include "time.hip"

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
// waits. `speaks` where this thread writes its results. A post that is late is the last one, and so is a
// wait: two patiences are the most that a poster takes, and not one for each post.
template <kvx_u32 BY>
KVX_FN void kvx_post_all(const kvx_post_args &args, kvx_u32 poster, kvx_u32 speaks) {
  const KVX_GLOBAL kvx_move *moves =
      (const KVX_GLOBAL kvx_move *)args.moves + (kvx_u64)poster * args.count;
  KVX_GLOBAL kvx_post_result *results =
      (KVX_GLOBAL kvx_post_result *)args.results + (kvx_u64)poster * args.count;
  kvx_u32 one_by_one = args.until == KVX_EACH || args.until == KVX_ALL;
  kvx_u32 posted = 0, awaited = 0, count = args.count;
  kvx_u32 waits = one_by_one ? count : args.until == KVX_IDLE;
  kvx_u64 ticket = 0;
  kvx_u32 status = KVX_OK;
#pragma nounroll
  while (posted < count || awaited < waits) {
    kvx_u32 turn = args.until == KVX_EACH ? awaited == posted : posted < count;
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
      if (status == KVX_TIMEOUT) {
        count = posted;
        waits = args.until == KVX_ALL ? posted : awaited;
      }
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
    kvx_u32 late = 0;
    if (args.until == KVX_IDLE || status == KVX_OK) {
      kvx_u32 ended = kvx_await_by<BY>(args, ticket, args.until == KVX_IDLE);
      if (speaks && args.count != 0) {
        results[at].ended = ended;
      }
      late = ended == KVX_TIMEOUT;
    }
    ++awaited;
    // All who post together have the same answer.
    if (late) {
      waits = awaited;
      count = posted;
    }
  }
  if (speaks) {
    for (; one_by_one && awaited < posted; ++awaited) {
      results[awaited].ended =
          results[awaited].posted == KVX_OK ? KVX_TIMEOUT : results[awaited].posted;
    }
    for (; posted < args.count; ++posted) {
      results[posted].ticket = 0;
      results[posted].posted = KVX_TIMEOUT;
      results[posted].ended = KVX_TIMEOUT;
    }
  }
}

// 2^64 divided by the golden ratio, odd.
#define KVX_GOLDEN 0x9e3779b97f4a7c15ull

// Fills a block; this thread's words.
KVX_FN void kvx_make(const kvx_produced &tensor, kvx_u32 block, kvx_u32 thread, kvx_u32 threads) {
  KVX_GLOBAL kvx_u64 *words = (KVX_GLOBAL kvx_u64 *)(tensor.addr + block * tensor.stride);
  kvx_u64 key = kvx_mix(tensor.salt + block);
  for (kvx_u64 i = thread; i < tensor.bytes / 8; i += threads) {
    kvx_u64 x = key + i * KVX_GOLDEN;
    words[i] = x ^ x >> 32;
  }
}

// One workgroup's part of a producer: makes a layer's blocks and pushes each as soon as it is there,
// then the next layer's; at last it waits for all of them.
KVX_FN void kvx_produce_part(const kvx_produce_args &args, kvx_u32 group, kvx_u32 groups,
                             kvx_u32 thread, kvx_u32 threads) {
  const KVX_GLOBAL kvx_produced *tensors = (const KVX_GLOBAL kvx_produced *)args.tensors;
  const KVX_GLOBAL kvx_produced_layer *layers =
      (const KVX_GLOBAL kvx_produced_layer *)args.layers;
  const KVX_GLOBAL kvx_pair *pairs = (const KVX_GLOBAL kvx_pair *)args.pairs;
  KVX_GLOBAL kvx_post_result *results = (KVX_GLOBAL kvx_post_result *)args.results;
  // A post that is late is the last one, and so is a wait.
  kvx_u32 late = 0;
  for (kvx_u32 layer = 0; layer < args.layers_len; ++layer) {
#pragma nounroll
    for (kvx_u32 pair = group; pair < args.pairs_len; pair += groups) {
      kvx_u32 src = pairs[pair].src, dst = pairs[pair].dst;
#pragma nounroll
      for (kvx_u32 t = layers[layer].first; t < layers[layer].end; ++t) {
        kvx_produced tensor = {tensors[t].addr, tensors[t].stride, tensors[t].bytes,
                               tensors[t].salt};
        kvx_make(tensor, src, thread, threads);
      }
      kvx_move move = {layers[layer].place | src, layers[layer].place | dst, layers[layer].len,
                       0, 0, 0, KVX_LOCAL_PLACE | KVX_REMOTE_PLACE};
      kvx_u64 ticket = 0;
      kvx_u32 status = late ? KVX_TIMEOUT : kvx_put_block(args.queue, move, ticket);
      late = status == KVX_TIMEOUT;
      if (kvx_leads_block()) {
        kvx_u64 at = (kvx_u64)layer * args.pairs_len + pair;
        results[at].ticket = ticket;
        results[at].posted = status;
        results[at].ended = status;
      }
    }
  }
  kvx_together<KVX_BY_BLOCK>();
  late = 0;
  for (kvx_u32 layer = 0; layer < args.layers_len; ++layer) {
#pragma nounroll
    for (kvx_u32 pair = group; pair < args.pairs_len; pair += groups) {
      kvx_u64 at = (kvx_u64)layer * args.pairs_len + pair;
      if (results[at].posted != KVX_OK) {
        continue;
      }
      kvx_u32 ended = late ? KVX_TIMEOUT : kvx_wait_block(args.queue, results[at].ticket);
      late = ended == KVX_TIMEOUT;
      if (kvx_leads_block()) {
        results[at].ended = ended;
      }
    }
  }
}

// Workgroup `group`'s share of a list of puts over GPU links, each by all of its threads. For queues of
// that kind alone, and with nothing else in it: so it can be seen that its fence comes after the copies.
KVX_FN void kvx_push_part(const kvx_post_args &args, kvx_u32 group, kvx_u32 groups) {
  const KVX_GLOBAL kvx_move *moves = (const KVX_GLOBAL kvx_move *)args.moves;
  KVX_GLOBAL kvx_post_result *results = (KVX_GLOBAL kvx_post_result *)args.results;
#pragma nounroll
  for (kvx_u32 i = group; i < args.count; i += groups) {
    kvx_move move = {moves[i].local, moves[i].remote, moves[i].len, 0, 0, 0, moves[i].flags};
    kvx_u32 status = KVX_BAD_QUEUE;
    if (args.queue.kind == KVX_LINKS) {
      status = kvx_link_block(args.queue, move, args.op);
    }
    if (kvx_leads_block()) {
      results[i].ticket = 0;
      results[i].posted = status;
      results[i].ended = status;
    }
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

KVX_KERNEL void kvx_push_blocks(kvx_post_args args) {
  kvx_push_part(args, kvx_group(), kvx_groups());
}

KVX_KERNEL void kvx_produce(kvx_produce_args args) {
  kvx_produce_part(args, kvx_group(), kvx_groups(), kvx_thread(), kvx_threads());
}
#else
// Posters `first` to `end`, one after the other in the calling thread.
KVX_KERNEL void kvx_post_host(const kvx_post_args *args, kvx_u32 first, kvx_u32 end, kvx_u32) {
  for (kvx_u32 poster = first; poster < end && poster < args->posters; ++poster) {
    kvx_post_all<KVX_BY_THREAD>(*args, poster, 1);
  }
}

// All workgroups, one after the other in the calling thread.
KVX_KERNEL void kvx_push_blocks(const kvx_post_args *args, kvx_u32 grid, kvx_u32) {
  for (kvx_u32 group = 0; group < grid; ++group) {
    kvx_push_part(*args, group, grid);
  }
}

KVX_KERNEL void kvx_produce(const kvx_produce_args *args, kvx_u32 grid, kvx_u32) {
  for (kvx_u32 group = 0; group < grid; ++group) {
    kvx_produce_part(*args, group, grid, 0, 1);
  }
}
#endif
