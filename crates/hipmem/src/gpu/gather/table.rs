//! What stays the same for all transfers with a peer: tensors, pieces, strides, and how many blocks there are.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::super::device::same_runtime;
use super::super::stream::{Keep, way};
use super::GpuKernels;
use super::error::{GatherFault, Side};
use super::launch::{GatherPart, Part};
use super::route::{Grid, Route};
use crate::error::{Error, Operation};
use crate::gpu::pool::Touched;
use crate::gpu::{Gpu, GpuMemory, PeerHostMemory, PinnedMemory, Place};
use crate::kernels::{Pair, Piece, Table, Tensor, bytes_of};

/// Block 0 of a tensor on both sides.
#[derive(Debug, Clone, Copy)]
pub struct TensorPlaces<'a> {
    /// Where it is read.
    pub src: Place<'a>,
    /// Where it is written.
    pub dst: Place<'a>,
}

/// Tensors that lie alike.
#[derive(Debug, Clone, Copy)]
pub struct GatherSection<'a> {
    /// The tensors, such as K and V of each layer.
    pub tensors: &'a [TensorPlaces<'a>],
    /// The stretches of a block that are contiguous on both sides.
    pub pieces: &'a [Piece],
    /// Bytes from one block to the next, at the source and at the destination.
    pub strides: (u64, u64),
    /// Blocks that there are at the source and at the destination.
    pub blocks: (u32, u32),
}

/// How a table's transfers are made, where not by the defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GatherOptions {
    /// The most workgroups of a launch: an engine wants its compute units.
    pub max_workgroups: Option<u32>,
    /// Workgroups of a large transfer's launch, in place of the default.
    pub workgroups: Option<u32>,
    /// Threads of a workgroup, up to 1024.
    pub threads: Option<u32>,
    /// From how many bytes on the copy engine takes what lies behind each other on both sides; 0: never.
    pub copy_engine_from: Option<u64>,
}

/// A table of sections, checked and in the GPU's memory. It holds all memory that it names. Clones are the same.
#[derive(Clone)]
pub struct GatherTable(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) kernels: GpuKernels,
    pub(super) sections: Vec<Section>,
    pub(super) grid: Grid,
    /// Tensors and pieces.
    _device: GpuMemory,
    pub(super) memories: Vec<Keep>,
}

/// A section as it is kept.
pub(super) struct Section {
    pub(super) tensors: Table,
    /// All pieces, for checks.
    pub(super) pieces: Table,
    /// Those that the kernel copies, and the longest of them.
    pub(super) small: Table,
    pub(super) longest: u64,
    /// Bytes of a block of one tensor in `small`.
    pub(super) small_bytes: u64,
    pub(super) strides: (u64, u64),
    pub(super) blocks: (u32, u32),
    /// What the copy engine can take of it.
    pub(super) engine: Engine,
}

/// What the copy engine takes of a section.
pub(super) struct Engine {
    /// Empty where it never takes anything.
    pub(super) tensors: Vec<Tensors>,
    /// Pieces that are its own.
    pub(super) large: Vec<Piece>,
    /// The only piece, if blocks lie behind each other on both sides, and how many of them in turn are the
    /// copy engine's.
    pub(super) merge: Option<(Piece, u64)>,
}

/// Block 0 of one tensor at the source and at the destination.
pub(super) type Tensors = (Owned, Owned);

/// A place that holds its memory.
pub(super) enum Owned {
    Gpu(GpuMemory, u64),
    Pinned(PinnedMemory, u64),
    PeerHost(PeerHostMemory, u64),
}

impl Owned {
    fn of(place: Place<'_>) -> Self {
        match place {
            Place::Gpu(memory, at) => Self::Gpu(memory.clone(), at),
            Place::Pinned(memory, at) => Self::Pinned(memory.clone(), at),
            Place::PeerHost(memory, at) => Self::PeerHost(memory.clone(), at),
        }
    }

    /// The place `by` bytes on; it has been checked that this is inside.
    pub(super) fn at(&self, by: u64) -> Place<'_> {
        match self {
            Self::Gpu(memory, at) => Place::Gpu(memory, at.saturating_add(by)),
            Self::Pinned(memory, at) => Place::Pinned(memory, at.saturating_add(by)),
            Self::PeerHost(memory, at) => Place::PeerHost(memory, at.saturating_add(by)),
        }
    }
}

/// Where the last byte ends that a section names of a tensor, from where block 0 begins.
pub(super) fn end(stride: u64, blocks: u32, pieces: impl Iterator<Item = (u64, u64)>) -> u128 {
    let Some(last) = blocks.checked_sub(1) else {
        return 0;
    };
    let piece = pieces.map(|(at, len)| u128::from(at) + u128::from(len));
    u128::from(stride) * u128::from(last) + piece.max().unwrap_or(0)
}

