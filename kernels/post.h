// Transfers that kernels start: put, get, wait. For an engine's own kernels to include; one source for
// AMD, NVIDIA and the host.
//
//   kvx_u32 kvx_put(queue, move, &ticket)       this side's bytes into the peer's memory
//   kvx_u32 kvx_get(queue, move, &ticket)       the peer's bytes into this side's
//   kvx_u32 kvx_put_imm(queue, move, &ticket)   a put that completes a receive of the peer with move.imm
//   kvx_u32 kvx_wait(queue, ticket)             until that one has ended
//   kvx_u32 kvx_quiet(queue)                    until all that was posted before has ended; the
//                                               queue's first failure, if it has had one
//
// A move is by addresses and keys, or by places on both sides: a block of a layer, all of it or one
// tensor's. What pieces that is in, the host knows of a proxy's post, and the queue's table of others
// (regions.h); however many they are, the post has one ticket, whose end is that of all of them.
//
// They return a status (queue.h), and never without an end: a call is over within the queue's patience. What a post of
// WQEs waits for its turn is what it has not waited for room, and about a quarter of the patience at least.
// A put over GPU links has no clock: it lasts as long as its copies, or until the abort word is set.
// Plain names are for a thread that posts what is its own; lanes of a wave take turns, for lanes that
// wait for each other in lockstep would wait for ever. Names with _wave are called by all lanes of a wave, with
// the same arguments, and post once; what any lane wrote before is part of it. Names with _block are
// called by all threads of a workgroup in the same way. All of them get the same answer.
//
// Over GPU links a put copies the block there and then, and all who call it take part (links.h).
// On every other queue a post of KVX_OK has been handed over; whether it went well is what the wait says. What failed stays
// failed: the queue takes nothing more once its room is used up, what is under way is flushed, and a
// slot that has failed is never used again. So a wait that comes after its slot has been used again knows
// that all went well.
#ifndef KVX_POST_H
#define KVX_POST_H

#include "device.h"
#include "links.h"
#include "mlx5.h"
#include "queue.h"
#include "regions.h"

// Faults planted on purpose, and looks into the order of stores, are for tests alone (planted.hip).
#ifndef KVX_PLANTED
#define KVX_PLANTED(which) 0
#define KVX_TRAP(queue, what, value) ((void)0)
#define KVX_NOW(queue) ((void)(queue), kvx_clock())
#endif
#define KVX_PHASE_FIRST 1u         // the phase before the rest of the descriptor
#define KVX_RECORD_LATE 2u         // the record after the doorbell
#define KVX_BELL_FROM_SLOT 3u      // the doorbell out of the slot
#define KVX_NO_CQ_RECORD 4u        // completions are read and not given back
#define KVX_WQE_LATE 5u            // the WQE after the record that tells of it
#define KVX_NO_TURN 6u             // rings though those before have not
#define KVX_TOLD_FIRST 7u          // of several WQEs the first tells of its end
#define KVX_READY_EARLY 8u         // ready to be rung for before the WQEs are written
#define KVX_READY_STALE 9u         // who rings takes words of the lap before for good ones
#define KVX_BELL_OWN 10u           // who rings for others rings with its own doorbell
#define KVX_PATIENCE_TWICE 11u     // a post that has waited for room has a patience of its own for its turn
#define KVX_TRAP_PHASE 1u
#define KVX_TRAP_RECORD 2u
#define KVX_TRAP_BELL 3u
#define KVX_TRAP_READY 4u

#define KVX_STATE(queue, field) ((queue).state + __builtin_offsetof(kvx_queue_state, field))
#define KVX_REPORT(queue, field) ((queue).report + __builtin_offsetof(kvx_queue_report, field))

// One call's waiting.
struct kvx_vigil {
  kvx_u64 since;
  kvx_u32 looks;
};

KVX_FN kvx_vigil kvx_vigil_begin(const kvx_queue &queue) {
  kvx_vigil vigil = {KVX_NOW(queue), 0};
  return vigil;
}

// A pause; or the reason to give up, after so many ticks since the call began.
KVX_FN kvx_u32 kvx_vigil_go_on(const kvx_queue &queue, kvx_vigil &vigil, kvx_u64 patience) {
  if (kvx_load_system_u32(queue.abort) != 0) {
    return KVX_STOPPED;
  }
  if (KVX_NOW(queue) - vigil.since > patience) {
    return KVX_TIMEOUT;
  }
  kvx_relax(vigil.looks++);
  return KVX_OK;
}

