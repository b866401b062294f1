// How a warp copies bytes: any alignment, any length, many loads of 16 bytes under way at once.
#ifndef KVX_COPY_H
#define KVX_COPY_H

#include "device.h"

// Vectors that one lane has in flight.
#define KVX_UNROLL 8u

// What one warp copies at a time.
struct kvx_span {
  kvx_u64 src;
  kvx_u64 dst;
  kvx_u32 len;
};

// COUNT words from each lane, all loads before the first store.
template <typename T, kvx_u32 COUNT>
KVX_FN void kvx_copy_batch(KVX_GLOBAL T *to, const KVX_GLOBAL T *from) {
  T word[COUNT];
#pragma unroll
  for (kvx_u32 k = 0; k < COUNT; ++k) {
    word[k] = from[k * KVX_WARP];
  }
#pragma unroll
  for (kvx_u32 k = 0; k < COUNT; ++k) {
    to[k * KVX_WARP] = word[k];
  }
}

// `n` words in all, both sides aligned to them.
template <typename T>
KVX_FN void kvx_copy_words(kvx_u64 dst, kvx_u64 src, kvx_u32 n, kvx_u32 lane) {
  const KVX_GLOBAL T *from = (const KVX_GLOBAL T *)src + lane;
  KVX_GLOBAL T *to = (KVX_GLOBAL T *)dst + lane;
#pragma nounroll
  for (; n >= KVX_UNROLL * KVX_WARP; n -= KVX_UNROLL * KVX_WARP) {
    kvx_copy_batch<T, KVX_UNROLL>(to, from);
    from += KVX_UNROLL * KVX_WARP;
    to += KVX_UNROLL * KVX_WARP;
  }
  if (n >= 4 * KVX_WARP) {
    kvx_copy_batch<T, 4>(to, from);
    from += 4 * KVX_WARP;
    to += 4 * KVX_WARP;
    n -= 4 * KVX_WARP;
  }
  // Fewer than four for each lane.
  T word[3];
#pragma unroll
  for (kvx_u32 k = 0; k < 3; ++k) {
    word[k] = T();
    if (k * KVX_WARP + lane < n) {
      word[k] = from[k * KVX_WARP];
    }
  }
#pragma unroll
  for (kvx_u32 k = 0; k < 3; ++k) {
    if (k * KVX_WARP + lane < n) {
      to[k * KVX_WARP] = word[k];
    }
  }
  if (3 * KVX_WARP + lane < n) {
    to[3 * KVX_WARP] = from[3 * KVX_WARP];
  }
}

// As above for words of four bytes whose source is not aligned to four: each is put together from the
// two aligned words that it lies across. Four bytes before and after the source are the caller's too.
KVX_FN void kvx_copy_shifted(kvx_u64 dst, kvx_u64 src, kvx_u32 n, kvx_u32 lane) {
  kvx_u32 shift = 8 * (src % 4);
  const KVX_GLOBAL kvx_u32 *from = (const KVX_GLOBAL kvx_u32 *)(src & ~3ull);
  KVX_GLOBAL kvx_u32 *to = (KVX_GLOBAL kvx_u32 *)dst;
  kvx_u32 i = lane;
#pragma nounroll
  for (; i + 3 * KVX_WARP < n; i += 4 * KVX_WARP) {
    kvx_u32 low[4], high[4];
#pragma unroll
    for (kvx_u32 k = 0; k < 4; ++k) {
      low[k] = from[i + k * KVX_WARP];
      high[k] = from[i + k * KVX_WARP + 1];
    }
#pragma unroll
    for (kvx_u32 k = 0; k < 4; ++k) {
      to[i + k * KVX_WARP] = low[k] >> shift | high[k] << (32 - shift);
    }
  }
#pragma nounroll
  for (; i < n; i += KVX_WARP) {
    kvx_u32 low = from[i], high = from[i + 1];
    to[i] = low >> shift | high << (32 - shift);
  }
}

// Fewer than 64 bytes, one by one.
KVX_FN void kvx_copy_bytes(kvx_u64 dst, kvx_u64 src, kvx_u32 n, kvx_u32 lane) {
#pragma nounroll
  for (; lane < n; lane += KVX_WARP) {
    ((KVX_GLOBAL kvx_u8 *)dst)[lane] = ((const KVX_GLOBAL kvx_u8 *)src)[lane];
  }
}

// One lane's part of a span: bytes up to where the destination is aligned, then words as wide as both
// sides are aligned alike, then the bytes that are left.
KVX_FN void kvx_copy(const kvx_span &span, kvx_u32 lane) {
  if (span.len < 64) {
    kvx_copy_bytes(span.dst, span.src, span.len, lane);
    return;
  }
  kvx_u32 apart = (kvx_u32)(span.src ^ span.dst);
  kvx_u32 width = apart % 16 == 0 ? 16 : apart % 8 == 0 ? 8 : 4;
  kvx_u32 head = (kvx_u32)(0 - span.dst) & (width - 1);
  if (apart % 4 != 0) {
    // So that the words around the shifted ones are inside the span.
    head += 4;
  }
  kvx_u32 tail = (span.len - head) & (width - 1);
  if (apart % 4 != 0) {
    tail += 4;
  }
  kvx_u32 body = span.len - head - tail;
  kvx_u64 src = span.src + head, dst = span.dst + head;
  if (width == 16) {
    kvx_copy_words<kvx_v4>(dst, src, body / 16, lane);
  } else if (width == 8) {
    kvx_copy_words<kvx_u64>(dst, src, body / 8, lane);
  } else if (apart % 4 == 0) {
    kvx_copy_words<kvx_u32>(dst, src, body / 4, lane);
  } else {
    kvx_copy_shifted(dst, src, body / 4, lane);
  }
  if ((head | tail) != 0) {
    // The first half of the warp has the head, the second the tail.
    if (lane < head) {
      kvx_copy_bytes(span.dst + lane, span.src + lane, 1, 0);
    }
    kvx_u32 last = lane - KVX_WARP / 2;
    if (last < tail) {
      kvx_copy_bytes(dst + body + last, src + body + last, 1, 0);
    }
  }
}

#endif
