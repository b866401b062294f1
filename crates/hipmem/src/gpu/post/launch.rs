//! Launches of the kernels that post.

use std::sync::Arc;
use std::time::Instant;

use super::links::LinkQueue;
use super::queue::{KernelQueue, sealed};
use crate::error::{Error, Operation};
use crate::gpu::device::same;
use crate::gpu::pool::Touched;
use crate::gpu::stream::Keep;
use crate::gpu::{
    Copy, Event, Gpu, GpuMemory, Kernel, Module, Pending, PinnedMemory, Place, RuntimeKind, Stream,
};
use crate::kernels::queue::{
    ALL_TENSORS, Move, PUT, PostArgs, PostResult, ProduceArgs, Produced, ProducedLayer,
};
use crate::kernels::{
    KVX_POST_BLOCKS, KVX_POST_THREADS, KVX_POST_WAVES, KVX_PRODUCE, KVX_PUSH_BLOCKS, Pair,
    bytes_of, posts_for_target,
};
use crate::post::Place as BlockPlace;

/// Workgroups of a producer at most: fewer than any GPU runs side by side, so that none waits for a place behind one
/// that waits for the queue.
const MOST_PRODUCERS: u32 = 32;
/// Threads of a producer's workgroup.
const PRODUCER_THREADS: u32 = 256;

/// The built-in kernels that post, loaded on a GPU. Clones are the same.
#[derive(Debug, Clone)]
pub struct PostKernels {
    gpu: Gpu,
    warp: u32,
    threads: Kernel,
    waves: Kernel,
    blocks: Kernel,
    produce: Kernel,
    push: Kernel,
}

/// Who posts as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PostBy {
    /// Each thread for itself.
    Threads,
    /// The lanes of a wave together.
    Waves,
    /// The threads of a workgroup together.
    Blocks,
}

/// Posts in numbers.
#[derive(Debug, Clone, Copy)]
pub struct Posts<'a> {
    /// What each poster posts, one poster after the other; the same number each.
    pub moves: &'a [Move],
    /// How many post.
    pub posters: u32,
    /// Who posts as one.
    pub by: PostBy,
    /// [`PUT`](crate::kernels::queue::PUT) and its like.
    pub op: u32,
    /// [`ALL`](crate::kernels::queue::ALL) and its like.
    pub until: u32,
}

/// Posts that lie where kernels find them.
#[derive(Debug)]
pub struct PreparedPosts {
    args: PostArgs,
    by: PostBy,
    moves: PinnedMemory,
    results: PinnedMemory,
    count: usize,
}

/// A tensor that a producer makes blocks of.
#[derive(Debug, Clone, Copy)]
pub struct ProducedTensor<'a> {
    /// Where block 0 begins.
    pub place: Place<'a>,
    /// Bytes from one block to the next.
    pub stride: u64,
    /// Bytes of a block.
    pub bytes: u64,
    /// What its words are made of.
    pub salt: u64,
}

/// A layer that a producer makes and pushes.
#[derive(Debug, Clone)]
pub struct Produce<'a> {
    /// The cache group.
    pub group: u8,
    /// The layer.
    pub layer: u16,
    /// Bytes of a put.
    pub len: u64,
    /// Its tensors.
    pub tensors: Vec<ProducedTensor<'a>>,
}

/// Puts over GPU links, which lie in the GPU's own memory: many warps read them over and over.
#[derive(Debug)]
pub struct PreparedPush {
    args: PostArgs,
    moves: GpuMemory,
    results: PinnedMemory,
    /// The copy of the moves to where the kernel reads them.
    laid_out: Pending,
}

/// A launch that posts. It holds what it touches until it has ended, whether or not this value is kept.
#[derive(Debug)]
pub struct Posting {
    pending: Pending,
    results: PinnedMemory,
    count: usize,
}

