//! The software device, and what this host allows of its paths.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};

use kvxfer_hipmem::HostArena;
use kvxfer_verbs::{Context, SoftConfig, SoftPath as Way, open_soft};

use super::report::{Soft, SoftLimits, SoftPath};
use crate::problem::{Exit, Problem};

const YAMA: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// Opens the device and tries each path on this process itself.
pub(super) fn look() -> Soft {
    let opened = open_soft(SoftConfig::default());
    let context = opened.as_ref().ok();
    let why_not = opened.as_ref().err().map(told);
    let paths = [arena(context), process_vm(context), tcp()].map(|(path, why_not, note)| {
        let why_not = why_not.or_else(|| opened.as_ref().err().map(told));
        SoftPath {
            path,
            usable: why_not.is_none(),
            why_not,
            note,
        }
    });
    Soft {
        device: "soft",
        why_not,
        limits: context.map(|context| {
            let info = context.device();
            SoftLimits {
                max_mr: info.max_mr,
                max_qp_wr: info.max_qp_wr,
                max_sge: info.max_sge,
                max_cqe: info.max_cqe,
                max_msg_sz: info.max_msg_sz,
            }
        }),
        paths: paths.into(),
    }
}

/// A path, why it cannot be used, and what there is to know of it.
type Path = (&'static str, Option<String>, String);

fn arena(context: Option<&Context>) -> Path {
    let note = "same host, memory of a file (arenas)".to_owned();
    let why_not = match HostArena::new(1) {
        Ok(_) => context.and_then(|context| refused(context, Way::Arena)),
        Err(error) => Some(told(&error)),
    };
    ("arena", why_not, note)
}

fn process_vm(context: Option<&Context>) -> Path {
    let scope = fs::read_to_string(YAMA).ok();
    let (refuses, rule) = yama(scope.as_deref().map(str::trim));
    let why_not = refuses.or_else(|| context.and_then(|c| refused(c, Way::ProcessVm)));
    let note = format!("same host and user, memory of any kind; {rule}");
    ("process-vm", why_not, note)
}

fn tcp() -> Path {
    let listens = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let why_not = listens.err().map(|error| told(&error));
    ("tcp", why_not, "any host".to_owned())
}

/// Why the device refuses this path to itself.
fn refused(context: &Context, path: Way) -> Option<String> {
    let error = context.probe(&context.address(), path).err()?;
    Some(told(&error))
}

/// What Yama, by its scope, lets a process read: why nothing, or the rule.
fn yama(scope: Option<&str>) -> (Option<String>, &'static str) {
    match scope {
        None => (None, "this kernel has no Yama to narrow that"),
        Some("0") => (None, "kernel.yama.ptrace_scope 0 does not narrow that"),
        Some("1") => (
            None,
            "kernel.yama.ptrace_scope 1 lets one peer at a time read a process, which names it",
        ),
        Some("3") => (
            Some("kernel.yama.ptrace_scope 3 lets nobody read a process".to_owned()),
            "set kernel.yama.ptrace_scope to 0 or 1, which takes a restart of the machine",
        ),
        Some(_) => (
            None,
            "kernel.yama.ptrace_scope lets processes with CAP_SYS_PTRACE alone read others",
        ),
    }
}

fn told(error: &(impl std::error::Error + 'static)) -> String {
    let problem = Problem::from_chain(Exit::Device, error);
    let mut said = vec![problem.cause];
    said.extend(problem.evidence);
    said.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yama_by_its_scope() {
        for scope in [None, Some("0"), Some("1"), Some("2"), Some("?")] {
            let (refuses, rule) = yama(scope);
            assert!(
                refuses.is_none() && rule.contains("ama"),
                "{scope:?}: {rule}"
            );
        }
        let (refuses, rule) = yama(Some("3"));
        assert!(refuses.is_some_and(|why| why.contains("nobody")), "{rule}");
        assert!(yama(Some("1")).1.contains("one peer at a time"));
        assert!(yama(Some("2")).1.contains("CAP_SYS_PTRACE"));
    }

    /// Whatever this machine allows, the device is there and goes over TCP.
    #[test]
    fn the_device_is_there() {
        let soft = look();
        assert_eq!((soft.device, soft.why_not), ("soft", None));
        let names: Vec<_> = soft.paths.iter().map(|path| path.path).collect();
        assert_eq!(names, ["arena", "process-vm", "tcp"]);
        for path in &soft.paths {
            assert_eq!(path.usable, path.why_not.is_none(), "{path:?}");
        }
        assert!(soft.paths[2].usable, "{soft:?}", soft = soft.paths);
        assert!(soft.limits.is_some_and(|limits| limits.max_sge > 0));
    }
}
