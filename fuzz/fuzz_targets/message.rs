//! A frame type and a payload. What is decoded is within bounds, so it encodes again.
#![no_main]

use kvxfer::wire::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((code, payload)) = data.split_first() else {
        return;
    };
    if let Ok(message) = Message::decode(*code, payload) {
        assert_eq!(message.kind() as u8, *code);
        let again = message
            .encode()
            .expect("a decoded message is within bounds");
        assert_eq!(Message::decode(*code, &again).as_ref(), Ok(&message));
    }
});