/// Checks one side of a tensor: that all its blocks are inside its memory, which the GPU reaches.
pub(super) fn check(
    gpu: &Gpu,
    (section, tensor, side): (usize, usize, Side),
    place: Place<'_>,
    end: u128,
) -> Result<(), Error> {
    let room = place.room();
    if end > u128::from(room) {
        return Err(GatherFault::Outside {
            section,
            tensor,
            side,
            end,
            room,
        }
        .into());
    }
    same_runtime("the memory", place.gpu(), gpu)?;
    if let (Side::Destination, Place::PeerHost(..)) = (side, place) {
        place.range(Operation::CopyDestination, 0)?;
    }
    match place {
        Place::Gpu(memory, _) if memory.gpu() != gpu => {
            if memory.is_opened() {
                return Err(GatherFault::OpenedElsewhere {
                    section,
                    tensor,
                    side,
                    opened: memory.gpu().info().pci,
                    gpu: gpu.info().pci,
                }
                .into());
            }
            gpu.enable_access(memory.gpu())
        }
        // The runtime's pinned memory is every device's.
        Place::Gpu(..) | Place::Pinned(..) | Place::PeerHost(..) => Ok(()),
    }
}

pub(super) fn count(section: usize, what: &'static str, count: usize) -> Result<u32, Error> {
    let fits = u32::try_from(count).ok().filter(|n| *n < 1 << 31);
    fits.ok_or_else(|| {
        GatherFault::TooMany {
            section,
            what,
            count,
        }
        .into()
    })
}

/// The tables' bytes, and where the next one goes.
struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    fn put(&mut self, bytes: &[u8], len: u32) -> Table {
        let addr = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        Table { addr, len }
    }
}

impl GpuKernels {
    /// Checks sections and puts them into the GPU's memory. The GPU is given access to other GPUs whose memory
    /// they name.
    ///
    /// # Errors
    ///
    /// [`GatherFault`] and [`GpuFault::NoPeerAccess`](crate::gpu::GpuFault::NoPeerAccess) for memory that is
    /// too short or out of reach; [`Error::Gpu`].
    pub fn table(
        &self,
        sections: &[GatherSection<'_>],
        options: GatherOptions,
    ) -> Result<GatherTable, Error> {
        let gpu = self.gpu();
        let mut memories: Vec<Keep> = Vec::new();
        let mut len = 0;
        for (i, section) in sections.iter().enumerate() {
            let pieces = section.pieces.iter();
            let src_end = end(
                section.strides.0,
                section.blocks.0,
                pieces.map(|p| (p.src, p.len)),
            );
            let pieces = section.pieces.iter();
            let dst_end = end(
                section.strides.1,
                section.blocks.1,
                pieces.map(|p| (p.dst, p.len)),
            );
            for (j, tensor) in section.tensors.iter().enumerate() {
                check(gpu, (i, j, Side::Source), tensor.src, src_end)?;
                check(gpu, (i, j, Side::Destination), tensor.dst, dst_end)?;
                memories.extend([tensor.src.keep(), tensor.dst.keep()]);
            }
            len += size_of_val(section.tensors) + 2 * size_of_val(section.pieces);
        }
        memories.sort_by_key(|keep| Arc::as_ptr(keep).cast::<()>());
        memories.dedup_by_key(|keep| Arc::as_ptr(keep).cast::<()>());
        // Sections that name nothing need a table's address too.
        let device = GpuMemory::pooled(gpu, (len as u64).max(8), Touched::ByOwn)?;
        let mut tables = Tables {
            base: device.addr(),
            bytes: Vec::with_capacity(len),
        };
        let mut grid: Option<Grid> = None;
        let mut kept = Vec::with_capacity(sections.len());
        for (i, section) in sections.iter().enumerate() {
            kept.push(self.keep(i, section, options, &mut tables, &mut grid)?);
        }
        device.write(0, &tables.bytes)?;
        let mut grid = grid.unwrap_or(Route::Local.grid(gpu, self.0.warp));
        if let Some(workgroups) = options.workgroups {
            grid.workgroups = workgroups;
        }
        if let Some(most) = options.max_workgroups {
            grid.workgroups = grid.workgroups.min(most.max(1));
        }
        if let Some(threads) = options.threads {
            grid.threads = threads;
        }
        Ok(GatherTable(Arc::new(Inner {
            kernels: self.clone(),
            sections: kept,
            grid,
            _device: device,
            memories,
        })))
    }

    /// One section, which has been checked.
    fn keep(
        &self,
        i: usize,
        section: &GatherSection<'_>,
        options: GatherOptions,
        tables: &mut Tables,
        grid: &mut Option<Grid>,
    ) -> Result<Section, Error> {
        let gpu = self.gpu();
        let mut addrs = Vec::with_capacity(section.tensors.len());
        let mut engine_from = None::<u64>;
        let mut engine_can = true;
        for tensor in section.tensors {
            addrs.push(Tensor {
                src: tensor.src.device_addr(),
                dst: tensor.dst.device_addr(),
            });
            let route = Route::of(gpu, tensor.src, tensor.dst);
            let most = route.grid(gpu, self.0.warp);
            if grid.is_none_or(|g| g.workgroups < most.workgroups) {
                *grid = Some(most);
            }
            let from = options.copy_engine_from.or(route.copy_engine_from(gpu));
            engine_can &=
                from.is_some_and(|from| from > 0) && way(tensor.dst, tensor.src).is_some();
            engine_from = engine_from.max(from);
        }
        let from = engine_from.filter(|_| engine_can).unwrap_or(u64::MAX);
        let (large, small): (Vec<Piece>, Vec<Piece>) =
            section.pieces.iter().partition(|piece| piece.len >= from);
        let merge = match small.as_slice() {
            [piece]
                if large.is_empty()
                    && piece.len > 0
                    && section.strides == (piece.len, piece.len) =>
            {
                (from != u64::MAX).then(|| (*piece, from.div_ceil(piece.len)))
            }
            _ => None,
        };
        let needed = !large.is_empty() || merge.is_some();
        let owned = |tensor: &TensorPlaces<'_>| (Owned::of(tensor.src), Owned::of(tensor.dst));
        let tensors = count(i, "tensors", addrs.len())?;
        let pieces = count(i, "pieces", section.pieces.len())?;
        let small_len = count(i, "pieces", small.len())?;
        Ok(Section {
            tensors: tables.put(bytes_of(&addrs), tensors),
            pieces: tables.put(bytes_of(section.pieces), pieces),
            small: tables.put(bytes_of(&small), small_len),
            longest: small.iter().map(|piece| piece.len).max().unwrap_or(0),
            // Pieces of one block are inside one memory, but may be the same bytes more than once.
            small_bytes: small
                .iter()
                .fold(0, |sum, piece| sum.saturating_add(piece.len)),
            strides: section.strides,
            blocks: section.blocks,
            engine: Engine {
                tensors: match needed {
                    true => section.tensors.iter().map(owned).collect(),
                    false => Vec::new(),
                },
                large,
                merge,
            },
        })
    }
}

impl GatherTable {
    /// The kernels that its transfers run.
    #[must_use]
    pub fn kernels(&self) -> &GpuKernels {
        &self.0.kernels
    }

