//! What can be wrong with a configuration.

use super::Source;

/// A configuration that cannot be used. Values of keys that are not ours are never repeated: they
/// may be secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not JSON.
    #[error("{origin}, line {line} column {column}{}: expected {expected}", in_path(.path))]
    Syntax {
        /// The file or flag.
        origin: String,
        /// Where in the document, as `a.b[2]`; empty at the top.
        path: String,
        /// Line, from 1.
        line: usize,
        /// Column in bytes, from 1.
        column: usize,
        /// What should stand there.
        expected: &'static str,
    },
    /// No setting has this name, here or in the systems whose configurations are understood.
    #[error("{source_of}: unknown key {key:?}{}", did_you_mean(.candidates))]
    UnknownKey {
        /// The name as given.
        key: String,
        /// Where it stands.
        source_of: Source,
        /// Names it may have meant.
        candidates: Vec<&'static str>,
    },
    /// A value that the setting does not take.
    #[error("{source_of}: {key} is {value:?}, expected {allowed}")]
    Value {
        /// The setting.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What it takes.
        allowed: String,
        /// Where it stands.
        source_of: Source,
    },
    /// A setting has two different values in places of the same rank.
    #[error("{key} is {first:?} ({first_source}) and {second:?} ({second_source}); remove one")]
    Conflict {
        /// The setting.
        key: &'static str,
        /// One value.
        first: Box<str>,
        /// Where it stands.
        first_source: Source,
        /// The other.
        second: Box<str>,
        /// Where that stands.
        second_source: Source,
    },
    /// Two settings do not go together.
    #[error("{key} is {value} and {other_key} is {other_value}: {rule}")]
    Together {
        /// One setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// The other.
        other_key: &'static str,
        /// Its value.
        other_value: String,
        /// What should hold.
        rule: &'static str,
    },
    /// An environment variable is not Unicode.
    #[error("environment variable {name} is not Unicode")]
    NotUnicode {
        /// Its name.
        name: String,
    },
    /// Listening where others can reach it, with nothing to tell friend from foe.
    #[error(
        "listening on {host} without a secret: set secret_file, or allow_unauthenticated if everybody who can reach this address may read and write KV blocks"
    )]
    Unauthenticated {
        /// Where it would listen.
        host: String,
    },
}

fn in_path(path: &str) -> String {
    if path.is_empty() {
        String::new()
    } else {
        format!(", in {path}")
    }
}

fn did_you_mean(candidates: &[&str]) -> String {
    if candidates.is_empty() {
        String::new()
    } else {
        format!("; did you mean {}?", candidates.join(" or "))
    }
}
