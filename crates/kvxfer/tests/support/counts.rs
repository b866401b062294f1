//! What this process has: descriptors, threads, memory.

use std::fs;
use std::time::{Duration, Instant};

use super::LONG;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) fds: usize,
    pub(crate) threads: usize,
    pub(crate) resident_kib: u64,
}

/// How many entries a directory of /proc/self has.
fn entries(of: &str) -> usize {
    fs::read_dir(format!("/proc/self/{of}"))
        .expect("procfs")
        .count()
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("a resident size");
    let number = line.split_whitespace().nth(1).expect("a number");
    number.parse().expect("a number")
}

impl Counts {
    pub(crate) fn now() -> Self {
        Self {
            fds: entries("fd"),
            threads: entries("task"),
            resident_kib: resident_kib(),
        }
    }

    /// Waits until there are no more descriptors and threads than these; their owners have told
    /// everybody that they go, and may still be on their way.
    #[track_caller]
    pub(crate) fn settle(&self, what: &str) {
        let begun = Instant::now();
        loop {
            let now = Counts::now();
            if now.fds <= self.fds && now.threads <= self.threads {
                return;
            }
            assert!(begun.elapsed() < LONG, "{what}: {now:?}, before {self:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// KiB that are resident now and were not then.
    pub(crate) fn grown_kib(&self) -> u64 {
        resident_kib().saturating_sub(self.resident_kib)
    }
}
