//! Scattered blocks, fences and checks: each transfer against plain copies on the host.

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gather::{
    Gather, GatherEnd, GatherFault, GatherOptions, GatherPart, GatherSection, GatherTable,
    GpuKernels, Side, TensorPlaces,
};
use kvxfer_hipmem::gpu::{GpuMemory, PinnedMemory, Place, Stream};
use kvxfer_hipmem::kernels::{Pair, Piece, block_sum};

use crate::{Outcome, gpu, on_host, pattern, runtime, soon};

pub(crate) const MIB: u64 = 1 << 20;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// A number below `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len as usize).collect()
    }
}

/// Where a side of a transfer lies.
pub(crate) enum Memory {
    Gpu(GpuMemory),
    Pinned(PinnedMemory),
}

impl Memory {
    fn at(&self, offset: u64) -> Place<'_> {
        match self {
            Self::Gpu(memory) => Place::Gpu(memory, offset),
            Self::Pinned(memory) => Place::Pinned(memory, offset),
        }
    }

    fn write(&self, bytes: &[u8]) -> Outcome {
        match self {
            Self::Gpu(memory) => memory.write(0, bytes)?,
            Self::Pinned(memory) => memory.host().write(0, bytes)?,
        }
        Ok(())
    }

    fn read(&self) -> Result<Vec<u8>, Error> {
        let mut bytes;
        match self {
            Self::Gpu(memory) => {
                bytes = vec![0; memory.len() as usize];
                memory.read(0, &mut bytes)?;
            }
            Self::Pinned(memory) => {
                bytes = vec![0; memory.len() as usize];
                memory.host().read(0, &mut bytes)?;
            }
        }
        Ok(bytes)
    }
}

/// A memory of each kind there is, for both sides of each transfer: the kernels' own GPU's, another GPU's where
/// there is one that it reaches, and the host's.
pub(crate) fn memories(len: u64) -> Result<Vec<(&'static str, Memory)>, Error> {
    let runtime = runtime();
    let near = gpu();
    let mut all = vec![
        ("near", Memory::Gpu(GpuMemory::new(&near, len)?)),
        ("pinned", Memory::Pinned(PinnedMemory::new(&near, len)?)),
    ];
    if let Some(far) = runtime.gpus().get(1)
        && near.can_access(far)?
    {
        all.push(("far", Memory::Gpu(GpuMemory::new(far, len)?)));
    }
    Ok(all)
}

/// A section by offsets, for the model and for the table.
#[derive(Debug)]
struct Part {
    tensors: Vec<(u64, u64)>,
    pieces: Vec<Piece>,
    strides: (u64, u64),
    blocks: (u32, u32),
    pairs: Vec<Pair>,
}

impl Part {
    /// Tensors after each other on both sides from `at` on, with gaps; blocks and pieces of odd sizes; no
    /// destination twice. The offsets behind the last.
    fn random(random: &mut Random, at: &mut (u64, u64), most: u64) -> Self {
        let merged = random.below(3) == 0;
        let mut pieces = Vec::new();
        let mut ends = (0, 0);
        for _ in 0..if merged { 1 } else { random.below(4) } {
            let len = 1 + random.below(most);
            let gaps = match merged {
                true => (0, 0),
                false => (random.below(40), random.below(40)),
            };
            pieces.push(Piece {
                src: ends.0 + gaps.0,
                dst: ends.1 + gaps.1,
                len,
            });
            ends = (ends.0 + gaps.0 + len, ends.1 + gaps.1 + len);
        }
        let strides = match merged {
            true => ends,
            false => (ends.0 + random.below(30), ends.1 + random.below(30)),
        };
        let blocks = (1 + random.below(20) as u32, 1 + random.below(20) as u32);
        let mut tensors = Vec::new();
        for _ in 0..random.below(5) {
            at.0 += random.below(50);
            at.1 += random.below(50);
            tensors.push(*at);
            at.0 += strides.0 * u64::from(blocks.0);
            at.1 += strides.1 * u64::from(blocks.1);
        }
        // Now and then a run, otherwise anything.
        let first = random.below(u64::from(blocks.0)) as u32;
        let straight = random.below(2) == 0;
        let dsts: Vec<u32> = (0..blocks.1)
            .filter(|_| straight || random.below(3) > 0)
            .collect();
        let mut pairs: Vec<Pair> = dsts
            .iter()
            .map(|dst| Pair {
                src: first,
                dst: *dst,
            })
            .collect();
        for (i, pair) in (0..).zip(&mut pairs) {
            pair.src = match straight {
                true => (first + i) % blocks.0,
                false => random.below(u64::from(blocks.0)) as u32,
            };
        }
        Self {
            tensors,
            pieces,
            strides,
            blocks,
            pairs,
        }
    }

