//! The tests that need RDMA, in one run of a guest: tests/vm/suite.sh, and the test binaries that have
//! any.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::guest::{End, Task};
use super::options::Options;
use crate::command;

/// For all of it, and for `--long`, where tests take longer by themselves.
const SECONDS: u32 = 480;
const LONG_SECONDS: u32 = 3600;
/// For one test binary, so that one that hangs is named and the others still run.
const BINARY_SECONDS: u32 = 180;
const LONG_BINARY_SECONDS: u32 = 1200;
/// For the table of speeds: 72 runs, of some seconds each.
const SPEED_SECONDS: u32 = 1800;

/// One device that talks to itself, and two hosts.
const ALONE: &str = "rxe0";
const TWO_HOSTS: &str = "ra:rb";
/// Both, one after the other: what tests of crates/verbs are told.
const EITHER: &str = "rxe0,ra:rb";
/// Tests that wait for long: in `--long` alone.
const SLOW: [&str; 2] = [
    "on_rdma_a_pull_that_is_late_for_a_cut_cable",
    "on_rdma_pulls_over_a_cable_that_swallows_all",
];

/// The tests of crates/verbs that run on RDMA devices where they are told of any.
const BLACK_BOX: [&str; 4] = ["bringup", "data", "faults", "model"];
/// What the ignored tests that need an RDMA device have in their names.
pub(crate) const ON_RDMA: &str = "on_rdma_";

/// Runs the suite, with the binaries that `build` (cargo with its arguments but the format) makes.
///
/// # Errors
///
/// No binaries or no guest; a failed test is none.
pub(crate) fn run(root: &Path, build: Command, long: bool) -> anyhow::Result<command::Ended> {
    let binaries = Binaries::build(root, build)?;
    let mut runs = Vec::new();
    for test in &binaries.tests {
        runs.extend(test.runs(test.has_ignored(ON_RDMA)?, long));
    }
    println!("runs of test binaries with RDMA: {}", runs.len());
    let seconds = if long {
        LONG_BINARY_SECONDS
    } else {
        BINARY_SECONDS
    };
    let mut command = vec!["sh".into(), root.join("tests/vm/suite.sh").into()];
    command.push(seconds.to_string().into());
    for run in &runs {
        command.extend(run.words());
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
    guest(root, options, &command, &environment)
}

/// Prints how fast the command is beside perftest: tests/vm/speed.sh, with the command that `build`
/// (cargo with its arguments but the format) makes.
///
/// # Errors
///
/// No command or no guest; a run that gives no figure is none.
pub(crate) fn speed(root: &Path, build: Command) -> anyhow::Result<command::Ended> {
    let messages = messages(root, build)?;
    let commands = executables(&messages).filter(Executable::is_command);
    let command = commands.map(|built| built.program).next();
    let environment = [("KVXFER_BIN", command.context("cargo built no kvxfer")?)];
    let options = Options {
        seconds: SPEED_SECONDS,
        ..Options::default()
    };
    let script = ["sh".into(), root.join("tests/vm/speed.sh").into()];
    guest(root, options, &script, &environment)
}

fn guest(
    root: &Path,
    options: Options,
    command: &[OsString],
    environment: &[(&str, OsString)],
) -> anyhow::Result<command::Ended> {
    let task = Task {
        options,
        folder: root,
        command,
        environment,
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

/// A test binary.
#[derive(Debug, PartialEq, Eq)]
struct Test {
    name: String,
    /// Its package's: cargo runs tests there.
    folder: OsString,
    program: OsString,
}

/// How the guest runs a test binary.
#[derive(Debug, PartialEq, Eq)]
struct Run<'a> {
    test: &'a Test,
    /// KVXFER_TEST_RDMA.
    devices: &'static str,
    /// Of the test runner.
    arguments: String,
}

impl Test {
    /// Whether it has ignored tests with this in their names.
    fn has_ignored(&self, part: &str) -> anyhow::Result<bool> {
        let output = Command::new(&self.program)
            .args(["--list", "--ignored", part])
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .output();
        let output = output.with_context(|| format!("listing the tests of {}", self.name))?;
        ensure!(output.status.success(), "{} lists no tests", self.name);
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(lines.lines().any(|line| line.ends_with(": test")))
    }

    /// What is to be run of it; `on_rdma`: whether it has tests that need a device.
    fn runs(&self, on_rdma: bool, long: bool) -> Vec<Run<'_>> {
        let run = |devices, arguments| Run {
            test: self,
            devices,
            arguments,
        };
        let verbs = Path::new(&self.folder).ends_with("crates/verbs");
        if self.name.starts_with("rdma") {
            // They cut the cable: no two at a time.
            let mut arguments = "--include-ignored --test-threads=1".to_owned();
            for slow in SLOW.iter().filter(|_| !long) {
                arguments.push_str(&format!(" --skip {slow}"));
            }
            return vec![run(TWO_HOSTS, arguments)];
        }
        if verbs && BLACK_BOX.contains(&self.name.as_str()) {
            return vec![run(EITHER, String::new())];
        }
        if on_rdma {
            let arguments = format!("--ignored --test-threads=1 {ON_RDMA}");
            let mut runs = vec![run(TWO_HOSTS, arguments.clone())];
            if long {
                runs.push(run(ALONE, arguments));
            }
            return runs;
        }
        Vec::new()
    }
}

impl Run<'_> {
    /// As tests/vm/suite.sh takes it.
    fn words(&self) -> [OsString; 4] {
        [
            self.test.folder.clone(),
            self.test.program.clone(),
            self.devices.into(),
            self.arguments.clone().into(),
        ]
    }
}

