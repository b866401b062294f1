//! A ticket from a router, as bytes and as JSON. What is taken is sound, and comes back as it was.
#![no_main]

use kvxfer::ticket::Ticket;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let from_json = std::str::from_utf8(data).ok().map(Ticket::from_json);
    for ticket in [Some(Ticket::from_bytes(data)), from_json]
        .into_iter()
        .flatten()
        .flatten()
    {
        ticket.check().expect("what is taken is sound");
        let bytes = ticket.to_bytes().expect("a sound ticket");
        assert_eq!(Ticket::from_bytes(&bytes).as_ref().ok(), Some(&ticket));
        let json = ticket.to_json().expect("a sound ticket");
        assert_eq!(Ticket::from_json(&json).as_ref().ok(), Some(&ticket));
    }
});
