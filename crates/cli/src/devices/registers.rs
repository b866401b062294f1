//! Which NICs register memory of which GPUs, tried on a little of it.

use std::sync::Arc;

use serde::Serialize;

use kvxfer_hipmem::gpu::{Gpu, GpuMemory};
use kvxfer_verbs::{Access, Memory, RdmaConfig, open_rdma};

/// What is tried, in bytes.
const TRIED: u64 = 2 << 20;

/// Whether a NIC registers a GPU's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Registers {
    pub(super) device: String,
    pub(super) usable: bool,
    pub(super) why_not: Option<String>,
}

/// Tries it with each of these NICs. Nothing is sent.
pub(super) fn of(gpu: &Gpu, nics: &[&str]) -> Vec<Registers> {
    if nics.is_empty() {
        return Vec::new();
    }
    let memory = GpuMemory::new(gpu, TRIED).map(|memory| memory.as_memory());
    let tried = |device: &&str| {
        let why_not = match &memory {
            Ok(memory) => register(device, memory).err().map(|e| e.to_string()),
            Err(error) => Some(error.to_string()),
        };
        Registers {
            device: (*device).to_owned(),
            usable: why_not.is_none(),
            why_not,
        }
    };
    nics.iter().map(tried).collect()
}

fn register(device: &str, memory: &Arc<dyn Memory>) -> Result<(), kvxfer_verbs::Error> {
    let context = open_rdma(&RdmaConfig::new(device))?;
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    context.alloc_pd()?.register(Arc::clone(memory), access)?;
    Ok(())
}
