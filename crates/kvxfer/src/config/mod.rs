//! The configuration of an engine: what may be set, where a value comes from, and why.
//!
//! Values come from flags, the environment (`KVXFER_…`, and a few names of other systems), the
//! kv-transfer-config JSON that inference engines are started with, and defaults, in this order of
//! precedence. Nothing is read behind the caller's back: the text of a file, the environment and
//! the flags are handed to a [`ConfigBuilder`]. All settings stand in one table, [`KEYS`].

mod builder;
mod error;
mod foreign;
mod json;
mod keys;
mod value;

pub use crate::wire::{KvRole, PathKind};
pub use builder::{ConfigBuilder, Place, Row, Source, UnknownKeys};
pub use error::ConfigError;
pub use keys::{Config, KEYS, Key};
pub use value::{BenchPlace, Bytes, DeviceFilter, FencePolicy, Listen, PathSet};

use std::fmt::Write;

/// The port an engine listens on unless told otherwise.
pub const DEFAULT_PORT: u16 = 7301;
/// What the names of this library's environment variables begin with.
pub const ENV_PREFIX: &str = "KVXFER_";

impl Config {
    /// Whether checksums are compared where a call does not say.
    pub(crate) fn verifies(&self) -> bool {
        self.verify || self.fence == FencePolicy::Verify
    }

    /// Checks every setting against its rule, and those that must fit each other.
    ///
    /// # Errors
    /// The first setting that breaks its rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        for key in KEYS {
            if !(key.check)(self) {
                return Err(ConfigError::Value {
                    key: key.name,
                    value: (key.show)(self),
                    allowed: key.allowed(),
                    source_of: Source::Code,
                });
            }
        }
        if self.heartbeat_timeout < self.heartbeat_interval * 2 {
            return Err(ConfigError::Together {
                key: "heartbeat_timeout",
                value: format!("{:?}", self.heartbeat_timeout),
                other_key: "heartbeat_interval",
                other_value: format!("{:?}", self.heartbeat_interval),
                rule: "the timeout must be at least two intervals",
            });
        }
        Ok(())
    }

    /// Whether the engine may listen where it is told to: on loopback, or with a secret, or when
    /// it is allowed to do without.
    ///
    /// # Errors
    /// It may not.
    pub fn check_listen(&self) -> Result<(), ConfigError> {
        if self.listen.is_loopback() || self.secret_file.is_some() || self.allow_unauthenticated {
            return Ok(());
        }
        Err(ConfigError::Unauthenticated {
            host: self.listen.host.clone(),
        })
    }

    /// Host and port to listen on.
    #[must_use]
    pub fn listen_on(&self) -> (&str, u16) {
        (&self.listen.host, self.listen.port.unwrap_or(self.port))
    }

    /// Work requests to post at once, or `None` when the scheduler chooses.
    #[must_use]
    pub fn fixed_batch_size(&self) -> Option<u32> {
        u32::try_from(self.post_batch_size).ok()
    }
}

/// The reference of all settings, as a Markdown table.
#[must_use]
pub fn reference() -> String {
    let mut out = String::from(
        "| key | default | values | environment | what it is |\n|---|---|---|---|---|\n",
    );
    for key in KEYS {
        // The default of the workers is the machine's; the reference is not to depend on it.
        let default = match key.name {
            "num_worker_threads" => "min(4, cores)".into(),
            _ => (key.show)(&Config::default()),
        };
        let mut env = vec![key.env()];
        env.extend(key.env_fallbacks.iter().map(|name| (*name).to_owned()));
        writeln!(
            out,
            "| `{}` | {} | {} | `{}` | {} |",
            key.name,
            if default.is_empty() {
                "unset"
            } else {
                &default
            },
            key.allowed(),
            env.join("`, `"),
            key.doc,
        )
        .expect("writing to a string does not fail");
    }
    out
}