KVX_FN kvx_u32 kvx_power_of_two(kvx_u32 n) { return n != 0 && (n & (n - 1)) == 0; }

KVX_FN kvx_u32 kvx_queue_check(const kvx_queue &queue) {
  kvx_u32 good = kvx_power_of_two(queue.depth);
  if (queue.kind == KVX_GPU_WQE || queue.kind == KVX_DIRECT) {
    // What is outstanding must fit half of a 16-bit counter, and the completion queue.
    good = good && queue.depth <= 1u << 15 && kvx_power_of_two(queue.cq_depth) &&
           queue.cq_depth >= queue.depth && queue.words != 0;
  } else if (queue.kind == KVX_LINKS) {
    good = queue.regions != 0;
  } else if (queue.kind != KVX_PROXY) {
    good = 0;
  }
  return good ? KVX_OK : KVX_BAD_QUEUE;
}

// Keeps the failure of the lowest ticket: what comes before it went well. A poster whose turn does not come fails while
// those before it are under way, and one of them may fail yet.
KVX_FN void kvx_fail(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 status) {
  kvx_u64 fault = (ticket + 1) << 8 | status;
  kvx_u64 known = 0;
#pragma nounroll
  for (;;) {
    kvx_u64 found = kvx_swap_device_u64(KVX_REPORT(queue, fault), known, fault);
    if (found == known || found >> 8 <= ticket + 1) {
      break;
    }
    known = found;
  }
  kvx_store_device_u64(KVX_STATE(queue, broken), 1);
}

// Reads what completions there are, unless somebody else does.
KVX_FN void kvx_nic_reap(const kvx_queue &queue) {
  if (kvx_load_device_u64(KVX_STATE(queue, polling)) != 0 ||
      kvx_swap_device_u64(KVX_STATE(queue, polling), 0, 1) != 0) {
    return;
  }
  kvx_u64 first = kvx_load_device_u64(KVX_STATE(queue, taken));
  kvx_u64 ended = kvx_load_device_u64(KVX_REPORT(queue, ended));
  kvx_u64 taken = first;
  kvx_u32 more = 1;
#pragma nounroll
  for (kvx_u32 i = 0; i < queue.cq_depth && more; i += 4) {
    // Four at once: each is a way to the host and back.
    kvx_u64 word = kvx_nic_peek(queue, taken), second = kvx_nic_peek(queue, taken + 1);
    kvx_u64 third = kvx_nic_peek(queue, taken + 2), fourth = kvx_nic_peek(queue, taken + 3);
#pragma nounroll
    for (kvx_u32 k = 0; k < 4 && more; ++k) {
      kvx_nic_end end = kvx_nic_poll(queue, taken, word);
      if (!end.there) {
        more = 0;
        break;
      }
      ++taken;
      // The counter made whole: it must name what is under way.
      kvx_u64 ahead = (end.counter - (kvx_u32)ended) & 0xffff;
      if (ahead >= kvx_load_device_u64(KVX_STATE(queue, next)) - ended) {
        kvx_fail(queue, ended, KVX_MALFORMED);
        more = 0;
        break;
      }
      if (end.status != KVX_OK) {
        kvx_fail(queue, ended + ahead, end.status);
      }
      ended += ahead + 1;
      word = second;
      second = third;
      third = fourth;
    }
  }
  if (taken != first) {
    // The device may write there again once it is told; so first all has been read.
    kvx_fence_acquire();
    if (!KVX_PLANTED(KVX_NO_CQ_RECORD)) {
      kvx_store_system_u32(queue.cq_record, kvx_nic_cq_record(taken));
    }
    kvx_store_device_u64(KVX_STATE(queue, taken), taken);
    kvx_store_device_u64(KVX_REPORT(queue, ended), ended);
  }
  kvx_store_device_u64(KVX_STATE(queue, polling), 0);
}

