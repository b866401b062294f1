//! Gathers values from their sources and settles which one holds.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;

use super::foreign::{Meaning, Recognised, distance, recognise};
use super::json::{self, Node, Value};
use super::{Config, ConfigError, ENV_PREFIX, KEYS};

/// The object inside a kv-transfer-config that connectors get.
const EXTRA: &str = "kv_connector_extra_config";

/// Variables that begin like settings and are read elsewhere.
const OTHER_VARIABLES: &[&str] = &["KVXFER_GPU", "KVXFER_LOG"];

/// A place in a kv-transfer-config document.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// The file, or the flag that held the text.
    pub origin: String,
    /// The member, as `a.b`.
    pub path: String,
    /// Its line, from 1.
    pub line: usize,
    /// Its column in bytes, from 1.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place {
            origin,
            path,
            line,
            column,
        } = self;
        write!(f, "{origin}: {path} at {line}:{column}")
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// Nobody gave one.
    Default,
    /// A kv-transfer-config document.
    File(Box<Place>),
    /// An environment variable.
    Env(String),
    /// A flag of the command line.
    Flag(String),
    /// A program that changed a [`Config`] itself.
    Code,
}

impl Source {
    /// The higher one holds.
    fn rank(&self) -> usize {
        match self {
            Source::Default | Source::Code => 0,
            Source::File(_) => 1,
            Source::Env(_) => 2,
            Source::Flag(_) => 3,
        }
    }
}

/// Ranks that values are given at: all but the default.
const GIVEN_RANKS: usize = 3;

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File(place) => write!(f, "{place}"),
            Source::Env(name) => write!(f, "environment variable {name}"),
            Source::Flag(name) => write!(f, "flag {name}"),
            Source::Code => f.write_str("code"),
        }
    }
}

/// What an unknown key in a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownKeys {
    /// An error.
    #[default]
    Deny,
    /// A warning.
    Warn,
}

/// One line of `--explain-config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The key.
    pub key: String,
    /// The value that holds, empty when unset; keys that are ignored show none.
    pub value: String,
    /// Where it came from.
    pub source: Source,
    /// What else there is to know: what it overrides, how it was spelt, why it is ignored.
    pub note: String,
}

#[derive(Debug, Clone)]
struct Given {
    /// As the setting writes it.
    shown: String,
    /// As it was given.
    text: String,
    source: Source,
    note: String,
}

/// Gathers a [`Config`]. The order of the calls does not matter: a flag holds against the
/// environment, the environment against a file, a file against the default.
#[derive(Debug, Default)]
pub struct ConfigBuilder {
    unknown: UnknownKeys,
    /// By index in [`KEYS`], then by rank less one.
    given: HashMap<usize, [Option<Given>; GIVEN_RANKS]>,
    ignored: Vec<Row>,
    warnings: Vec<String>,
}

impl ConfigBuilder {
    /// Nothing given; unknown keys are errors.
    #[must_use]
    pub fn new() -> ConfigBuilder {
        ConfigBuilder::default()
    }

    /// Says what an unknown key in a document is. Must come before the document.
    pub fn unknown_keys(&mut self, policy: UnknownKeys) -> &mut Self {
        self.unknown = policy;
        self
    }

    /// Takes a kv-transfer-config. `origin` names it in messages: the file's path, or the flag
    /// that held the text.
    ///
    /// # Errors
    /// It is not a JSON object, has an unknown key or a value that the key does not take, or gives
    /// one key two values.
    pub fn json(&mut self, text: &str, origin: &str) -> Result<&mut Self, ConfigError> {
        let document = json::read(text, origin)?;
        let at = |offset: usize, path: String| {
            let (line, column) = json::line_column(text, offset);
            Source::File(Box::new(Place {
                origin: origin.into(),
                path,
                line,
                column,
            }))
        };
        let members = |node: Node, path: &str| match node.value {
            Value::Object(members) => Ok(members),
            _ => {
                let (line, column) = json::line_column(text, node.offset);
                let (origin, path) = (origin.into(), path.into());
                Err(ConfigError::Syntax {
                    origin,
                    path,
                    line,
                    column,
                    expected: "an object",
                })
            }
        };
        for (name, node) in members(document, "")? {
            if name == EXTRA || (name.len() > 8 && distance(&name, EXTRA) <= 2) {
                if name != EXTRA {
                    let source = at(node.offset, name.clone());
                    self.warnings
                        .push(format!("{source}: {name:?} is taken as {EXTRA}"));
                }
                if matches!(node.value, Value::Null) {
                    continue;
                }
                for (inner, node) in members(node, EXTRA)? {
                    let source = at(node.offset, format!("{EXTRA}.{inner}"));
                    self.member(&inner, node, source)?;
                }
            } else {
                let source = at(node.offset, name.clone());
                self.member(&name, node, source)?;
            }
        }
        Ok(self)
    }

