// What differs between AMD, NVIDIA and the host, spelled once for each. No vendor's header is needed.
//
// The host build is for tests and for machines without a GPU. There a workgroup is one warp of 32
// lanes, and KVX_LANES runs what every lane does, one lane after the other; so nothing inside it may
// depend on another lane.
#ifndef KVX_DEVICE_H
#define KVX_DEVICE_H

#include "args.h"

#if defined(__AMDGCN__)
#define KVX_AMD 1
#elif defined(__NVPTX__)
#define KVX_NVIDIA 1
#elif defined(__x86_64__) || defined(__aarch64__)
#define KVX_HOST 1
#else
#error "no such target"
#endif

#if defined(KVX_AMD) && (defined(__gfx942__) || defined(__gfx950__))
#define KVX_GFX94 1
#elif defined(KVX_AMD) && defined(__gfx90a__)
#define KVX_GFX90A 1
#elif defined(KVX_AMD) && defined(__GFX11__)
#define KVX_GFX11 1
#elif defined(KVX_AMD)
#error "the fences of this gfx family are not written"
#endif

// Threads of a workgroup at most.
#define KVX_MAX_THREADS 1024u

#ifdef KVX_HOST
#define KVX_FN static inline __attribute__((always_inline))
#define KVX_GLOBAL
#define KVX_TABLE
#else
#define KVX_FN static inline __attribute__((device, always_inline))
#define KVX_SHARED __attribute__((shared))
// Memory of any device or of the host, as opposed to registers and shared memory.
#define KVX_GLOBAL __attribute__((address_space(1)))
#endif

#ifdef KVX_AMD
// Global memory that stands still while the kernel runs: it comes through the scalar cache.
#define KVX_TABLE __attribute__((address_space(4)))
#define KVX_KERNEL extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, 1024)))
#ifdef KVX_GFX11
#define KVX_WARP 32u
#else
#define KVX_WARP 64u
#endif
#elif defined(KVX_NVIDIA)
#define KVX_TABLE KVX_GLOBAL
#define KVX_KERNEL extern "C" __attribute__((global, launch_bounds(1024)))
#define KVX_WARP 32u
#else
#define KVX_KERNEL extern "C" __attribute__((visibility("default")))
#define KVX_WARP 32u
#endif

typedef kvx_u32 kvx_v4 __attribute__((ext_vector_type(4)));
static_assert(sizeof(kvx_v4) == 16 && alignof(kvx_v4) == 16, "a vector is 16 bytes");

// Where this thread is: the workgroup's number and size, and the thread's number in it.
#ifdef KVX_AMD
KVX_FN kvx_u32 kvx_thread() { return __builtin_amdgcn_workitem_id_x(); }
KVX_FN kvx_u32 kvx_threads() { return __builtin_amdgcn_workgroup_size_x(); }
KVX_FN kvx_u32 kvx_group() { return __builtin_amdgcn_workgroup_id_x(); }
KVX_FN kvx_u32 kvx_groups() {
  return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
}
#elif defined(KVX_NVIDIA)
KVX_FN kvx_u32 kvx_thread() { return __nvvm_read_ptx_sreg_tid_x(); }
KVX_FN kvx_u32 kvx_threads() { return __nvvm_read_ptx_sreg_ntid_x(); }
KVX_FN kvx_u32 kvx_group() { return __nvvm_read_ptx_sreg_ctaid_x(); }
KVX_FN kvx_u32 kvx_groups() { return __nvvm_read_ptx_sreg_nctaid_x(); }
#endif

#ifdef KVX_HOST
#define KVX_LANES(lane) for (kvx_u32 lane = 0; lane < KVX_WARP; ++lane)
#else
#define KVX_LANES(lane) for (kvx_u32 lane = kvx_thread() % KVX_WARP, once = 1; once; once = 0)
#endif

// The same value in all lanes, for what every lane of a warp must decide alike.
KVX_FN kvx_u32 kvx_uniform(kvx_u32 value) {
#ifdef KVX_AMD
  return __builtin_amdgcn_readfirstlane(value);
#elif defined(KVX_NVIDIA)
  return __nvvm_shfl_sync_idx_i32(0xffffffffu, value, 0, 0x1f);
#else
  return value;
#endif
}