// Looks how far operations have ended. It fails where one has failed: `seen` stays before it, so that
// its slot is not used again.
KVX_FN kvx_u32 kvx_look(const kvx_queue &queue) {
  kvx_u64 ended;
  if (queue.kind == KVX_PROXY) {
    // The fault is stored before what makes it seen.
    ended = kvx_load_acquire_u64(KVX_REPORT(queue, ended));
    if (kvx_load_system_u64(KVX_REPORT(queue, fault)) != 0) {
      kvx_store_device_u64(KVX_STATE(queue, broken), 1);
      return KVX_BROKEN;
    }
  } else {
    kvx_nic_reap(queue);
    ended = kvx_load_device_u64(KVX_REPORT(queue, ended));
    if (kvx_load_device_u64(KVX_REPORT(queue, fault)) != 0) {
      return KVX_BROKEN;
    }
  }
  kvx_u64 seen = kvx_load_device_u64(KVX_STATE(queue, seen));
  while (seen < ended) {
    kvx_u64 found = kvx_swap_device_u64(KVX_STATE(queue, seen), seen, ended);
    if (found == seen) {
      break;
    }
    seen = found;
  }
  return KVX_OK;
}

// Swaps that are tried one right after the other, before somebody looks whether to go on.
#define KVX_RESERVE_TRIES 8u

// So many numbers in a row, from `first`, whose slots are free: without them nothing has changed. So a
// queue that is full for too long has none that nobody posts.
KVX_FN kvx_u32 kvx_reserve(const kvx_queue &queue, kvx_vigil &vigil, kvx_u32 count, kvx_u64 &first) {
  for (;;) {
    if (kvx_load_device_u64(KVX_STATE(queue, broken)) != 0) {
      return KVX_BROKEN;
    }
    // Before `next`, so that there is room at least for what it says.
    kvx_u64 seen = kvx_load_device_u64(KVX_STATE(queue, seen));
    kvx_u64 next = kvx_load_device_u64(KVX_STATE(queue, next));
    if (next + count - seen <= queue.depth) {
      // Where somebody else was quicker, the swap finds out, and how far they are.
#pragma nounroll
      for (kvx_u32 i = 0; i < KVX_RESERVE_TRIES && next + count - seen <= queue.depth; ++i) {
        kvx_u64 found = kvx_swap_device_u64(KVX_STATE(queue, next), next, next + count);
        if (found == next) {
          first = next;
          return KVX_OK;
        }
        next = found;
      }
    } else {
      kvx_u32 status = kvx_look(queue);
      if (status != KVX_OK) {
        return status;
      }
      if (next + count - kvx_load_device_u64(KVX_STATE(queue, seen)) <= queue.depth) {
        continue;
      }
    }
    // Who has a number and no time left for its turn fails the queue: so a part is kept for that.
    kvx_u64 kept = queue.kind == KVX_PROXY ? 0 : queue.patience / 4;
    kvx_u32 status = kvx_vigil_go_on(queue, vigil, queue.patience - kept);
    if (status != KVX_OK) {
      return status;
    }
  }
}

// Puts a descriptor into its slot.
KVX_FN void kvx_ring_write(const kvx_queue &queue, kvx_u64 ticket, const kvx_move &move,
                           kvx_u32 op) {
  kvx_u64 at = queue.slots + (ticket & (queue.depth - 1)) * sizeof(kvx_desc);
  kvx_u64 last = (kvx_u64)KVX_PHASE(ticket, queue.depth) << 56 | (kvx_u64)move.flags << 8 | op;
  kvx_u64 last_at = at + __builtin_offsetof(kvx_desc, op);
  if (KVX_PLANTED(KVX_PHASE_FIRST)) {
    kvx_store_release_u64(last_at, last);
    KVX_TRAP(queue, KVX_TRAP_PHASE, ticket);
  }
  KVX_GLOBAL kvx_v4 *to = (KVX_GLOBAL kvx_v4 *)at;
  kvx_v4 places = {(kvx_u32)move.local, (kvx_u32)(move.local >> 32), (kvx_u32)move.remote,
                   (kvx_u32)(move.remote >> 32)};
  kvx_v4 span = {(kvx_u32)move.len, (kvx_u32)(move.len >> 32), move.lkey, move.rkey};
  kvx_v4 number = {(kvx_u32)ticket, (kvx_u32)(ticket >> 32), 0, 0};
  to[0] = places;
  to[1] = span;
  to[2] = number;
  *(KVX_GLOBAL kvx_u64 *)(at + __builtin_offsetof(kvx_desc, imm)) = move.imm;
  if (!KVX_PLANTED(KVX_PHASE_FIRST)) {
    kvx_store_release_u64(last_at, last);
    KVX_TRAP(queue, KVX_TRAP_PHASE, ticket);
  }
}

