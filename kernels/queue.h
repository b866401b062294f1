// Queues that kernels post to: what posters, consumers and devices have in common, as it lies in
// memory. As in args.h: fixed-width integers, and an address is a u64 that the device running the
// kernel can reach. The Rust mirror is crates/hipmem/src/kernels/queue.rs; a test compares the two.
#ifndef KVX_QUEUE_H
#define KVX_QUEUE_H

#include "args.h"

// How a call or an operation ended. What stands behind KVX_BAD_QUEUE comes from who carried it out.
#define KVX_OK 0u
#define KVX_TIMEOUT 1u      // no room, no turn or no completion within the queue's patience
#define KVX_STOPPED 2u      // the abort word was set while there was something to wait for
#define KVX_BROKEN 3u       // an operation has failed before: nothing was posted
#define KVX_BAD_QUEUE 4u    // no such kind, or a depth that is no power of two
#define KVX_BAD_OP 5u       // an operation, or flags, that the queue does not have
#define KVX_BAD_LENGTH 6u   // more bytes, or pieces, than an operation can have; not the block's bytes
#define KVX_BAD_KEY 7u      // a key that names nothing
#define KVX_BAD_RANGE 8u    // bytes outside of what the key or the place names
#define KVX_BAD_RIGHTS 9u   // not allowed there
#define KVX_MALFORMED 10u   // a descriptor or completion that makes no sense
#define KVX_FLUSHED 11u     // an operation before it has failed
#define KVX_PEER 12u        // the peer is lost or does not answer
#define KVX_LATE 13u        // its deadline has passed
#define KVX_CLOSED 14u      // the queue has been closed
#define KVX_DEVICE 15u      // the device failed it for another reason

// kvx_desc.op and the operation of a post.
#define KVX_PUT 1u
#define KVX_GET 2u
#define KVX_PUT_IMM 3u

// kvx_move.flags, kvx_desc.flags: the address is a place (KVX_PLACE), and its key is not looked at. The
// host knows what a proxy's places mean; other queues look them up in their table (regions.h), and take
// both or neither.
#define KVX_LOCAL_PLACE 1u
#define KVX_REMOTE_PLACE 2u

// A block by its names, in 64 bits: 8 for the group, 8 for the tensor, 16 for the layer, 32 for the
// block.
#define KVX_PLACE(group, layer, tensor, block)                                            \
  ((kvx_u64)(kvx_u8)(group) << 56 | (kvx_u64)(kvx_u8)(tensor) << 48 |                     \
   (kvx_u64)(unsigned short)(layer) << 32 | (kvx_u64)(kvx_u32)(block))

// The tensor of a place that stands for all of its layer: what queues of a push take.
#define KVX_ALL_TENSORS 0xffu

// A ticket is what a wait is given, as the post gave it. In its high 8 bits it says how many WQEs the
// post took beside the last one, which has the number in the other 56.
#define KVX_TICKET(last, more) ((kvx_u64)(more) << 56 | (last))
#define KVX_TICKET_LAST(ticket) ((ticket) & (1ull << 56) - 1)
#define KVX_TICKET_FIRST(ticket) (KVX_TICKET_LAST(ticket) - ((ticket) >> 56))

// What a post of WQEs leaves for whoever rings for it, in the word of its first slot: the number behind
// its last WQE, and in eight bits what the doorbell says beside the number. A word that was left a lap
// before has a number that is not above the slot's.
#define KVX_READY(next, says) ((next) << 8 | (says))
#define KVX_READY_NEXT(word) ((word) >> 8)
#define KVX_READY_SAYS(word) ((kvx_u32)(word) & 0xff)

// WQEs of a post at most: pieces of a block.
#define KVX_MOST_PIECES 256u

static_assert(KVX_PLACE(0x11, 0x2233, 0x44, 0x55667788) == 0x1144223355667788ull, "places");

// What is moved: `len` bytes between here and the peer.
struct kvx_move {
  kvx_u64 local;    // address, or a place
  kvx_u64 remote;   // address, or a place
  kvx_u64 len;      // bytes
  kvx_u32 lkey;
  kvx_u32 rkey;
  kvx_u32 imm;      // of KVX_PUT_IMM
  kvx_u32 flags;
};

// A descriptor of the proxy ring. The last eight bytes are stored last, in one store; the phase in
// them says that the rest is there.
struct kvx_desc {
  kvx_u64 local;
  kvx_u64 remote;
  kvx_u64 len;
  kvx_u32 lkey;
  kvx_u32 rkey;
  kvx_u64 ticket;     // which post this is
  kvx_u64 reserved;   // 0
  kvx_u32 imm;
  kvx_u32 reserved2;  // 0
  kvx_u8 op;
  kvx_u8 flags;
  kvx_u8 reserved3[5];  // 0
  kvx_u8 phase;         // KVX_PHASE of the ticket
};

// What the slot of a ticket says when it is there: the lap, counted from 1, in eight bits.
#define KVX_PHASE(ticket, depth) ((((ticket) >> __builtin_ctz(depth)) + 1) & 0xff)

