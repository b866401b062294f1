//! The kernels' sources, as they are built for the host, against plain copies and sums. What the GPU
//! does beyond that is lanes side by side and fences; the index arithmetic, the alignments, the tails
//! and the abort word are these.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use kvxfer_hipmem::kernels::{
    ABORTED, DESTINATION, FenceArgs, FenceSlot, GatherArgs, GatherSlot, HostKernels, Pair, Piece,
    SOURCE, Section, Table, Tensor, VerifyArgs, WHOLE, block_sum, spread,
};
use proptest::prelude::*;

fn kernels() -> &'static HostKernels {
    static KERNELS: OnceLock<HostKernels> = OnceLock::new();
    KERNELS.get_or_init(|| HostKernels::load().expect("the host image loads"))
}

/// What lies where a sum goes.
const NO_SUM: u64 = 0xdead_beef_dead_beef;

/// Blocks of tensors that lie alike.
#[derive(Debug, Clone)]
struct Part {
    tensors: Vec<Tensor>,
    pairs: Vec<Pair>,
    pieces: Vec<Piece>,
    strides: (u64, u64),
    chunk: u32,
}

impl Part {
    fn section(&self) -> Section {
        let longest = self.pieces.iter().map(|p| p.len).max().unwrap_or(0);
        Section::new(
            table(&self.tensors),
            table(&self.pairs),
            table(&self.pieces),
            self.strides,
            longest,
            self.chunk,
        )
        .expect("small enough")
    }

    fn bytes(&self) -> u64 {
        let block: u64 = self.pieces.iter().map(|p| p.len).sum();
        block * self.tensors.len() as u64 * self.pairs.len() as u64
    }

    /// Every stretch, as (source, destination, length), by tensor and pair.
    fn stretches(&self) -> impl Iterator<Item = Vec<(u64, u64, u64)>> {
        let blocks = self
            .tensors
            .iter()
            .flat_map(|t| self.pairs.iter().map(move |p| (t, p)));
        blocks.map(|(tensor, pair)| {
            let src = tensor.src + u64::from(pair.src) * self.strides.0;
            let dst = tensor.dst + u64::from(pair.dst) * self.strides.1;
            let pieces = self.pieces.iter();
            pieces.map(|p| (src + p.src, dst + p.dst, p.len)).collect()
        })
    }
}

fn table<T>(of: &[T]) -> Table {
    Table {
        addr: of.as_ptr().expose_provenance() as u64,
        len: u32::try_from(of.len()).expect("few"),
    }
}

fn sections(parts: &[Part], warps: u32) -> Vec<Section> {
    let mut sections: Vec<_> = parts.iter().map(Part::section).collect();
    spread(&mut sections, warps);
    sections
}

/// Shares a grid among threads.
fn on_threads(grid: u32, threads: u32, run: impl Fn(Range<u32>) + Sync) {
    if threads == 1 {
        return run(0..grid);
    }
    thread::scope(|scope| {
        for i in 0..threads {
            let run = &run;
            let groups = grid * i / threads..grid * (i + 1) / threads;
            scope.spawn(move || run(groups));
        }
    });
}

/// Runs a gather of tables that are already addresses of this process.
fn gather(
    parts: &[Part],
    grid: u32,
    threads: u32,
    abort: &AtomicU32,
    poll: u32,
) -> Vec<GatherSlot> {
    let sections = sections(parts, grid);
    let mut slots = vec![GatherSlot::default(); grid as usize];
    let args = GatherArgs {
        sections: table(&sections).addr,
        slots: slots.as_mut_ptr().expose_provenance() as u64,
        abort: abort.as_ptr().expose_provenance() as u64,
        sequence: 0x1234_5678_9abc_def0,
        sections_len: u32::try_from(sections.len()).expect("few"),
        poll_bytes: poll,
    };
    on_threads(grid, threads, |groups| {
        // SAFETY: the callers made every table of addresses inside memory that they hold and look at
        // after this call only; `slots` has one for each workgroup.
        unsafe { kernels().gather(&args, groups, grid) };
    });
    for slot in &slots {
        assert_eq!(slot.sequence, args.sequence);
    }
    slots
}