// The WQEs of a post: what it moves, or the pieces that it is in.
struct kvx_train {
  kvx_u64 first;
  kvx_u64 next;        // behind the last
  kvx_move last;       // what the last one moves
};

// Puts a WQE for each piece into its slot. Only the last one tells of its end: those of a queue pair
// end in their order.
KVX_FN void kvx_nic_fill(const kvx_queue &queue, const kvx_move &move, const kvx_block &block,
                         kvx_u32 op, kvx_train &train) {
#pragma nounroll
  for (kvx_u64 n = train.first; n != train.next; ++n) {
    kvx_u32 ends = n + 1 == train.next;
    kvx_u32 told = KVX_PLANTED(KVX_TOLD_FIRST) ? n == train.first : ends;
    if (block.pieces != 0) {
      train.last = kvx_piece_of(block, (kvx_u32)(n - train.first), move.imm);
    }
    kvx_u64 at = queue.slots + (n & (queue.depth - 1)) * 64;
    kvx_u32 this_op = ends || op == KVX_GET ? op : KVX_PUT;
    kvx_nic_write(queue, at, n, train.last, this_op, told);
  }
}

KVX_FN kvx_u64 kvx_ready_at(const kvx_queue &queue, kvx_u64 n) {
  return queue.words + (n & (queue.depth - 1)) * 8;
}

// Tells whoever rings that this post may be told of. Right behind the release of its WQEs.
KVX_FN void kvx_nic_ready(const kvx_queue &queue, const kvx_train &train, kvx_u64 ready) {
  kvx_store_bare_u64(kvx_ready_at(queue, train.first), ready);
  KVX_TRAP(queue, KVX_TRAP_READY, train.first);
}

// How far somebody rings for others: so many times four slots, which is so many posts at least.
#define KVX_RING_LOOKS 16u

// Rings once, for the post that left `ready` and for all behind it that are ready too, as far as it looks.
// By the one whose turn it is; then it is that of the first for which it has not rung.
KVX_FN void kvx_nic_ring(const kvx_queue &queue, kvx_u64 ready) {
  kvx_u64 own = KVX_READY_NEXT(ready), end = own;
#pragma nounroll
  for (kvx_u32 i = 0; i < KVX_RING_LOOKS; ++i) {
    kvx_u64 from = end;
    kvx_u64 word = kvx_load_bare_u64(kvx_ready_at(queue, from));
    kvx_u64 second = kvx_load_bare_u64(kvx_ready_at(queue, from + 1));
    kvx_u64 third = kvx_load_bare_u64(kvx_ready_at(queue, from + 2));
    kvx_u64 fourth = kvx_load_bare_u64(kvx_ready_at(queue, from + 3));
#pragma nounroll
    for (kvx_u64 n = from; n != from + 4; ++n) {
      // The next post begins here, and is of this lap.
      kvx_u32 good = KVX_PLANTED(KVX_READY_STALE) ? word != 0 : KVX_READY_NEXT(word) > end;
      if (n == end && good) {
        ready = KVX_PLANTED(KVX_BELL_OWN) ? ready : word;
        end = KVX_READY_NEXT(word);
      }
      word = second;
      second = third;
      third = fourth;
    }
    if (end - from < 4) {
      break;
    }
  }
  if (end != own) {
    kvx_fence_device();
  }
  if (!KVX_PLANTED(KVX_RECORD_LATE)) {
    kvx_store_system_u32(queue.record, kvx_nic_record(end));
    KVX_TRAP(queue, KVX_TRAP_RECORD, end);
  }
  kvx_u64 bell = kvx_nic_bell(queue, KVX_READY_NEXT(ready) - 1, KVX_READY_SAYS(ready));
  if (KVX_PLANTED(KVX_BELL_FROM_SLOT)) {
    bell = kvx_load_system_u64(queue.slots + ((end - 1) & (queue.depth - 1)) * 64);
  }
  kvx_store_release_u64(queue.bell, bell);
  KVX_TRAP(queue, KVX_TRAP_BELL, bell);
  if (KVX_PLANTED(KVX_RECORD_LATE)) {
    kvx_store_system_u32(queue.record, kvx_nic_record(end));
  }
  kvx_store_device_u64(KVX_STATE(queue, rung), end);
}

