// Puts over GPU links: the kernel that posts copies the block itself, into memory of the peer that is
// mapped here. So there is nothing to wait for, and no ticket: a put that says KVX_OK is there, for
// whoever learns of it by a release of system scope that comes after it (kvx_store_release_u64), or by
// the kernel's end.
//
// A queue of a push knows which blocks the peer expects, and keeps a note of each, by which the host knows
// what was put when the kernels have ended; and the first put that was refused, which fails the push. Two
// puts of one block at a time are the kernels' own mistake.
#ifndef KVX_LINKS_H
#define KVX_LINKS_H

#include "copy.h"
#include "device.h"
#include "regions.h"

// What a warp copies at a time, at least and at most: four and 32 vectors for each lane.
#define KVX_LINK_LEAST (KVX_WARP * 16 * 4)
#define KVX_LINK_MOST (KVX_WARP * 16 * 32)
// Bytes that a warp copies between two looks at the abort word.
#define KVX_LINK_POLL (64u << 10)

// All lanes of a warp together, or a thread that has no warp.
struct kvx_by_lanes {
  KVX_FN void copy(const kvx_span &span) {
    KVX_LANES(lane) { kvx_copy(span, lane); }
  }
  KVX_FN kvx_u32 same(kvx_u32 value) { return kvx_uniform(value); }
};
struct kvx_by_one {
  KVX_FN void copy(const kvx_span &span) {
#pragma nounroll
    for (kvx_u32 lane = 0; lane < KVX_WARP; ++lane) {
      kvx_copy(span, lane);
    }
  }
  KVX_FN kvx_u32 same(kvx_u32 value) { return value; }
};

// The share of warp `own` of `warps` in a block: chunk after chunk of all pieces, in turns. Stops where
// the abort word is set; `stop` is what it was a moment ago.
template <typename BY>
KVX_FN kvx_u32 kvx_link_share(const kvx_queue &queue, const kvx_block &block, kvx_u32 stop,
                              kvx_u32 own, kvx_u32 warps) {
  kvx_u32 turn = 0, unpolled = 0;
#pragma nounroll
  for (kvx_u32 i = 0; i < block.count; ++i) {
    kvx_move piece = kvx_piece_of(block, i, 0);
    kvx_u32 len = (kvx_u32)piece.len;
    kvx_u32 chunk = (len / warps + KVX_LINK_LEAST - 1) & ~(KVX_LINK_LEAST - 1);
    chunk = chunk < KVX_LINK_LEAST ? KVX_LINK_LEAST : chunk > KVX_LINK_MOST ? KVX_LINK_MOST : chunk;
    kvx_u32 chunks = (len - 1) / chunk + 1;
#pragma nounroll
    for (kvx_u32 k = own >= turn ? own - turn : own + warps - turn; k < chunks; k += warps) {
      if (unpolled >= KVX_LINK_POLL) {
        unpolled = 0;
        stop = kvx_load_system_u32(queue.abort);
      }
      if (BY::same(stop) != 0) {
        return KVX_STOPPED;
      }
      kvx_u32 at = k * chunk;
      kvx_span span = {piece.local + at, piece.remote + at, len - at < chunk ? len - at : chunk};
      BY::copy(span);
      unpolled += span.len;
    }
    turn = (turn + chunks) % warps;
  }
  return KVX_OK;
}

// `note` is where the block's is; 0: the queue keeps none.
KVX_FN kvx_u32 kvx_link_find(const kvx_queue &queue, const kvx_move &move, kvx_u32 op,
                             kvx_block &block, kvx_u64 &note) {
  note = 0;
  if (queue.regions == 0) {
    return KVX_BAD_QUEUE;
  }
  kvx_u32 status = op == KVX_PUT ? kvx_find(queue, move, block) : KVX_BAD_OP;
  // The compiler is told so that it puts copies, fence and result in that order, as the check of what it
  // makes of them wants it.
  if (__builtin_expect(status != KVX_OK || queue.words == 0, 0)) {
    return status;
  }
  if (((kvx_u32)(move.local >> 48) & 0xff) != KVX_ALL_TENSORS) {
    return KVX_BAD_RANGE;
  }
  kvx_u32 place =
      *((const KVX_TABLE kvx_u32 *)queue.words + ((kvx_u64)block.expected + block.remote));
  if (place == 0) {
    return KVX_BAD_RIGHTS;
  }
  note = queue.slots + ((kvx_u64)block.notes + place - 1) * 4;
  return KVX_OK;
}