impl Binaries {
    fn build(root: &Path, cargo: Command) -> anyhow::Result<Self> {
        Self::of(&messages(root, cargo)?)
    }

    fn of(messages: &str) -> anyhow::Result<Self> {
        let (mut devices, mut kvxfer, mut tests) = (None, None, Vec::new());
        for built in executables(messages) {
            match (built.kind.as_str(), built.name.as_str(), built.test) {
                ("example", "rdma_devices", false) => devices = Some(built.program),
                _ if built.is_command() => kvxfer = Some(built.program),
                // The library's own tests, too.
                ("test" | "lib", _, true) => tests.push(Test {
                    name: built.name,
                    folder: built.folder,
                    program: built.program,
                }),
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

/// A program that cargo has built.
struct Executable {
    kind: String,
    name: String,
    /// Whether it is of tests.
    test: bool,
    program: OsString,
    /// Its package's.
    folder: OsString,
}

impl Executable {
    fn is_command(&self) -> bool {
        (self.kind.as_str(), self.name.as_str(), self.test) == ("bin", "kvxfer", false)
    }
}

/// What cargo says of what it builds.
fn messages(root: &Path, mut cargo: Command) -> anyhow::Result<String> {
    let output = cargo
        .args(["--quiet", "--message-format=json-render-diagnostics"])
        .current_dir(root)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    ensure!(output.status.success(), "cargo could not build it");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Reads cargo's messages, one a line.
fn executables(messages: &str) -> impl Iterator<Item = Executable> + '_ {
    messages.lines().filter_map(|line| {
        // Other kinds of messages have no such fields.
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        let program = message["executable"].as_str()?.into();
        let target = &message["target"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let manifest = text(&message["manifest_path"]);
        let folder = Path::new(&manifest).parent();
        Some(Executable {
            kind: text(&target["kind"][0]),
            name: text(&target["name"]),
            test: message["profile"]["test"] == true,
            program,
            folder: folder.unwrap_or(Path::new("/")).into(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(package: &str, kind: &str, name: &str, test: bool) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"x","manifest_path":"/w/{package}/Cargo.toml","target":{{"kind":["{kind}"],"crate_types":["bin"],"name":"{name}","src_path":"x"}},"profile":{{"opt_level":"1","test":{test}}},"features":[],"filenames":[],"executable":"/t/{kind}-{name}-{test}","fresh":true}}"#
        )
    }

    fn test(package: &str, name: &str) -> Test {
        Test {
            name: name.into(),
            folder: format!("/w/{package}").into(),
            program: format!("/t/test-{name}-true").into(),
        }
    }

    #[test]
    fn test_binaries_are_taken_from_every_package() {
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
        let tests = [
            test("verbs", "data"),
            test("cli", "rdma_a"),
            test("verbs", "rdma_b"),
        ];
        assert_eq!(binaries.tests, tests);
        assert!(Binaries::of(&lines[0]).is_err());
    }

    #[test]
    fn a_binary_runs_on_the_devices_that_its_tests_are_for() {
        let devices = |package, name, on_rdma| {
            let test = test(package, name);
            let runs = test.runs(on_rdma, true);
            runs.iter().map(|run| run.devices).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(devices("crates/verbs", "data", false), [EITHER]);
        assert_eq!(devices("crates/verbs", "processes", false), none);
        assert_eq!(devices("crates/kvxfer", "data", false), none);
        assert_eq!(devices("crates/kvxfer", "faults", false), none);
        assert_eq!(devices("crates/kvxfer", "faults", true), [TWO_HOSTS, ALONE]);
        assert_eq!(devices("crates/kvxfer", "rdma", true), [TWO_HOSTS]);
        // What takes long is left for when there is time.
        let short = test("crates/kvxfer", "faults");
        let devices: Vec<&str> = short
            .runs(true, false)
            .iter()
            .map(|run| run.devices)
            .collect();
        assert_eq!(devices, [TWO_HOSTS]);
        let cable = test("crates/kvxfer", "rdma");
        let arguments = |long| cable.runs(true, long)[0].arguments.clone();
        assert!(arguments(false).contains(SLOW[0]) && !arguments(true).contains("--skip"));
    }
}
