// The host build with faults planted in it, and with looks into the order of its stores: for tests
// that a fault is found. No program has it.
#include "device.h"

#ifndef KVX_HOST
#error "for the host alone"
#endif

extern "C" {
// Which fault of post.h is planted; 0: none.
__attribute__((visibility("default"))) kvx_u32 kvx_planted = 0;
// Called right after a store that somebody else may act on, with the address of the queue's slots.
__attribute__((visibility("default"))) void (*kvx_trap)(kvx_u64 slots, kvx_u32 what,
                                                       kvx_u64 value) = nullptr;
// What is looked at for the time, with the address of the queue's slots; none: the clock.
__attribute__((visibility("default"))) kvx_u64 (*kvx_now)(kvx_u64 slots) = nullptr;
}

#define KVX_PLANTED(which) (kvx_planted == (which))
#define KVX_TRAP(queue, what, value)                \
  do {                                              \
    if (kvx_trap != nullptr) {                      \
      kvx_trap((queue).slots, (what), (value));     \
    }                                               \
  } while (0)
#define KVX_NOW(queue) (kvx_now != nullptr ? kvx_now((queue).slots) : kvx_clock())

#include "kvx.hip"
