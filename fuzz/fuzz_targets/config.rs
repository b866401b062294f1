//! A kv-transfer-config, variables and flags, one on each line after the first. What is built has
//! passed its own check.
//!
//! Input: JSON, then lines of `NAME=VALUE`; a name with a capital is a variable, another a flag.
#![no_main]

use kvxfer::config::{ConfigBuilder, UnknownKeys};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for policy in [UnknownKeys::Deny, UnknownKeys::Warn] {
        let mut lines = text.lines();
        let mut builder = ConfigBuilder::new();
        builder.unknown_keys(policy);
        if builder
            .json(lines.next().unwrap_or_default(), "--kv-transfer-config")
            .is_err()
        {
            continue;
        }
        let rest: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once('=')).collect();
        let (variables, flags): (Vec<_>, Vec<_>) = rest
            .into_iter()
            .partition(|(name, _)| name.starts_with(|c: char| c.is_ascii_uppercase()));
        if builder.env(variables).is_err() {
            continue;
        }
        if flags
            .iter()
            .any(|(key, value)| builder.flag(key, "--flag", value).is_err())
        {
            continue;
        }
        if let Ok(config) = builder.build() {
            config.check().expect("what is built is sound");
            assert!(!builder.explain().expect("it was built").is_empty());
        }
    }
});