KVX_FN kvx_u64 kvx_uniform_u64(kvx_u64 value) {
  return (kvx_u64)kvx_uniform((kvx_u32)(value >> 32)) << 32 | kvx_uniform((kvx_u32)value);
}

// All threads of the workgroup have come here, and see what the others put into shared memory.
KVX_FN void kvx_barrier() {
#ifdef KVX_AMD
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#elif defined(KVX_NVIDIA)
  asm volatile("bar.sync 0;" ::: "memory");
#endif
}

// Thread 0's value, in all threads of the workgroup, which all call it. Another barrier must come
// before the next call.
KVX_FN kvx_u32 kvx_same_in_group(kvx_u32 value, kvx_u32 thread) {
#ifdef KVX_HOST
  (void)thread;
#else
  static KVX_SHARED kvx_u32 same;
  if (thread == 0) {
    same = value;
  }
  kvx_barrier();
  value = same;
#endif
  return value;
}

// What this thread reads from here on is no older than what any device or the host had made visible
// before: nothing comes from a cache that a network card or another GPU writes behind. It reaches the
// caches of the compute unit and of the XCD that run the wave, and no others.
KVX_FN void kvx_fence_acquire() {
#if defined(KVX_GFX94)
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "buffer_inv sc0 sc1\n\t"
      "s_waitcnt vmcnt(0)" ::: "memory");
#elif defined(KVX_GFX90A)
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "buffer_invl2\n\t"
      "buffer_wbinvl1_vol\n\t"
      "s_waitcnt vmcnt(0)" ::: "memory");
#elif defined(KVX_GFX11)
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "s_waitcnt_vscnt null, 0x0\n\t"
      "buffer_gl1_inv\n\t"
      "buffer_gl0_inv\n\t"
      "s_waitcnt vmcnt(0)" ::: "memory");
#elif defined(KVX_NVIDIA)
  asm volatile("fence.sc.sys;" ::: "memory");
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

// What this thread wrote is visible to every device and to the host before anything that it writes
// from here on. By hand, for compilers up to clang 22 leave the wait after buffer_wbl2 out where they
// know of no access that is under way. Reaches what kvx_fence_acquire reaches.
KVX_FN void kvx_fence_release() {
#if defined(KVX_GFX94)
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "buffer_wbl2 sc0 sc1\n\t"
      "s_waitcnt vmcnt(0)" ::: "memory");
#elif defined(KVX_GFX90A)
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "buffer_wbl2\n\t"
      "s_waitcnt vmcnt(0)" ::: "memory");
#elif defined(KVX_GFX11)
  // Its L2 writes through to whatever is not its own.
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "s_waitcnt_vscnt null, 0x0" ::: "memory");
#elif defined(KVX_NVIDIA)
  asm volatile("fence.sc.sys;" ::: "memory");
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

// This wave's stores have reached the cache that its workgroup shares with the rest of the device: what
// a wave does before a barrier, when another wave of the workgroup has the release fence for all.
KVX_FN void kvx_drain() {
#if defined(KVX_GFX11)
  asm volatile(
      "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t"
      "s_waitcnt_vscnt null, 0x0" ::: "memory");
#elif defined(KVX_AMD)
  asm volatile("s_waitcnt vmcnt(0) lgkmcnt(0)" ::: "memory");
#endif
  // On NVIDIA the barrier and the fence after it cover the stores of all threads.
}

// All lanes of the wave have come here, and what they have written comes before what any of them
// releases from here on.
KVX_FN void kvx_wave_barrier() {
  kvx_drain();
#ifdef KVX_NVIDIA
  asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
#endif
}

