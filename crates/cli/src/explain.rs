//! What the library's errors are to the person at the command line: cause, evidence, fix, exit code.

use std::io;

use kvxfer::Error;
use kvxfer::config::{ConfigError, PathKind};
use kvxfer::layout::LayoutError;
use kvxfer::ping::PINGERS;
use kvxfer::session::{Party, SessionError, SessionState};
use kvxfer::transfer::Cause;
use kvxfer::wire::{Refusal, Role, WireError};
use kvxfer_verbs::PostCause;

use crate::problem::{Exit, Problem};
use crate::run::Failed;

const START_AGAIN: &str = "look whether it still runs and why it ended, and start it again";
const DEVICE_FAILED: &str = "look at the kernel's log for the device, and start the command again";
const DEFECT: &str =
    "this is a defect of kvxfer: please report it, with what this side says with KVXFER_LOG=debug";
const LOOK_AT_LOGS: &str = "look at the server's log (KVXFER_LOG=debug says more on both sides)";

/// What an error of the library is.
pub(crate) fn library(error: &Error) -> Problem {
    match error {
        Error::Session { peer, source } => session(peer, source),
        Error::NoPath { forced, candidates } => no_path(*forced, candidates),
        Error::Unreachable { address, source } => {
            Problem::new(Exit::Peer, format!("{address} cannot be reached"))
                .with_evidence(format!("connecting: {source}"))
                .with_fix(match source.kind() {
                    io::ErrorKind::ConnectionRefused => format!(
                        "start the engine, or `kvxfer serve --listen {address}`, there; or correct \
                         the port"
                    ),
                    _ => "check the address, the network and firewalls".to_owned(),
                })
        }
        Error::Resolve { address, source } => {
            Problem::new(Exit::Peer, format!("{address} is no host that is known"))
                .with_evidence(source.to_string())
                .with_fix("say HOST or HOST:PORT, with a name or number that leads to the server")
        }
        Error::Listen { address, source } => {
            let problem = Problem::usage(format!("cannot listen on {address}"))
                .with_evidence(source.to_string());
            match source.kind() {
                io::ErrorKind::AddrInUse => problem.with_fix(
                    "another process listens there: end it (`ss -ltnp` shows it), or take another \
                     port with --listen",
                ),
                io::ErrorKind::AddrNotAvailable => problem
                    .with_fix("this machine has no such address: `ip address` shows those it has"),
                io::ErrorKind::PermissionDenied => problem.with_fix("take a port above 1023"),
                _ => problem,
            }
        }
        Error::Unauthenticated { address } => unauthenticated(&address.to_string()),
        Error::Config(ConfigError::Unauthenticated { host }) => unauthenticated(host),
        Error::Deadline { what, after } => {
            Problem::new(Exit::Peer, format!("{what} did not come within {after:?}"))
                .with_fix("look whether the server is busy or stopped; --timeout waits longer")
        }
        Error::NotConnected { cause } => match this_side(cause) {
            Some((exit, fix)) => Problem::new(exit, "this side has left the server")
                .with_evidence(cause.to_string())
                .with_fix(fix),
            None => Problem::new(Exit::Peer, "the server is gone")
                .with_evidence(cause.to_string())
                .with_fix(START_AGAIN),
        },
        Error::BenchWrong(wrong) => Problem::new(Exit::Check, "a byte is not what was sent")
            .with_evidence(wrong.to_string())
            .with_fix("this is a defect of kvxfer or of the machine's memory: please report it"),
        Error::PingWrong { .. } => Problem::new(Exit::Check, "a byte is not what was sent")
            .with_evidence(error.to_string())
            .with_fix("this is a defect of kvxfer or of the machine's memory: please report it"),
        Error::PingFailed { .. } => Problem::new(Exit::Peer, "the data path has failed")
            .with_evidence(error.to_string())
            .with_fix("--path tcp takes another way; look at the peer's log"),
        Error::Secret(_) => Problem::from_chain(Exit::Usage, error).with_fix(
            "--secret-file or KVXFER_SECRET_FILE names a file with the shared secret that this user \
             may read",
        ),
        Error::Config(error) => config(error),
        Error::Layout(LayoutError::UnevenShard { extent, tp, .. }) => Problem::usage(format!(
            "{extent} heads cannot be shared evenly by {tp} ranks"
        ))
        .with_evidence(error.to_string())
        .with_fix(format!("say a --tp that divides {extent}")),
        Error::Layout(_) => Problem::from_chain(Exit::Usage, error),
        Error::Memory(kvxfer_hipmem::Error::Mismatch(_))
        | Error::Mismatch(_)
        | Error::Compile(_) => Problem::from_chain(Exit::Check, error),
        Error::Memory(_) => Problem::from_chain(Exit::Device, error)
            .with_fix("say fewer --blocks or --tokens, or free some memory"),
        Error::Verbs(kvxfer_verbs::Error::DialDeadline { .. }) => {
            Problem::from_chain(Exit::Peer, error).with_fix(
                "look whether its process is stopped (`ps -o stat`: T) or its machine overloaded; \
                 --timeout waits longer",
            )
        }
        // It was there when the path was chosen.
        Error::Verbs(kvxfer_verbs::Error::Path { .. }) => {
            Problem::from_chain(Exit::Peer, error).with_fix(START_AGAIN)
        }
        Error::Verbs(_)
        | Error::ForeignGpuMemory { .. }
        | Error::MixedMemory { .. }
        | Error::SeveralGpus { .. }
        | Error::GpuOverRdma { .. }
        | Error::TooManySteps
        | Error::Os { .. }
        | Error::Spawn { .. }
        | Error::PathNotHere { .. } => {
            Problem::from_chain(Exit::Device, error)
        }
        Error::RdmaDevice { .. } => Problem::from_chain(Exit::Device, error).with_fix(
            "`kvxfer devices` shows what there is and why it cannot be used; --device soft, or --path auto, needs no NIC",
        ),
        Error::NoRdmaPort { candidates } => {
            let mut problem = Problem::new(Exit::Device, "no NIC can be used");
            for (port, why) in candidates {
                problem = problem.with_evidence(format!("{port}: {why}"));
            }
            problem.with_fix("--device names another; --device soft, or --path auto, needs no NIC")
        }
        // Their own words are advice to a program that holds an engine.
        Error::DeviceFailed => {
            Problem::new(Exit::Device, "the device has failed").with_fix(DEVICE_FAILED)
        }
        Error::WorkerPanicked => {
            Problem::new(Exit::Check, "a thread of this side has panicked").with_fix(DEFECT)
        }
        Error::Forked { .. } | Error::ShuttingDown => {
            Problem::from_chain(Exit::Check, error).with_fix(DEFECT)
        }
        Error::Post(failed) => Problem::from_chain(Exit::Device, error).with_fix(match failed.cause {
            PostCause::CqFull => "raise max_cqe_num: each queue pair to a peer keeps room for its receives there",
            _ => DEVICE_FAILED,
        }),
        // What is left is said by the peer, or of it.
        _ => Problem::from_chain(Exit::Peer, error).with_fix(LOOK_AT_LOGS),
    }
}

