//! Where the blocks of a bandwidth test lie: the host's memory, or a GPU's.

use std::fmt;
use std::str::FromStr;

use kvxfer::bench::BenchMemory;
use kvxfer::config::{Config, PathKind};
use kvxfer_hipmem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind};

use crate::output::schema::{GpuConfig, MemoryConfig};
use crate::problem::{Exit, Problem};
use crate::say;

/// `host`, `gpu`, or `gpu:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mem {
    /// The host's.
    Host,
    /// A GPU's: the N-th that the process sees.
    Gpu(Option<u32>),
}

impl FromStr for Mem {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "host" => Ok(Self::Host),
            None if text == "gpu" => Ok(Self::Gpu(None)),
            Some(("gpu", number)) => match number.parse() {
                Ok(number) => Ok(Self::Gpu(Some(number))),
                Err(_) => Err(format!("{number:?} is no device's number")),
            },
            _ => Err("say host, gpu, or gpu:N".to_owned()),
        }
    }
}

impl fmt::Display for Mem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Gpu(None) => f.write_str("gpu"),
            Self::Gpu(Some(number)) => write!(f, "gpu:{number}"),
        }
    }
}

/// The GPUs of both sides; of one side at least.
#[derive(Debug)]
pub(crate) struct Gpus {
    runtime: RuntimeChoice,
    /// `None`: this side's blocks are the host's.
    own: Option<Gpu>,
    /// That of a target of our own.
    target: Option<Gpu>,
}

impl Gpus {
    /// Those that the options mean: `peer` is for a target of our own, which gets the next GPU where there are
    /// several and nothing is said. `None`: all blocks are the host's.
    ///
    /// # Errors
    ///
    /// A [`Problem`] for GPUs that are not there.
    pub(crate) fn open(
        mem: Option<Mem>,
        peer: Option<Mem>,
        config: &Config,
        own_target: bool,
    ) -> anyhow::Result<Option<Self>> {
        let own = match mem {
            Some(Mem::Gpu(number)) => Some(number.unwrap_or(config.gpu_device)),
            None | Some(Mem::Host) => None,
        };
        if let (None, None | Some(Mem::Host)) = (own, peer) {
            return Ok(None);
        }
        let found = GpuRuntime::open(config.gpu).map_err(|error| {
            Problem::from_chain(Exit::Device, &error)
                .with_fix("`kvxfer devices` shows the GPUs there are; KVXFER_GPU=host takes a stand-in, to try the way")
        })?;
        if found.kind() == RuntimeKind::Host {
            say::aside(
                "the GPU is a stand-in, which is this machine's processor: figures say nothing of a GPU",
            );
        }
        let gpu = |number| {
            found
                .gpu(number)
                .cloned()
                .map_err(|error| Problem::from_chain(Exit::Usage, &error))
        };
        let count = u32::try_from(found.gpus().len()).unwrap_or(1).max(1);
        let target = match (peer, own) {
            (Some(Mem::Host), _) => None,
            (Some(Mem::Gpu(Some(number))), _) => Some(number),
            (_, Some(own)) => Some((own + 1) % count),
            (_, None) => Some(config.gpu_device),
        };
        Ok(Some(Self {
            runtime: config.gpu,
            own: own.map(gpu).transpose()?,
            target: target.filter(|_| own_target).map(gpu).transpose()?,
        }))
    }

    /// What this side's blocks lie in, if it is a GPU's.
    pub(crate) fn memory(&self) -> Option<BenchMemory> {
        let own = self.own.as_ref()?;
        Some(BenchMemory::Gpu {
            runtime: self.runtime,
            ordinal: own.info().ordinal,
        })
    }

    /// This side's GPU, if its blocks lie there.
    pub(crate) fn own(&self) -> Option<&Gpu> {
        self.own.as_ref()
    }

    /// The GPU of a target of our own.
    pub(crate) fn target(&self) -> Option<&Gpu> {
        self.target.as_ref()
    }

    /// Whether this side's blocks are in the host's memory after all.
    pub(crate) fn is_on_host(&self) -> bool {
        self.own.is_none() || self.stands_in()
    }

    /// Whether there is only a stand-in.
    pub(crate) fn stands_in(&self) -> bool {
        let known = self.own.iter().chain(&self.target);
        known
            .into_iter()
            .any(|gpu| gpu.runtime() == RuntimeKind::Host)
    }
}

/// What the report says of it.
pub(crate) fn shown(gpus: Option<&Gpus>) -> MemoryConfig {
    let of = |gpu: &Gpu| {
        let info = gpu.info();
        GpuConfig {
            runtime: gpu.runtime().to_string(),
            ordinal: info.ordinal,
            pci: info.pci.to_string(),
            name: info.name.clone(),
            arch: info.arch.clone(),
        }
    };
    MemoryConfig {
        kind: match gpus.and_then(|gpus| gpus.own.as_ref()) {
            Some(_) => "gpu",
            None => "host",
        },
        gpu: gpus.and_then(|gpus| gpus.own.as_ref()).map(of),
        target_gpu: gpus.and_then(Gpus::target).map(of),
    }
}

/// Memory for a test over the host's, by what the path wants.
pub(crate) fn of_host(config: &Config) -> BenchMemory {
    // Memory that any path could take, unless only process-vm may be taken: that is for memory that
    // cannot be mapped.
    match config.path.forced() {
        Some(PathKind::ProcessVm) => BenchMemory::Anonymous,
        _ => BenchMemory::Arena,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        for text in ["host", "gpu", "gpu:0", "gpu:7"] {
            let read = text.parse::<Mem>().map(|mem| mem.to_string());
            assert_eq!(read.as_deref(), Ok(text));
        }
        for text in ["", "gpu:", "gpu:x", "gpu:-1", "cpu", "host:0", "GPU"] {
            assert!(text.parse::<Mem>().is_err(), "{text}");
        }
    }
}
