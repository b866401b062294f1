//! What can be wrong with a config.json.

use thiserror::Error;

/// A config.json that no format can be made of. `path` is the place inside the file:
/// `text_config.num_hidden_layers`, `layer_types[3]`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Text that is not JSON.
    #[error("not JSON: {reason} at line {line} column {column}")]
    Json {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// The parser's words.
        reason: String,
    },
    /// A file longer than any config.
    #[error("{bytes} bytes are more than the {max} that a config may have")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The most there may be.
        max: usize,
    },
    /// A field that must be there.
    #[error("{path} is missing, and a {model_type} needs it")]
    Missing {
        /// Place inside the file.
        path: String,
        /// The model's type.
        model_type: String,
    },
    /// A field of another type.
    #[error("{path} is {found}, not {expected}")]
    Type {
        /// Place inside the file; `the file` for the file itself.
        path: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A number that no model has.
    #[error("{path} is {value}, not in {min}..={max}")]
    Range {
        /// Place inside the file.
        path: String,
        /// The number as it stands there.
        value: String,
        /// The least it may be.
        min: u64,
        /// The most it may be.
        max: u64,
    },
    /// A model type that this version does not know.
    #[error("{path} is {value}; known are {}", known.join(", "))]
    UnknownModelType {
        /// Place inside the file.
        path: String,
        /// The type.
        value: String,
        /// The known ones.
        known: Vec<&'static str>,
    },
    /// A word that means nothing to us.
    #[error("{path} is {value}; known are {}", known.join(", "))]
    UnknownWord {
        /// Place inside the file.
        path: String,
        /// The word.
        value: String,
        /// The known ones.
        known: Vec<&'static str>,
    },
    /// A list with another length than the number of layers.
    #[error("{path} has {count} entries for {layers} layers")]
    Length {
        /// Place inside the file.
        path: String,
        /// Its length.
        count: usize,
        /// The layers.
        layers: u32,
    },
    /// Two numbers of which one must be a multiple of the other.
    #[error("{path} is {value}, not a multiple of {divisor_path}, which is {divisor}")]
    NotMultiple {
        /// Place inside the file.
        path: String,
        /// Its value.
        value: u64,
        /// Place of the divisor.
        divisor_path: String,
        /// The divisor.
        divisor: u64,
    },
    /// Draft layers were asked for, and the model has none.
    #[error("no MTP layers to count: {path} is 0 or not there (model type {model_type})")]
    NoMtp {
        /// Place inside the file.
        path: String,
        /// The model's type.
        model_type: String,
    },
}
