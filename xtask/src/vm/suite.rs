//! The tests that need RDMA, in one run of a guest: tests/vm/suite.sh and the test binaries that
//! are named `rdma*`.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::guest::{End, Task};
use super::options::Options;
use crate::command;

/// For all of it, and for `--long`, where tests take longer by themselves.
const SECONDS: u32 = 330;
const LONG_SECONDS: u32 = 3600;

/// Runs the suite, with the binaries that `build` (cargo with its arguments but the format) makes.
///
/// # Errors
///
/// No binaries or no guest; a failed test is none.
pub(crate) fn run(root: &Path, build: Command, long: bool) -> anyhow::Result<command::Ended> {
    let binaries = Binaries::build(root, build)?;
    let tests = binaries.tests.len();
    println!("test binaries of RDMA: {tests}");
    let mut command = vec!["sh".into(), root.join("tests/vm/suite.sh").into()];
    for test in &binaries.tests {
        command.extend([test.folder.clone(), test.program.clone()]);
    }
    let mut environment = vec![
        ("RDMA_DEVICES", binaries.devices),
        ("KVXFER_BIN", binaries.kvxfer),
    ];
    if long {
        environment.push(("KVXFER_LONG_TESTS", "1".into()));
    }
    let options = Options {
        seconds: if long { LONG_SECONDS } else { SECONDS },
        two_hosts: true,
        ..Options::default()
    };
    let task = Task {
        options,
        folder: root,
        command: &command,
        environment: &environment,
    };
    let ended = super::run(root, &task)?;
    if let Some(up) = ended.up {
        println!("the guest was up after {:.1} s", up.as_secs_f64());
    }
    Ok(command::Ended {
        success: matches!(ended.end, End::Exit(0)),
        lines: ended.lines,
    })
}

/// What the guest runs.
struct Binaries {
    /// The example of crates/verbs.
    devices: OsString,
    /// The command.
    kvxfer: OsString,
    tests: Vec<Test>,
}

#[derive(Debug, PartialEq, Eq)]
struct Test {
    /// Its package's: cargo runs tests there.
    folder: OsString,
    program: OsString,
}

impl Binaries {
    fn build(root: &Path, mut cargo: Command) -> anyhow::Result<Self> {
        let output = cargo
            .args(["--quiet", "--message-format=json-render-diagnostics"])
            .current_dir(root)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("starting cargo")?;
        ensure!(output.status.success(), "cargo could not build the tests");
        Self::of(&String::from_utf8_lossy(&output.stdout))
    }

    /// Reads cargo's messages, one a line.
    fn of(messages: &str) -> anyhow::Result<Self> {
        let (mut devices, mut kvxfer, mut tests) = (None, None, Vec::new());
        for line in messages.lines() {
            // Other kinds of messages have no such fields.
            let message: Value = serde_json::from_str(line).unwrap_or_default();
            let Some(program) = message["executable"].as_str().map(OsString::from) else {
                continue;
            };
            let target = &message["target"];
            let kind = target["kind"][0].as_str().unwrap_or_default();
            let name = target["name"].as_str().unwrap_or_default();
            match (kind, name, message["profile"]["test"] == true) {
                ("example", "rdma_devices", false) => devices = Some(program),
                ("bin", "kvxfer", false) => kvxfer = Some(program),
                ("test", name, true) if name.starts_with("rdma") => {
                    let manifest = message["manifest_path"].as_str().unwrap_or_default();
                    let folder = Path::new(manifest).parent();
                    let folder = folder.unwrap_or(Path::new("/")).into();
                    tests.push(Test { folder, program });
                }
                _ => {}
            }
        }
        // Cargo tells of them as they get ready.
        tests.sort_by(|a, b| a.program.cmp(&b.program));
        Ok(Self {
            devices: devices.context("cargo built no example rdma_devices")?,
            kvxfer: kvxfer.context("cargo built no kvxfer")?,
            tests,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(package: &str, kind: &str, name: &str, test: bool) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"x","manifest_path":"/w/{package}/Cargo.toml","target":{{"kind":["{kind}"],"crate_types":["bin"],"name":"{name}","src_path":"x"}},"profile":{{"opt_level":"1","test":{test}}},"features":[],"filenames":[],"executable":"/t/{kind}-{name}-{test}","fresh":true}}"#
        )
    }

    #[test]
    fn tests_named_rdma_are_taken_from_every_package() {
        let library =
            built("verbs", "lib", "rdma_x", false).replace(r#""/t/lib-rdma_x-false""#, "null");
        let lines = [
            built("verbs", "test", "rdma_b", true),
            r#"{"reason":"compiler-message","message":{"rendered":"warning"}}"#.into(),
            built("verbs", "test", "data", true),
            built("verbs", "example", "rdma_devices", false),
            built("verbs", "example", "rdma_other", false),
            library,
            built("cli", "bin", "kvxfer", true),
            built("cli", "bin", "kvxfer", false),
            built("cli", "test", "rdma_a", true),
            "no json".into(),
            r#"{"reason":"build-finished","success":true}"#.into(),
        ];
        let binaries = Binaries::of(&lines.join("\n")).unwrap();
        assert_eq!(binaries.devices, "/t/example-rdma_devices-false");
        assert_eq!(binaries.kvxfer, "/t/bin-kvxfer-false");
        let test = |folder: &str, program: &str| Test {
            folder: folder.into(),
            program: program.into(),
        };
        assert_eq!(
            binaries.tests,
            [
                test("/w/cli", "/t/test-rdma_a-true"),
                test("/w/verbs", "/t/test-rdma_b-true")
            ]
        );
        assert!(Binaries::of(&lines[0]).is_err());
    }
}