    fn member(&mut self, name: &str, node: Node, source: Source) -> Result<(), ConfigError> {
        let (meaning, note) = match recognise(name) {
            Recognised::Exactly(meaning) => (meaning, String::new()),
            Recognised::Misspelt(meaning) => {
                let right = meaning.name();
                self.warnings.push(format!(
                    "{source}: unknown key {name:?} is taken as {right}"
                ));
                (meaning, format!("misspelt as {name}"))
            }
            Recognised::Not(candidates) => {
                let error = ConfigError::UnknownKey {
                    key: name.into(),
                    source_of: source,
                    candidates,
                };
                return match self.unknown {
                    UnknownKeys::Deny => Err(error),
                    UnknownKeys::Warn => {
                        self.warnings.push(format!("{error}; ignored"));
                        Ok(())
                    }
                };
            }
        };
        match meaning {
            Meaning::Foreign(foreign) => {
                let note = match note.as_str() {
                    "" => foreign.note.into(),
                    _ => format!("{note}; {}", foreign.note),
                };
                let row = Row {
                    key: foreign.name.into(),
                    value: String::new(),
                    source,
                    note,
                };
                self.ignored.push(row);
                Ok(())
            }
            Meaning::Ours(key) => match scalar(&node.value) {
                Scalar::Unset => Ok(()),
                Scalar::Text(text) => self.put(key, &text, source, note),
                Scalar::Not(what) => Err(bad_value(key, what, source)),
            },
        }
    }

    /// Takes the settings of an environment, given as pairs of name and value; others are skipped,
    /// and so are empty values.
    ///
    /// # Errors
    /// A value that the setting does not take, or that is not Unicode.
    pub fn env<K, V>(
        &mut self,
        vars: impl IntoIterator<Item = (K, V)>,
    ) -> Result<&mut Self, ConfigError>
    where
        K: AsRef<OsStr>,
        V: AsRef<OsStr>,
    {
        let wanted: HashMap<String, (usize, usize)> = KEYS
            .iter()
            .enumerate()
            .flat_map(|(index, key)| {
                let fallbacks = key.env_fallbacks.iter().map(|name| (*name).to_owned());
                let names = std::iter::once(key.env()).chain(fallbacks);
                names
                    .enumerate()
                    .map(move |(order, name)| (name, (index, order)))
            })
            .collect();
        let mut found: Vec<(usize, usize, String, String)> = Vec::new();
        for (name, value) in vars {
            // A name that is not Unicode is none of ours.
            let Some(name) = name.as_ref().to_str() else {
                continue;
            };
            let Some(&(index, order)) = wanted.get(name) else {
                self.stray_variable(name);
                continue;
            };
            let Some(value) = value.as_ref().to_str() else {
                return Err(ConfigError::NotUnicode { name: name.into() });
            };
            if !value.is_empty() {
                found.push((index, order, name.into(), value.into()));
            }
        }
        // Its own variable before those of other systems.
        found.sort();
        let mut last: Option<(usize, String)> = None;
        for (index, order, name, value) in found {
            if let Some((earlier, by)) = &last
                && *earlier == index
                && order > 0
            {
                self.ignored.push(Row {
                    key: name.clone(),
                    value: String::new(),
                    source: Source::Env(name),
                    note: format!("ignored: {by} is set"),
                });
                continue;
            }
            self.put(index, &value, Source::Env(name.clone()), String::new())?;
            last = Some((index, name));
        }
        Ok(self)
    }

    /// Warns of a variable that looks like ours and is not. It is no error: the environment may
    /// have been made for another version.
    fn stray_variable(&mut self, name: &str) {
        let Some(rest) = name.strip_prefix(ENV_PREFIX) else {
            return;
        };
        if OTHER_VARIABLES.contains(&name) {
            return;
        }
        let hint = match recognise(&rest.to_ascii_lowercase()) {
            Recognised::Misspelt(Meaning::Ours(key)) => {
                format!("; did you mean {}?", KEYS[key].env())
            }
            _ => String::new(),
        };
        self.warnings.push(format!(
            "environment variable {name} is no setting{hint}; ignored"
        ));
    }

    /// Takes the settings of this process's environment.
    ///
    /// # Errors
    /// As [`env`](Self::env).
    pub fn from_process_env(&mut self) -> Result<&mut Self, ConfigError> {
        self.env(std::env::vars_os())
    }

    /// Takes the value of a flag; `flag` is what the user typed, `key` the setting's name.
    ///
    /// # Errors
    /// No such setting, or a value that it does not take.
    pub fn flag(&mut self, key: &str, flag: &str, value: &str) -> Result<&mut Self, ConfigError> {
        let source = Source::Flag(flag.into());
        match KEYS.iter().position(|k| k.name == key) {
            Some(index) => self.put(index, value, source, String::new())?,
            None => {
                return Err(ConfigError::UnknownKey {
                    key: key.into(),
                    source_of: source,
                    candidates: Vec::new(),
                });
            }
        }
        Ok(self)
    }

