//! A model of an mlx5 device's send queue, for tests and demonstrations where there is none: it reads
//! WQEs, doorbell records and doorbells out of queue memory as the device would, and is stricter than it.
//!
//! It checks what a program must keep: WQEs that are whole when they are told of, their numbers, queue
//! pair, keys and bounds; records that never go back or too far; doorbells that say what was posted and
//! come after their record; completions that are given back. What breaks a rule is a [`Violation`]: on a
//! device it would be a lost or wrong transfer, or nothing at all, on another day.
//!
//! A device may read a doorbell record at any time, and fetch what it tells of at once. So the model can
//! be asked to ([`Hca::see_record`]) between a poster's stores, and to check a doorbell in the moment in which it is rung
//! ([`Hca::ring`]). It overwrites the slots that it has consumed, as if the next lap were there already. Without these
//! two, stores in a wrong order are hardly ever found: by the time somebody looks, both have been made.
//!
//! What it is not: a network, a cache, a PCIe bus. Nothing that passes here is proven for a device.

mod hca;
mod keys;
#[cfg(test)]
mod tests;
mod violation;

pub use hca::{Carried, Copying, Hca, HcaSetup, Queues, Sink};
pub use keys::{KeyTable, Region};
pub use violation::Violation;