// Loads and stores that every device and the host agree on, of naturally aligned words.
#ifdef KVX_NVIDIA
KVX_FN kvx_u64 kvx_load_system_u64(kvx_u64 at) {
  kvx_u64 value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
KVX_FN kvx_u32 kvx_load_system_u32(kvx_u64 at) {
  kvx_u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
KVX_FN kvx_u8 kvx_load_system_u8(kvx_u64 at) {
  kvx_u32 value;
  asm volatile("ld.relaxed.sys.global.u8 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return (kvx_u8)value;
}
KVX_FN kvx_u32 kvx_load_acquire_u32(kvx_u64 at) {
  kvx_u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
KVX_FN kvx_u64 kvx_load_acquire_u64(kvx_u64 at) {
  kvx_u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
KVX_FN void kvx_store_release_u64(kvx_u64 at, kvx_u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
KVX_FN void kvx_store_system_u32(kvx_u64 at, kvx_u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
#else
template <typename T>
KVX_FN T kvx_load_system(kvx_u64 at) {
#ifdef KVX_AMD
  return __scoped_atomic_load_n((const KVX_GLOBAL T *)at, __ATOMIC_RELAXED, __MEMORY_SCOPE_SYSTEM);
#else
  return __atomic_load_n((const T *)at, __ATOMIC_RELAXED);
#endif
}
KVX_FN kvx_u64 kvx_load_system_u64(kvx_u64 at) { return kvx_load_system<kvx_u64>(at); }
KVX_FN kvx_u32 kvx_load_system_u32(kvx_u64 at) { return kvx_load_system<kvx_u32>(at); }
KVX_FN kvx_u8 kvx_load_system_u8(kvx_u64 at) { return kvx_load_system<kvx_u8>(at); }
KVX_FN kvx_u32 kvx_load_acquire_u32(kvx_u64 at) {
  kvx_u32 value = kvx_load_system_u32(at);
  kvx_fence_acquire();
  return value;
}
KVX_FN kvx_u64 kvx_load_acquire_u64(kvx_u64 at) {
  kvx_u64 value = kvx_load_system_u64(at);
  kvx_fence_acquire();
  return value;
}
template <typename T>
KVX_FN void kvx_store_system(kvx_u64 at, T value) {
#ifdef KVX_AMD
  __scoped_atomic_store_n((KVX_GLOBAL T *)at, value, __ATOMIC_RELAXED, __MEMORY_SCOPE_SYSTEM);
#else
  __atomic_store_n((T *)at, value, __ATOMIC_RELAXED);
#endif
}
KVX_FN void kvx_store_system_u32(kvx_u64 at, kvx_u32 value) {
  kvx_store_system<kvx_u32>(at, value);
}
KVX_FN void kvx_store_release_u64(kvx_u64 at, kvx_u64 value) {
  kvx_fence_release();
  kvx_store_system<kvx_u64>(at, value);
}
#endif

// Words that the threads of one device have among themselves, in its own memory: loads acquire, stores
// release and swaps do both, at the scope of the device. A swap gives what was there, and has taken place
// if that is `expected`. Those that are called bare order nothing: so several loads are under way at once,
// with kvx_fence_device behind them, and a store goes right behind a fence that releases.
#ifdef KVX_NVIDIA
KVX_FN kvx_u64 kvx_load_bare_u64(kvx_u64 at) {
  kvx_u64 value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
KVX_FN void kvx_store_bare_u64(kvx_u64 at, kvx_u64 value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
KVX_FN void kvx_fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
KVX_FN kvx_u64 kvx_load_device_u64(kvx_u64 at) {
  kvx_u64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
KVX_FN void kvx_store_device_u64(kvx_u64 at, kvx_u64 value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
KVX_FN kvx_u64 kvx_swap_device_u64(kvx_u64 at, kvx_u64 expected, kvx_u64 value) {
  kvx_u64 found;
  asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(found)
               : "l"(at), "l"(expected), "l"(value)
               : "memory");
  return found;
}
#elif defined(KVX_AMD)
// Each reaches the device's coherent memory by itself, past the caches that are not; and waits for what
// was before it, unless it is bare. Whatever else one wave leaves for another, a fence of its own sees to.
KVX_FN kvx_u64 kvx_load_bare_u64(kvx_u64 at) {
  return __scoped_atomic_load_n((const KVX_GLOBAL kvx_u64 *)at, __ATOMIC_RELAXED,
                                __MEMORY_SCOPE_DEVICE);
}
KVX_FN void kvx_store_bare_u64(kvx_u64 at, kvx_u64 value) {
  __scoped_atomic_store_n((KVX_GLOBAL kvx_u64 *)at, value, __ATOMIC_RELAXED,
                          __MEMORY_SCOPE_DEVICE);
}
KVX_FN void kvx_fence_device() { kvx_drain(); }
KVX_FN kvx_u64 kvx_load_device_u64(kvx_u64 at) {
  kvx_u64 value = kvx_load_bare_u64(at);
  kvx_drain();
  return value;
}
KVX_FN void kvx_store_device_u64(kvx_u64 at, kvx_u64 value) {
  kvx_drain();
  kvx_store_bare_u64(at, value);
}
KVX_FN kvx_u64 kvx_swap_device_u64(kvx_u64 at, kvx_u64 expected, kvx_u64 value) {
  kvx_drain();
  __scoped_atomic_compare_exchange_n((KVX_GLOBAL kvx_u64 *)at, &expected, value, false,
                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED, __MEMORY_SCOPE_DEVICE);
  kvx_drain();
  return expected;
}
#else
KVX_FN kvx_u64 kvx_load_bare_u64(kvx_u64 at) {
  return __atomic_load_n((const kvx_u64 *)at, __ATOMIC_RELAXED);
}
KVX_FN void kvx_store_bare_u64(kvx_u64 at, kvx_u64 value) {
  __atomic_store_n((kvx_u64 *)at, value, __ATOMIC_RELAXED);
}
KVX_FN void kvx_fence_device() { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
KVX_FN kvx_u64 kvx_load_device_u64(kvx_u64 at) {
  return __atomic_load_n((const kvx_u64 *)at, __ATOMIC_ACQUIRE);
}
KVX_FN void kvx_store_device_u64(kvx_u64 at, kvx_u64 value) {
  __atomic_store_n((kvx_u64 *)at, value, __ATOMIC_RELEASE);
}
KVX_FN kvx_u64 kvx_swap_device_u64(kvx_u64 at, kvx_u64 expected, kvx_u64 value) {
  __atomic_compare_exchange_n((kvx_u64 *)at, &expected, value, false, __ATOMIC_ACQ_REL,
                              __ATOMIC_ACQUIRE);
  return expected;
}
#endif

// Which XCC (AMD with several) or multiprocessor (NVIDIA) this wave runs on.
KVX_FN kvx_u32 kvx_unit() {
#if defined(KVX_GFX94)
  // Four bits of HW_REG_XCC_ID, register 20.
  return __builtin_amdgcn_s_getreg(20 | (3 << 11));
#elif defined(KVX_NVIDIA)
  return __nvvm_read_ptx_sreg_smid();
#else
  return 0;
#endif
}

// A steady clock: nanoseconds on NVIDIA, hipDeviceAttributeWallClockRate (kHz) on AMD, the
// processor's counter on the host.
KVX_FN kvx_u64 kvx_clock() {
#ifndef KVX_HOST
  return __builtin_readsteadycounter();
#elif defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  kvx_u64 ticks;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#endif
}

// Between two looks at a word that somebody else will change.
KVX_FN void kvx_pause() {
#ifdef KVX_AMD
  __builtin_amdgcn_s_sleep(2);
#elif defined(KVX_NVIDIA)
  asm volatile("nanosleep.u32 100;");
#elif defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

// The same in a loop, whose turns are counted. A thread of the host gives its processor away now and
// then, to who may be what it waits for.
KVX_FN void kvx_relax(kvx_u32 turn) {
  kvx_pause();
#ifdef KVX_HOST
  if (turn % 64 == 63) {
    // sched_yield
#if defined(__x86_64__)
    long number = 24;
    asm volatile("syscall" : "+a"(number) : : "rcx", "r11", "memory");
#else
    register long number asm("x8") = 124;
    register long answer asm("x0");
    asm volatile("svc 0" : "=r"(answer) : "r"(number) : "memory");
    (void)answer;
#endif
  }
#else
  (void)turn;
#endif
}

// A word spread over all 64 bits (the finaliser of splitmix64): for checksums and patterns.
KVX_FN kvx_u64 kvx_mix(kvx_u64 x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

#endif