    fn put(
        &mut self,
        index: usize,
        text: &str,
        source: Source,
        note: String,
    ) -> Result<(), ConfigError> {
        let key = &KEYS[index];
        let text = text.trim();
        let mut scratch = Config::default();
        if !(key.set)(&mut scratch, text) {
            return Err(bad_value(index, text, source));
        }
        let shown = (key.show)(&scratch);
        let slot = &mut self.given.entry(index).or_default()
            [source.rank().saturating_sub(1).min(GIVEN_RANKS - 1)];
        match slot {
            Some(first) if first.shown != shown => Err(ConfigError::Conflict {
                key: key.name,
                first: first.text.as_str().into(),
                first_source: first.source.clone(),
                second: text.into(),
                second_source: source,
            }),
            Some(first) => {
                self.warnings.push(format!(
                    "{} is given twice: {} and {source}",
                    key.name, first.source
                ));
                Ok(())
            }
            None => {
                *slot = Some(Given {
                    shown,
                    text: text.into(),
                    source,
                    note,
                });
                Ok(())
            }
        }
    }

    /// What was noticed and did no harm: misspelt keys, repeated ones, stray variables.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Keys of other systems that were given and have no effect.
    #[must_use]
    pub fn ignored(&self) -> &[Row] {
        &self.ignored
    }

    /// Settles every setting.
    ///
    /// # Errors
    /// Settings that do not go together.
    pub fn build(&self) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        for (index, key) in KEYS.iter().enumerate() {
            if let Some(given) = self.holding(index) {
                let taken = (key.set)(&mut config, &given.text);
                debug_assert!(taken, "a text that was accepted is accepted again");
            }
        }
        self.settle_port(&mut config)?;
        config.check()?;
        Ok(config)
    }

    /// All settings with their values, sources and notes, then the keys that were ignored.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn explain(&self) -> Result<Vec<Row>, ConfigError> {
        let config = self.build()?;
        let rows = KEYS.iter().enumerate().map(|(index, key)| {
            let value = (key.show)(&config);
            let Some(given) = self.holding(index) else {
                let note = match key.name {
                    "port" if config.port != super::DEFAULT_PORT => "from listen".into(),
                    _ => String::new(),
                };
                return Row {
                    key: key.name.into(),
                    value,
                    source: Source::Default,
                    note,
                };
            };
            let mut notes: Vec<String> = Vec::new();
            if !given.note.is_empty() {
                notes.push(given.note.clone());
            }
            if given.shown != value {
                notes.push(format!("{} was given", given.shown));
            }
            for under in self.values(index).filter(|g| g.source != given.source) {
                notes.push(format!("overrides {} ({})", under.shown, under.source));
            }
            Row {
                key: key.name.into(),
                value,
                source: given.source.clone(),
                note: notes.join("; "),
            }
        });
        Ok(rows.chain(self.ignored.iter().cloned()).collect())
    }

    /// Values given for a setting, the one that holds first.
    fn values(&self, index: usize) -> impl Iterator<Item = &Given> {
        self.given
            .get(&index)
            .into_iter()
            .flat_map(|ranks| ranks.iter().rev().flatten())
    }

    fn holding(&self, index: usize) -> Option<&Given> {
        self.values(index).next()
    }

    /// `listen` may name a port too: the one from the higher source holds.
    fn settle_port(&self, config: &mut Config) -> Result<(), ConfigError> {
        let Some(listen_port) = config.listen.port else {
            return Ok(());
        };
        let given = |name: &str| {
            KEYS.iter()
                .position(|k| k.name == name)
                .and_then(|index| self.holding(index))
        };
        match (given("listen"), given("port")) {
            (Some(listen), Some(port)) if listen_port != config.port => {
                if listen.source.rank() == port.source.rank() {
                    return Err(ConfigError::Conflict {
                        key: "port",
                        first: listen.text.as_str().into(),
                        first_source: listen.source.clone(),
                        second: port.text.as_str().into(),
                        second_source: port.source.clone(),
                    });
                }
                if listen.source.rank() > port.source.rank() {
                    config.port = listen_port;
                } else {
                    config.listen.port = Some(config.port);
                }
            }
            _ => config.port = listen_port,
        }
        Ok(())
    }
}

fn bad_value(index: usize, value: &str, source: Source) -> ConfigError {
    let key = &KEYS[index];
    ConfigError::Value {
        key: key.name,
        value: value.into(),
        allowed: key.allowed(),
        source_of: source,
    }
}

enum Scalar {
    Unset,
    Text(String),
    Not(&'static str),
}

/// A value as text. A list of names becomes what it is on the command line, joined with commas.
fn scalar(value: &Value) -> Scalar {
    match value {
        Value::Null => Scalar::Unset,
        Value::Bool(b) => Scalar::Text(b.to_string()),
        Value::Number(text) | Value::String(text) => Scalar::Text(text.clone()),
        Value::Object(_) => Scalar::Not("an object"),
        Value::Array(items) => {
            let mut parts = Vec::new();
            for item in items {
                match scalar(&item.value) {
                    Scalar::Text(text) => parts.push(text),
                    _ => return Scalar::Not("a list with more than names in it"),
                }
            }
            Scalar::Text(parts.join(","))
        }
    }
}
