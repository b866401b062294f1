//! The control connection against itself, against a peer written out by hand from
//! docs/wire-format.md, and against altered bytes; all in virtual time.

mod bytes;
mod endings;
mod handshake;
mod messages;
mod pair;
mod script;
mod time;