// Writes the WQEs of a post from number `first`, and has the device told of them when it has been told of
// all before them: by this thread, or by one that rings for several.
KVX_FN kvx_u32 kvx_nic_post(const kvx_queue &queue, kvx_vigil &vigil, kvx_u64 first,
                            const kvx_move &move, const kvx_block &block, kvx_u32 op) {
  kvx_train train = {first, first + block.count, move};
  if (KVX_PLANTED(KVX_READY_EARLY)) {
    kvx_nic_ready(queue, train, KVX_READY(train.next, kvx_nic_says(move, op)));
  }
  if (!KVX_PLANTED(KVX_WQE_LATE)) {
    kvx_nic_fill(queue, move, block, op, train);
  }
  // All that was written is there when this is over, and not only before what this thread writes next:
  // another one tells of it.
  kvx_fence_release();
  kvx_u64 ready = KVX_READY(train.next, kvx_nic_says(train.last, op));
  if (!KVX_PLANTED(KVX_READY_EARLY)) {
    kvx_nic_ready(queue, train, ready);
  }
  if (KVX_PLANTED(KVX_PATIENCE_TWICE)) {
    vigil = kvx_vigil_begin(queue);
  }
  kvx_u64 rung = first;
  while (!KVX_PLANTED(KVX_NO_TURN) && (rung = kvx_load_device_u64(KVX_STATE(queue, rung))) < first) {
    kvx_u32 status = kvx_vigil_go_on(queue, vigil, queue.patience);
    if (status != KVX_OK) {
      // Its turn never came, so nobody's after it will. Who is late has nothing to ring for any more,
      // unless it has just looked; and then it may have rung.
      kvx_swap_device_u64(kvx_ready_at(queue, first), ready, 0);
      if (kvx_load_device_u64(KVX_STATE(queue, rung)) > first) {
        return KVX_OK;
      }
      kvx_fail(queue, first, status);
      return status;
    }
  }
  if (rung == first) {
    kvx_nic_ring(queue, ready);
    if (KVX_PLANTED(KVX_WQE_LATE)) {
      kvx_nic_fill(queue, move, block, op, train);
    }
  }
  return KVX_OK;
}

// Whether a queue of WQEs can do it, and in how many; `block` is what places were found to be.
KVX_FN kvx_u32 kvx_nic_plan(const kvx_queue &queue, const kvx_move &move, kvx_block &block) {
  if (move.flags == 0) {
    block.count = 1;
    return kvx_nic_can(move);
  }
  kvx_u32 status = kvx_find(queue, move, block);
  if (status == KVX_OK && (block.count > KVX_MOST_PIECES || block.count > queue.depth)) {
    return KVX_BAD_LENGTH;
  }
  return status;
}

// By one thread, for which no other of its wave waits.
KVX_FN kvx_u32 kvx_post_one(const kvx_queue &queue, const kvx_move &move, kvx_u32 op,
                            kvx_u64 &ticket) {
  kvx_u32 status = kvx_queue_check(queue);
  if (status != KVX_OK) {
    return status;
  }
  if (queue.kind == KVX_PROXY) {
    if (move.flags > (KVX_LOCAL_PLACE | KVX_REMOTE_PLACE)) {
      return KVX_BAD_OP;
    }
    kvx_vigil vigil = kvx_vigil_begin(queue);
    status = kvx_reserve(queue, vigil, 1, ticket);
    if (status == KVX_OK) {
      kvx_ring_write(queue, ticket, move, op);
    }
    return status;
  }
  kvx_block block = {0, 0, 0, 0, 0, 0};
  status = kvx_nic_plan(queue, move, block);
  if (status != KVX_OK) {
    return status;
  }
  // All of the post's waiting: for room, and for its turn.
  kvx_vigil vigil = kvx_vigil_begin(queue);
  kvx_u64 first;
  status = kvx_reserve(queue, vigil, block.count, first);
  if (status != KVX_OK) {
    return status;
  }
  ticket = KVX_TICKET(first + block.count - 1, block.count - 1);
  return kvx_nic_post(queue, vigil, first, move, block, op);
}

