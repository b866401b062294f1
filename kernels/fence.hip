// The fences around received data, and a check of it that only reads.
//
// Nothing here writes a block, nor reads one with an atomic: a read-modify-write could put a stale
// line back over what a network card wrote.
#include "device.h"

KVX_FN void kvx_fence_record(const kvx_fence_args &args, kvx_u32 group) {
  KVX_GLOBAL kvx_v4 *slot = (KVX_GLOBAL kvx_v4 *)(args.slots + (kvx_u64)group * sizeof(kvx_fence_slot));
  kvx_v4 value = {(kvx_u32)args.sequence, (kvx_u32)(args.sequence >> 32), kvx_unit(), 0};
  *slot = value;
}

// Bytes left..left+8 of a piece as a little-endian word; what lies behind its end is 0.
KVX_FN kvx_u64 kvx_word(kvx_u64 at, kvx_u64 left) {
  if (left >= 8 && at % 8 == 0) {
    return kvx_load_system_u64(at);
  }
  if (left >= 8 && at % 4 == 0) {
    kvx_u64 low = kvx_load_system_u32(at);
    kvx_u64 high = kvx_load_system_u32(at + 4);
    return low | high << 32;
  }
  kvx_u64 word = 0;
#pragma nounroll
  for (kvx_u32 i = 0; i < 8 && i < left; ++i) {
    word |= (kvx_u64)kvx_load_system_u8(at + i) << (8 * i);
  }
  return word;
}

// The part of a piece's sum that one of `threads` threads works out: its words, each mixed with its
// place, so that a word that has moved is found.
KVX_FN kvx_u64 kvx_piece_sum(kvx_u64 at, kvx_u64 len, kvx_u32 piece, kvx_u32 thread, kvx_u32 threads) {
  const kvx_u64 golden = 0x9e3779b97f4a7c15ull;
  kvx_u64 words = (len + 7) / 8;
  kvx_u64 place = ((kvx_u64)piece << 40) + 1;
  kvx_u64 sum = 0;
  kvx_u64 i = thread;
  if (at % 8 == 0) {
    // Four loads in flight.
#pragma nounroll
    for (; i + 3ull * threads < len / 8; i += 4ull * threads) {
      kvx_u64 word[4];
      for (kvx_u32 k = 0; k < 4; ++k) {
        word[k] = kvx_load_system_u64(at + 8 * (i + (kvx_u64)k * threads));
      }
      for (kvx_u32 k = 0; k < 4; ++k) {
        sum += kvx_mix(word[k] ^ golden * (place + i + (kvx_u64)k * threads));
      }
    }
  }
#pragma nounroll
  for (; i < words; i += threads) {
    sum += kvx_mix(kvx_word(at + 8 * i, len - 8 * i) ^ golden * (place + i));
  }
  return sum;
}

// The sum of what every thread of the workgroup has; thread 0 gets it. All threads call it.
KVX_FN kvx_u64 kvx_sum_of_group(kvx_u64 value, kvx_u32 thread, kvx_u32 threads) {
#ifdef KVX_HOST
  // A workgroup of one thread.
  (void)thread, (void)threads;
#else
  static KVX_SHARED kvx_u64 sums[KVX_MAX_THREADS];
  sums[thread] = value;
  for (kvx_u32 half = KVX_MAX_THREADS / 2; half > 0; half /= 2) {
    kvx_barrier();
    if (thread < half && thread + half < threads) {
      sums[thread] += sums[thread + half];
    }
  }
  value = sums[0];
  // Before anybody writes into it again.
  kvx_barrier();
#endif
  return value;
}