    /// Stretches of each block, by tensor and pair.
    fn blocks(&self) -> impl Iterator<Item = Vec<(u64, u64, u64)>> {
        let each = self
            .tensors
            .iter()
            .flat_map(|t| self.pairs.iter().map(move |p| (t, p)));
        each.map(|(tensor, pair)| {
            let src = tensor.0 + u64::from(pair.src) * self.strides.0;
            let dst = tensor.1 + u64::from(pair.dst) * self.strides.1;
            let pieces = self.pieces.iter();
            pieces.map(|p| (src + p.src, dst + p.dst, p.len)).collect()
        })
    }

    fn bytes(&self) -> u64 {
        self.blocks().flatten().map(|(.., len)| len).sum()
    }
}

fn table(
    kernels: &GpuKernels,
    parts: &[Part],
    (src, dst): (&Memory, &Memory),
    options: GatherOptions,
) -> Result<GatherTable, Error> {
    let places: Vec<Vec<TensorPlaces<'_>>> = parts
        .iter()
        .map(|part| {
            let each = part.tensors.iter().map(|at| TensorPlaces {
                src: src.at(at.0),
                dst: dst.at(at.1),
            });
            each.collect()
        })
        .collect();
    let sections: Vec<GatherSection<'_>> = parts
        .iter()
        .zip(&places)
        .map(|(part, tensors)| GatherSection {
            tensors,
            pieces: &part.pieces,
            strides: part.strides,
            blocks: part.blocks,
        })
        .collect();
    kernels.table(&sections, options)
}

fn pairs(parts: &[Part]) -> Vec<&[Pair]> {
    parts.iter().map(|part| &part.pairs[..]).collect()
}

#[track_caller]
pub(crate) fn whole(end: GatherEnd) {
    assert!(matches!(end, GatherEnd::Whole), "{end:?}");
}

#[track_caller]
fn gather_fault<T>(result: Result<T, Error>) -> GatherFault {
    match result.map(drop) {
        Err(Error::Gather(fault)) => *fault,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("nothing was refused"),
    }
}

/// Gathers, and compares every byte of both memories and all sums with what plain copies give.
fn compare(
    kernels: &GpuKernels,
    stream: &Stream,
    parts: &[Part],
    sides: (&Memory, &Memory),
    options: GatherOptions,
    random: &mut Random,
) -> Result<Gather, Box<dyn std::error::Error>> {
    let len = sides.0.read()?.len() as u64;
    let (before, mut wanted) = (random.bytes(len), random.bytes(len));
    sides.0.write(&before)?;
    sides.1.write(&wanted)?;
    let mut sums = Vec::new();
    for part in parts {
        let mut of = Vec::new();
        for block in part.blocks() {
            for &(src, dst, len) in &block {
                let from = &before[src as usize..][..len as usize];
                wanted[dst as usize..][..len as usize].copy_from_slice(from);
            }
            let pieces = block.iter();
            of.push(block_sum(
                pieces.map(|&(src, _, len)| &before[src as usize..][..len as usize]),
            ));
        }
        sums.push(of);
    }
    let table = table(kernels, parts, sides, options)?;
    let pairs = pairs(parts);
    let mut gather = table.gather(stream, &pairs)?;
    assert_eq!(gather.bytes(), parts.iter().map(Part::bytes).sum::<u64>());
    whole(gather.wait(soon())?);
    whole(gather.poll().ok_or("no end")?);
    assert!(sides.1.read()? == wanted, "{parts:?}");
    assert!(sides.0.read()? == before, "the source was written");
    for side in [Side::Source, Side::Destination] {
        assert_eq!(table.verify(stream, side, &pairs)?.wait(soon())?, sums);
    }
    assert!(sides.1.read()? == wanted, "the check wrote");
    some_tensors((&table, stream), parts, sides, random)?;
    Ok(gather)
}

