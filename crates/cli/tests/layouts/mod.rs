//! `kvxfer layout` on the built binary, and files for it.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const CONFIGS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../kvxfer/src/layout/hf/configs"
);

pub(crate) fn kvxfer(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvxfer"));
    command.arg("layout").args(args).stdin(Stdio::null());
    command.output().expect("it runs")
}

pub(crate) fn json_of(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {stderr}"))
}

pub(crate) fn config(name: &str) -> String {
    format!("{CONFIGS}/{name}.json")
}

/// A folder of files that differ from a good one in one thing.
pub(crate) struct Files(tempfile::TempDir);

impl Files {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, value: &Value) -> String {
        let path = self.path(name);
        std::fs::write(&path, value.to_string()).expect("written");
        path.to_str().expect("text").to_owned()
    }

    /// A config.json with some fields set otherwise; null takes one out.
    pub(crate) fn config(&self, name: &str, of: &str, fields: &[(&str, Value)]) -> String {
        let text = std::fs::read_to_string(config(of)).expect("a config");
        let mut value: Value = serde_json::from_str(&text).expect("JSON");
        for (field, with) in fields {
            let (at, field) = match field.split_once('.') {
                Some((part, field)) => (&mut value[part], field),
                None => (&mut value, *field),
            };
            match with {
                Value::Null => drop(at.as_object_mut().expect("an object").remove(field)),
                with => at[field] = with.clone(),
            }
        }
        self.write(name, &value)
    }

    /// A layout file, changed.
    pub(crate) fn layout(
        &self,
        name: &str,
        source: &str,
        change: impl FnOnce(&mut Value),
    ) -> String {
        let mut value = json_of(&kvxfer(&["show", source, "--json"]));
        change(&mut value["layout"]["format"]["groups"][0]["layers"]);
        self.write(name, &value)
    }
}

impl Files {
    /// With heads outside of tokens.
    pub(crate) fn by_heads(&self, source: &str) -> String {
        self.layout("by-heads", source, |layers| {
            for layer in layers.as_array_mut().expect("layers") {
                for tensor in layer["tensors"].as_array_mut().expect("tensors") {
                    tensor["axes"].as_array_mut().expect("axes").swap(0, 1);
                    tensor["sharded"] = json!(0);
                }
            }
        })
    }
}
