// Scattered blocks from one address space to another, one launch for a whole transfer.
//
// The grid's warps share the chunks of each section: warp w takes chunk w, w + warps, w + 2 warps
// and so on, in the order tensor, pair, piece, chunk. So the whole grid is in the same tensor at a time,
// a warp needs no other warp, and a few workgroups can keep a link busy: each lane has eight loads of
// 16 bytes under way.
#include "copy.h"
#include "device.h"

// Which chunk comes next, as digits. Adding the grid's warps is adding their digits, with carries:
// no division for each chunk.
struct kvx_cursor {
  kvx_u32 chunk;
  kvx_u32 piece;
  kvx_u32 pair;
  kvx_u32 tensor;
};

struct kvx_radices {
  kvx_u32 chunks;
  kvx_u32 pieces;
  kvx_u32 pairs;
};

KVX_FN kvx_cursor kvx_digits(kvx_u32 n, const kvx_radices &of) {
  kvx_cursor at;
  at.chunk = n % of.chunks;
  n /= of.chunks;
  at.piece = n % of.pieces;
  n /= of.pieces;
  at.pair = n % of.pairs;
  at.tensor = n / of.pairs;
  return at;
}

// One digit of a sum; the carry goes in and out. Both digits are below `radix`, which is below 2^31.
KVX_FN kvx_u32 kvx_add_digit(kvx_u32 a, kvx_u32 b, kvx_u32 radix, kvx_u32 &carry) {
  kvx_u32 sum = a + b + carry;
  carry = sum >= radix;
  return carry ? sum - radix : sum;
}

KVX_FN void kvx_advance(kvx_cursor &at, const kvx_cursor &step, const kvx_radices &of) {
  kvx_u32 carry = 0;
  at.chunk = kvx_add_digit(at.chunk, step.chunk, of.chunks, carry);
  at.piece = kvx_add_digit(at.piece, step.piece, of.pieces, carry);
  at.pair = kvx_add_digit(at.pair, step.pair, of.pairs, carry);
  at.tensor += step.tensor + carry;
}

KVX_FN kvx_span kvx_span_at(const KVX_TABLE kvx_section *section, const kvx_cursor &at) {
  const KVX_TABLE kvx_tensor *tensor = (const KVX_TABLE kvx_tensor *)section->tensors + at.tensor;
  const KVX_TABLE kvx_pair *pair = (const KVX_TABLE kvx_pair *)section->pairs + at.pair;
  const KVX_TABLE kvx_piece *piece = (const KVX_TABLE kvx_piece *)section->pieces + at.piece;
  kvx_u64 skip = (kvx_u64)at.chunk * section->chunk;
  kvx_span span;
  span.src = tensor->src + pair->src * section->src_stride + piece->src + skip;
  span.dst = tensor->dst + pair->dst * section->dst_stride + piece->dst + skip;
  // Chunks are counted for the longest piece; a shorter one has none at the end.
  kvx_u64 left = piece->len > skip ? piece->len - skip : 0;
  span.len = left < section->chunk ? (kvx_u32)left : section->chunk;
  return span;
}

// What a warp has done.
struct kvx_work {
  kvx_u64 bytes;
  kvx_u32 aborted;
};