impl PostKernels {
    /// Loads them. NVIDIA's driver compiles them, the first time in some tenths of a second.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] if none are for this GPU; [`Error::Gpu`].
    pub fn load(gpu: &Gpu) -> Result<Self, Error> {
        let arch = match gpu.runtime() {
            RuntimeKind::Host => "host",
            _ => &gpu.info().arch,
        };
        let image = posts_for_target(arch)?;
        // SAFETY: the image was built for this target from the sources in kernels/, and has no initialisers.
        let module = unsafe { Module::load(gpu, image.bytes) }?;
        Ok(Self {
            gpu: gpu.clone(),
            warp: image.warp,
            threads: module.kernel(KVX_POST_THREADS)?,
            waves: module.kernel(KVX_POST_WAVES)?,
            blocks: module.kernel(KVX_POST_BLOCKS)?,
            produce: module.kernel(KVX_PRODUCE)?,
            push: module.kernel(KVX_PUSH_BLOCKS)?,
        })
    }

    /// Puts posts on a stream. What the moves name is not touched by the kernel: the queue's consumer looks at it.
    /// Moves that are left over when all posters have as many are not posted.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] for no posts; [`Error::Gpu`].
    pub fn post<Q: KernelQueue>(
        &self,
        stream: &Stream,
        queue: &Arc<Q>,
        posts: &Posts<'_>,
    ) -> Result<Posting, Error> {
        self.launch(stream, queue, &self.prepare(posts)?)
    }

    /// Lays posts out for [`launch`](Self::launch), which then takes no longer than a launch takes.
    ///
    /// # Errors
    ///
    /// As [`post`](Self::post).
    pub fn prepare(&self, posts: &Posts<'_>) -> Result<PreparedPosts, Error> {
        let posters = posts.posters.max(1);
        let each = posts.moves.len() / posters as usize;
        let count = u32::try_from(each).map_err(|_| too_large(posts.moves.len()))?;
        if count == 0 {
            return Err(Error::Empty);
        }
        let moves = self.table(Move::bytes(posts.moves))?;
        let posted = each * posters as usize;
        let results = self.results(posted)?;
        Ok(PreparedPosts {
            args: PostArgs {
                moves: moves.device_addr(),
                results: results.device_addr(),
                count,
                posters,
                op: posts.op,
                until: posts.until,
                ..PostArgs::default()
            },
            by: posts.by,
            moves,
            results,
            count: posted,
        })
    }

    /// Puts prepared posts on a stream. They can be launched again when they have ended.
    ///
    /// # Errors
    ///
    /// As [`post`](Self::post).
    pub fn launch<Q: KernelQueue>(
        &self,
        stream: &Stream,
        queue: &Arc<Q>,
        posts: &PreparedPosts,
    ) -> Result<Posting, Error> {
        let args = PostArgs {
            queue: queue.handle(),
            ..posts.args
        };
        let posters = args.posters;
        let (kernel, grid, block) = match posts.by {
            PostBy::Threads => (&self.threads, posters.div_ceil(self.warp), self.warp),
            PostBy::Waves => (&self.waves, posters, self.warp),
            PostBy::Blocks => (
                &self.blocks,
                posters,
                <Q as sealed::Sealed>::THREADS.unwrap_or(2 * self.warp),
            ),
        };
        let moves = [Place::Pinned(&posts.moves, 0)];
        let keep = self.keep(stream, queue, &moves, &posts.results)?;
        let pending = stream.put(keep, |raw| {
            // SAFETY: the argument is the kernel's, every table has the length that it says, all of it is in `keep`
            // or of the module that `self` shares with it, and every wait of the kernel ends by itself.
            unsafe { kernel.put(raw, grid, block, args.bytes()) }
        })?;
        Ok(Posting {
            pending,
            results: posts.results.clone(),
            count: posts.count,
        })
    }

