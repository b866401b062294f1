//! loom's atomics, as far as they are used, with a switch that makes all orderings relaxed.

use std::cell::Cell;

pub use std::sync::atomic::Ordering;

use loom::sync::atomic as modelled;

thread_local! {
    // The threads of a model all run on the thread that runs the model.
    static WEAK: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, this thread's models have no orderings.
#[derive(Debug)]
pub(crate) struct Weak(());

impl Weak {
    pub(crate) fn begin() -> Self {
        WEAK.set(true);
        Self(())
    }
}

impl Drop for Weak {
    fn drop(&mut self) {
        WEAK.set(false);
    }
}

fn order(wanted: Ordering) -> Ordering {
    if WEAK.get() {
        Ordering::Relaxed
    } else {
        wanted
    }
}

/// As [`std::sync::atomic::fence`].
pub fn fence(order: Ordering) {
    if !WEAK.get() {
        modelled::fence(order);
    }
}

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        #[doc = concat!("As [`std::sync::atomic::", stringify!($name), "`].")]
        #[derive(Debug, Default)]
        pub struct $name(modelled::$name);

        #[allow(missing_docs, reason = "as in the standard library")]
        impl $name {
            #[must_use]
            pub fn new(value: $value) -> Self {
                Self(modelled::$name::new(value))
            }

            pub fn load(&self, ordering: Ordering) -> $value {
                self.0.load(order(ordering))
            }

            pub fn store(&self, value: $value, ordering: Ordering) {
                self.0.store(value, order(ordering));
            }

            pub fn swap(&self, value: $value, ordering: Ordering) -> $value {
                self.0.swap(value, order(ordering))
            }

            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                f: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                self.0.fetch_update(order(set), order(fetch), f)
            }
        }
    };
}

macro_rules! number {
    ($name:ident, $value:ty) => {
        atomic!($name, $value);

        #[allow(missing_docs, reason = "as in the standard library")]
        impl $name {
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                let orders = (order(success), order(failure));
                self.0.compare_exchange(current, new, orders.0, orders.1)
            }

            pub fn fetch_add(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_add(value, order(ordering))
            }

            pub fn fetch_sub(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_sub(value, order(ordering))
            }

            pub fn fetch_max(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_max(value, order(ordering))
            }
        }
    };
}

atomic!(AtomicBool, bool);
number!(AtomicU32, u32);
number!(AtomicU64, u64);
number!(AtomicUsize, usize);
