//! A model of [`std::sync::OnceLock`].

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, Ordering};

/// As [`std::sync::OnceLock`]: who finds it filled sees what was done before it was.
#[derive(Debug)]
pub struct OnceLock<T> {
    filling: Mutex<()>,
    filled: AtomicBool,
    value: std::sync::OnceLock<T>,
}

#[allow(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::new_without_default,
    missing_docs,
    reason = "as in the standard library"
)]
impl<T> OnceLock<T> {
    #[must_use]
    pub fn new() -> Self {
        Self {
            filling: Mutex::new(()),
            filled: AtomicBool::new(false),
            value: std::sync::OnceLock::new(),
        }
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        let _filling = self.filling.lock().expect("loom's locks are not poisoned");
        self.value.set(value)?;
        self.filled.store(true, Ordering::Release);
        Ok(())
    }

    #[must_use]
    pub fn get(&self) -> Option<&T> {
        let filled = self.filled.load(Ordering::Acquire);
        self.value.get().filter(|_| filled)
    }
}