    /// Lays puts over GPU links out for [`push`](Self::push), on this stream.
    ///
    /// # Errors
    ///
    /// As [`post`](Self::post).
    pub fn prepare_push(&self, stream: &Stream, moves: &[Move]) -> Result<PreparedPush, Error> {
        let count = u32::try_from(moves.len()).map_err(|_| too_large(moves.len()))?;
        if count == 0 {
            return Err(Error::Empty);
        }
        same("the kernels", &self.gpu, stream.gpu())?;
        let list = self.table(Move::bytes(moves))?;
        let table = GpuMemory::pooled(&self.gpu, list.len(), Touched::ByOwn)?;
        let copy = Copy {
            dst: Place::Gpu(&table, 0),
            src: Place::Pinned(&list, 0),
            len: list.len(),
        };
        let laid_out = stream.copy(&[copy])?;
        let results = self.results(moves.len())?;
        Ok(PreparedPush {
            args: PostArgs {
                moves: table.addr(),
                results: results.device_addr(),
                count,
                op: PUT,
                ..PostArgs::default()
            },
            moves: table,
            results,
            laid_out,
        })
    }

    /// Puts blocks over GPU links, by so many workgroups of a GPU's full size. They can be launched again when they have
    /// ended. A queue of another kind ends each with [`Status::BadQueue`](crate::post::Status::BadQueue).
    ///
    /// # Errors
    ///
    /// As [`post`](Self::post).
    pub fn push<Q: KernelQueue>(
        &self,
        stream: &Stream,
        queue: &Arc<Q>,
        push: &PreparedPush,
        workgroups: u32,
    ) -> Result<Posting, Error> {
        let args = PostArgs {
            queue: queue.handle(),
            ..push.args
        };
        let moves = [Place::Gpu(&push.moves, 0)];
        let keep = self.keep(stream, queue, &moves, &push.results)?;
        // It may have been laid out on another stream.
        stream.wait_event(push.laid_out.event())?;
        let grid = workgroups.clamp(1, args.count);
        let threads = <LinkQueue as sealed::Sealed>::THREADS.unwrap_or(self.warp);
        let pending = stream.put(keep, |raw| {
            // SAFETY: as in `launch`; and what the queue's table names is checked, and held with the queue.
            unsafe { self.push.put(raw, grid, threads, args.bytes()) }
        })?;
        Ok(Posting {
            pending,
            results: push.results.clone(),
            count: args.count as usize,
        })
    }