fn unauthenticated(address: &str) -> Problem {
    Problem::usage(format!(
        "{address} can be reached from other machines, and there is no secret"
    ))
    .with_fix(
        "give both sides a secret (`openssl rand -hex 32 > FILE`, --secret-file FILE), or say \
         --allow-unauthenticated if everybody who can reach this address may use the server",
    )
}

fn session(peer: &str, source: &SessionError) -> Problem {
    let new = |cause: &str| {
        Problem::new(Exit::Peer, format!("{peer}: {cause}")).with_evidence(source.to_string())
    };
    match source {
        SessionError::Wire(WireError::NotKvxfer { saw }) => {
            Problem::new(Exit::Peer, format!("{peer} is not kvxfer"))
                .with_evidence(format!("it answered with {saw}"))
                .with_fix("check the address and the port; `kvxfer serve` prints its own")
        }
        SessionError::Wire(WireError::Framing { .. }) | SessionError::VersionMismatch { .. } => {
            new("another version of kvxfer").with_fix("run the same version on both sides")
        }
        SessionError::NotAuthorised => new("another secret")
            .with_fix("give both sides the same --secret-file (or KVXFER_SECRET_FILE)"),
        SessionError::SecretMissing { side: Party::Us } => new("a secret is demanded").with_fix(
            "set --secret-file or KVXFER_SECRET_FILE here, to the secret that the server has",
        ),
        SessionError::SecretMissing { side: Party::Peer } => new(
            "the server has no secret, and this side has one",
        )
        .with_fix("start the server with the same --secret-file, or leave it out on both sides"),
        SessionError::Busy => new("busy").with_fix("try again later"),
        SessionError::HandshakeTimeout { .. } | SessionError::EstablishTimeout { .. } => new(
            "no answer in time",
        )
        .with_fix(
            "look whether it is kvxfer, and whether it is stopped or busy; --timeout waits longer",
        ),
        SessionError::Rejected { reason } => rejected(peer, reason),
        SessionError::Refused { reason } => {
            Problem::new(refusal_exit(reason), format!("{peer} cannot be used"))
                .with_evidence(reason.to_string())
                .with_fix("run the same version on both sides, and look at the server's log")
        }
        SessionError::HandshakeRefused
        | SessionError::RejectedCode { .. }
        | SessionError::UnexpectedFrame { .. } => {
            new("it does not understand this side").with_fix("run the same version on both sides")
        }
        SessionError::PeerClosed {
            state: SessionState::Handshake,
            ..
        }
        | SessionError::ConnectionLost {
            state: SessionState::Handshake,
            ..
        } => new("closed the connection before it said what it is").with_fix(
            "look whether it is kvxfer that listens there (`ss -ltnp`), what its log says, and \
             whether a proxy or firewall stands in between",
        ),
        SessionError::PeerClosed { .. } | SessionError::ConnectionLost { .. } => {
            new("died, or the connection to it was cut").with_fix(START_AGAIN)
        }
        SessionError::PeerStalled { .. } => {
            new("stalled: the connection stands, and nothing comes").with_fix(
                "look whether its process is stopped (`ps -o stat`: T) or its machine overloaded",
            )
        }
        _ => new("the session ended").with_fix(LOOK_AT_LOGS),
    }
}

