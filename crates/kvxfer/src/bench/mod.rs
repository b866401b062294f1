//! The bandwidth test's role: two sides with memory of their own, never an engine's KV blocks.
//!
//! A client says which layout it wants to test ([`BenchShape`]); the engine that it connects to
//! allocates the counterpart, if it allows benchmarks, and carries out what the client's messages
//! ask: fill, offer, expect, verify. The blocks themselves move through the same calls as an
//! engine's: [`Peer::pull`](crate::engine::Peer::pull) and
//! [`Peer::begin_push`](crate::engine::Peer::begin_push).

mod client;
mod memory;
mod message;
mod pattern;
mod produce;
mod server;
mod side;

pub use client::BenchClient;
pub use memory::{BenchMemory, BlockMemory};
pub use pattern::{Pattern, Plane, scattered_pairs};
pub use produce::ReachedMemory;
pub(crate) use server::BenchSeat;
pub use server::hold_to_format;
pub use side::{BenchShape, BenchSide, WrongByte};

/// For the fuzz targets, which see nothing that is not public.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    use super::message::{Answer, Ask};
    use crate::wire::Blob;

    /// Decodes a question or an answer; what is taken must come back as it was.
    #[allow(clippy::missing_panics_doc, reason = "that is what it is for")]
    pub fn comes_back(question: bool, bytes: &[u8]) {
        let blob = Blob(bytes.to_vec());
        if question {
            if let Ok(ask) = blob.unpack::<Ask>("question") {
                let again = Blob::pack("question", &ask).expect("what was unpacked");
                assert_eq!(again.unpack("question").as_ref(), Ok(&ask));
            }
        } else if let Ok(answer) = blob.unpack::<Answer>("answer") {
            let again = Blob::pack("answer", &answer).expect("what was unpacked");
            assert_eq!(again.unpack("answer").as_ref(), Ok(&answer));
        }
    }
}
