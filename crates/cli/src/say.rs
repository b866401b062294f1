//! What is said on standard output and standard error, either of which may be closed or full.

use std::fmt::Display;
use std::io::{self, Write};

use crate::problem::{Exit, Problem};

/// Whether anybody still reads standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// As far as can be known.
    Yes,
    /// It was closed early (`| head`): that is no failure, and nothing more need be said.
    No,
}

/// Writes results to standard output.
///
/// # Errors
///
/// It does not take them: what was checked or measured could not be reported, so the exit code is
/// that of a failed check.
pub(crate) fn result(text: &str) -> Result<Heard, Problem> {
    to(io::stdout().lock(), text)
}

fn to(mut out: impl Write, text: &str) -> Result<Heard, Problem> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Heard::Yes),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Heard::No),
        Err(error) => Err(unwritten(&error)),
    }
}

/// Standard output has failed.
pub(crate) fn unwritten(error: &io::Error) -> Problem {
    Problem::new(
        Exit::Check,
        "the result could not be written to standard output",
    )
    .with_evidence(error.to_string())
    .with_fix("look where it is sent: its disk may be full (`df`)")
}

/// Columns of the terminal that standard output is, if it is one.
pub(crate) fn width() -> Option<usize> {
    let (width, _) = terminal_size::terminal_size_of(io::stdout())?;
    // One that does not know its size says 0.
    Some(usize::from(width.0)).filter(|width| *width > 0)
}

/// A line on standard error. If nobody can hear it, there is nobody left to tell.
pub(crate) fn aside(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_no_failure_and_a_full_disk_is_a_failed_check() {
        struct Fails(io::ErrorKind);
        impl Write for Fails {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert_eq!(to(Vec::new(), "x"), Ok(Heard::Yes));
        let closed = Fails(io::ErrorKind::BrokenPipe);
        assert_eq!(to(closed, "x"), Ok(Heard::No));
        let full = to(Fails(io::ErrorKind::StorageFull), "x");
        assert_eq!(full.map_err(|problem| problem.exit), Err(Exit::Check));
    }
}