fn whole(parts: &[Part], grid: u32, threads: u32) {
    let slots = gather(parts, grid, threads, &AtomicU32::new(0), 0);
    assert!(slots.iter().all(|slot| slot.state == WHOLE));
    let copied: u64 = slots.iter().map(|slot| slot.bytes).sum();
    assert_eq!(copied, parts.iter().map(Part::bytes).sum::<u64>());
}

fn sums(parts: &[Part], side: u32, grid: u32, threads: u32) -> Vec<u64> {
    sums_unless(0, parts, side, grid, threads)
}

/// The sums where the abort word is this one, over what looks like none of them.
fn sums_unless(abort: u32, parts: &[Part], side: u32, grid: u32, threads: u32) -> Vec<u64> {
    let sections = sections(parts, grid);
    let len: u64 = sections.iter().map(Section::sums).sum();
    let mut sums = vec![NO_SUM; len as usize];
    let abort = AtomicU32::new(abort);
    let args = VerifyArgs {
        sections: table(&sections).addr,
        sums: sums.as_mut_ptr().expose_provenance() as u64,
        abort: abort.as_ptr().expose_provenance() as u64,
        sections_len: u32::try_from(sections.len()).expect("few"),
        side,
    };
    on_threads(grid, threads, |groups| {
        // SAFETY: as for `gather`; `sums` has one for each tensor and pair.
        unsafe { kernels().verify(&args, groups, grid) };
    });
    sums
}

/// Bytes that differ from their neighbours and from those at any power of two away.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Two memories, and parts whose tensors are offsets into them until [`World::run`].
struct World {
    src: Vec<u8>,
    dst: Vec<u8>,
}

