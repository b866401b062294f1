//! What the kernel tells of RDMA devices in files.

use std::fs;
use std::path::{Path, PathBuf};

use super::port::Place;

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

/// The kernel's driver of a device.
pub(super) fn driver(sys: &Path, device: &str) -> Option<String> {
    let folder = sys.join("class/infiniband").join(device);
    if let Ok(driver) = fs::read_link(folder.join("device/driver")) {
        return Some(driver.file_name()?.to_string_lossy().into_owned());
    }
    // The software devices are plugged in nowhere. rxe alone has this file; siw says what it is.
    if folder.join("parent").exists() {
        return Some("rdma_rxe".to_owned());
    }
    let words = fs::read_to_string(folder.join("node_desc")).ok()?;
    (words.trim() == "Software iWARP stack").then(|| "siw".to_owned())
}

/// Where an RDMA device is plugged in.
pub(super) fn rdma_place(sys: &Path, device: &str) -> Place {
    place(&sys.join("class/infiniband").join(device).join("device"))
}

/// Where a PCI device is plugged in; `None` where there is none of that address.
pub(super) fn pci_place(sys: &Path, address: &str) -> Option<Place> {
    if !is_pci(address) {
        return None;
    }
    let place = place(&sys.join("bus/pci/devices").join(address));
    (!place.pci_path.is_empty()).then_some(place)
}

/// `link` leads to the device's folder, whose parents are the buses that it hangs on.
fn place(link: &Path) -> Place {
    let Ok(folder) = fs::canonicalize(link) else {
        return Place::default();
    };
    let mut pci_path = Vec::new();
    for part in folder.components() {
        let part = part.as_os_str().to_string_lossy();
        if is_pci(&part) || (pci_path.is_empty() && is_pci_root(&part)) {
            pci_path.push(part.into_owned());
        }
    }
    // What hangs on a PCI device, such as a function of it, is on the node of that.
    let numa_node = folder.ancestors().find_map(|folder| {
        let node = fs::read_to_string(folder.join("numa_node")).ok()?;
        node.trim().parse::<i32>().ok()
    });
    Place {
        pci_path,
        // A machine of one node, or a kernel that does not know, says -1.
        numa_node: numa_node.and_then(|node| u32::try_from(node).ok()),
    }
}

/// Whether this is an address such as `0000:41:00.0`.
fn is_pci(text: &str) -> bool {
    let hex = |text: &str, len: usize| {
        text.len() >= len && text.len() <= 8 && text.chars().all(|c| c.is_ascii_hexdigit())
    };
    let parts: Vec<&str> = text.split([':', '.']).collect();
    matches!(parts.as_slice(), [domain, bus, device, function]
        if text.contains('.') && hex(domain, 4) && hex(bus, 2) && hex(device, 2) && hex(function, 1))
}

/// Whether this is a root such as `pci0000:40`.
fn is_pci_root(text: &str) -> bool {
    text.strip_prefix("pci")
        .is_some_and(|root| is_pci(&format!("{root}:00.0")))
}

#[cfg(test)]
mod tests;
