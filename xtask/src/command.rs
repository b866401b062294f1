//! Running a command: its output is shown as it comes and kept for counting.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::Context;

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) success: bool,
    /// All lines of both outputs, in no order between the two.
    pub(crate) lines: Vec<String>,
}

/// The cargo that runs this program, or the one in the path.
pub(crate) fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Runs to the end, showing everything.
pub(crate) fn show(command: &mut Command, dir: &Path) -> anyhow::Result<Ended> {
    let name = format!("{command:?}");
    let mut child = command
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    let out = child.stdout.take().map(|pipe| tee(pipe, std::io::stdout()));
    let err = child.stderr.take().map(|pipe| tee(pipe, std::io::stderr()));
    let status = child
        .wait()
        .with_context(|| format!("waiting for {name}"))?;
    let mut lines = Vec::new();
    for reader in [out, err].into_iter().flatten() {
        lines.extend(reader.join().unwrap_or_default());
    }
    Ok(Ended {
        success: status.success(),
        lines,
    })
}

/// Runs to the end, showing nothing. `None` where it cannot be started.
pub(crate) fn quiet(program: &str, args: &[&str]) -> Option<bool> {
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.ok().map(|status| status.success())
}

fn tee(
    pipe: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
) -> thread::JoinHandle<Vec<String>> {
    thread::spawn(move || {
        let mut lines = Vec::new();
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            // A reader that has gone away must not end the tests.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
        }
        lines
    })
}
