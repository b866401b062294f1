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

/// The GPUs of both sides, if there are any.
#[derive(Debug)]
pub(crate) struct Gpus {
    runtime: RuntimeChoice,
    own: Gpu,
    /// That of a target of our own.
    target: Option<Gpu>,
}

impl Gpus {
    /// Those that the options mean: `peer` is for a target of our own, which gets the next GPU where there are
    /// several and nothing is said.
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
        let own = match (mem, peer) {
            (Some(Mem::Gpu(number)), None | Some(Mem::Gpu(_))) => number,
            (None | Some(Mem::Host), None | Some(Mem::Host)) => return Ok(None),
            _ => {
                let cause = "the blocks of one side are to be the host's, of the other a GPU's";
                return Err(Problem::usage(cause)
                    .with_fix("say --mem gpu --peer-mem gpu, or neither: what goes between the two is not there yet")
                    .into());
            }
        };
        let found = GpuRuntime::open(config.gpu).map_err(|error| {
            Problem::from_chain(Exit::Device, &error)
                .with_fix("`kvxfer devices` shows the GPUs there are; KVXFER_GPU=host takes a stand-in, to try the way")
        })?;
        if found.kind() == RuntimeKind::Host {
            say::aside(
                "the GPU is a stand-in, which is this machine's processor: figures say nothing of a GPU",
            );
        }
        let own = own.unwrap_or(config.gpu_device);
        let gpu = |number| {
            found
                .gpu(number)
                .cloned()
                .map_err(|error| Problem::from_chain(Exit::Usage, &error))
        };
        let count = u32::try_from(found.gpus().len()).unwrap_or(1).max(1);
        let target = match peer {
            Some(Mem::Gpu(Some(number))) => number,
            _ => (own + 1) % count,
        };
        Ok(Some(Self {
            runtime: config.gpu,
            own: gpu(own)?,
            target: own_target.then(|| gpu(target)).transpose()?,
        }))
    }

    pub(crate) fn memory(&self) -> BenchMemory {
        BenchMemory::Gpu {
            runtime: self.runtime,
            ordinal: self.own.info().ordinal,
        }
    }

    /// This side's GPU.
    pub(crate) fn own(&self) -> &Gpu {
        &self.own
    }

    /// The GPU of a target of our own.
    pub(crate) fn target(&self) -> Option<&Gpu> {
        self.target.as_ref()
    }

    /// Whether there is only a stand-in.
    pub(crate) fn stands_in(&self) -> bool {
        self.own.runtime() == RuntimeKind::Host
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
        kind: if gpus.is_some() { "gpu" } else { "host" },
        gpu: gpus.map(|gpus| of(&gpus.own)),
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