impl World {
    /// Runs the parts and compares every byte of both memories, those between blocks too, with what
    /// a plain copy leaves.
    fn run(mut self, parts: &[Part], grid: u32, threads: u32) {
        let mut wanted = self.dst.clone();
        let mut wanted_sums = Vec::new();
        for part in parts {
            for block in part.stretches() {
                for &(src, dst, len) in &block {
                    let from = &self.src[src as usize..][..len as usize];
                    wanted[dst as usize..][..len as usize].copy_from_slice(from);
                }
                let bytes = block.iter();
                wanted_sums.push(block_sum(
                    bytes.map(|&(src, _, len)| &self.src[src as usize..][..len as usize]),
                ));
            }
        }
        let before = self.src.clone();
        let src = self.src.as_mut_ptr().expose_provenance() as u64;
        let dst = self.dst.as_mut_ptr().expose_provenance() as u64;
        let mut placed = parts.to_vec();
        for tensor in placed.iter_mut().flat_map(|part| &mut part.tensors) {
            tensor.src += src;
            tensor.dst += dst;
        }
        whole(&placed, grid, threads);
        assert!(
            self.dst == wanted,
            "{:?}",
            first_difference(&self.dst, &wanted)
        );
        assert_eq!(sums(&placed, SOURCE, grid, threads), wanted_sums);
        assert_eq!(sums(&placed, DESTINATION, grid, threads), wanted_sums);
        assert!(self.dst == wanted, "verify wrote");
        assert!(self.src == before, "the source was written");
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

#[test]
fn every_alignment_of_both_sides() {
    let lens = [
        0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 71, 79, 80, 127, 128, 129, 500, 511, 512,
        513, 1023, 1024, 1536, 2047, 2048, 2049, 4095, 4096, 4097, 6001,
    ];
    for len in lens {
        let bytes = noise(len + 64, 3 * len as u64);
        for apart in 0..256_u64 {
            let (src, dst) = (apart % 16, apart / 16);
            let world = World {
                src: bytes.clone(),
                dst: vec![0xee; len + 64],
            };
            let part = Part {
                tensors: vec![Tensor {
                    src: 16 + src,
                    dst: 16 + dst,
                }],
                pairs: vec![Pair::default()],
                pieces: vec![Piece {
                    src: 0,
                    dst: 0,
                    len: len as u64,
                }],
                strides: (0, 0),
                chunk: 1 << 20,
            };
            world.run(&[part], 1, 1);
        }
    }
}

/// A part whose blocks do not overlap at the destination, within memories of this many bytes.
#[derive(Debug, Clone)]
struct Laid {
    part: Part,
    src_len: u64,
    dst_len: u64,
}

prop_compose! {
    fn laid()(
        lens in prop::collection::vec(prop_oneof![Just(0_u64), 1..40_u64, 60..700_u64, Just(2048)], 1..5),
        gaps in prop::collection::vec((0..20_u64, 0..20_u64), 5),
        tensors in 1..4_usize,
        blocks in 1..12_u32,
        offset in (0..33_u64, 0..33_u64),
        spare in (0..40_u64, 0..40_u64),
        chunk in prop_oneof![Just(16_u32), Just(17), Just(64), Just(100), Just(512), Just(4096)],
    )(
        // Any source block, also twice; destinations once each, in any order.
        sources in prop::collection::vec(0..blocks, 0..=blocks as usize),
        order in Just((0..blocks).collect::<Vec<_>>()).prop_shuffle(),
        lens in Just(lens), gaps in Just(gaps), tensors in Just(tensors), blocks in Just(blocks),
        offset in Just(offset), spare in Just(spare), chunk in Just(chunk),
    ) -> Laid {
        let mut pieces = Vec::new();
        let (mut src, mut dst) = (0, 0);
        for (len, gap) in lens.iter().zip(&gaps) {
            pieces.push(Piece { src: src + gap.0, dst: dst + gap.1, len: *len });
            src += gap.0 + len;
            dst += gap.1 + len;
        }
        let strides = (src + spare.0, dst + spare.1);
        let blocks = u64::from(blocks);
        let one = (strides.0 * blocks + offset.0, strides.1 * blocks + offset.1);
        let tensors: Vec<_> = (0..tensors as u64)
            .map(|t| Tensor { src: t * one.0 + offset.0, dst: t * one.1 + offset.1 })
            .collect();
        let pairs = sources.iter().zip(&order).map(|(src, dst)| Pair { src: *src, dst: *dst });
        Laid {
            src_len: one.0 * tensors.len() as u64,
            dst_len: one.1 * tensors.len() as u64,
            part: Part { tensors, pairs: pairs.collect(), pieces, strides, chunk },
        }
    }
}

proptest! {
    #[test]
    fn a_gather_is_a_plain_copy(
        laid in prop::collection::vec(laid(), 1..4),
        seed in any::<u64>(),
        grid in 1..70_u32,
    ) {
        let (mut src, mut dst) = (8, 8);
        let mut parts = Vec::new();
        for mut one in laid {
            for tensor in &mut one.part.tensors {
                tensor.src += src;
                tensor.dst += dst;
            }
            src += one.src_len;
            dst += one.dst_len;
            parts.push(one.part);
        }
        let world = World {
            src: noise(src as usize + 64, seed),
            dst: noise(dst as usize + 64, seed ^ 0xffff),
        };
        world.run(&parts, grid, 1);
    }
}

/// A permutation of 0..n for odd steps that n does not share a factor with.
fn shuffled(n: u32, step: u64) -> Vec<u32> {
    let at = |i: u32| (u64::from(i) * step % u64::from(n)) as u32;
    (0..n).map(at).collect()
}

#[test]
fn a_hundred_thousand_blocks_there_and_back() {
    const BLOCKS: u32 = 100_000;
    const BYTES: usize = 264;
    let sources = shuffled(BLOCKS, 77_773);
    let there: Vec<_> = (0..)
        .zip(&sources)
        .map(|(dst, src)| Pair { src: *src, dst })
        .collect();
    let back: Vec<_> = there
        .iter()
        .map(|p| Pair {
            src: p.dst,
            dst: p.src,
        })
        .collect();
    let part = |pairs: &[Pair]| Part {
        tensors: vec![Tensor::default()],
        pairs: pairs.to_vec(),
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: BYTES as u64,
        }],
        strides: (BYTES as u64, BYTES as u64),
        chunk: 1024,
    };
    let first = noise(BLOCKS as usize * BYTES, 7);
    let mut second = vec![0_u8; first.len()];
    let mut third = vec![0_u8; first.len()];
    let addr = |bytes: &mut Vec<u8>| bytes.as_mut_ptr().expose_provenance() as u64;
    let mut one = part(&there);
    one.tensors = vec![Tensor {
        src: first.as_ptr().expose_provenance() as u64,
        dst: addr(&mut second),
    }];
    whole(&[one], 96, 3);
    for (dst, src) in sources.iter().enumerate() {
        let src = *src as usize;
        assert!(
            second[dst * BYTES..][..BYTES] == first[src * BYTES..][..BYTES],
            "block {dst}"
        );
    }
    let mut two = part(&back);
    two.tensors = vec![Tensor {
        src: addr(&mut second),
        dst: addr(&mut third),
    }];
    whole(&[two], 7, 2);
    assert!(third == first);
}