    /// Puts a producer on a stream: it fills the source block of each pair, layer by layer, with the pattern of the
    /// salts, and pushes each block of a layer as soon as it is there. The results are layer by layer.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] for nothing to do, [`Error::OutOfBounds`] and [`Error::Misaligned`] for a block that is not
    /// wholly inside its memory, or not on words; [`Error::Gpu`].
    pub fn produce<Q: KernelQueue>(
        &self,
        stream: &Stream,
        queue: &Arc<Q>,
        layers: &[Produce<'_>],
        pairs: &[Pair],
    ) -> Result<Posting, Error> {
        let last = pairs.iter().map(|pair| pair.src).max();
        let posts = layers.len().checked_mul(pairs.len());
        let (Some(last), Some(posts @ 1..)) = (last, posts) else {
            return Err(Error::Empty);
        };
        let (mut tensors, mut table) = (Vec::new(), Vec::new());
        let mut places = Vec::new();
        for layer in layers {
            let first = tensors.len();
            for tensor in &layer.tensors {
                tensors.push(produced(tensor, last)?);
                places.push(tensor.place);
            }
            let place = BlockPlace {
                group: layer.group,
                tensor: ALL_TENSORS,
                layer: layer.layer,
                block: 0,
            };
            let number = |n: usize| u32::try_from(n).map_err(|_| too_large(n));
            table.push(ProducedLayer {
                place: place.to_word(),
                len: layer.len,
                first: number(first)?,
                end: number(tensors.len())?,
            });
        }
        let [tensors, table, list] =
            [bytes_of(&tensors), bytes_of(&table), bytes_of(pairs)].map(|bytes| self.table(bytes));
        let (tensors, table, list) = (tensors?, table?, list?);
        let results = self.results(posts)?;
        let number = |n: usize| u32::try_from(n).map_err(|_| too_large(n));
        let args = ProduceArgs {
            queue: queue.handle(),
            tensors: tensors.device_addr(),
            layers: table.device_addr(),
            pairs: list.device_addr(),
            results: results.device_addr(),
            layers_len: number(layers.len())?,
            pairs_len: number(pairs.len())?,
        };
        places.extend([&tensors, &table, &list].map(|memory| Place::Pinned(memory, 0)));
        let keep = self.keep(stream, queue, &places, &results)?;
        let grid = args.pairs_len.min(MOST_PRODUCERS);
        let pending = stream.put(keep, |raw| {
            let args = bytes_of(std::slice::from_ref(&args));
            // SAFETY: as in `post`; and every block that it fills is inside of a memory that is in `keep`.
            unsafe { self.produce.put(raw, grid, PRODUCER_THREADS, args) }
        })?;
        Ok(Posting {
            pending,
            results,
            count: posts,
        })
    }

    /// A table in pinned memory.
    fn table(&self, bytes: &[u8]) -> Result<PinnedMemory, Error> {
        let memory = PinnedMemory::pooled(&self.gpu, bytes.len().max(8) as u64, Touched::ByOwn)?;
        memory.host().write(0, bytes)?;
        Ok(memory)
    }

    fn results(&self, posts: usize) -> Result<PinnedMemory, Error> {
        let bytes = posts.checked_mul(size_of::<PostResult>());
        let bytes = bytes.ok_or_else(|| too_large(posts))? as u64;
        let memory = PinnedMemory::pooled(&self.gpu, bytes, Touched::ByOwn)?;
        // What no kernel has written is no status.
        memory.host().fill(0, bytes, 0xee)?;
        Ok(memory)
    }

    /// What a launch touches.
    fn keep<Q: KernelQueue>(
        &self,
        stream: &Stream,
        queue: &Arc<Q>,
        places: &[Place<'_>],
        results: &PinnedMemory,
    ) -> Result<Vec<Keep>, Error> {
        same("the kernels", &self.gpu, stream.gpu())?;
        same("the queue", queue.gpu(), stream.gpu())?;
        for place in places {
            same("what is posted", place.gpu(), stream.gpu())?;
        }
        let mut keep: Vec<Keep> = places.iter().map(Place::keep).collect();
        keep.push(Place::Pinned(results, 0).keep());
        keep.push(Arc::clone(queue) as Keep);
        keep.push(Arc::new(self.produce.module().clone()) as Keep);
        Ok(keep)
    }
}

/// A tensor for the kernel, of which block `last` is the last that is made.
fn produced(tensor: &ProducedTensor<'_>, last: u32) -> Result<Produced, Error> {
    let addr = tensor.place.device_addr();
    for offset in [addr, tensor.stride, tensor.bytes] {
        if !offset.is_multiple_of(8) {
            let operation = Operation::Fill;
            return Err(Error::Misaligned {
                operation,
                offset,
                addr,
            });
        }
    }
    let reach = u64::from(last).checked_mul(tensor.stride);
    let reach = reach.and_then(|reach| reach.checked_add(tensor.bytes));
    tensor
        .place
        .range(Operation::Fill, reach.unwrap_or(u64::MAX))?;
    Ok(Produced {
        addr,
        stride: tensor.stride,
        bytes: tensor.bytes,
        salt: tensor.salt,
    })
}

fn too_large(posts: usize) -> Error {
    Error::TooLarge { len: posts as u64 }
}

impl Posting {
    /// Whether it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], also for what went wrong with it.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.pending.is_done()
    }

    /// The mark behind it.
    #[must_use]
    pub fn event(&self) -> &Event {
        self.pending.event()
    }

    /// Waits until it has ended; what became of the posts.
    ///
    /// # Errors
    ///
    /// [`GpuFault::Deadline`](crate::gpu::GpuFault::Deadline); as [`is_done`](Self::is_done).
    pub fn wait(&self, deadline: Instant) -> Result<Vec<PostResult>, Error> {
        self.pending.wait(deadline)?;
        let mut bytes = vec![0; self.count * size_of::<PostResult>()];
        self.results.host().read(0, &mut bytes)?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(PostResult::from_bytes)
            .collect())
    }
}
