//! The opening of a data stream, forged.
#![no_main]

use kvxfer::wire::{STREAM_OPENING_LEN, Side, StreamGate, StreamOpening, Transcript};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(bytes) = data.first_chunk::<STREAM_OPENING_LEN>() else {
        return;
    };
    let keys = Transcript::new().keys(None);
    let key = keys.streams_from(Side::Client);
    let mut gate = StreamGate::new(keys.id, key.clone());
    if let Ok(opening) = StreamOpening::decode(bytes) {
        let sealed = opening.encode(&key);
        // All but the proof is canonical.
        assert_eq!(
            sealed[..STREAM_OPENING_LEN - 32],
            bytes[..STREAM_OPENING_LEN - 32]
        );
        assert_eq!(
            gate.admit(bytes).is_ok(),
            sealed == *bytes && opening.session == keys.id
        );
    } else {
        assert!(gate.admit(bytes).is_err());
    }
});