/// Gathers some tensors of each section, now and then of one in two parts, and compares every byte.
fn some_tensors(
    (table, stream): (&GatherTable, &Stream),
    parts: &[Part],
    sides: (&Memory, &Memory),
    random: &mut Random,
) -> Outcome {
    let len = sides.1.read()?.len() as u64;
    let (from, mut wanted) = (sides.0.read()?, random.bytes(len));
    sides.1.write(&wanted)?;
    let mut some = Vec::new();
    for (section, part) in parts.iter().enumerate() {
        let count = part.tensors.len() as u64;
        let mut ends = [0; 3].map(|_| random.below(count + 1) as usize);
        ends.sort_unstable();
        let [first, middle, last] = ends;
        for tensors in [first..middle, middle..last] {
            let per_tensor = part.pairs.len();
            let chosen = tensors.start * per_tensor..tensors.end * per_tensor;
            for block in part.blocks().take(chosen.end).skip(chosen.start) {
                for (src, dst, len) in block {
                    let from = &from[src as usize..][..len as usize];
                    wanted[dst as usize..][..len as usize].copy_from_slice(from);
                }
            }
            let pairs = &part.pairs;
            some.push(GatherPart {
                section,
                tensors,
                pairs,
            });
        }
    }
    whole(table.gather_parts(stream, &some)?.wait(soon())?);
    assert!(sides.1.read()? == wanted, "{some:?}");
    Ok(())
}

#[test]
fn random_sections_arrive_whole_both_ways() -> Outcome {
    const LEN: u64 = 3 * MIB;
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let (sources, destinations) = (memories(LEN)?, memories(LEN)?);
    let mut random = Random(0x6761_7468_6572);
    let mut by_engine = 0;
    for round in 0..if on_host() { 60 } else { 120 } {
        let (from, src) = &sources[random.below(sources.len() as u64) as usize];
        let (to, dst) = &destinations[random.below(destinations.len() as u64) as usize];
        let most = [20, 300, 3000][random.below(3) as usize];
        let mut at = (random.below(30), random.below(30));
        let mut parts = Vec::new();
        for _ in 0..random.below(6) {
            let next = Part::random(&mut random, &mut at, most);
            if at.0.max(at.1) > LEN {
                break;
            }
            parts.push(next);
        }
        let options = GatherOptions {
            max_workgroups: [None, Some(1), Some(3), Some(0)][random.below(4) as usize],
            workgroups: [None, Some(0), Some(17), Some(u32::MAX)][random.below(4) as usize],
            threads: [None, Some(64), Some(1)][random.below(3) as usize],
            copy_engine_from: [None, Some(0), Some(1), Some(2000)][random.below(4) as usize],
        };
        let words = format!("round {round}, {from} to {to}, {options:?}: {parts:?}");
        let gather = compare(&kernels, &stream, &parts, (src, dst), options, &mut random)
            .map_err(|e| format!("{words}: {e}"))?;
        by_engine += u64::from(gather.engine_bytes() > 0);
    }
    assert!(by_engine > 5, "{by_engine} rounds had copies");
    Ok(())
}

/// Blocks of `block` bytes that lie behind each other in one tensor, all of them, in an order of their own on
/// each side.
fn shuffled(block: u64, blocks: u32, random: &mut Random) -> Part {
    let mut order: Vec<u32> = (0..blocks).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, random.below(i as u64 + 1) as usize);
    }
    Part {
        tensors: vec![(0, 0)],
        pieces: vec![Piece {
            src: 0,
            dst: 0,
            len: block,
        }],
        strides: (block, block),
        blocks: (blocks, blocks),
        pairs: (0..)
            .zip(order)
            .map(|(src, dst)| Pair { src, dst })
            .collect(),
    }
}

#[test]
fn a_hundred_thousand_blocks() -> Outcome {
    const BLOCKS: u32 = 100_000;
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let mut random = Random(100_000);
    for block in [1, 97] {
        let part = [shuffled(block, BLOCKS, &mut random)];
        let len = block * u64::from(BLOCKS) + 5;
        for (_, src) in memories(len)? {
            for (_, dst) in memories(len)? {
                let options = GatherOptions::default();
                compare(&kernels, &stream, &part, (&src, &dst), options, &mut random)?;
            }
        }
    }
    Ok(())
}

