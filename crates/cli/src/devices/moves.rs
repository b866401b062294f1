//! Which memory can be moved to which, by which path, and why not.

use serde::Serialize;

use super::gpus::Gpus;
use super::report::{Chosen, Rdma, Soft};

/// A path between two kinds of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Move {
    /// `host` or `gpu`, either way.
    pub(super) between: [&'static str; 2],
    pub(super) path: &'static str,
    pub(super) reach: &'static str,
    pub(super) usable: bool,
    pub(super) why_not: Option<String>,
}

const HOST: &str = "host";
const GPU: &str = "gpu";

/// By what was found. Nothing is said here of a peer, who has to be able to do it too.
pub(super) fn moves(soft: &Soft, rdma: &Rdma, order: &[Chosen], gpus: &Gpus) -> Vec<Move> {
    let paths = soft.paths.iter().map(|path| {
        let reach = match path.path {
            "tcp" => "any host",
            _ => "same host",
        };
        known([HOST, HOST], path.path, reach, path.why_not.clone())
    });
    let no_nic = match (&rdma.why, order.is_empty()) {
        (Some(why), _) => Some(format!("no RDMA: {why}")),
        (None, true) => Some("no NIC can be used".to_owned()),
        (None, false) => None,
    };
    let network = known([HOST, HOST], "rdma", "any host", no_nic.clone());
    let no_gpu = gpus.runtime.missing.as_ref().map(|_| "no GPU".to_owned());
    let of_gpus = [
        known([GPU, GPU], "ipc", "same host", no_gpu.clone()),
        known(
            [GPU, HOST],
            "ipc",
            "same host",
            no_gpu.clone().or_else(|| unpinned(gpus)),
        ),
        known([GPU, GPU], "staged", "any host", no_gpu.clone()),
        known([GPU, HOST], "staged", "any host", no_gpu.clone()),
    ];
    let unregistered = no_gpu.clone().or(no_nic).or_else(|| unregistered(gpus));
    let straight = [[GPU, GPU], [GPU, HOST]]
        .map(|between| known(between, "rdma", "any host", unregistered.clone()));
    let paths = paths.chain([network]).chain(of_gpus);
    paths.chain(straight).collect()
}

/// Why no GPU moves blocks from and to host memory that it did not allocate, where none does.
fn unpinned(gpus: &Gpus) -> Option<String> {
    let to_host = gpus.gpus.iter().filter(|gpu| gpu.host_register);
    if to_host.clone().next().is_none() {
        return Some("no GPU takes host memory that it has not allocated".to_owned());
    }
    // Where the runtime does not say, trying tells.
    let mut both = to_host.filter(|gpu| gpu.host_register_read_only != Some(false));
    match both.next() {
        Some(_) => None,
        None => Some("to the host alone: no GPU takes another process's memory to read".to_owned()),
    }
}

/// Why no NIC registers a GPU's memory, where none does with any GPU: the first reason, of the NICs as they are named.
fn unregistered(gpus: &Gpus) -> Option<String> {
    let mut tried = gpus.gpus.iter().flat_map(|gpu| &gpu.registers);
    if tried.clone().any(|nic| nic.usable) {
        return None;
    }
    let first = tried.find_map(|nic| nic.why_not.clone());
    first.or_else(|| Some("no NIC was tried".to_owned()))
}

fn known(
    between: [&'static str; 2],
    path: &'static str,
    reach: &'static str,
    why_not: Option<String>,
) -> Move {
    Move {
        between,
        path,
        reach,
        usable: why_not.is_none(),
        why_not,
    }
}
