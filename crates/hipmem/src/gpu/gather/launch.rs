//! A transfer that is on its way: its launch, its end, and how it is stopped.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::api::{CopySpan, Direction};
use super::super::device::same;
use super::super::event::poll;
use super::super::stream::{Keep, way};
use super::GpuKernels;
use super::error::GatherFault;
use super::request::{Run, runs};
use super::route::Grid;
use super::scratch::{MAX_WORKGROUPS, SLOT, Scratch, TABLES};
use super::table::{GatherTable, Section, Tensors};
use crate::error::{Error, Operation};
use crate::gpu::{Event, Pending, Place, Stream};
use crate::kernels::{
    self, ABORTED, GatherArgs, GatherShape, Pair, Piece, Table, bytes_of, spread,
};

/// Transfers of so few bytes have their tables read over the bus: a copy before the launch would take longer than
/// the launch.
const READ_OVER_BUS: u64 = 256 << 10;

/// And tables of so few bytes: about as many lines as one workgroup's warps ask for at once.
const BUS_TABLES: u64 = 4 << 10;

/// How long the slots are looked at before the runtime is asked whether something went wrong.
const ASK_AFTER: Duration = Duration::from_micros(200);

/// How a transfer has ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum GatherEnd {
    /// Every byte is there, for every device and the host.
    Whole,
    /// It was told to stop and did, somewhere.
    Aborted {
        /// Bytes that were copied.
        bytes: u64,
    },
    /// The GPU has refused it or lost it. What was copied is not known.
    Failed(Error),
}

/// A transfer on a stream. It ends, and keeps its memory until then, whether or not this value is kept.
#[derive(Debug)]
pub struct Gather {
    kernels: GpuKernels,
    pending: Pending,
    /// Parts on other streams, which `pending` ends after: so they let go when it has.
    _beside: Vec<Pending>,
    scratch: Arc<Scratch>,
    sequence: u64,
    /// Of the launch; 0 where the copy engine does all.
    workgroups: u32,
    /// How many of them have said that they ended.
    ended: u32,
    /// What the launch copies.
    launched: u64,
    /// What the copy engine copies.
    copied: u64,
    since: Instant,
}

/// What a transfer copies of one section.
#[derive(Debug, Clone)]
pub struct GatherPart<'a> {
    /// The section's place in the table.
    pub section: usize,
    /// Those of its tensors that are meant.
    pub tensors: Range<usize>,
    /// The blocks.
    pub pairs: &'a [Pair],
}

/// A part as a kernel is told of it.
pub(super) struct Part<'a> {
    pub(super) section: &'a Section,
    /// The tensors' table.
    pub(super) tensors: Table,
    pub(super) pairs: Cow<'a, [Pair]>,
}

/// A request, cut into what the kernel does and what the copy engine does.
struct Cut<'a> {
    /// What the kernel copies.
    parts: Vec<Part<'a>>,
    launched: u64,
    copies: Vec<CopySpan>,
    copied: u64,
}

impl<'a> Cut<'a> {
    fn new(parts: impl Iterator<Item = (Part<'a>, &'a [Tensors])>) -> Result<Self, Error> {
        let mut cut = Self {
            parts: Vec::with_capacity(parts.size_hint().0),
            launched: 0,
            copies: Vec::new(),
            copied: 0,
        };
        for (mut part, of_engine) in parts {
            let section = part.section;
            for piece in &section.engine.large {
                for first in &*part.pairs {
                    let first = *first;
                    cut.copy((section, of_engine), piece, &Run { first, blocks: 1 })?;
                }
            }
            if let Some((piece, at_least)) = &section.engine.merge {
                let (found, rest) = runs(part.pairs, *at_least);
                for run in &found {
                    cut.copy((section, of_engine), piece, run)?;
                }
                part.pairs = rest;
            }
            let blocks = u64::from(part.tensors.len).saturating_mul(part.pairs.len() as u64);
            let bytes = blocks.saturating_mul(section.small_bytes);
            cut.launched = cut.launched.saturating_add(bytes);
            if section.small_bytes == 0 {
                part.pairs = Cow::Borrowed(&[]);
            }
            cut.parts.push(part);
        }
        Ok(cut)
    }

