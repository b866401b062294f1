// What moves and checks blocks, as one module. A GPU has the posts of post.hip in a module of their own,
// which nobody need load for the rest; the host's are in the same one.
#include "fence.hip"
#include "gather.hip"
#ifdef KVX_HOST
#include "post.hip"
#endif

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

KVX_KERNEL void kvx_post_threads(const kvx_post_args *args, kvx_u32, kvx_u32) {
  kvx_post_host(args, 0, args->posters, 0);
}

KVX_KERNEL void kvx_post_waves(const kvx_post_args *args, kvx_u32, kvx_u32) {
  kvx_post_host(args, 0, args->posters, 0);
}

KVX_KERNEL void kvx_post_blocks(const kvx_post_args *args, kvx_u32, kvx_u32) {
  kvx_post_host(args, 0, args->posters, 0);
}

// Every size and offset of args.h, queue.h and regions.h, in the order in which Rust's mirror lists its own.
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
    sizeof(kvx_move),
    __builtin_offsetof(kvx_move, local),
    __builtin_offsetof(kvx_move, remote),
    __builtin_offsetof(kvx_move, len),
    __builtin_offsetof(kvx_move, lkey),
    __builtin_offsetof(kvx_move, rkey),
    __builtin_offsetof(kvx_move, imm),
    __builtin_offsetof(kvx_move, flags),
    sizeof(kvx_desc),
    __builtin_offsetof(kvx_desc, local),
    __builtin_offsetof(kvx_desc, remote),
    __builtin_offsetof(kvx_desc, len),
    __builtin_offsetof(kvx_desc, lkey),
    __builtin_offsetof(kvx_desc, rkey),
    __builtin_offsetof(kvx_desc, ticket),
    __builtin_offsetof(kvx_desc, reserved),
    __builtin_offsetof(kvx_desc, imm),
    __builtin_offsetof(kvx_desc, reserved2),
    __builtin_offsetof(kvx_desc, op),
    __builtin_offsetof(kvx_desc, flags),
    __builtin_offsetof(kvx_desc, reserved3),
    __builtin_offsetof(kvx_desc, phase),
    sizeof(kvx_queue_state),
    __builtin_offsetof(kvx_queue_state, next),
    __builtin_offsetof(kvx_queue_state, seen),
    __builtin_offsetof(kvx_queue_state, broken),
    __builtin_offsetof(kvx_queue_state, rung),
    __builtin_offsetof(kvx_queue_state, taken),
    __builtin_offsetof(kvx_queue_state, polling),
    sizeof(kvx_queue_report),
    __builtin_offsetof(kvx_queue_report, ended),
    __builtin_offsetof(kvx_queue_report, fault),
    sizeof(kvx_link_refused),
    __builtin_offsetof(kvx_link_refused, status),
    __builtin_offsetof(kvx_link_refused, local),
    __builtin_offsetof(kvx_link_refused, remote),
    __builtin_offsetof(kvx_link_refused, len),
    __builtin_offsetof(kvx_link_refused, flags),
    __builtin_offsetof(kvx_link_refused, op),
    sizeof(kvx_queue),
    __builtin_offsetof(kvx_queue, slots),
    __builtin_offsetof(kvx_queue, words),
    __builtin_offsetof(kvx_queue, state),
    __builtin_offsetof(kvx_queue, report),
    __builtin_offsetof(kvx_queue, abort),
    __builtin_offsetof(kvx_queue, patience),
    __builtin_offsetof(kvx_queue, completions),
    __builtin_offsetof(kvx_queue, record),
    __builtin_offsetof(kvx_queue, cq_record),
    __builtin_offsetof(kvx_queue, bell),
    __builtin_offsetof(kvx_queue, regions),
    __builtin_offsetof(kvx_queue, kind),
    __builtin_offsetof(kvx_queue, depth),
    __builtin_offsetof(kvx_queue, cq_depth),
    __builtin_offsetof(kvx_queue, qpn),
    sizeof(kvx_post_args),
    __builtin_offsetof(kvx_post_args, queue),
    __builtin_offsetof(kvx_post_args, moves),
    __builtin_offsetof(kvx_post_args, results),
    __builtin_offsetof(kvx_post_args, count),
    __builtin_offsetof(kvx_post_args, posters),
    __builtin_offsetof(kvx_post_args, op),
    __builtin_offsetof(kvx_post_args, until),
    sizeof(kvx_post_result),
    __builtin_offsetof(kvx_post_result, ticket),
    __builtin_offsetof(kvx_post_result, posted),
    __builtin_offsetof(kvx_post_result, ended),
    sizeof(kvx_produced),
    __builtin_offsetof(kvx_produced, addr),
    __builtin_offsetof(kvx_produced, stride),
    __builtin_offsetof(kvx_produced, bytes),
    __builtin_offsetof(kvx_produced, salt),
    sizeof(kvx_produced_layer),
    __builtin_offsetof(kvx_produced_layer, place),
    __builtin_offsetof(kvx_produced_layer, len),
    __builtin_offsetof(kvx_produced_layer, first),
    __builtin_offsetof(kvx_produced_layer, end),
    sizeof(kvx_produce_args),
    __builtin_offsetof(kvx_produce_args, queue),
    __builtin_offsetof(kvx_produce_args, tensors),
    __builtin_offsetof(kvx_produce_args, layers),
    __builtin_offsetof(kvx_produce_args, pairs),
    __builtin_offsetof(kvx_produce_args, results),
    __builtin_offsetof(kvx_produce_args, layers_len),
    __builtin_offsetof(kvx_produce_args, pairs_len),
    sizeof(kvx_region_piece),
    __builtin_offsetof(kvx_region_piece, local),
    __builtin_offsetof(kvx_region_piece, local_stride),
    __builtin_offsetof(kvx_region_piece, remote),
    __builtin_offsetof(kvx_region_piece, remote_stride),
    __builtin_offsetof(kvx_region_piece, len),
    __builtin_offsetof(kvx_region_piece, lkey),
    __builtin_offsetof(kvx_region_piece, rkey),
    sizeof(kvx_region_tensor),
    __builtin_offsetof(kvx_region_tensor, bytes),
    __builtin_offsetof(kvx_region_tensor, first),
    __builtin_offsetof(kvx_region_tensor, count),
    sizeof(kvx_region_layer),
    __builtin_offsetof(kvx_region_layer, first),
    __builtin_offsetof(kvx_region_layer, tensors),
    __builtin_offsetof(kvx_region_layer, local_blocks),
    __builtin_offsetof(kvx_region_layer, remote_blocks),
    __builtin_offsetof(kvx_region_layer, expected),
    __builtin_offsetof(kvx_region_layer, notes),
    sizeof(kvx_region_group),
    __builtin_offsetof(kvx_region_group, first),
    __builtin_offsetof(kvx_region_group, layers),
    sizeof(kvx_regions),
    __builtin_offsetof(kvx_regions, groups),
    __builtin_offsetof(kvx_regions, layers),
    __builtin_offsetof(kvx_regions, tensors),
    __builtin_offsetof(kvx_regions, pieces),
    __builtin_offsetof(kvx_regions, groups_len),
    __builtin_offsetof(kvx_regions, reserved),
};
#endif