#[test]
fn what_lies_behind_each_other_is_the_copy_engines() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let mut random = Random(5);
    let straight = |random: &mut Random| {
        let mut part = shuffled(1000, 3000, random);
        part.pairs = (0..3000).map(|i| Pair { src: i, dst: i }).collect();
        part
    };
    let len = 3_000_000;
    let (src, dst) = (
        Memory::Gpu(GpuMemory::new(&gpu, len)?),
        Memory::Gpu(GpuMemory::new(&gpu, len)?),
    );
    let options = |from| GatherOptions {
        copy_engine_from: from,
        ..GatherOptions::default()
    };
    // All; none, for it is never or not enough; half.
    for (from, swap, engine) in [
        (Some(3_000_000), None, 3_000_000),
        (Some(3_000_001), None, 0),
        (Some(0), None, 0),
        // Two blocks that have changed places end a run of 2000.
        (Some(1_500_000), Some(2000), 2_000_000),
    ] {
        let mut part = straight(&mut random);
        if let Some(at) = swap {
            let next: &mut [Pair] = &mut part.pairs[at..at + 2];
            (next[0].src, next[1].src) = (next[1].src, next[0].src);
        }
        let parts = [part];
        let gather = compare(
            &kernels,
            &stream,
            &parts,
            (&src, &dst),
            options(from),
            &mut random,
        )?;
        assert_eq!(gather.engine_bytes(), engine, "{from:?}");
        assert_eq!(gather.workgroups() == 0, engine == 3_000_000);
    }
    // A piece that is large by itself.
    let mut part = straight(&mut random);
    part.pieces = vec![
        Piece {
            src: 0,
            dst: 10,
            len: 90,
        },
        Piece {
            src: 100,
            dst: 100,
            len: 900,
        },
    ];
    let gather = compare(
        &kernels,
        &stream,
        &[part],
        (&src, &dst),
        options(Some(900)),
        &mut random,
    )?;
    assert_eq!(gather.engine_bytes(), 900 * 3000);
    Ok(())
}

#[test]
fn nothing_is_a_transfer_too() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    whole(
        kernels
            .table(&[], GatherOptions::default())?
            .gather(&stream, &[])?
            .wait(soon())?,
    );
    let mut part = shuffled(100, 10, &mut Random(1));
    let memory = || Ok::<_, Error>(Memory::Gpu(GpuMemory::new(&gpu, 1000)?));
    let (src, dst) = (memory()?, memory()?);
    part.pairs.clear();
    let parts = [part];
    compare(
        &kernels,
        &stream,
        &parts,
        (&src, &dst),
        GatherOptions::default(),
        &mut Random(2),
    )?;
    let [mut part] = parts;
    part.blocks = (0, 0);
    part.pieces.clear();
    compare(
        &kernels,
        &stream,
        &[part],
        (&src, &dst),
        GatherOptions::default(),
        &mut Random(3),
    )?;
    Ok(())
}

/// A reader on another stream, behind the transfer's event and the acquire fence, finds each time what was sent.
///
/// On a machine whose GPUs are coherent, as H200s are, this cannot fail for want of the fence: it shows that the
/// streams, events and fences fit together. For the fence itself on AMD there is the disassembly alone.
#[test]
fn a_reader_behind_the_fence_finds_each_of_a_thousand_transfers() -> Outcome {
    let gpu = gpu();
    let kernels = GpuKernels::load(&gpu)?;
    let (producer, mover, reader) = (Stream::new(&gpu)?, Stream::new(&gpu)?, Stream::new(&gpu)?);
    let mut random = Random(1000);
    let part = shuffled(1001, 64, &mut random);
    let len = 64 * 1001;
    let (near, pinned) = (GpuMemory::new(&gpu, len)?, PinnedMemory::new(&gpu, len)?);
    for (_, src) in memories(len)? {
        let Memory::Gpu(src) = src else { continue };
        let sides = (Memory::Gpu(src.clone()), Memory::Gpu(near.clone()));
        let parts = [Part {
            pairs: part.pairs.clone(),
            ..shuffled(1001, 64, &mut random)
        }];
        let table = table(
            &kernels,
            &parts,
            (&sides.0, &sides.1),
            GatherOptions::default(),
        )?;
        let pairs = pairs(&parts);
        for round in 0..if on_host() { 200 } else { 1000_u64 } {
            let bytes = Random(round).bytes(len);
            pinned.host().write(0, &bytes)?;
            let copy = kvxfer_hipmem::gpu::Copy {
                dst: Place::Gpu(&src, 0),
                src: Place::Pinned(&pinned, 0),
                len,
            };
            producer.copy(&[copy])?;
            let released = kernels.release(&producer)?;
            mover.wait_event(released.event())?;
            let mut gather = table.gather(&mover, &pairs)?;
            reader.wait_event(gather.event())?;
            let fence = kernels.acquire(&reader)?;
            let found = table
                .verify(&reader, Side::Destination, &pairs)?
                .wait(soon())?;
            let wanted = part
                .pairs
                .iter()
                .map(|pair| block_sum([&bytes[pair.src as usize * 1001..][..1001]]));
            assert_eq!(found, [wanted.collect::<Vec<_>>()], "round {round}");
            fence.wait(soon())?;
            released.wait(soon())?;
            whole(gather.wait(soon())?);
        }
    }
    Ok(())
}

