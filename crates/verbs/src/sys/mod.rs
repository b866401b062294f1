//! libibverbs, opened when it is first needed: types, constants and functions by the names of C.
//!
//! The program starts without the library, and says what is missing. Nothing here is checked by
//! C: that types and prototypes are right is shown by the tests in tests/abi, which compare all of
//! them with the headers and with rdma-sys. No value from C is undefined behaviour: enumerations are
//! integers with names.

#[allow(
    non_camel_case_types,
    dead_code,
    reason = "names of C, and all of an enumeration"
)]
pub(crate) mod enums;
#[cfg(test)]
pub(crate) mod fake;
mod functions;
pub(crate) mod inline;
mod library;
#[cfg(test)]
mod tests;
#[allow(
    non_camel_case_types,
    non_snake_case,
    dead_code,
    reason = "names of C, and fields that only C uses"
)]
pub(crate) mod types;

pub(crate) use functions::Functions;
pub use library::library_file;
pub(crate) use library::{Library, Verbs};