/// A setting that cannot be.
fn config(error: &ConfigError) -> Problem {
    match error {
        ConfigError::Value {
            key,
            value,
            allowed,
            source_of,
        } => Problem::usage(format!("{key} cannot be {value:?}"))
            .with_evidence(format!("so says {source_of}"))
            .with_fix(format!("say {allowed}")),
        ConfigError::Syntax { origin, .. } => Problem::usage(format!("{origin} cannot be read"))
            .with_evidence(error.to_string())
            .with_fix(
                "give JSON such as {\"kv_connector_extra_config\": {\"qp_per_transfer\": 8}}, or \
                     @FILE with such a text",
            ),
        ConfigError::UnknownKey {
            key,
            source_of,
            candidates,
        } => {
            let problem = Problem::usage(format!("there is no setting {key:?}"))
                .with_evidence(source_of.to_string());
            match candidates.as_slice() {
                [] => problem.with_fix("leave it out; --explain-config shows all there are"),
                near => problem.with_fix(format!("did you mean {}?", near.join(" or "))),
            }
        }
        _ => Problem::from_chain(Exit::Usage, error)
            .with_fix("--explain-config shows every setting and where it comes from"),
    }
}

fn rejected(peer: &str, reason: &Refusal) -> Problem {
    let problem = Problem::new(refusal_exit(reason), format!("{peer} refuses"))
        .with_evidence(reason.to_string());
    match reason {
        Refusal::Full { what, .. } if what == PINGERS => {
            problem.with_fix("wait until others have done with their pings")
        }
        Refusal::Full { .. } => problem.with_fix(
            "say fewer --blocks or --tokens here, or give the server more with --max-memory",
        ),
        Refusal::FormatMismatch { .. } => problem.with_fix(
            "give both sides the same --model, --tp and --block-size, or the server none",
        ),
        Refusal::RoleNotServed { role: Role::Bench } => {
            problem.with_fix("start `kvxfer serve` there, or set allow_bench on the engine")
        }
        Refusal::RoleNotServed { role: Role::Probe } => problem.with_fix(
            "look at the server's log: it had no memory or no queue pair left for a pinger",
        ),
        Refusal::WrongEngine { .. } => problem.with_fix("check the address and the port"),
        Refusal::NoPath { .. } => {
            problem.with_fix("--path tcp goes everywhere, if the server allows it")
        }
        _ => problem.with_fix("run the same version on both sides, and look at the server's log"),
    }
}

fn refusal_exit(reason: &Refusal) -> Exit {
    match reason {
        Refusal::FormatMismatch { .. } => Exit::Check,
        _ => Exit::Peer,
    }
}

fn no_path(forced: Option<PathKind>, candidates: &[kvxfer::wire::Candidate]) -> Problem {
    // Of a path that was asked for, the others' reasons are no news.
    let told = |path| forced.is_none_or(|forced| forced == path);
    let exit = match forced {
        Some(PathKind::Rdma) => Exit::Device,
        _ => Exit::Peer,
    };
    let cause = match forced {
        Some(path) => format!("the {path} path cannot be used"),
        None => "no path leads to the server".to_owned(),
    };
    let mut problem = Problem::new(exit, cause);
    for candidate in candidates.iter().filter(|c| told(c.path)) {
        if let Some(why_not) = &candidate.why_not {
            problem = problem.with_evidence(format!("{}: {why_not}", candidate.path));
        }
    }
    problem.with_fix(match forced {
        Some(_) => "--path auto takes the best that can be used; --path tcp goes everywhere",
        None => "--path tcp goes everywhere; or allow another path on both sides",
    })
}