// Keeps a put that was refused, if it is the first: by one thread.
KVX_FN void kvx_link_refuse(const kvx_queue &queue, const kvx_move &move, kvx_u32 op,
                            kvx_u32 status) {
  if (queue.words == 0 || kvx_swap_device_u64(queue.report, KVX_OK, status) != KVX_OK) {
    return;
  }
  // Until the kernel has ended they are nobody else's.
  KVX_GLOBAL kvx_link_refused *kept = (KVX_GLOBAL kvx_link_refused *)queue.report;
  kept->local = move.local;
  kept->remote = move.remote;
  kept->len = move.len;
  kept->flags = move.flags;
  kept->op = op;
}

// Before the first byte of a block: what it holds from now on is not what was put before.
KVX_FN void kvx_link_begin(kvx_u64 note) {
  if (note != 0) {
    kvx_store_system_u32(note, KVX_NOTE_BEGUN);
  }
}

// And behind the last, unless it was stopped before.
KVX_FN void kvx_link_end(kvx_u64 note, const kvx_block &block, kvx_u32 stopped) {
  if (note != 0 && stopped == 0) {
    kvx_store_system_u32(note, KVX_NOTE_PUT + block.local);
  }
}

// By one thread. Slow: a wave is as many times faster as it has lanes.
KVX_FN kvx_u32 kvx_link_thread(const kvx_queue &queue, const kvx_move &move, kvx_u32 op) {
  kvx_block block;
  kvx_u32 stop = kvx_load_system_u32(queue.abort);
  kvx_u64 note;
  kvx_u32 status = kvx_link_find(queue, move, op, block, note);
  if (status == KVX_OK) {
    kvx_link_begin(note);
    status = kvx_link_share<kvx_by_one>(queue, block, stop, 0, 1);
    kvx_link_end(note, block, status);
    kvx_fence_release();
  } else {
    kvx_link_refuse(queue, move, op, status);
  }
  return status;
}

// By all lanes of a wave.
KVX_FN kvx_u32 kvx_link_wave(const kvx_queue &queue, const kvx_move &move, kvx_u32 op) {
  kvx_block block;
  kvx_wave_barrier();
  kvx_u32 stop = kvx_load_system_u32(queue.abort);
  kvx_u64 note;
  kvx_u32 status = kvx_link_find(queue, move, op, block, note);
  if (status == KVX_OK) {
    // All lanes store the same word.
    kvx_link_begin(note);
    status = kvx_link_share<kvx_by_lanes>(queue, block, stop, 0, 1);
    kvx_wave_barrier();
    kvx_link_end(note, block, status);
    kvx_fence_release();
  } else {
    KVX_LANES(lane) {
      if (lane == 0) {
        kvx_link_refuse(queue, move, op, status);
      }
    }
  }
  return status;
}

// By all threads of a workgroup, whose size is a multiple of the warp's.
KVX_FN kvx_u32 kvx_link_block(const kvx_queue &queue, const kvx_move &move, kvx_u32 op) {
#ifdef KVX_HOST
  // So many warps, one after the other.
  const kvx_u32 warps = 5;
  kvx_block block;
  kvx_u32 stop = kvx_load_system_u32(queue.abort);
  kvx_u64 note;
  kvx_u32 status = kvx_link_find(queue, move, op, block, note);
  if (status != KVX_OK) {
    kvx_link_refuse(queue, move, op, status);
    return status;
  }
  kvx_link_begin(note);
  for (kvx_u32 own = 0; own < warps && status == KVX_OK; ++own) {
    status = kvx_link_share<kvx_by_lanes>(queue, block, stop, own, warps);
  }
  kvx_link_end(note, block, status);
  kvx_fence_release();
  return status;
#else
  static KVX_SHARED kvx_u32 stopped;
  if (kvx_thread() == 0) {
    stopped = 0;
  }
  // What any of them has written of the block is there for all.
  kvx_drain();
  kvx_barrier();
  kvx_block block;
  kvx_u32 stop = kvx_load_system_u32(queue.abort);
  kvx_u64 note;
  kvx_u32 status = kvx_link_find(queue, move, op, block, note);
  kvx_u32 leads = kvx_thread() == 0;
  if (status == KVX_OK) {
    if (leads) {
      kvx_link_begin(note);
    }
    kvx_u32 own = kvx_uniform(kvx_thread() / KVX_WARP);
    kvx_u32 warps = kvx_threads() / KVX_WARP;
    if (kvx_link_share<kvx_by_lanes>(queue, block, stop, own, warps) != KVX_OK) {
      stopped = 1;
    }
    kvx_drain();
    kvx_barrier();
    status = stopped != 0 ? KVX_STOPPED : KVX_OK;
    if (leads) {
      kvx_link_end(note, block, status);
    }
  } else if (leads) {
    kvx_link_refuse(queue, move, op, status);
  }
  // One for all of them: they have their caches in common. A refusal comes by here too, for the sake of that
  // order.
  if (__builtin_expect(leads, 1)) {
    kvx_fence_release();
  }
  // Nobody goes on before it, nor begins the next one.
  kvx_barrier();
  return status;
#endif
}

#endif
