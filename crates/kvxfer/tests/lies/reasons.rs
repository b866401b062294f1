//! What the engine says of its peers in its log.

use std::fmt::{Debug, Write};
use std::sync::{Mutex, Once, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::support::until;

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Keep;

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string does not fail.
        let _ = write!(self.0, "{}={value:?} ", field.name());
    }
}

impl Subscriber for Keep {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(line.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Keeps warnings and errors from here on.
pub(crate) fn keep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::subscriber::set_global_default(Keep).expect("no other in this process");
    });
    forget();
}

/// Drops what has been said.
pub(crate) fn forget() {
    LINES.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Waits until the log says something.
#[track_caller]
pub(crate) fn logged(words: &str) {
    let all = || {
        LINES
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    };
    until(&format!("{words:?} in the log"), || all().contains(words));
}

/// Checks that nothing was said.
#[track_caller]
pub(crate) fn assert_quiet() {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(lines.is_empty(), "{lines:#?}");
}