#[test]
fn merged_runs_are_pieces_of_one_pair() {
    // Runs of 1, 5 and 200 blocks of 96 bytes, from block 0 on both sides.
    let piece = |src: u64, dst: u64, blocks: u64| Piece {
        src: src * 96,
        dst: dst * 96,
        len: blocks * 96,
    };
    let part = Part {
        tensors: vec![
            Tensor { src: 5, dst: 9 },
            Tensor {
                src: 40_005,
                dst: 50_009,
            },
        ],
        pairs: vec![Pair::default()],
        pieces: vec![piece(300, 3, 1), piece(7, 100, 5), piece(50, 200, 200)],
        strides: (0, 0),
        chunk: 4096,
    };
    World {
        src: noise(80_100, 11),
        dst: noise(100_100, 12),
    }
    .run(&[part], 5, 2);
}

/// Blocks of one tensor, of which one lies over the abort word.
fn aborting(len: usize, blocks: u32, trap: u32, poll: u32) -> (GatherSlot, Vec<u8>) {
    let src = vec![0x11_u8; len];
    // The abort word is where block `trap` goes, aligned.
    let mut dst = vec![0_u64; len * blocks as usize / 8];
    let at = dst.as_mut_ptr().expose_provenance() as u64;
    let word = at + u64::from(trap) * len as u64;
    let part = Part {
        tensors: vec![Tensor {
            src: src.as_ptr().expose_provenance() as u64,
            dst: at,
        }],
        pairs: (0..blocks).map(|dst| Pair { src: 0, dst }).collect(),
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: len as u64,
        }],
        strides: (len as u64, len as u64),
        chunk: 1 << 20,
    };
    let sections = [part.section()];
    let mut slot = GatherSlot::default();
    let args = GatherArgs {
        sections: table(&sections).addr,
        slots: (&raw mut slot).expose_provenance() as u64,
        abort: word,
        sequence: 1,
        sections_len: 1,
        poll_bytes: poll,
    };
    // SAFETY: every block is inside `dst`, whose words are read after the call; one slot for one
    // workgroup.
    unsafe { kernels().gather(&args, 0..1, 1) };
    let bytes = dst.iter().flat_map(|word| word.to_ne_bytes()).collect();
    (slot, bytes)
}

#[test]
fn an_abort_midway_stops_at_the_next_block() {
    for trap in [0, 1, 39, 98] {
        let (slot, dst) = aborting(160, 100, trap, 0);
        assert_eq!(slot.state, ABORTED, "{trap}");
        let end = 160 * (trap as usize + 1);
        assert_eq!(slot.bytes, end as u64);
        assert!(dst[..end].iter().all(|byte| *byte == 0x11), "{trap}");
        assert!(dst[end..].iter().all(|byte| *byte == 0), "{trap}");
    }
    // After the last block there is nothing left to abort.
    let (slot, _) = aborting(160, 100, 99, 0);
    assert_eq!((slot.state, slot.bytes), (WHOLE, 16_000));
}

