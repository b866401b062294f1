//! Memory that kvxfer can move: host arenas another process may map, anonymous buffers, and spans
//! that an engine already owns. All three are reached through one safe handle, [`HostMemory`]. Memory of
//! GPUs, with their streams, events and code, is in [`gpu`], and what moves scattered blocks between such
//! memories in [`gather`].
//!
//! # The memory model
//!
//! The bytes behind a [`HostMemory`] are shared with things the compiler cannot see: a network
//! card, another process, other threads of the engine. Any of them may change a byte at any moment. From that
//! follow three rules, and this crate keeps them so that its callers need no `unsafe`:
//!
//! 1. **No reference to the bytes is ever made.** A `&[u8]` promises that its bytes stand still, and
//!    a `&mut [u8]` that nobody else looks; neither can be promised here. There are only raw pointers,
//!    and the bytes come and go by copy.
//! 2. **Bulk access is foreign code.** Copies and fills call the C library's `memmove` and `memset`
//!    through a pointer that the optimiser cannot see through, just as a device's DMA is out of its sight. To
//!    the compiler no access of its own can race with them; what a copy of bytes that change
//!    meanwhile delivers is *some* bytes, never an invalid value: only `u8` and `u64` are read.
//! 3. **Order comes from words, not from bytes.** Who must know that bytes are whole looks at an
//!    aligned 64-bit word that is stored after them ([`HostMemory::store_u64`], release) and loaded
//!    before them ([`HostMemory::load_u64`], acquire). The lease slots of kvxfer are such words.
//!
//! Which bytes may change when, and who may read them, is decided above, by leases, quarantine and
//! completions; here nothing worse than wrong bytes can come of getting it wrong.
//!
//! # Huge pages
//!
//! [`HostArena`] takes 2 MiB pages where they can be had, and [`HostArena::pages`] says what the
//! kernel really gave and why it is not more.

mod arena;
pub mod bare;
mod buffer;
mod error;
pub mod gpu;
pub mod kernels;
mod mapping;
mod memory;
mod pages;
pub mod post;
mod queue_memory;
mod raw;
mod words;

pub use arena::{ArenaOptions, HostArena, HugePages};
pub use buffer::HostBuffer;
pub use error::{Error, FirstMismatch, Operation};
pub use gpu::gather;
pub use memory::{CopyPair, HostMemory, read};
pub use pages::{PageBacking, PageInfo, WhyNotHuge};