    /// Checks that there is a list for each section.
    pub(super) fn check_lists(&self, pairs: &[&[Pair]]) -> Result<(), Error> {
        let (given, sections) = (pairs.len(), self.0.sections.len());
        match given == sections {
            true => Ok(()),
            false => Err(GatherFault::Lists { given, sections }.into()),
        }
    }

    /// All tensors of each section, with its list of pairs.
    pub(super) fn all_of<'a>(
        &self,
        pairs: &'a [&'a [Pair]],
    ) -> impl Iterator<Item = GatherPart<'a>> {
        let sections = self.0.sections.iter().zip(pairs).enumerate();
        sections.map(|(at, (section, pairs))| GatherPart {
            section: at,
            tensors: 0..section.tensors.len as usize,
            pairs,
        })
    }

    /// Checks a request: tensors and blocks that there are. Gives each part as a kernel is told of it, and what
    /// of it the copy engine may take.
    pub(super) fn check<'a>(
        &'a self,
        parts: &[GatherPart<'a>],
    ) -> Result<Vec<(Part<'a>, &'a [Tensors])>, Error> {
        let mut out = Vec::with_capacity(parts.len());
        for part in parts {
            let (section, pairs, tensors) = (part.section, part.pairs, part.tensors.clone());
            let unknown = || GatherFault::NoSuchTensors {
                section,
                from: tensors.start,
                to: tensors.end,
            };
            let of = self.0.sections.get(section).ok_or_else(unknown)?;
            let there = of.tensors.len as usize;
            if tensors.start > tensors.end || tensors.end > there {
                return Err(unknown().into());
            }
            count(section, "pairs", pairs.len())?;
            let refuse = |pair, side, block, blocks| GatherFault::NoSuchBlock {
                section,
                pair,
                side,
                block,
                blocks,
            };
            for (i, pair) in pairs.iter().enumerate() {
                if pair.src >= of.blocks.0 {
                    return Err(refuse(i, Side::Source, pair.src, of.blocks.0).into());
                }
                if pair.dst >= of.blocks.1 {
                    return Err(refuse(i, Side::Destination, pair.dst, of.blocks.1).into());
                }
            }
            let part = Part {
                section: of,
                tensors: Table {
                    addr: of.tensors.addr + (tensors.start * size_of::<Tensor>()) as u64,
                    len: count(section, "tensors", tensors.len())?,
                },
                pairs: Cow::Borrowed(pairs),
            };
            // Empty where it never takes anything.
            let of_engine = of.engine.tensors.get(tensors).unwrap_or_default();
            out.push((part, of_engine));
        }
        Ok(out)
    }
}

impl fmt::Debug for GatherTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sections = self.0.sections.len();
        write!(f, "table of {sections} sections for {:?}", self.0.kernels)
    }
}
