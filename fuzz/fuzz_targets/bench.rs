//! What the two ends of a bandwidth test say to each other.
//!
//! Input: which of the two (one byte), then the message.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The library shows these messages to fuzzers alone; an ordinary check of this file sees none.
    #[cfg(fuzzing)]
    if let Some((which, bytes)) = data.split_first() {
        kvxfer::bench::fuzzing::comes_back(which % 2 == 0, bytes);
    }
    #[cfg(not(fuzzing))]
    let _ = data;
});