    /// A run of each tensor. The range check is one more than is needed.
    fn copy(
        &mut self,
        (section, tensors): (&Section, &[Tensors]),
        piece: &Piece,
        run: &Run,
    ) -> Result<(), Error> {
        let len = piece.len.saturating_mul(run.blocks);
        let at = |block: u32, stride: u64, by: u64| {
            u64::from(block).saturating_mul(stride).saturating_add(by)
        };
        let from = at(run.first.src, section.strides.0, piece.src);
        let to = at(run.first.dst, section.strides.1, piece.dst);
        for (src, dst) in tensors {
            let (src, dst) = (src.at(from), dst.at(to));
            let Some(way) = way(dst, src) else {
                continue;
            };
            self.copies.push(CopySpan {
                dst: dst.range(Operation::CopyDestination, len)?,
                src: src.range(Operation::CopySource, len)?,
                len,
                way,
            });
            self.copied = self.copied.saturating_add(len);
        }
        Ok(())
    }
}

/// Puts parts into the staging memory, as a kernel reads them: sections, then pairs, from `base` on.
pub(super) fn stage_tables(
    scratch: &Scratch,
    parts: &[Part<'_>],
    base: u64,
    of: impl Fn(&Section) -> (Table, u64),
    shape: (u32, u32),
) -> Result<(), Error> {
    let (chunk, warps) = shape;
    let mut at = base + size_of::<kernels::Section>() as u64 * parts.len() as u64;
    let mut sections = Vec::with_capacity(parts.len());
    for part in parts {
        let (section, pairs) = (part.section, &part.pairs);
        let (pieces, longest) = of(section);
        let len = u32::try_from(pairs.len()).unwrap_or(u32::MAX);
        let pairs_at = Table { addr: at, len };
        sections.push(kernels::Section::new(
            part.tensors,
            pairs_at,
            pieces,
            section.strides,
            longest,
            chunk,
        )?);
        at += size_of_val::<[Pair]>(pairs) as u64;
    }
    spread(&mut sections, warps);
    let staging = scratch.staging().host();
    let sections = bytes_of(&sections);
    staging.write(TABLES, sections)?;
    let mut at = TABLES + sections.len() as u64;
    for part in parts {
        let pairs = bytes_of(&part.pairs);
        staging.write(at, pairs)?;
        at += pairs.len() as u64;
    }
    Ok(())
}

/// The bytes that [`stage_tables`] puts there.
pub(super) fn tables_len(parts: &[Part<'_>]) -> u64 {
    let of = |part: &Part<'_>| size_of::<kernels::Section>() + size_of_val::<[Pair]>(&part.pairs);
    parts.iter().map(of).sum::<usize>() as u64
}

/// Puts the abort word of a scratch right before what comes next on a stream. It goes the way that aborts go: so one
/// that comes for the next launch is not undone, however long that waits for its turn.
pub(super) fn clear_abort(
    kernels: &GpuKernels,
    scratch: &Arc<Scratch>,
    stream: &Stream,
) -> Result<(), Error> {
    if !scratch.was_told() {
        return Ok(());
    }
    let (word, zero) = (
        scratch.device().addr(),
        kernels.0.words.range(Operation::CopySource, 4, 4)?,
    );
    let keep: Vec<Keep> = vec![Arc::clone(scratch) as Keep, words(kernels)];
    let cleared = kernels.0.aborts.put(keep, |raw| {
        let api = kernels.gpu().api();
        // SAFETY: `keep` has the words and the scratch.
        Ok(unsafe { api.copy(word, zero, 4, Direction::HostToDevice, raw) }?)
    })?;
    stream.wait_event(cleared.event())?;
    scratch.untell();
    Ok(())
}

/// What abort words are set from.
fn words(kernels: &GpuKernels) -> Keep {
    Place::Pinned(&kernels.0.words, 0).keep()
}

/// Puts the tables into the GPU's memory, in a stream's order.
///
/// # Safety
///
/// `scratch` is held until the stream has got past it; the device is current.
pub(super) unsafe fn put_tables(
    kernels: &GpuKernels,
    scratch: &Scratch,
    tables: Option<u64>,
    stream: u64,
) -> Result<(), Error> {
    let api = kernels.gpu().api();
    let to = scratch.device().addr();
    if let Some(len) = tables.filter(|len| *len > 0) {
        let from = scratch
            .staging()
            .range(Operation::CopySource, TABLES, len)?;
        // SAFETY: both are of the scratch, which is as long on both sides.
        unsafe { api.copy(to + TABLES, from, len, Direction::HostToDevice, stream) }?;
    }
    Ok(())
}

/// A launch whose tables go into a scratch.
pub(super) struct Launch {
    pub(super) scratch: Arc<Scratch>,
    pub(super) shape: GatherShape,
    /// 0: there is nothing to launch.
    pub(super) workgroups: u32,
    launched: u64,
    /// Bytes of the tables, and whether they are read where they were written.
    len: u64,
    over_bus: bool,
}

impl Launch {
    /// Of a launch that copies so many bytes and has tables of so many.
    pub(super) fn new(
        kernels: &GpuKernels,
        grid: Grid,
        launched: u64,
        len: u64,
    ) -> Result<Self, Error> {
        let most = grid.workgroups.min(MAX_WORKGROUPS);
        let shape = GatherShape::new(launched, kernels.0.warp, most, grid.threads);
        let scratch = kernels.scratch(len).map_err(|error| match error {
            Error::Gpu(fault) => GatherFault::NotBegun(fault).into(),
            error => error,
        })?;
        Ok(Self {
            scratch,
            workgroups: match launched {
                0 => 0,
                _ => shape.workgroups,
            },
            shape,
            launched,
            len,
            over_bus: launched <= READ_OVER_BUS && len <= BUS_TABLES,
        })
    }

    /// Where the kernel finds the tables.
    pub(super) fn tables(&self) -> u64 {
        let base = match self.over_bus {
            true => self.scratch.staging().device_addr(),
            false => self.scratch.device().addr(),
        };
        base + TABLES
    }

    pub(super) fn args(&self, kernels: &GpuKernels, sections: usize) -> GatherArgs {
        GatherArgs {
            sections: self.tables(),
            slots: self.scratch.slots().device_addr(),
            abort: self.scratch.device().addr(),
            sequence: kernels.sequence(),
            sections_len: u32::try_from(sections).unwrap_or(0),
            poll_bytes: self.shape.poll_bytes,
        }
    }

    /// Puts it on a stream.
    ///
    /// # Safety
    ///
    /// The tables in the scratch name memory that is there, and it and the scratch are held until the launch has
    /// ended; the device is current.
    pub(super) unsafe fn put(
        &self,
        kernels: &GpuKernels,
        args: &GatherArgs,
        stream: u64,
    ) -> Result<(), Error> {
        if self.workgroups == 0 {
            return Ok(());
        }
        let copied = (!self.over_bus).then_some(self.len);
        // SAFETY: the caller holds the scratch, and the device is current.
        unsafe { put_tables(kernels, &self.scratch, copied, stream) }?;
        let args = bytes_of(std::slice::from_ref(args));
        let (workgroups, threads) = (self.workgroups, self.shape.threads);
        // SAFETY: the kernels hold the module, and the caller all that the tables name. It ends: its counts are
        // finite.
        unsafe { kernels.0.gather.put(stream, workgroups, threads, args) }
    }

    /// The transfer that it is, once it is on the stream.
    pub(super) fn begun(self, kernels: &GpuKernels, pending: Pending, args: &GatherArgs) -> Gather {
        Gather {
            kernels: kernels.clone(),
            pending,
            _beside: Vec::new(),
            scratch: self.scratch,
            sequence: args.sequence,
            workgroups: self.workgroups,
            ended: 0,
            launched: self.launched,
            copied: 0,
            since: Instant::now(),
        }
    }
}

impl GatherTable {
    /// Puts a transfer of these block pairs, a list for each section, on a stream of the kernels' GPU.
    ///
    /// What it costs the host grows with the pairs alone. A copy engine's part is copied to its end even if the
    /// transfer is told to stop.
    ///
    /// # Errors
    ///
    /// [`GatherFault::Lists`], [`GatherFault::NoSuchBlock`], [`GatherFault::TooMany`],
    /// [`GpuFault::OtherStreamDevice`](crate::gpu::GpuFault::OtherStreamDevice); then nothing was put.
    /// [`Error::Gpu`]; then some of it may have been.
    pub fn gather(&self, stream: &Stream, pairs: &[&[Pair]]) -> Result<Gather, Error> {
        self.check_lists(pairs)?;
        let parts: Vec<GatherPart<'_>> = self.all_of(pairs).collect();
        self.gather_parts(stream, &parts)
    }

    /// The same of some tensors, such as those of one layer. A section may be named more than once.
    ///
    /// # Errors
    ///
    /// [`GatherFault::NoSuchTensors`], [`GatherFault::NoSuchBlock`], [`GatherFault::TooMany`],
    /// [`GpuFault::OtherStreamDevice`](crate::gpu::GpuFault::OtherStreamDevice); then nothing was put.
    /// [`Error::Gpu`]; then some of it may have been.
    pub fn gather_parts(&self, stream: &Stream, of: &[GatherPart<'_>]) -> Result<Gather, Error> {
        let kernels = &self.0.kernels;
        same("the table", kernels.gpu(), stream.gpu())?;
        let cut = Cut::new(self.check(of)?.into_iter())?;
        let len = tables_len(&cut.parts);
        let launch = Launch::new(kernels, self.0.grid, cut.launched, len)?;
        if launch.workgroups > 0 {
            let small = |section: &Section| (section.small, section.longest);
            let shape = (launch.shape.chunk, launch.shape.warps(kernels.0.warp));
            stage_tables(&launch.scratch, &cut.parts, launch.tables(), small, shape)?;
        }
        let args = launch.args(kernels, cut.parts.len());
        clear_abort(kernels, &launch.scratch, stream)?;
        let keep: Vec<Keep> = vec![
            Arc::clone(&launch.scratch) as Keep,
            Arc::clone(&self.0) as Keep,
        ];
        let mut beside = Vec::new();
        let pending = stream.put(keep, |raw| {
            // First, for the sides' copies need not wait for the launch.
            let (own, more) = self.share(&cut.copies);
            beside = self.copy_beside(stream, more)?;
            // SAFETY: `keep` has every memory that the tables name: the table's own, each section inside it as
            // `table` and `check` have found; and the scratch.
            unsafe { launch.put(kernels, &args, raw) }?;
            let api = kernels.gpu().api();
            // SAFETY: all spans are of the table's memories, which `keep` has.
            unsafe { api.copy_all(own, raw) }?;
            for pending in &beside {
                stream.wait_event(pending.event())?;
            }
            Ok(())
        })?;
        let mut gather = launch.begun(kernels, pending, &args);
        gather._beside = beside;
        gather.copied = cut.copied;
        Ok(gather)
    }

    /// The copies that go onto the transfer's own stream, and those for the streams beside it: where copies go in
    /// batches, and there are a few for each.
    fn share<'a>(&self, copies: &'a [CopySpan]) -> (&'a [CopySpan], &'a [CopySpan]) {
        let kernels = &self.0.kernels.0;
        let lanes = kernels.sides.len() + 1;
        let own = match kernels.gpu.api().has_batches() && copies.len() >= 2 * lanes {
            true => copies.len() / lanes,
            false => copies.len(),
        };
        copies.split_at_checked(own).unwrap_or((copies, &[]))
    }

    /// Puts copies on the streams beside, behind what is on `stream` now. They hold the memories themselves, and not
    /// the table, which holds these streams.
    fn copy_beside(&self, stream: &Stream, copies: &[CopySpan]) -> Result<Vec<Pending>, Error> {
        let kernels = &self.0.kernels.0;
        let mut beside = Vec::new();
        if copies.is_empty() {
            return Ok(beside);
        }
        let now = Event::new(&kernels.gpu)?;
        now.record(stream)?;
        let each = copies.len().div_ceil(kernels.sides.len().max(1));
        for (side, part) in kernels.sides.iter().zip(copies.chunks(each)) {
            side.wait_event(&now)?;
            let keep = self.0.memories.clone();
            beside.push(side.put(keep, |raw| {
                // SAFETY: all spans are of the table's memories, which are `keep`.
                Ok(unsafe { kernels.gpu.api().copy_all(part, raw) }?)
            })?);
        }
        Ok(beside)
    }
}

impl Gather {
    /// All its bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.launched.saturating_add(self.copied)
    }

    /// Those of them that the copy engine copies.
    #[must_use]
    pub fn engine_bytes(&self) -> u64 {
        self.copied
    }

    /// Workgroups of its launch; 0 if the copy engine does all of it.
    #[must_use]
    pub fn workgroups(&self) -> u32 {
        self.workgroups
    }

    /// The mark behind it, for other streams to wait for. It comes a little after the last byte.
    #[must_use]
    pub fn event(&self) -> &Event {
        self.pending.event()
    }

    /// Tells it to stop: at most a few chunks a warp are copied after the GPU has the word, and none of it touches
    /// the memories once the transfer has ended. It may still end [`GatherEnd::Whole`].
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`].
    pub fn abort(&self) -> Result<(), Error> {
        let keep = words(&self.kernels);
        let kernels = &self.kernels.0;
        let one = kernels.words.range(Operation::CopySource, 0, 4)?;
        let word = self.scratch.device().addr();
        self.scratch.tell();
        // The scratch goes to no other launch before the word has been set for this one.
        let keep: Vec<Keep> = vec![Arc::clone(&self.scratch) as Keep, keep];
        let told = kernels.aborts.put(keep, |raw| {
            let api = kernels.gpu.api();
            // SAFETY: `keep` has the words and the scratch.
            Ok(unsafe { api.copy(word, one, 4, Direction::HostToDevice, raw) }?)
        })?;
        drop(told);
        Ok(())
    }

    /// Its end, if it has come. Again says the same.
    pub fn poll(&mut self) -> Option<GatherEnd> {
        self.look()
            .unwrap_or_else(|error| Some(GatherEnd::Failed(error)))
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Deadline`](crate::gpu::GpuFault::Deadline): it has not ended.
    pub fn wait(&mut self, deadline: Instant) -> Result<GatherEnd, Error> {
        let mut end = None;
        poll("a gather", deadline, || {
            end = self.poll();
            Ok(end.is_some())
        })?;
        // `poll` ends well with an end only.
        Ok(end.unwrap_or(GatherEnd::Whole))
    }

    fn look(&mut self) -> Result<Option<GatherEnd>, Error> {
        self.count_ended()?;
        if self.ended == self.workgroups && self.copied == 0 && self.workgroups > 0 {
            return self.tally().map(Some);
        }
        if self.copied == 0 && self.workgroups > 0 && self.since.elapsed() < ASK_AFTER {
            return Ok(None);
        }
        self.since = Instant::now();
        if !self.pending.is_done()? {
            return Ok(None);
        }
        self.count_ended()?;
        self.tally().map(Some)
    }

    fn count_ended(&mut self) -> Result<(), Error> {
        let slots = self.scratch.slots().host();
        while self.ended < self.workgroups
            && slots.load_u64(u64::from(self.ended) * SLOT + 24)? == self.sequence
        {
            self.ended += 1;
        }
        Ok(())
    }

    /// What the slots say of a launch that has ended.
    fn tally(&self) -> Result<GatherEnd, Error> {
        let slots = self.scratch.slots().host();
        let mut bytes: u64 = 0;
        let mut aborted = false;
        for i in 0..self.ended {
            let at = u64::from(i) * SLOT;
            bytes = bytes.saturating_add(slots.load_u64(at)?);
            // State and unit are one word.
            let state = slots.load_u64(at + 16)?.to_le_bytes();
            aborted |= state.first_chunk() == Some(&ABORTED.to_le_bytes());
        }
        if self.ended == self.workgroups && aborted {
            let bytes = bytes.saturating_add(self.copied);
            return Ok(GatherEnd::Aborted { bytes });
        }
        if self.ended == self.workgroups && bytes == self.launched {
            return Ok(GatherEnd::Whole);
        }
        let (ended, workgroups) = (self.ended, self.workgroups);
        Err(GatherFault::Incomplete {
            ended,
            workgroups,
            bytes,
            wanted: self.launched,
        }
        .into())
    }

    /// The longest that a workgroup took, in ticks of the device's clock (nanoseconds on NVIDIA).
    ///
    /// # Errors
    ///
    /// None that can be foreseen: the slots are there.
    pub fn ticks(&self) -> Result<u64, Error> {
        let slots = self.scratch.slots().host();
        let mut each = (0..self.ended).map(|i| slots.load_u64(u64::from(i) * SLOT + 8));
        each.try_fold(0, |most, ticks| Ok(ticks?.max(most)))
    }
}
