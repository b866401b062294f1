//! The tries of requests that ended last, so that what comes late is told from what is wrong.

use std::collections::{HashSet, VecDeque};

use crate::ids::{Nonce, RequestId};

/// A bounded set of (request, nonce); the oldest makes room.
#[derive(Debug)]
pub(crate) struct Recent {
    bound: usize,
    order: VecDeque<(RequestId, Nonce)>,
    set: HashSet<(RequestId, Nonce)>,
}

impl Recent {
    pub(crate) fn new(bound: usize) -> Recent {
        Recent {
            bound,
            order: VecDeque::new(),
            set: HashSet::new(),
        }
    }

    pub(crate) fn contains(&self, request: &RequestId, nonce: Nonce) -> bool {
        self.set.contains(&(request.clone(), nonce))
    }

    pub(crate) fn push(&mut self, request: &RequestId, nonce: Nonce) {
        if self.set.insert((request.clone(), nonce)) {
            self.order.push_back((request.clone(), nonce));
        }
        if self.order.len() > self.bound
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
    }
}