/// What a cause comes to that lies in this process or its device. `None`: it is said of the peer, or
/// of what lies between.
fn this_side(cause: &Cause) -> Option<(Exit, String)> {
    match cause {
        Cause::Post { .. }
        | Cause::LocalDevice { .. }
        | Cause::CompletionQueue
        | Cause::DeviceFatal => Some((Exit::Device, DEVICE_FAILED.to_owned())),
        Cause::PortDown { .. } => {
            let fix = "look at the port's link, cable and switch; `ip link` shows its state";
            Some((Exit::Device, fix.to_owned()))
        }
        // What this side's device says, and the peer may have brought about.
        Cause::QueuePair { .. } => Some((Exit::Device, other_way())),
        Cause::WorkerPanicked | Cause::Forked | Cause::ShuttingDown | Cause::LostWork { .. } => {
            Some((Exit::Check, DEFECT.to_owned()))
        }
        _ => None,
    }
}

fn other_way() -> String {
    format!("--path tcp takes another way; {LOOK_AT_LOGS}")
}

/// What a failed transfer is.
pub(crate) fn transfer(failed: &Failed) -> Problem {
    let new = |exit| Problem::new(exit, failed.to_string()).with_evidence(failed.cause.to_string());
    if let Some((exit, fix)) = this_side(&failed.cause) {
        return new(exit).with_fix(fix);
    }
    let problem = new(Exit::Peer);
    match failed.cause {
        Cause::DeadlinePassed | Cause::PeerStalled { .. } => problem.with_fix(format!(
            "look whether the server is busy or stopped; --timeout allows more than {:?}",
            failed.timeout
        )),
        Cause::PeerDead | Cause::PeerClosed | Cause::PeerRestarted | Cause::PeerUnreachable => {
            problem.with_fix(START_AGAIN)
        }
        Cause::Completion { .. } | Cause::LaneFailed | Cause::LaneReset => {
            problem.with_fix(other_way())
        }
        _ => problem.with_fix(LOOK_AT_LOGS),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::output::schema::Op;

    fn exit_of(error: Error) -> (Exit, String) {
        let problem = library(&error);
        (problem.exit, problem.to_string())
    }

    #[test]
    fn a_forced_path_tells_its_own_reason_alone() {
        let candidates = [PathKind::Rdma, PathKind::Arena].map(|path| kvxfer::wire::Candidate {
            path,
            why_not: Some(format!("no {path} here")),
        });
        let error = |forced| Error::NoPath {
            forced,
            candidates: candidates.to_vec(),
        };
        let (exit, text) = exit_of(error(Some(PathKind::Rdma)));
        assert_eq!(exit, Exit::Device);
        assert!(
            text.contains("no rdma here") && !text.contains("no arena here"),
            "{text}"
        );
        let (exit, text) = exit_of(error(Some(PathKind::Arena)));
        assert_eq!(exit, Exit::Peer);
        assert!(text.contains("no arena here"), "{text}");
        let (_, text) = exit_of(error(None));
        assert!(
            text.contains("no rdma here") && text.contains("no arena here"),
            "{text}"
        );
    }

    #[test]
    fn a_peer_that_does_not_answer_a_dial_is_no_device_that_fails() {
        let (path, peer) = (kvxfer_verbs::SoftPath::Arena, "kvxfer/0".to_owned());
        let late = kvxfer_verbs::Error::DialDeadline { path, peer };
        let (exit, text) = exit_of(Error::Verbs(late));
        assert_eq!(exit, Exit::Peer);
        assert!(text.contains("fix: ") && text.contains("stopped"), "{text}");
        let (path, peer) = (kvxfer_verbs::SoftPath::Arena, "kvxfer/0".to_owned());
        let fault = kvxfer_verbs::PathFault::Connect(io::ErrorKind::ConnectionRefused.into());
        let gone = kvxfer_verbs::Error::Path { path, peer, fault };
        assert_eq!(exit_of(Error::Verbs(gone)).0, Exit::Peer);
    }

    #[test]
    fn only_a_refusal_for_pingers_says_to_wait_for_others() {
        let waits = |what: &str| {
            let reason = Refusal::Full {
                what: what.into(),
                limit: 16,
            };
            rejected("n:1", &reason)
                .to_string()
                .contains("have done with their pings")
        };
        assert!(waits(PINGERS));
        assert!(!waits("memory, and pingers") && !waits("memory"));
        let text = rejected("n:1", &Refusal::RoleNotServed { role: Role::Probe }).to_string();
        assert!(text.contains("server's log"), "{text}");
    }

    #[test]
    fn exit_codes_follow_the_cause() {
        let rejected = |reason| Error::Session {
            peer: "n:1".into(),
            source: SessionError::Rejected { reason },
        };
        let full = Refusal::Full {
            what: "memory".into(),
            limit: 1,
        };
        let (exit, text) = exit_of(rejected(full));
        assert_eq!(exit, Exit::Peer);
        assert!(
            text.contains("n:1") && text.contains("--max-memory"),
            "{text}"
        );
        let mismatch = Refusal::FormatMismatch {
            detail: "dtype".into(),
        };
        assert_eq!(exit_of(rejected(mismatch)).0, Exit::Check);
        let gone = Error::NotConnected {
            cause: Cause::PeerClosed,
        };
        assert_eq!(exit_of(gone).0, Exit::Peer);
        let memory = kvxfer_hipmem::Error::Empty;
        assert_eq!(exit_of(Error::Memory(memory)).0, Exit::Device);
        let busy = Error::Listen {
            address: "a:1".into(),
            source: io::ErrorKind::AddrInUse.into(),
        };
        assert_eq!(exit_of(busy).0, Exit::Usage);
    }

    fn failed(cause: Cause) -> (Exit, String) {
        let problem = transfer(&Failed {
            op: Op::Read,
            timeout: Duration::from_secs(3),
            cause,
        });
        (problem.exit, problem.to_string())
    }

    #[test]
    fn what_fails_on_this_side_is_not_looked_for_at_the_peer() {
        let (engine, here) = (1, 2);
        for error in [
            Error::WorkerPanicked,
            Error::Forked { engine, here },
            Error::ShuttingDown,
        ] {
            let (exit, text) = exit_of(error);
            assert_eq!(exit, Exit::Check, "{text}");
            assert!(
                text.contains("please report it") && !text.contains("server"),
                "{text}"
            );
        }
        let full = kvxfer_verbs::PostError {
            posted: 0,
            cause: PostCause::QueueFull,
        };
        let (exit, text) = exit_of(Error::Post(full));
        assert_eq!(exit, Exit::Device);
        assert!(
            text.contains("kernel's log") && !text.contains("server"),
            "{text}"
        );

        let full = kvxfer_verbs::PostError {
            posted: 0,
            cause: PostCause::CqFull,
        };
        let (exit, text) = exit_of(Error::Post(full));
        assert_eq!(exit, Exit::Device);
        assert!(text.contains("raise max_cqe_num"), "{text}");

        let operation = kvxfer::transfer::LocalOperation::Map;
        for (cause, exit, fix) in [
            (Cause::WorkerPanicked, Exit::Check, "please report it"),
            (Cause::Forked, Exit::Check, "please report it"),
            (Cause::ShuttingDown, Exit::Check, "please report it"),
            (
                Cause::LostWork { missing: 1 },
                Exit::Check,
                "please report it",
            ),
            (Cause::Post { errno: 12 }, Exit::Device, "kernel's log"),
            (
                Cause::LocalDevice {
                    operation,
                    errno: 5,
                },
                Exit::Device,
                "kernel's log",
            ),
            (Cause::DeviceFatal, Exit::Device, "kernel's log"),
            (Cause::PortDown { port: 1 }, Exit::Device, "cable"),
        ] {
            let said = cause.to_string();
            let lost = Error::NotConnected {
                cause: cause.clone(),
            };
            for (got, text) in [failed(cause), exit_of(lost)] {
                assert_eq!(got, exit, "{text}");
                assert!(text.contains(&said) && text.contains(fix), "{text}");
                assert!(!text.contains("server's log"), "{text}");
                assert!(!text.contains("server is gone"), "{text}");
            }
        }
    }

    #[test]
    fn a_failed_transfer_names_its_cause() {
        let (exit, text) = failed(Cause::DeadlinePassed);
        assert_eq!(exit, Exit::Peer);
        assert!(
            text.contains("deadline passed") && text.contains("3s"),
            "{text}"
        );
    }
}
