//! Reading fields of a config.json, with their paths for messages.

use serde_json::{Map, Value};

use super::ConfigError;

/// The longest piece of a file that a message repeats.
const SHOWN: usize = 48;

/// A field that may be absent, null or there: to a model's class these are three different things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Given<T> {
    Absent,
    Null,
    Value(T),
}

impl<T> Given<T> {
    /// What is there, or a default for what is absent; null stays nothing.
    pub(super) fn or_default(self, default: Option<T>) -> Option<T> {
        match self {
            Self::Absent => default,
            Self::Null => None,
            Self::Value(value) => Some(value),
        }
    }

    pub(super) fn value(self) -> Option<T> {
        self.or_default(None)
    }
}

/// An object of the file.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// In front of every key: empty, or `text_config.`.
    prefix: &'static str,
    model_type: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(
        value: &'a Value,
        path: &str,
        prefix: &'static str,
        model_type: &'a str,
    ) -> Result<Self, ConfigError> {
        let map = value
            .as_object()
            .ok_or_else(|| wrong_type(path.to_owned(), "an object", value))?;
        Ok(Self {
            map,
            prefix,
            model_type,
        })
    }

    pub(super) fn with_type(self, model_type: &'a str) -> Self {
        Self { model_type, ..self }
    }

    pub(super) fn model_type(&self) -> &'a str {
        self.model_type
    }

    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing {
            path: self.path(key),
            model_type: shorten(self.model_type),
        }
    }

    pub(super) fn raw(&self, key: &str) -> Given<&'a Value> {
        match self.map.get(key) {
            None => Given::Absent,
            Some(Value::Null) => Given::Null,
            Some(value) => Given::Value(value),
        }
    }

    fn read<T>(
        &self,
        key: &str,
        read: impl FnOnce(&'a Value) -> Result<T, ConfigError>,
    ) -> Result<Given<T>, ConfigError> {
        Ok(match self.raw(key) {
            Given::Absent => Given::Absent,
            Given::Null => Given::Null,
            Given::Value(value) => Given::Value(read(value)?),
        })
    }

    /// A whole number in `min..=max`.
    pub(super) fn number(&self, key: &str, min: u64, max: u64) -> Result<Given<u64>, ConfigError> {
        self.read(key, |value| {
            let Value::Number(number) = value else {
                return Err(wrong_type(self.path(key), "a whole number", value));
            };
            if number.is_f64() {
                return Err(wrong_type(self.path(key), "a whole number", value));
            }
            match number.as_u64() {
                Some(n) if (min..=max).contains(&n) => Ok(n),
                _ => Err(ConfigError::Range {
                    path: self.path(key),
                    value: shorten(&number.to_string()),
                    min,
                    max,
                }),
            }
        })
    }

    /// A whole number in `1..=max` that must be there.
    pub(super) fn needed(&self, key: &str, max: u64) -> Result<u64, ConfigError> {
        let given = self.number(key, 1, max)?;
        given.value().ok_or_else(|| self.missing(key))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Given<bool>, ConfigError> {
        self.read(key, |value| {
            let wrong = || wrong_type(self.path(key), "true or false", value);
            value.as_bool().ok_or_else(wrong)
        })
    }

    pub(super) fn word(&self, key: &str) -> Result<Given<&'a str>, ConfigError> {
        self.read(key, |value| {
            let wrong = || wrong_type(self.path(key), "a string", value);
            value.as_str().ok_or_else(wrong)
        })
    }

    pub(super) fn list(&self, key: &str) -> Result<Given<&'a [Value]>, ConfigError> {
        self.read(key, |value| {
            let wrong = || wrong_type(self.path(key), "a list", value);
            value.as_array().map(Vec::as_slice).ok_or_else(wrong)
        })
    }
}

pub(super) fn wrong_type(path: String, expected: &'static str, value: &Value) -> ConfigError {
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => shorten(&n.to_string()),
        Value::String(s) => format!("the string {:?}", shorten(s)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    ConfigError::Type {
        path: if path.is_empty() {
            "the file".to_owned()
        } else {
            path
        },
        expected,
        found,
    }
}

/// At most so much of a file's text as a message bears.
pub(super) fn shorten(text: &str) -> String {
    if text.chars().nth(SHOWN).is_none() {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(SHOWN).collect();
    short.push('…');
    short
}