// kvx_queue.kind
#define KVX_PROXY 1u      // descriptors, which the host carries out
#define KVX_GPU_WQE 2u    // WQEs; `bell` is a word that the host copies to the doorbell
#define KVX_DIRECT 3u     // WQEs; `bell` is the doorbell
#define KVX_LINKS 4u      // nothing is handed over: who puts copies the block, to where `regions` says

// What has become of a block that the peer expects of a push over links. Whoever reads notes waits for the
// kernels' ends.
#define KVX_NOTE_OPEN 0u      // not put
#define KVX_NOTE_BEGUN 1u     // being put, or stopped in the middle
#define KVX_NOTE_PUT 2u       // put: and the number of the block here, added

// What posters have among themselves: memory of the device that runs them.
struct kvx_queue_state {
  kvx_u64 next;      // the ticket that the next post gets
  kvx_u64 seen;      // tickets below have ended well, so far as a poster has looked
  kvx_u64 broken;    // not 0: some operation has failed
  kvx_u64 rung;      // WQEs: tickets below have been told to the device
  kvx_u64 taken;     // WQEs: completions that have been read
  kvx_u64 polling;   // WQEs: not 0 while somebody reads completions
};

// What is told of the end of operations: by the host, in pinned memory, where it carries them out;
// by who reads the completions of a device otherwise, in the memory of the state.
struct kvx_queue_report {
  kvx_u64 ended;     // tickets below have ended, well or not; stored after `fault`
  // The first failure that was found: (ticket + 1) << 8 | status; 0: none. So tickets have 56 bits,
  // which at 10^7 posts a second are two centuries.
  kvx_u64 fault;
};

// The first put over links of a push that was refused. Whoever reads it waits for the kernels' ends.
struct kvx_link_refused {
  kvx_u64 status;    // what it was told; KVX_OK: none was. Stored before the others, by a swap
  kvx_u64 local;     // kvx_move
  kvx_u64 remote;
  kvx_u64 len;
  kvx_u64 flags;
  kvx_u64 op;
};

// A queue, as it is given to a kernel. Whoever posts to it has a copy of this.
struct kvx_queue {
  kvx_u64 slots;       // kvx_desc[depth] in pinned memory, or the device's WQEs, 64 bytes each; links of a
                       // push: notes (KVX_NOTE_OPEN and on), kvx_u32 for each expected block of each layer
  kvx_u64 words;       // proxy: kvx_u64[depth] in pinned memory, (ticket + 1) << 8 | status;
                       // WQEs: kvx_u64[depth] in the device's memory, KVX_READY of posts, at first 0;
                       // links of a push: for each of a group's blocks at the peer a kvx_u32, 1 and its place
                       // among those that the peer expects, or 0; links of none: 0
  kvx_u64 state;       // kvx_queue_state
  kvx_u64 report;      // kvx_queue_report; links of a push: kvx_link_refused
  kvx_u64 abort;       // kvx_u32 in the device's memory: not 0 ends every wait
  kvx_u64 patience;    // ticks of the device's steady clock that a call waits at most
  kvx_u64 completions; // WQEs: the completion queue, 64 bytes each
  kvx_u64 record;      // WQEs: the send queue's word of the doorbell record
  kvx_u64 cq_record;   // WQEs: the completion queue's word
  kvx_u64 bell;        // WQEs: eight bytes, the doorbell or a word in its place
  kvx_u64 regions;     // kvx_regions for places, but of a proxy; 0: WQEs by addresses alone
  kvx_u32 kind;
  kvx_u32 depth;       // slots: a power of two
  kvx_u32 cq_depth;    // WQEs: a power of two, at least `depth`
  kvx_u32 qpn;         // WQEs: the queue pair's number
};

// kvx_post_args.until
#define KVX_POSTED 0u     // nothing is waited for
#define KVX_EACH 1u       // each is waited for before the next one
#define KVX_ALL 2u        // each is waited for when all have been posted
#define KVX_IDLE 3u       // all are posted, and then nothing of the queue may be under way

// Posts in numbers, for tests and measurements. Poster `p` makes those from p * count.
struct kvx_post_args {
  kvx_queue queue;
  kvx_u64 moves;      // kvx_move[posters * count]
  kvx_u64 results;    // kvx_post_result[posters * count]
  kvx_u32 count;      // posts of each poster
  kvx_u32 posters;    // those beyond have nothing to do
  kvx_u32 op;
  kvx_u32 until;
};

struct kvx_post_result {
  kvx_u64 ticket;     // where it was posted
  kvx_u32 posted;     // what the post said
  kvx_u32 ended;      // what the wait said; as `posted` where none was wanted, late behind a late one
};

// A tensor that kvx_produce makes blocks of: word `i` of block `b` is x ^ x >> 32 of
// x = mix(salt + b) + i * KVX_GOLDEN, as the pattern of the bandwidth test has it.
struct kvx_produced {
  kvx_u64 addr;       // block 0
  kvx_u64 stride;     // bytes from one block to the next
  kvx_u64 bytes;      // of a block; all three are multiples of 8
  kvx_u64 salt;
};

