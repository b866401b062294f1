//! What the kernel tells of RDMA devices in files.

use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the kernel's interface for libibverbs.
pub(super) fn interface(sys: &Path) -> PathBuf {
    sys.join("class/infiniband_verbs")
}

/// The version of that interface, in the kernel's words; `None` where there is no interface.
pub(super) fn interface_version(sys: &Path) -> Option<String> {
    let version = fs::read_to_string(interface(sys).join("abi_version")).ok()?;
    Some(version.trim().to_owned())
}

/// The names of the kernel's devices, in order.
pub(super) fn devices(sys: &Path) -> Vec<String> {
    let entries = fs::read_dir(sys.join("class/infiniband"))
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Whether a GID is one of RoCE v2; `None` where the kernel does not say.
pub(super) fn is_roce_v2(sys: &Path, device: &str, port: u32, index: u32) -> Option<bool> {
    let text = fs::read_to_string(gid_attr(sys, device, port, "types", index)).ok()?;
    Some(text.trim() == "RoCE v2")
}

/// The network interface that a GID belongs to.
pub(super) fn gid_netdev(sys: &Path, device: &str, port: u32, index: u32) -> Option<String> {
    let text = fs::read_to_string(gid_attr(sys, device, port, "ndevs", index)).ok()?;
    let name = text.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

fn gid_attr(sys: &Path, device: &str, port: u32, what: &str, index: u32) -> PathBuf {
    sys.join("class/infiniband")
        .join(device)
        .join(format!("ports/{port}/gid_attrs/{what}/{index}"))
}
