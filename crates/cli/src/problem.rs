//! What people see when something fails: the cause, the evidence, the fix; and the exit code.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;

/// Why the command ends; the numbers are part of its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// A check failed: bytes differ, below a wanted figure. Or a defect of this program.
    Check = 1,
    /// The command was used wrongly.
    Usage = 2,
    /// The peer, or a deadline.
    Peer = 3,
    /// The device, its driver or memory.
    Device = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A failure as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) exit: Exit,
    /// What went wrong, in a line.
    pub(crate) cause: String,
    /// What was seen, the nearest first.
    pub(crate) evidence: Vec<String>,
    /// What to do about it, where that is known.
    pub(crate) fix: Option<String>,
}

impl Problem {
    pub(crate) fn new(exit: Exit, cause: impl Into<String>) -> Self {
        Self {
            exit,
            cause: cause.into(),
            evidence: Vec::new(),
            fix: None,
        }
    }

    pub(crate) fn usage(cause: impl Into<String>) -> Self {
        Self::new(Exit::Usage, cause)
    }

    pub(crate) fn with_evidence(mut self, evidence: impl Into<String>) -> Self {
        self.evidence.push(evidence.into());
        self
    }

    pub(crate) fn with_fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// An error and its chain of sources.
    pub(crate) fn from_chain(exit: Exit, error: &(dyn StdError + 'static)) -> Self {
        let mut problem = Self::new(exit, error.to_string());
        problem.add_sources(error);
        problem
    }

    /// Adds the sources, without what a text above already says.
    fn add_sources(&mut self, error: &(dyn StdError + 'static)) {
        let mut source = error.source();
        while let Some(error) = source {
            let text = error.to_string();
            let above = self.evidence.last().unwrap_or(&self.cause);
            if !above.contains(&text) {
                self.evidence.push(text);
            }
            source = error.source();
        }
    }

    /// What an error is to the user. A [`Problem`] anywhere in the chain is taken as it is, with what was said on
    /// the way up as evidence; other errors are told apart by their type.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        let mut said = Vec::new();
        for error in error.chain() {
            if let Some(problem) = error.downcast_ref::<Self>() {
                let mut problem = problem.clone();
                problem.evidence.extend(said);
                return problem;
            }
            let explained = match (error.downcast_ref(), error.downcast_ref()) {
                (Some(error), _) => Some(crate::explain::library(error)),
                (_, Some(failed)) => Some(crate::explain::transfer(failed)),
                _ => None,
            };
            if let Some(mut problem) = explained {
                problem.evidence.extend(said);
                return problem;
            }
            said.push(error.to_string());
        }
        let exit = error.chain().find_map(exit_of).unwrap_or(Exit::Check);
        Self::from_chain(exit, error.as_ref())
    }
}

/// The exit code of an error whose type tells it.
fn exit_of(error: &(dyn StdError + 'static)) -> Option<Exit> {
    if error.is::<kvxfer_hipmem::Error>() {
        Some(match error.downcast_ref() {
            Some(kvxfer_hipmem::Error::Mismatch(_)) => Exit::Check,
            _ => Exit::Device,
        })
    } else if error.is::<crate::size::BadValue>() {
        Some(Exit::Usage)
    } else if error.is::<std::io::Error>() {
        // What comes from a peer has a type of the library: this is the machine's own word.
        Some(Exit::Device)
    } else {
        None
    }
}

impl StdError for Problem {}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kvxfer: {}", self.cause)?;
        for evidence in &self.evidence {
            write!(f, "\n  evidence: {evidence}")?;
        }
        if let Some(fix) = &self.fix {
            write!(f, "\n  fix: {fix}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn it_reads_cause_evidence_fix() {
        let problem = Problem::new(Exit::Peer, "10.0.0.7:7301 cannot be reached")
            .with_evidence("connect: connection refused (ECONNREFUSED)")
            .with_fix("start `kvxfer serve --listen 10.0.0.7` there");
        let wanted = "kvxfer: 10.0.0.7:7301 cannot be reached\n  \
                      evidence: connect: connection refused (ECONNREFUSED)\n  \
                      fix: start `kvxfer serve --listen 10.0.0.7` there";
        assert_eq!(problem.to_string(), wanted);
    }

    #[test]
    fn a_source_that_is_already_told_is_not_told_again() {
        let error = kvxfer_hipmem::Error::Map {
            len: 5,
            source: nix::errno::Errno::ENOMEM,
        };
        let problem = Problem::of(&anyhow::Error::new(error));
        assert_eq!(problem.exit, Exit::Device);
        assert!(problem.cause.contains("ENOMEM"), "{problem}");
        assert!(problem.evidence.is_empty(), "{problem}");
    }

    #[test]
    fn context_keeps_the_exit_code_of_what_is_below() {
        let refused = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let error = anyhow::Error::new(refused).context("opening connections over the loopback");
        let problem = Problem::of(&error);
        assert_eq!(
            (problem.exit, problem.cause.as_str()),
            (Exit::Device, "opening connections over the loopback")
        );
        assert_eq!(problem.evidence, ["permission denied"]);

        let inner: Result<(), Problem> = Err(Problem::usage("no such model").with_fix("say a"));
        let problem = Problem::of(&inner.context("reading the options").unwrap_err());
        assert_eq!(
            (problem.exit, problem.cause.as_str()),
            (Exit::Usage, "no such model")
        );
        assert_eq!(problem.evidence, ["reading the options"]);
    }
}