// A layer that it makes, and pushes.
struct kvx_produced_layer {
  kvx_u64 place;      // of block 0: of both sides
  kvx_u64 len;        // bytes of a put
  kvx_u32 first;      // its tensors: from here
  kvx_u32 end;        // to here
};

// For kvx_produce. Workgroup `g` has the pairs g, g + workgroups and so on.
struct kvx_produce_args {
  kvx_queue queue;
  kvx_u64 tensors;    // kvx_produced[]
  kvx_u64 layers;     // kvx_produced_layer[layers_len]
  kvx_u64 pairs;      // kvx_pair[pairs_len]
  kvx_u64 results;    // kvx_post_result[layers_len * pairs_len]: layer by layer
  kvx_u32 layers_len;
  kvx_u32 pairs_len;
};

KVX_SIZE(kvx_move, 40);
KVX_AT(kvx_move, remote, 8);
KVX_AT(kvx_move, len, 16);
KVX_AT(kvx_move, lkey, 24);
KVX_AT(kvx_move, rkey, 28);
KVX_AT(kvx_move, imm, 32);
KVX_AT(kvx_move, flags, 36);
KVX_SIZE(kvx_desc, 64);
KVX_AT(kvx_desc, remote, 8);
KVX_AT(kvx_desc, len, 16);
KVX_AT(kvx_desc, lkey, 24);
KVX_AT(kvx_desc, rkey, 28);
KVX_AT(kvx_desc, ticket, 32);
KVX_AT(kvx_desc, reserved, 40);
KVX_AT(kvx_desc, imm, 48);
KVX_AT(kvx_desc, reserved2, 52);
KVX_AT(kvx_desc, op, 56);
KVX_AT(kvx_desc, flags, 57);
KVX_AT(kvx_desc, phase, 63);
KVX_SIZE(kvx_queue_state, 48);
KVX_AT(kvx_queue_state, seen, 8);
KVX_AT(kvx_queue_state, broken, 16);
KVX_AT(kvx_queue_state, rung, 24);
KVX_AT(kvx_queue_state, taken, 32);
KVX_AT(kvx_queue_state, polling, 40);
KVX_SIZE(kvx_queue_report, 16);
KVX_AT(kvx_queue_report, fault, 8);
KVX_SIZE(kvx_link_refused, 48);
KVX_AT(kvx_link_refused, local, 8);
KVX_AT(kvx_link_refused, remote, 16);
KVX_AT(kvx_link_refused, len, 24);
KVX_AT(kvx_link_refused, flags, 32);
KVX_AT(kvx_link_refused, op, 40);
KVX_SIZE(kvx_queue, 104);
KVX_AT(kvx_queue, words, 8);
KVX_AT(kvx_queue, state, 16);
KVX_AT(kvx_queue, report, 24);
KVX_AT(kvx_queue, abort, 32);
KVX_AT(kvx_queue, patience, 40);
KVX_AT(kvx_queue, completions, 48);
KVX_AT(kvx_queue, record, 56);
KVX_AT(kvx_queue, cq_record, 64);
KVX_AT(kvx_queue, bell, 72);
KVX_AT(kvx_queue, regions, 80);
KVX_AT(kvx_queue, kind, 88);
KVX_AT(kvx_queue, depth, 92);
KVX_AT(kvx_queue, cq_depth, 96);
KVX_AT(kvx_queue, qpn, 100);
KVX_SIZE(kvx_post_args, 136);
KVX_AT(kvx_post_args, moves, 104);
KVX_AT(kvx_post_args, results, 112);
KVX_AT(kvx_post_args, count, 120);
KVX_AT(kvx_post_args, posters, 124);
KVX_AT(kvx_post_args, op, 128);
KVX_AT(kvx_post_args, until, 132);
KVX_SIZE(kvx_post_result, 16);
KVX_AT(kvx_post_result, posted, 8);
KVX_AT(kvx_post_result, ended, 12);
KVX_SIZE(kvx_produced, 32);
KVX_AT(kvx_produced, stride, 8);
KVX_AT(kvx_produced, bytes, 16);
KVX_AT(kvx_produced, salt, 24);
KVX_SIZE(kvx_produced_layer, 24);
KVX_AT(kvx_produced_layer, len, 8);
KVX_AT(kvx_produced_layer, first, 16);
KVX_AT(kvx_produced_layer, end, 20);
KVX_SIZE(kvx_produce_args, 144);
KVX_AT(kvx_produce_args, tensors, 104);
KVX_AT(kvx_produce_args, layers, 112);
KVX_AT(kvx_produce_args, pairs, 120);
KVX_AT(kvx_produce_args, results, 128);
KVX_AT(kvx_produce_args, layers_len, 136);
KVX_AT(kvx_produce_args, pairs_len, 140);

#endif