// One workgroup's share: a block of one tensor at a time.
KVX_FN void kvx_verify_group(const kvx_verify_args &args, kvx_u32 group, kvx_u32 groups,
                             kvx_u32 thread, kvx_u32 threads) {
  kvx_fence_acquire();
  kvx_u64 sums = args.sums;
  for (kvx_u32 s = 0; s < args.sections_len; ++s) {
    const KVX_TABLE kvx_section *section = (const KVX_TABLE kvx_section *)args.sections + s;
    const KVX_TABLE kvx_tensor *tensors = (const KVX_TABLE kvx_tensor *)section->tensors;
    const KVX_TABLE kvx_pair *pairs = (const KVX_TABLE kvx_pair *)section->pairs;
    const KVX_TABLE kvx_piece *pieces = (const KVX_TABLE kvx_piece *)section->pieces;
    kvx_u32 tensors_len = section->tensors_len;
    kvx_u32 pairs_len = section->pairs_len;
    kvx_u32 pieces_len = section->pieces_len;
    if (pairs_len == 0) {
      continue;
    }
    // As in gather.hip: counters with carries in place of a division for each block.
    kvx_u32 tensor_step = groups / pairs_len, pair_step = groups % pairs_len;
    kvx_u32 tensor = group / pairs_len, pair = group % pairs_len;
    while (tensor < tensors_len) {
      // Waves that saw different words would wait for each other for ever.
      if (kvx_same_in_group(kvx_load_system_u32(args.abort), thread) != 0) {
        return;
      }
      kvx_u64 at = args.side == KVX_SOURCE
                       ? tensors[tensor].src + pairs[pair].src * section->src_stride
                       : tensors[tensor].dst + pairs[pair].dst * section->dst_stride;
      kvx_u64 sum = 0;
#pragma nounroll
      for (kvx_u32 p = 0; p < pieces_len; ++p) {
        kvx_u64 from = args.side == KVX_SOURCE ? pieces[p].src : pieces[p].dst;
        sum += kvx_piece_sum(at + from, pieces[p].len, p, thread, threads);
      }
      sum = kvx_sum_of_group(sum, thread, threads);
      if (thread == 0) {
        ((KVX_GLOBAL kvx_u64 *)sums)[(kvx_u64)tensor * pairs_len + pair] = sum;
      }
      pair += pair_step;
      kvx_u32 carry = pair >= pairs_len;
      pair -= carry ? pairs_len : 0;
      tensor += tensor_step + carry;
    }
    sums += 8ull * tensors_len * pairs_len;
  }
}

#ifndef KVX_HOST
// Once before a consumer reads received blocks, however many they are.
KVX_KERNEL void kvx_acquire(kvx_fence_args args) {
  kvx_fence_acquire();
  if (kvx_thread() == 0) {
    kvx_fence_record(args, kvx_group());
  }
}

// Once after a producer's kernels, before a network card or another GPU reads what they wrote.
KVX_KERNEL void kvx_release(kvx_fence_args args) {
  kvx_fence_release();
  if (kvx_thread() == 0) {
    kvx_fence_record(args, kvx_group());
  }
}

// Checksums of blocks. For checking; it makes nothing coherent.
KVX_KERNEL void kvx_verify(kvx_verify_args args) {
  kvx_verify_group(args, kvx_group(), kvx_groups(), kvx_thread(), kvx_threads());
}
#else
// Workgroups `first` to `end` of a grid of `groups`, one after the other in the calling thread.
KVX_KERNEL void kvx_acquire_host(const kvx_fence_args *args, kvx_u32 first, kvx_u32 end, kvx_u32) {
  for (kvx_u32 group = first; group < end; ++group) {
    kvx_fence_acquire();
    kvx_fence_record(*args, group);
  }
}

KVX_KERNEL void kvx_release_host(const kvx_fence_args *args, kvx_u32 first, kvx_u32 end, kvx_u32) {
  for (kvx_u32 group = first; group < end; ++group) {
    kvx_fence_release();
    kvx_fence_record(*args, group);
  }
}

KVX_KERNEL void kvx_verify_host(const kvx_verify_args *args, kvx_u32 first, kvx_u32 end,
                                kvx_u32 groups) {
  for (kvx_u32 group = first; group < end; ++group) {
    kvx_verify_group(*args, group, groups, 0, 1);
  }
}
#endif