// All of a warp's share, unless it has been told to stop already.
KVX_FN kvx_work kvx_gather_warp(const kvx_gather_args &args, kvx_u32 warp, kvx_u32 warps,
                                kvx_u32 stop) {
  kvx_work work = {0, stop != 0};
  kvx_u32 unpolled = 0;
  for (kvx_u32 s = 0; s < args.sections_len && !work.aborted; ++s) {
    const KVX_TABLE kvx_section *section = (const KVX_TABLE kvx_section *)args.sections + s;
    kvx_radices of = {section->chunks, section->pieces_len, section->pairs_len};
    kvx_u32 tensors = section->tensors_len;
    if (of.chunks == 0 || of.pieces == 0 || of.pairs == 0) {
      continue;
    }
    kvx_u32 first = section->first % warps;
    kvx_cursor at = kvx_digits(warp >= first ? warp - first : warp + warps - first, of);
    if (at.tensor >= tensors) {
      continue;
    }
    kvx_cursor step = kvx_digits(warps, of);
    kvx_span next = kvx_span_at(section, at);
    for (;;) {
      kvx_span span = next;
      kvx_advance(at, step, of);
      kvx_u32 more = at.tensor < tensors;
      if (more) {
        // Where the next one lies is looked up while this one is on its way.
        next = kvx_span_at(section, at);
      }
      if (span.len != 0) {
        if (unpolled >= args.poll_bytes) {
          unpolled = 0;
          if (kvx_uniform(kvx_load_system_u32(args.abort)) != 0) {
            work.aborted = 1;
            break;
          }
        }
        KVX_LANES(lane) { kvx_copy(span, lane); }
        work.bytes += span.len;
        kvx_u32 sum = unpolled + span.len;
        unpolled = sum < unpolled ? ~0u : sum;
      }
      if (!more) {
        break;
      }
    }
  }
  return work;
}

// The workgroup's slot; the sequence comes last, so that who reads it finds the rest, and the blocks.
KVX_FN void kvx_gather_record(const kvx_gather_args &args, kvx_u32 group, const kvx_work &work,
                              kvx_u64 ticks) {
  kvx_u64 slot = args.slots + (kvx_u64)group * sizeof(kvx_gather_slot);
  KVX_GLOBAL kvx_gather_slot *to = (KVX_GLOBAL kvx_gather_slot *)slot;
  to->bytes = work.bytes;
  to->ticks = ticks;
  to->state = work.aborted ? KVX_ABORTED : KVX_WHOLE;
  to->unit = kvx_unit();
  kvx_store_release_u64(slot + __builtin_offsetof(kvx_gather_slot, sequence), args.sequence);
}

#ifndef KVX_HOST
KVX_KERNEL void kvx_gather(kvx_gather_args args) {
  static KVX_SHARED kvx_u64 bytes[KVX_MAX_THREADS / 32];
  static KVX_SHARED kvx_u32 aborted[KVX_MAX_THREADS / 32];
  kvx_u64 start = kvx_clock();
  kvx_u32 own = kvx_uniform(kvx_thread() / KVX_WARP);
  kvx_u32 warps = kvx_threads() / KVX_WARP;
  // A workgroup's waves share their caches: one acquires before and one releases after for all. (Not
  // all of them on gfx11, where the barrier itself sees to the ones that they have apart.)
  kvx_u32 stop = 0;
  if (__builtin_expect(own == 0, 1)) {
    stop = kvx_load_acquire_u32(args.abort);
  }
  stop = kvx_uniform(kvx_same_in_group(stop, kvx_thread()));
  kvx_work work = kvx_gather_warp(args, kvx_group() * warps + own, kvx_groups() * warps, stop);
  kvx_drain();
  if (kvx_thread() % KVX_WARP == 0) {
    bytes[own] = work.bytes;
    aborted[own] = work.aborted;
  }
  kvx_barrier();
  if (kvx_thread() == 0) {
#pragma nounroll
    for (kvx_u32 i = 1; i < warps; ++i) {
      work.bytes += bytes[i];
      work.aborted |= aborted[i];
    }
    kvx_gather_record(args, kvx_group(), work, kvx_clock() - start);
  }
}
#else
// Workgroups `first` to `end` of a grid of `groups`, one after the other in the calling thread.
KVX_KERNEL void kvx_gather_host(const kvx_gather_args *args, kvx_u32 first, kvx_u32 end,
                                kvx_u32 groups) {
  for (kvx_u32 group = first; group < end; ++group) {
    kvx_u64 start = kvx_clock();
    kvx_u32 stop = kvx_load_acquire_u32(args->abort);
    kvx_work work = kvx_gather_warp(*args, group, groups, stop);
    kvx_gather_record(*args, group, work, kvx_clock() - start);
  }
}
#endif
