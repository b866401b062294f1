//! The target process that `bw` starts for itself when no host is named.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::problem::{Exit, Problem};
use crate::size::Address;

/// How often, and for how long between, a target that may be dying is looked at.
const DYING_LOOKS: u32 = 20;
const DYING_LOOK: Duration = Duration::from_millis(10);

/// How long a target may take to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// A line of a target is never longer.
const LONGEST_LINE: usize = 4096;

/// A `kvxfer serve` of our own. It ends with this value, and by itself when this process ends.
#[derive(Debug)]
pub(crate) struct OwnTarget {
    pid: u32,
    child: Mutex<Child>,
    address: Address,
    /// Kept open: a target that prints must not be hit by SIGPIPE.
    _out: ChildStdout,
}

impl OwnTarget {
    /// Starts this very program as a server on a free port of the loopback, with these variables.
    ///
    /// Call it on the main thread: the target ends with the *thread* that started it.
    ///
    /// # Errors
    ///
    /// A [`Problem`] if it cannot be started or is not listening in time.
    pub(crate) fn start(
        more: &[String],
        variables: &[(&str, &str)],
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let mut command = Command::new(program);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--exit-with-parent"])
            .arg(std::process::id().to_string())
            .args(more)
            .envs(variables.iter().copied());
        if std::env::var_os("KVXFER_LOG").is_none() {
            // What goes wrong is told once, by this side.
            command.env("KVXFER_LOG", "error");
        }
        Self::spawn(command, timeout)
    }

    fn spawn(mut command: Command, timeout: Duration) -> anyhow::Result<Self> {
        let deadline = Instant::now() + timeout;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        // Ctrl-C at a terminal is for this process alone: it ends the target itself.
        command.process_group(0);
        let mut child = command
            .spawn()
            .map_err(|e| Problem::from_chain(Exit::Device, &e))
            .context("starting a target process")?;
        let waited = match child.stdout.take() {
            Some(mut out) => listening(&mut out, deadline).map(|address| (out, address)),
            None => Err(Problem::new(
                Exit::Device,
                "the target process has no standard output",
            )),
        };
        match waited {
            Ok((out, address)) => Ok(Self {
                pid: child.id(),
                child: Mutex::new(child),
                address,
                _out: out,
            }),
            Err(problem) => {
                let status = end(&mut child);
                Err(match status {
                    Some(status) => problem.with_evidence(format!("the target process: {status}")),
                    None => problem,
                }
                .into())
            }
        }
    }

    /// Where the server is: it, if it was started, or the host that was named.
    pub(crate) fn or_host(target: Option<&Self>, host: Option<&Address>) -> String {
        let address = target.map(Self::address).or(host);
        address.map(ToString::to_string).unwrap_or_default()
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, if it has ended before its handle. A process that dies closes its sockets
    /// before it can be waited for: what was heard from them is given a moment.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..DYING_LOOKS {
            if let Some(status) = child.try_wait().ok()? {
                return Some(status);
            }
            std::thread::sleep(DYING_LOOK);
        }
        None
    }
}

impl Drop for OwnTarget {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        end(child);
    }
}

/// Waits for the line `listening ADDR`.
fn listening(out: &mut ChildStdout, deadline: Instant) -> Result<Address, Problem> {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(out.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) if left.is_zero() || Instant::now() >= deadline => {
                return Err(
                    Problem::new(Exit::Peer, "the target process was not ready in time")
                        .with_fix("give it longer with --timeout"),
                );
            }
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(Problem::from_chain(Exit::Device, &errno)),
        }
        let mut byte = [0];
        match out.read(&mut byte) {
            Ok(0) => return Err(Problem::new(Exit::Peer, "the target process ended at once")),
            Ok(_) => line.extend(byte),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Problem::from_chain(Exit::Peer, &e)),
        }
        if line.len() > LONGEST_LINE {
            break;
        }
    }
    let line = String::from_utf8_lossy(&line);
    let address = line.trim_end().strip_prefix("listening ");
    address
        .and_then(|address| address.parse().ok())
        .ok_or_else(|| {
            Problem::new(
                Exit::Peer,
                "the target process did not say where it listens",
            )
            .with_evidence(format!("it said {:?}", line.trim_end()))
        })
}

/// Ends a child: SIGTERM, a grace, SIGKILL. Says how it ended.
fn end(child: &mut Child) -> Option<ExitStatus> {
    if let Ok(Some(status)) = child.try_wait() {
        return Some(status);
    }
    if let Ok(pid) = i32::try_from(child.id()) {
        // It has not been waited for, so the number is still its own. One that was stopped hears
        // the first with the second.
        for signal in [Signal::SIGTERM, Signal::SIGCONT] {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => break,
        }
    }
    let _ = child.kill();
    child.wait().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spawn(script: &str, timeout: Duration) -> Result<OwnTarget, Problem> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        OwnTarget::spawn(command, timeout).map_err(|e| Problem::of(&e))
    }

    #[test]
    fn a_target_says_where_it_listens_and_ends_with_its_handle() -> Result<(), Problem> {
        let script = "echo listening 127.0.0.1:4711; exec sleep 600";
        let target = spawn(script, Duration::from_secs(60))?;
        assert_eq!(target.address().to_string(), "127.0.0.1:4711");
        let pid = Pid::from_raw(i32::try_from(target.pid()).unwrap_or(0));
        assert!(kill(pid, None).is_ok());
        drop(target);
        assert_eq!(kill(pid, None), Err(nix::errno::Errno::ESRCH));
        Ok(())
    }

    #[test]
    fn a_target_that_fails_is_told_with_its_status() {
        let problem = spawn("exit 4", Duration::from_secs(60)).err();
        let text = problem.map(|p| p.to_string()).unwrap_or_default();
        assert!(
            text.contains("ended at once") && text.contains("exit status: 4"),
            "{text}"
        );
    }

    #[test]
    fn a_target_that_says_something_else_is_told() {
        let problem = spawn("echo hello; exec sleep 600", Duration::from_secs(60)).err();
        let text = problem.map(|p| p.to_string()).unwrap_or_default();
        assert!(text.contains("it said \"hello\""), "{text}");
    }

    #[test]
    fn a_stopped_target_ends_by_itself() -> Result<(), Problem> {
        let script = "trap 'touch \"$0\"; exit' TERM; echo listening 127.0.0.1:1; kill -STOP $$";
        let dir = tempfile::tempdir().map_err(|e| Problem::from_chain(Exit::Device, &e))?;
        let done = dir.path().join("done");
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&done);
        let target =
            OwnTarget::spawn(command, Duration::from_secs(60)).map_err(|e| Problem::of(&e))?;
        let stat = format!("/proc/{}/stat", target.pid());
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let stat = std::fs::read_to_string(&stat).unwrap_or_default();
            if stat.contains(") T ") {
                break;
            }
            assert!(Instant::now() < until, "it does not stop itself: {stat:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(target);
        assert!(done.exists(), "it was killed");
        Ok(())
    }

    #[test]
    fn a_silent_target_runs_out_of_time() {
        let problem = spawn("exec sleep 600", Duration::from_millis(50)).err();
        assert_eq!(problem.map(|p| p.exit), Some(Exit::Peer));
    }
}
