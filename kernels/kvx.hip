// Everything in one module.
#include "fence.hip"
#include "gather.hip"

#ifdef KVX_HOST
// By the names of the device's kernels, as the stand-in for a GPU launches them: all workgroups, one
// after the other in the thread of its stream.
KVX_KERNEL void kvx_gather(const kvx_gather_args *args, kvx_u32 grid, kvx_u32) {
  kvx_gather_host(args, 0, grid, grid);
}

KVX_KERNEL void kvx_acquire(const kvx_fence_args *args, kvx_u32 grid, kvx_u32) {
  kvx_acquire_host(args, 0, grid, grid);
}

KVX_KERNEL void kvx_release(const kvx_fence_args *args, kvx_u32 grid, kvx_u32) {
  kvx_release_host(args, 0, grid, grid);
}

KVX_KERNEL void kvx_verify(const kvx_verify_args *args, kvx_u32 grid, kvx_u32) {
  kvx_verify_host(args, 0, grid, grid);
}

// Every size and offset of args.h, in the order in which Rust's mirror lists its own.
extern "C" __attribute__((visibility("default"))) const kvx_u32 kvx_layout[] = {
    sizeof(kvx_tensor),
    __builtin_offsetof(kvx_tensor, src),
    __builtin_offsetof(kvx_tensor, dst),
    sizeof(kvx_piece),
    __builtin_offsetof(kvx_piece, src),
    __builtin_offsetof(kvx_piece, dst),
    __builtin_offsetof(kvx_piece, len),
    sizeof(kvx_pair),
    __builtin_offsetof(kvx_pair, src),
    __builtin_offsetof(kvx_pair, dst),
    sizeof(kvx_section),
    __builtin_offsetof(kvx_section, tensors),
    __builtin_offsetof(kvx_section, pairs),
    __builtin_offsetof(kvx_section, pieces),
    __builtin_offsetof(kvx_section, src_stride),
    __builtin_offsetof(kvx_section, dst_stride),
    __builtin_offsetof(kvx_section, tensors_len),
    __builtin_offsetof(kvx_section, pairs_len),
    __builtin_offsetof(kvx_section, pieces_len),
    __builtin_offsetof(kvx_section, chunks),
    __builtin_offsetof(kvx_section, chunk),
    __builtin_offsetof(kvx_section, first),
    sizeof(kvx_gather_args),
    __builtin_offsetof(kvx_gather_args, sections),
    __builtin_offsetof(kvx_gather_args, slots),
    __builtin_offsetof(kvx_gather_args, abort),
    __builtin_offsetof(kvx_gather_args, sequence),
    __builtin_offsetof(kvx_gather_args, sections_len),
    __builtin_offsetof(kvx_gather_args, poll_bytes),
    sizeof(kvx_gather_slot),
    __builtin_offsetof(kvx_gather_slot, bytes),
    __builtin_offsetof(kvx_gather_slot, ticks),
    __builtin_offsetof(kvx_gather_slot, state),
    __builtin_offsetof(kvx_gather_slot, unit),
    __builtin_offsetof(kvx_gather_slot, sequence),
    sizeof(kvx_fence_args),
    __builtin_offsetof(kvx_fence_args, slots),
    __builtin_offsetof(kvx_fence_args, sequence),
    sizeof(kvx_fence_slot),
    __builtin_offsetof(kvx_fence_slot, sequence),
    __builtin_offsetof(kvx_fence_slot, unit),
    sizeof(kvx_verify_args),
    __builtin_offsetof(kvx_verify_args, sections),
    __builtin_offsetof(kvx_verify_args, sums),
    __builtin_offsetof(kvx_verify_args, abort),
    __builtin_offsetof(kvx_verify_args, sections_len),
    __builtin_offsetof(kvx_verify_args, side),
};
#endif