// How one ticket has ended; `over` says whether it has.
KVX_FN kvx_u32 kvx_ended(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 &over) {
  if (queue.kind == KVX_PROXY) {
    kvx_u64 word = kvx_load_system_u64(queue.words + (ticket & (queue.depth - 1)) * 8);
    over = word >> 8 > ticket;
    // Where the slot has been used again, all was well.
    return word >> 8 == ticket + 1 ? (kvx_u32)word & 0xff : KVX_OK;
  }
  kvx_u64 last = KVX_TICKET_LAST(ticket);
  over = kvx_load_device_u64(KVX_REPORT(queue, ended)) > last;
  kvx_u64 fault = kvx_load_device_u64(KVX_REPORT(queue, fault));
  // After a completion that makes no sense nobody knows of any more.
  over = over || (fault & 0xff) == KVX_MALFORMED;
  if (fault == 0 || last + 1 < fault >> 8) {
    return KVX_OK;
  }
  // Any of its pieces.
  return KVX_TICKET_FIRST(ticket) + 1 <= fault >> 8 ? (kvx_u32)fault & 0xff : KVX_FLUSHED;
}

// How all below a ticket have ended; `over` says whether they have.
KVX_FN kvx_u32 kvx_all_ended(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 &over) {
  if (queue.kind == KVX_PROXY) {
    over = kvx_load_acquire_u64(KVX_REPORT(queue, ended)) >= ticket;
    return (kvx_u32)kvx_load_system_u64(KVX_REPORT(queue, fault)) & 0xff;
  }
  over = kvx_load_device_u64(KVX_REPORT(queue, ended)) >= ticket;
  kvx_u32 fault = (kvx_u32)kvx_load_device_u64(KVX_REPORT(queue, fault)) & 0xff;
  over = over || fault == KVX_MALFORMED;
  return fault;
}

// Waits, by one thread: for a ticket, or for all that have been posted. After KVX_OK what was got is
// there to be read.
KVX_FN kvx_u32 kvx_await_one(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 all) {
  kvx_u32 status = kvx_queue_check(queue);
  if (status != KVX_OK) {
    return status;
  }
  if (queue.kind == KVX_LINKS) {
    // A put has ended when it returns.
    return KVX_OK;
  }
  if (all) {
    ticket = kvx_load_device_u64(KVX_STATE(queue, next));
  }
  kvx_vigil vigil = kvx_vigil_begin(queue);
  for (;;) {
    if (queue.kind != KVX_PROXY) {
      kvx_nic_reap(queue);
    }
    kvx_u32 over;
    status = all ? kvx_all_ended(queue, ticket, over) : kvx_ended(queue, ticket, over);
    if (over) {
      kvx_fence_acquire();
      return status;
    }
    status = kvx_vigil_go_on(queue, vigil, queue.patience);
    if (status != KVX_OK) {
      return status;
    }
  }
}

// Runs `body` for each lane that is here, one lane after the other where lanes step together.
#ifdef KVX_AMD
#define KVX_BY_TURNS(body)                                        \
  do {                                                            \
    kvx_u32 kvx_mine = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)); \
    kvx_u32 kvx_left = 1;                                         \
    do {                                                          \
      if (kvx_mine == (kvx_u32)__builtin_amdgcn_readfirstlane(kvx_mine)) { \
        body;                                                     \
        kvx_left = 0;                                             \
      }                                                           \
      /* Or the compiler would gather the lanes behind the loop, and run `body` for all at once. */ \
      asm volatile("" : "+v"(kvx_left));                          \
    } while (kvx_left != 0);                                      \
  } while (0)
#else
#define KVX_BY_TURNS(body) \
  do {                     \
    body;                  \
  } while (0)
#endif

KVX_FN kvx_u32 kvx_post_thread(const kvx_queue &queue, const kvx_move &move, kvx_u32 op,
                               kvx_u64 &ticket) {
  if (queue.kind == KVX_LINKS) {
    ticket = 0;
    return kvx_link_thread(queue, move, op);
  }
  kvx_u32 status = KVX_OK;
  KVX_BY_TURNS(status = kvx_post_one(queue, move, op, ticket));
  return status;
}

KVX_FN kvx_u32 kvx_await_thread(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 all) {
  kvx_u32 status = KVX_OK;
  KVX_BY_TURNS(status = kvx_await_one(queue, ticket, all));
  return status;
}

KVX_FN kvx_u32 kvx_wait(const kvx_queue &queue, kvx_u64 ticket) {
  return kvx_await_thread(queue, ticket, 0);
}

KVX_FN kvx_u32 kvx_quiet(const kvx_queue &queue) { return kvx_await_thread(queue, 0, 1); }

KVX_FN kvx_u32 kvx_put(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_thread(queue, move, KVX_PUT, ticket);
}

KVX_FN kvx_u32 kvx_get(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_thread(queue, move, KVX_GET, ticket);
}