#[test]
fn what_is_not_inside_is_refused_and_nothing_is_copied() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let src = Memory::Gpu(GpuMemory::new(&gpu, 1000)?);
    let dst = Memory::Pinned(PinnedMemory::new(&gpu, 1000)?);
    src.write(&pattern(1000, 1))?;
    dst.write(&pattern(1000, 2))?;
    let good = || Part {
        tensors: vec![(0, 0)],
        ..shuffled(100, 10, &mut Random(1))
    };
    let none = GatherOptions::default();
    let refused = |part: Part| gather_fault(table(&kernels, &[good(), part], (&src, &dst), none));
    let outside = |part: Part| match refused(part) {
        GatherFault::Outside {
            section: 1,
            tensor,
            side,
            end,
            ..
        } => (tensor, side, end),
        other => panic!("{other}"),
    };
    let piece = |src, dst, len| Piece { src, dst, len };
    let with = |change: fn(&mut Part)| {
        let mut part = good();
        change(&mut part);
        part
    };
    assert_eq!(outside(with(|p| p.blocks.0 = 11)), (0, Side::Source, 1100));
    assert_eq!(
        outside(with(|p| p.blocks.1 = 11)),
        (0, Side::Destination, 1100)
    );
    assert_eq!(
        outside(with(|p| p.tensors.push((1, 0)))),
        (1, Side::Source, 1000)
    );
    assert_eq!(
        outside(with(|p| p.tensors.push((0, 1)))),
        (1, Side::Destination, 1000)
    );
    assert_eq!(
        outside(with(|p| p.tensors.push((1001, 0)))),
        (1, Side::Source, 1000)
    );
    assert_eq!(
        outside(with(|p| p.strides.1 = 101)),
        (0, Side::Destination, 1009)
    );
    let mut part = good();
    part.pieces.push(piece(0, 1, 100));
    assert_eq!(outside(part), (0, Side::Destination, 1001));
    let mut part = good();
    part.pieces.push(piece(u64::MAX, 0, u64::MAX));
    assert!(outside(part).2 > u128::from(u64::MAX));
    assert_eq!(
        outside(with(|p| (p.strides.0, p.blocks.0) = (u64::MAX, u32::MAX))).1,
        Side::Source
    );
    // A request that the table does not have.
    let parts = [good(), good()];
    let table = table(&kernels, &parts, (&src, &dst), none)?;
    let all = pairs(&parts);
    let lists = |pairs: &[&[Pair]]| gather_fault(table.gather(&stream, pairs));
    assert_eq!(
        lists(&all[..1]),
        GatherFault::Lists {
            given: 1,
            sections: 2
        }
    );
    let bad = [Pair { src: 0, dst: 0 }, Pair { src: 10, dst: 0 }];
    let expected = GatherFault::NoSuchBlock {
        section: 1,
        pair: 1,
        side: Side::Source,
        block: 10,
        blocks: 10,
    };
    assert_eq!(lists(&[all[0], &bad]), expected);
    assert_eq!(
        gather_fault(table.verify(&stream, Side::Source, &[all[0], &bad])),
        expected
    );
    let bad = [Pair {
        src: 9,
        dst: u32::MAX,
    }];
    assert!(matches!(
        lists(&[&bad, all[1]]),
        GatherFault::NoSuchBlock {
            section: 0,
            side: Side::Destination,
            block: u32::MAX,
            ..
        }
    ));
    stream.wait(soon())?;
    assert_eq!(dst.read()?, pattern(1000, 2));
    // The table is as good as before.
    whole(table.gather(&stream, &[all[0], &[]])?.wait(soon())?);
    Ok(())
}

#[test]
fn tensors_that_a_table_does_not_have_are_refused() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let (src, dst) = (memories(MIB)?, memories(MIB)?);
    let part = shuffled(256, 8, &mut Random(3));
    let sides = (&src[0].1, &dst[0].1);
    let table = table(&kernels, &[part], sides, GatherOptions::default())?;
    for (section, tensors) in [(0, 0..2), (0, 2..2), (1, 0..0), (0, 0..usize::MAX)] {
        let (from, to) = (tensors.start, tensors.end);
        let pairs = &[];
        let part = GatherPart {
            section,
            tensors,
            pairs,
        };
        let found = gather_fault(table.gather_parts(&stream, &[part]));
        assert_eq!(found, GatherFault::NoSuchTensors { section, from, to });
    }
    Ok(())
}
