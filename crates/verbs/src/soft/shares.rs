//! What this context lets peers map that were told a token.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::sync::{Mutex, lock};

/// A file, and where in it a memory begins.
type Shared = (Arc<OwnedFd>, u64);

#[derive(Debug, Default)]
pub(crate) struct Shares {
    by_token: Mutex<HashMap<[u8; 16], Vec<Shared>>>,
}

impl Shares {
    pub(crate) fn add(&self, token: [u8; 16], files: Vec<Shared>) {
        lock(&self.by_token).insert(token, files);
    }

    pub(crate) fn remove(&self, token: &[u8; 16]) {
        lock(&self.by_token).remove(token);
    }

    pub(crate) fn find(&self, token: &[u8; 16], index: u32) -> Option<Shared> {
        let by_token = lock(&self.by_token);
        let files = by_token.get(token)?;
        let (file, offset) = files.get(usize::try_from(index).ok()?)?;
        Some((Arc::clone(file), *offset))
    }
}