#[test]
fn the_abort_word_is_looked_at_every_so_many_bytes() {
    // Before the blocks 4, 8, 12 …
    for (trap, copied) in [(0, 4), (3, 4), (4, 8), (90, 92)] {
        let (slot, dst) = aborting(160, 100, trap, 640);
        assert_eq!(slot.state, ABORTED);
        assert_eq!(slot.bytes, 160 * copied, "{trap}");
        assert!(dst[160 * copied as usize..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn what_is_aborted_before_it_begins_touches_nothing() {
    let (src, mut dst) = (vec![1_u8; 4096], vec![0_u8; 4096]);
    let part = Part {
        tensors: vec![Tensor {
            src: src.as_ptr().expose_provenance() as u64,
            dst: dst.as_mut_ptr().expose_provenance() as u64,
        }],
        pairs: vec![Pair::default()],
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: 4096,
        }],
        strides: (0, 0),
        chunk: 64,
    };
    let slots = gather(&[part.clone(), part], 5, 2, &AtomicU32::new(7), 0);
    assert!(slots.iter().all(|s| s.state == ABORTED && s.bytes == 0));
    assert!(dst.iter().all(|byte| *byte == 0));
}

#[test]
fn a_check_that_is_aborted_leaves_its_sums_alone() {
    let bytes = noise(1000, 3);
    let part = Part {
        tensors: vec![Tensor {
            src: bytes.as_ptr().expose_provenance() as u64,
            dst: 0,
        }],
        pairs: vec![Pair::default(), Pair { src: 1, dst: 0 }],
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: 500,
        }],
        strides: (500, 0),
        chunk: 64,
    };
    let parts = [part];
    let done = sums(&parts, SOURCE, 1, 1);
    assert_eq!(
        done,
        [block_sum([&bytes[..500]]), block_sum([&bytes[500..]])]
    );
    assert_eq!(sums_unless(1, &parts, SOURCE, 1, 1), [NO_SUM; 2]);
}

#[test]
fn a_launch_that_would_take_years_ends_when_another_thread_says_so() {
    let (src, mut dst) = (vec![0x5a_u8; 64 << 10], vec![0_u8; 64 << 10]);
    let tensor = Tensor {
        src: src.as_ptr().expose_provenance() as u64,
        dst: dst.as_mut_ptr().expose_provenance() as u64,
    };
    // 10^11 blocks: more than 32 bits count.
    let part = Part {
        tensors: vec![tensor; 1_000_000],
        pairs: (0..100_000)
            .map(|i| Pair {
                src: i % 16,
                dst: i % 16,
            })
            .collect(),
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: 4096,
        }],
        strides: (4096, 4096),
        chunk: 4096,
    };
    let abort = AtomicU32::new(0);
    let at = dst.as_mut_ptr().expose_provenance();
    let slots = thread::scope(|scope| {
        let launch = scope.spawn(|| gather(&[part], 2, 2, &abort, 64 << 10));
        let first = std::ptr::with_exposed_provenance::<AtomicU32>(at);
        // SAFETY: the word is in `dst`, which outlives the scope and which nothing else here reads.
        while unsafe { (*first).load(Ordering::Relaxed) } == 0 {
            assert!(!launch.is_finished());
            thread::yield_now();
        }
        abort.store(1, Ordering::Release);
        launch.join().expect("the launch ends")
    });
    assert!(slots.iter().all(|slot| slot.state == ABORTED));
    assert!(slots.iter().any(|slot| slot.bytes > 0));
    assert!(slots.iter().all(|slot| slot.bytes % 4096 == 0));
}

/// Address space of which only what is touched takes memory.
struct Sparse {
    at: *mut libc::c_void,
    len: usize,
}

impl Sparse {
    fn new(len: u64) -> Self {
        let len = len as usize;
        // SAFETY: an anonymous mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self { at, len }
    }

    fn base(&self) -> u64 {
        self.at.expose_provenance() as u64
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(offset.is_multiple_of(8) && offset as usize + 8 <= self.len);
        std::ptr::with_exposed_provenance_mut((self.base() + offset) as usize)
    }

    fn set(&self, offset: u64, value: u64) {
        // SAFETY: inside the mapping and aligned, which `word` has checked.
        unsafe { self.word(offset).write(value) };
    }

