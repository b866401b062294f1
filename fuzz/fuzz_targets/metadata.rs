//! What `connect_with` is given. What is taken is sound, and comes back as it was.
#![no_main]

use kvxfer::metadata::Metadata;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(metadata) = Metadata::from_bytes(data) {
        let bytes = metadata.to_bytes().expect("what is taken is sound");
        assert_eq!(Metadata::from_bytes(&bytes).as_ref(), Ok(&metadata));
    }
});
