//! By what a rank has a GPU copy blocks: the kernels, the streams, and tables of both sides' memory.

use crate::config::Config;
use crate::engine::worker::MOST_RUNNING;
use crate::error::Error;
use crate::mem::gather::{GatherOptions, GatherSection, GatherTable, GpuKernels, TensorPlaces};
use crate::mem::gpu::{Gpu, GpuMemory, PeerHostMemory, PinnedMemory, Place, Stream};
use crate::mem::kernels::Piece;
use crate::plan::Compiled;

/// Launches at a time whose memory is allocated when the engine starts: 10 MiB.
const MOST_RESERVED: usize = 64;

/// What launches on a GPU are made with.
#[derive(Debug)]
pub(crate) struct Launcher {
    pub(super) kernels: GpuKernels,
    /// Where gathers go, one after the other: long ones, and short ones with fences.
    pub(super) long: Stream,
    pub(super) short: Stream,
    pub(super) options: GatherOptions,
}

/// A memory of either side, as a GPU reaches it.
#[derive(Debug, Clone)]
pub(super) enum Reached {
    Gpu(GpuMemory),
    /// This process's.
    Host(PinnedMemory),
    /// Another process's.
    PeerHost(PeerHostMemory),
}

impl Reached {
    fn place(&self, offset: u64) -> Place<'_> {
        match self {
            Self::Gpu(memory) => Place::Gpu(memory, offset),
            Self::Host(memory) => Place::Pinned(memory, offset),
            Self::PeerHost(memory) => Place::PeerHost(memory, offset),
        }
    }
}

impl Launcher {
    /// # Errors
    ///
    /// [`Error::Memory`], also for a GPU that the kernels do not run on.
    pub(super) fn new(gpu: &Gpu, config: &Config) -> Result<Self, Error> {
        let most = config.gpu_workgroups;
        let kernels = GpuKernels::load(gpu)?;
        let workers = usize::try_from(config.num_worker_threads).unwrap_or(MOST_RESERVED);
        // One of each worker's may be a fence.
        let launches = workers.saturating_mul(MOST_RUNNING + 1);
        kernels.reserve(launches.min(MOST_RESERVED))?;
        Ok(Self {
            kernels,
            long: Stream::new(gpu)?,
            short: Stream::new(gpu)?,
            options: GatherOptions {
                max_workgroups: (most > 0).then_some(most),
                ..GatherOptions::default()
            },
        })
    }

    /// What is copied from `theirs` to `own` by these plans.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] for memory that the GPU does not reach, [`Error::TooManySteps`].
    pub(super) fn table(
        &self,
        (theirs, own): (&[Reached], &[Reached]),
        plans: &Compiled,
    ) -> Result<GatherTable, Error> {
        let classes = plans.scattered().ok_or(Error::TooManySteps)?;
        fn place((memory, offset): (u32, u64), of: &[Reached]) -> Result<Place<'_>, Error> {
            let memory = usize::try_from(memory).ok().and_then(|at| of.get(at));
            Ok(memory.ok_or(Error::OtherPlan)?.place(offset))
        }
        let mut pieces: Vec<Vec<Piece>> = Vec::with_capacity(classes.len());
        let mut tensors = Vec::with_capacity(classes.len());
        for class in &classes {
            let piece = |(src, dst, len)| Piece { src, dst, len };
            pieces.push(class.pieces().map(piece).collect());
            let places = class.tensors().map(|(remote, local)| {
                Ok(TensorPlaces {
                    src: place(remote, theirs)?,
                    dst: place(local, own)?,
                })
            });
            tensors.push(places.collect::<Result<Vec<_>, Error>>()?);
        }
        let sections: Vec<GatherSection<'_>> = classes
            .iter()
            .zip(tensors.iter().zip(&pieces))
            .map(|(class, (tensors, pieces))| GatherSection {
                tensors,
                pieces,
                strides: (class.remote_step, class.local_step),
                blocks: (class.remote_steps, class.local_steps),
            })
            .collect();
        Ok(self.kernels.table(&sections, self.options)?)
    }
}