    fn get(&self, offset: u64) -> u64 {
        // SAFETY: inside the mapping and aligned, which `word` has checked.
        unsafe { self.word(offset).read() }
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, of which nothing is used after.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

#[test]
fn blocks_more_than_four_gigabytes_apart() {
    const STRIDE: u64 = (5 << 30) + 4096;
    let memory = Sparse::new(5 * STRIDE);
    let piece = Piece {
        src: STRIDE / 2,
        dst: 64,
        len: 4104,
    };
    let words = || (0..2_u64).flat_map(|block| (0..513).map(move |i| (block, 8 * i)));
    for (block, offset) in words() {
        memory.set(block * STRIDE + piece.src + offset, block << 32 | offset);
    }
    let part = Part {
        tensors: vec![Tensor {
            src: memory.base(),
            dst: memory.base(),
        }],
        pairs: vec![Pair { src: 0, dst: 3 }, Pair { src: 1, dst: 4 }],
        pieces: vec![piece],
        strides: (STRIDE, STRIDE),
        chunk: 1024,
    };
    whole(std::slice::from_ref(&part), 3, 1);
    assert_eq!(
        sums(std::slice::from_ref(&part), SOURCE, 3, 1),
        sums(std::slice::from_ref(&part), DESTINATION, 3, 1)
    );
    for (block, offset) in words() {
        let found = memory.get((block + 3) * STRIDE + piece.dst + offset);
        assert_eq!(found, block << 32 | offset);
    }
}

#[test]
fn a_piece_longer_than_four_gigabytes() {
    const CHUNK: u64 = 1 << 20;
    const LEN: u64 = 6144 * CHUNK - 8;
    let (src, dst) = (Sparse::new(LEN + 8), Sparse::new(LEN + 8));
    let part = Part {
        tensors: vec![Tensor {
            src: src.base(),
            dst: dst.base(),
        }],
        pairs: vec![Pair::default()],
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: LEN,
        }],
        strides: (0, 0),
        chunk: CHUNK as u32,
    };
    // One workgroup for each chunk, of which only these run.
    let sections = [part.section()];
    let go = AtomicU32::new(0);
    let mut slots = vec![GatherSlot::default(); 6144];
    let args = GatherArgs {
        sections: table(&sections).addr,
        slots: slots.as_mut_ptr().expose_provenance() as u64,
        abort: go.as_ptr().expose_provenance() as u64,
        sequence: 1,
        sections_len: 1,
        poll_bytes: 0,
    };
    for (chunk, len) in [(1, CHUNK), (4096, CHUNK), (6000, CHUNK), (6143, CHUNK - 8)] {
        let at = u64::from(chunk) * CHUNK;
        let edges = [at - 8, at, at + len - 8, at + len];
        for edge in edges {
            src.set(edge, edge | 1);
        }
        // SAFETY: both sides are mapped to the piece's end; a slot for each workgroup.
        unsafe { kernels().gather(&args, chunk..chunk + 1, 6144) };
        assert_eq!(
            edges.map(|edge| dst.get(edge)),
            [0, at | 1, (at + len - 8) | 1, 0]
        );
        assert_eq!(slots[chunk as usize].bytes, len);
    }
}

#[test]
fn fences_leave_their_records() {
    let mut slots = vec![FenceSlot::default(); 9];
    let args = |slots: &mut Vec<FenceSlot>, sequence| FenceArgs {
        slots: slots.as_mut_ptr().expose_provenance() as u64,
        sequence,
    };
    let acquire = args(&mut slots, 1 << 40 | 1);
    // SAFETY: nine slots, of which eight are written.
    unsafe { kernels().acquire(&acquire, 0..8, 8) };
    assert!(
        slots[..8]
            .iter()
            .all(|s| (s.sequence, s.unit) == (1 << 40 | 1, 0))
    );
    assert_eq!(slots[8], FenceSlot::default());
    let release = args(&mut slots, 2);
    // SAFETY: nine slots, of which one is written.
    unsafe { kernels().release(&release, 8..9, 9) };
    assert_eq!(
        slots[8],
        FenceSlot {
            sequence: 2,
            unit: 0
        }
    );
    assert_eq!(slots[7].sequence, 1 << 40 | 1);
}
