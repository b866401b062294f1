//! The built command as processes, each waited for with a bound.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code; none if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The one line of JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.stdout.matches('\n').count(), 1, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Ended with this code, having said all of these.
    #[track_caller]
    pub(crate) fn failed(&self, code: i32, said: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for text in said {
            assert!(
                self.stderr.contains(text),
                "{text:?} was not said: {self:?}"
            );
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

/// A process that is killed if it is still there at the end.
pub(crate) struct Process {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    lines: Receiver<String>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command, in an environment that gives it no settings.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvxfer"));
    command.args(args);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KVXFER_") {
            command.env_remove(name);
        }
    }
    command
}

/// The same by somebody who may lock so much memory and no more, as `prlimit` writes it.
pub(crate) fn locking(memlock: &str, plain: &Command) -> Command {
    let mut limited = Command::new("setpriv");
    limited.args([
        "--bounding-set=-ipc_lock",
        "--inh-caps=-ipc_lock",
        "prlimit",
    ]);
    limited.arg(format!("--memlock={memlock}"));
    limited.arg(plain.get_program()).args(plain.get_args());
    for (key, value) in plain.get_envs() {
        match value {
            Some(value) => limited.env(key, value),
            None => limited.env_remove(key),
        };
    }
    limited
}

pub(crate) fn start(args: &[&str]) -> Process {
    spawn(&mut command(args))
}

pub(crate) fn spawn(command: &mut Command) -> Process {
    spawn_to(command, Stdio::piped())
}

/// With its standard output going somewhere; what of it comes here is kept.
pub(crate) fn spawn_to(command: &mut Command, to: Stdio) -> Process {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(to)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let (sender, lines) = channel();
    let stdout = child.stdout.take();
    let stdout = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(stdout) = stdout {
            let mut out = BufReader::new(stdout);
            let mut line = String::new();
            while out.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                text.push_str(&line);
                let _ = sender.send(std::mem::take(&mut line));
            }
        }
        text
    });
    let mut stderr = child.stderr.take().expect("piped");
    let stderr = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    Process {
        child,
        stdout: Some(stdout),
        stderr: Some(stderr),
        lines,
    }
}

impl Process {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid());
        nix::sys::signal::kill(pid, signal).expect("the process is there");
    }

    /// The next line on standard output, when it comes.
    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(LONG).expect("a line in time")
    }

    /// Where a server listens.
    pub(crate) fn address(&self) -> String {
        let line = self.line();
        let address = line.strip_prefix("listening ").map(str::trim_end);
        address
            .unwrap_or_else(|| panic!("it said {line:?}"))
            .to_owned()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Ended {
        let until = Instant::now() + LONG;
        let status = loop {
            match self.child.try_wait().expect("a child") {
                Some(status) => break status,
                None if Instant::now() > until => {
                    let _ = self.child.kill();
                    panic!("still running after {LONG:?}");
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let text = |reader: Option<JoinHandle<String>>| {
            reader
                .and_then(|reader| reader.join().ok())
                .unwrap_or_default()
        };
        Ended {
            code: status.code(),
            stdout: text(self.stdout.take()),
            stderr: text(self.stderr.take()),
        }
    }
}

pub(crate) fn run(args: &[&str]) -> Ended {
    start(args).end()
}

/// A server that serves on a free port.
pub(crate) fn serve(args: &[&str]) -> (Process, String) {
    let server = start(&[&["serve", "--listen", "127.0.0.1:0"], args].concat());
    let address = server.address();
    (server, address)
}

/// Waits until something holds.
pub(crate) fn wait_until(what: &str, holds: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    let mut holds = holds;
    while !holds() {
        assert!(Instant::now() < until, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The processes whose parent this is.
pub(crate) fn children_of(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// Whether a process runs: a zombie that nobody waits for does not.
pub(crate) fn runs(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    !state.starts_with(['Z', 'X'])
}

/// Waits for the end of a client, whose own target is gone with it.
pub(crate) fn leaves_nothing(mut client: Process) {
    let mut targets = Vec::new();
    wait_until("the end of the run", || {
        targets.extend(children_of(client.pid()));
        client.has_ended()
    });
    assert!(!targets.is_empty());
    assert!(!targets.into_iter().any(runs));
}

/// Whether a line is of a ping of which everything came back.
pub(crate) fn whole(line: &str) -> bool {
    line.starts_with("seq=") && line.matches(" us").count() == 3
}

/// Waits for a line of a ping that satisfies.
#[track_caller]
pub(crate) fn ping_line(client: &Process, wanted: fn(&str) -> bool) {
    loop {
        let line = client.line();
        assert!(line.starts_with("seq="), "{line:?}");
        if wanted(&line) {
            return;
        }
    }
}

/// Endless pings that are being answered, of a server that is given up after one and a half seconds
/// of silence.
#[track_caller]
pub(crate) fn endless_pings(address: &str, more: &[&str]) -> Process {
    let args = ["ping", address, "-c", "0", "-i", "20ms", "-W", "200ms"];
    let client = spawn(
        command(&[&args[..], more].concat())
            .env("KVXFER_HEARTBEAT_TIMEOUT", "500ms")
            .env("KVXFER_HEARTBEAT_INTERVAL", "100ms"),
    );
    assert!(client.line().starts_with("PING "));
    ping_line(&client, whole);
    client
}

/// What both sides of a test of struck peers are given as `--timeout`.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(1500);
pub(crate) const TIMEOUT_TEXT: &str = "1500ms";
/// What may come on top of it: a machine with two cores and much to do.
const SLACK: Duration = Duration::from_secs(6);

/// Asserts that what was begun is over within the timeout and the slack.
#[track_caller]
pub(crate) fn in_time(begun: Instant, what: impl std::fmt::Debug) {
    let took = begun.elapsed();
    assert!(took < TIMEOUT + SLACK, "it took {took:?}: {what:?}");
}

/// Two files with secrets, gone with it.
pub(crate) struct Secrets {
    dir: tempfile::TempDir,
}

impl Secrets {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["one", "two"] {
            let text = format!("{name}: 0123456789abcdef0123456789abcdef");
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("written");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(&path, mode).expect("set");
        }
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}