KVX_FN kvx_u32 kvx_put_imm(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_thread(queue, move, KVX_PUT_IMM, ticket);
}

// A wave's lane that speaks for it.
KVX_FN kvx_u32 kvx_leads_wave() {
#ifdef KVX_HOST
  return 1;
#else
  return kvx_thread() % KVX_WARP == 0;
#endif
}

KVX_FN kvx_u32 kvx_post_wave(const kvx_queue &queue, const kvx_move &move, kvx_u32 op,
                             kvx_u64 &ticket) {
  if (queue.kind == KVX_LINKS) {
    ticket = 0;
    return kvx_link_wave(queue, move, op);
  }
  kvx_u32 status = KVX_OK;
  kvx_u64 mine = 0;
  // What other lanes have written comes before the leader's release.
  kvx_wave_barrier();
  if (kvx_leads_wave()) {
    status = kvx_post_one(queue, move, op, mine);
  }
  ticket = kvx_uniform_u64(mine);
  return kvx_uniform(status);
}

KVX_FN kvx_u32 kvx_put_wave(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_wave(queue, move, KVX_PUT, ticket);
}

KVX_FN kvx_u32 kvx_get_wave(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_wave(queue, move, KVX_GET, ticket);
}

KVX_FN kvx_u32 kvx_put_imm_wave(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_wave(queue, move, KVX_PUT_IMM, ticket);
}

KVX_FN kvx_u32 kvx_await_wave(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 all) {
  kvx_u32 status = KVX_OK;
  if (kvx_leads_wave()) {
    status = kvx_await_one(queue, ticket, all);
  }
  kvx_wave_barrier();
  return kvx_uniform(status);
}

KVX_FN kvx_u32 kvx_wait_wave(const kvx_queue &queue, kvx_u64 ticket) {
  return kvx_await_wave(queue, ticket, 0);
}

KVX_FN kvx_u32 kvx_quiet_wave(const kvx_queue &queue) { return kvx_await_wave(queue, 0, 1); }

// Thread 0's answer, in all threads of the workgroup.
KVX_FN kvx_u32 kvx_same_answer(kvx_u32 status, kvx_u64 &ticket) {
#ifndef KVX_HOST
  static KVX_SHARED kvx_u64 same[2];
  if (kvx_thread() == 0) {
    same[0] = status;
    same[1] = ticket;
  }
  kvx_barrier();
  status = (kvx_u32)same[0];
  ticket = same[1];
  // Before the next answer.
  kvx_barrier();
#else
  (void)ticket;
#endif
  return status;
}

KVX_FN kvx_u32 kvx_leads_block() {
#ifdef KVX_HOST
  return 1;
#else
  return kvx_thread() == 0;
#endif
}

KVX_FN kvx_u32 kvx_post_block(const kvx_queue &queue, const kvx_move &move, kvx_u32 op,
                              kvx_u64 &ticket) {
  if (queue.kind == KVX_LINKS) {
    ticket = 0;
    return kvx_link_block(queue, move, op);
  }
  kvx_u32 status = KVX_OK;
  kvx_u64 mine = 0;
  kvx_drain();
  kvx_barrier();
  if (kvx_leads_block()) {
    status = kvx_post_one(queue, move, op, mine);
  }
  status = kvx_same_answer(status, mine);
  ticket = mine;
  return status;
}

KVX_FN kvx_u32 kvx_put_block(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_block(queue, move, KVX_PUT, ticket);
}

KVX_FN kvx_u32 kvx_get_block(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_block(queue, move, KVX_GET, ticket);
}

KVX_FN kvx_u32 kvx_put_imm_block(const kvx_queue &queue, const kvx_move &move, kvx_u64 &ticket) {
  return kvx_post_block(queue, move, KVX_PUT_IMM, ticket);
}

KVX_FN kvx_u32 kvx_await_block(const kvx_queue &queue, kvx_u64 ticket, kvx_u32 all) {
  kvx_u32 status = KVX_OK;
  if (kvx_leads_block()) {
    status = kvx_await_one(queue, ticket, all);
  }
  kvx_u64 none = 0;
  return kvx_same_answer(status, none);
}

KVX_FN kvx_u32 kvx_wait_block(const kvx_queue &queue, kvx_u64 ticket) {
  return kvx_await_block(queue, ticket, 0);
}

KVX_FN kvx_u32 kvx_quiet_block(const kvx_queue &queue) { return kvx_await_block(queue, 0, 1); }

#endif
