//! `cargo xtask test`: every check there is, in the order in which they fail fastest.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::command::{self, quiet};
use crate::documents;
use crate::kernels;
use crate::packages;
use crate::tally::{self, Tally};
use crate::vm;

/// How a step ended. A step that runs no tests counts as one check.
enum Outcome {
    Passed(Tally),
    Failed(Tally),
    Skipped(String),
}

struct Step {
    name: &'static str,
    took: Duration,
    outcome: Outcome,
}

struct Session<'a> {
    root: &'a Path,
    long: bool,
    /// On a build machine a missing tool is a failure: there it would go unseen.
    strict: bool,
    steps: Vec<Step>,
}

/// Histories of whole engines that `--long` tries.
const LONG_HISTORIES: &str = "2000000";

/// The step that runs the tests which need RDMA.
const RDMA: &str = "RDMA in a virtual machine";

/// The step that prints how fast it is there.
const SPEED: &str = "speed beside perftest";

/// Where bindgen looks for libclang.
const LIBCLANG: &str = "LIBCLANG_PATH";

/// What the names of ignored tests begin with that need a GPU.
const ON_GPU: &str = "on_gpu_";

/// How often a model of loom switches between threads where none has to wait.
const PREEMPTIONS: &str = "LOOM_MAX_PREEMPTIONS";

const ONE: Tally = Tally {
    passed: 1,
    failed: 0,
    skipped: 0,
};
const NONE: Tally = Tally {
    passed: 0,
    failed: 0,
    skipped: 0,
};

/// Runs everything; `true` if nothing failed.
pub(crate) fn run(root: &Path, long: bool) -> anyhow::Result<bool> {
    let ci = std::env::var("CI").unwrap_or_default();
    let mut session = Session {
        root,
        long,
        strict: !matches!(ci.as_str(), "" | "0" | "false"),
        steps: Vec::new(),
    };
    session.all()?;
    Ok(session.summary())
}

impl Session<'_> {
    fn all(&mut self) -> anyhow::Result<()> {
        let root = self.root;
        self.step("documents", |_| {
            let problems = documents::problems(root);
            for problem in &problems {
                eprintln!("{problem}");
            }
            Ok(passed_if(problems.is_empty()))
        })?;
        self.step("format", |s| {
            s.component("fmt", "rustfmt", &["fmt", "--all", "--check"])
        })?;
        self.step("clippy", |s| {
            let args = [
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ];
            s.component("clippy", "clippy", &args)
        })?;
        self.step("build", |s| {
            // As the tests are built, so that everything is built once; with the examples, which
            // tests run.
            s.cargo(&["test", "--workspace", "--no-run"])
        })?;
        if matches!(
            self.steps.last(),
            Some(Step {
                outcome: Outcome::Failed(_),
                ..
            })
        ) {
            let rest = [
                "network",
                "tests",
                RDMA,
                "races",
                "simulation",
                "doc tests",
                "docs",
            ];
            for name in rest {
                self.step(name, |_| Ok(Outcome::Skipped("the build failed".into())))?;
            }
            return Ok(());
        }
        // Of the tests, some need two network namespaces.
        let mut network = false;
        self.step("network", |_| {
            let there = packages::need("ip", "iproute2")
                .and_then(|()| packages::need("nft", "nftables"))
                .and_then(|()| packages::namespaces());
            Ok(match there {
                Ok(()) => {
                    network = true;
                    Outcome::Passed(ONE)
                }
                // Where the machine allows none, no package helps.
                Err(why) => {
                    Outcome::Skipped(format!("{why}; the tests of network faults test nothing"))
                }
            })
        })?;
        self.step("tests", |s| s.tests(network))?;
        self.step(RDMA, |s| {
            if let Err(why) = packages::rdma_guest() {
                return Ok(s.missing(why));
            }
            // As in the step "build": it is all there.
            let build = s.command(&["test", "--workspace", "--no-run"]);
            Ok(match vm::suite::run(s.root, build, s.long) {
                Ok(ended) => tested(&ended),
                Err(e) => {
                    eprintln!("{e:#}");
                    Outcome::Failed(NONE)
                }
            })
        })?;
        if self.long {
            self.step(SPEED, |s| {
                if let Err(why) = packages::rdma_guest() {
                    return Ok(s.missing(why));
                }
                let build = s.command(&["build", "--release", "--bin", "kvxfer"]);
                Ok(match vm::suite::speed(s.root, build) {
                    Ok(ended) => passed_if(ended.success),
                    Err(e) => {
                        eprintln!("{e:#}");
                        Outcome::Failed(NONE)
                    }
                })
            })?;
        }
        self.step("races", Self::races)?;
        if self.long {
            self.step("simulation", Self::simulation)?;
        }
        self.step("doc tests", |s| {
            let ended = command::show(&mut s.command(&["test", "--workspace", "--doc"]), root)?;
            Ok(tested(&ended))
        })?;
        self.step("docs", |s| {
            let mut command = Command::new(command::cargo());
            command.args(["doc", "--workspace", "--no-deps"]);
            command.env("RUSTDOCFLAGS", "-D warnings");
            let ended = command::show(&mut command, s.root)?;
            Ok(passed_if(ended.success))
        })?;
        self.step("kernels", |s| {
            let checked = kernels::check(s.root)?;
            for problem in &checked.problems {
                eprintln!("{problem}");
            }
            if !checked.problems.is_empty() {
                return Ok(Outcome::Failed(NONE));
            }
            Ok(match checked.skipped {
                None => Outcome::Passed(ONE),
                Some(why) => s.missing(why),
            })
        })?;
        self.step("abi", |s| {
            // What it needs is of other packages than Rust's: who has it not is told.
            if let Err(why) = packages::rdma_headers().and_then(|()| packages::hip_headers()) {
                return Ok(s.missing(why));
            }
            let mut command = s.command(&["test", "--manifest-path", "tests/abi/Cargo.toml"]);
            command.args(["--locked", "--lib"]);
            if let (None, Some(libclang)) =
                (std::env::var_os(LIBCLANG), packages::oldest_libclang())
            {
                command.env(LIBCLANG, libclang);
            }
            Ok(tested(&command::show(&mut command, s.root)?))
        })?;
        if root.join("fuzz/Cargo.toml").exists() {
            self.step("fuzz targets", |s| {
                if let Err(why) = packages::need("c++", "g++") {
                    return Ok(s.missing(why));
                }
                s.cargo(&["check", "--manifest-path", "fuzz/Cargo.toml", "--bins"])
            })?;
            if self.long {
                self.step("fuzzing", Self::fuzz)?;
            }
        }
        Ok(())
    }

    /// Unit, property, simulation and process tests.
    fn tests(&mut self, network: bool) -> anyhow::Result<Outcome> {
        let cargo = command::cargo();
        let nextest = Command::new(&cargo).args(["nextest", "--version"]).output();
        let nextest = nextest.is_ok_and(|output| output.status.success());
        // Most of them wait for something most of the time.
        let threads = std::thread::available_parallelism().map_or(2, |n| 2 * n.get());
        let threads = threads.to_string();
        let mut args = if nextest {
            let args = ["nextest", "run", "--workspace", "--no-fail-fast"];
            let threads = ["--test-threads", &threads];
            [&args[..], &threads].concat()
        } else {
            println!("cargo-nextest is not installed: cargo test runs the same tests");
            // The doc tests have a step of their own.
            vec![
                "test",
                "--workspace",
                "--lib",
                "--bins",
                "--tests",
                "--no-fail-fast",
            ]
        };
        // Ignored tests that need RDMA run in the virtual machine alone, those that need a GPU where there
        // is one.
        let elsewhere = format!("not test(/{}|{ON_GPU}/)", vm::suite::ON_RDMA);
        match (self.long, nextest) {
            (true, true) => args.extend(["--run-ignored", "all", "-E", &elsewhere]),
            (true, false) => {
                args.extend(["--", "--include-ignored"]);
                args.extend(["--skip", vm::suite::ON_RDMA, "--skip", ON_GPU]);
            }
            (false, _) => {}
        }
        let mut command = self.command(&args);
        if network {
            // They may not skip themselves then.
            command.env("KVXFER_NEED_NETWORK", "1");
        }
        match packages::hip() {
            Ok(()) => {
                command.env("KVXFER_NEED_HIP", "1");
            }
            Err(why) => println!("no test loads the real HIP: {why}"),
        }
        let ended = command::show(&mut command, self.root)?;
        Ok(tested(&ended))
    }

    /// The loom tests: hand-made concurrent structures, in every order of their threads' steps. A
    /// profile of their own keeps what they build apart from everything else.
    fn races(&mut self) -> anyhow::Result<Outcome> {
        let args = ["test", "--profile", "loom", "--lib"];
        let mut command = self.command(&args);
        command.args(["-p", "kvxfer-verbs", "-p", "kvxfer-hipmem", "-p", "kvxfer"]);
        command.args(["--", "loom_"]);
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        command.env("RUSTFLAGS", format!("{flags} --cfg loom -D warnings"));
        if std::env::var_os(PREEMPTIONS).is_none() {
            let bound = if self.long { "5" } else { "3" };
            command.env(PREEMPTIONS, bound);
        }
        // What a planted fault's panic says is of no use to anybody.
        command.env("RUST_BACKTRACE", "0");
        let ended = command::show(&mut command, self.root)?;
        Ok(tested(&ended))
    }

    /// Runs each fuzz target for a minute, from the seeds that are in the tree.
    fn fuzz(&mut self) -> anyhow::Result<Outcome> {
        if let Err(why) = packages::need("c++", "g++").and_then(|()| packages::cargo_fuzz()) {
            return Ok(self.missing(why));
        }
        let mut tally = NONE;
        for name in fuzz_targets(self.root)? {
            // What is found goes to the build folder: the seeds in the tree stay few.
            let found = format!("target/fuzz-corpus/{name}");
            std::fs::create_dir_all(self.root.join(&found))?;
            let seeds = format!("fuzz/corpus/{name}");
            let mut command = Command::new(command::cargo());
            command.args(["fuzz", "run", &name, &found, &seeds, "--"]);
            command.args(["-max_total_time=60", "-max_len=16384", "-timeout=20"]);
            // libFuzzer's instrumentation needs flags that stable compilers hide.
            command.env("RUSTC_BOOTSTRAP", "1");
            if command::show(&mut command, self.root)?.success {
                tally.passed += 1;
            } else {
                tally.failed += 1;
            }
        }
        Ok(if tally.failed == 0 {
            Outcome::Passed(tally)
        } else {
            Outcome::Failed(tally)
        })
    }

    /// Millions of histories; the plain run has tried the first of them.
    fn simulation(&mut self) -> anyhow::Result<Outcome> {
        let args = ["test", "-p", "kvxfer", "--test", "cluster_sim"];
        let mut command = self.command(&args);
        command.args(["--", "--nocapture", "every_history_keeps_the_promises"]);
        if std::env::var_os("KVXFER_SIM_HISTORIES").is_none() {
            command.env("KVXFER_SIM_HISTORIES", LONG_HISTORIES);
        }
        let ended = command::show(&mut command, self.root)?;
        Ok(tested(&ended))
    }

    fn step(
        &mut self,
        name: &'static str,
        work: impl FnOnce(&mut Self) -> anyhow::Result<Outcome>,
    ) -> anyhow::Result<()> {
        println!("==> {name}");
        let start = Instant::now();
        let outcome = work(self)?;
        let took = start.elapsed();
        let step = Step {
            name,
            took,
            outcome,
        };
        println!("{}", step.line());
        self.steps.push(step);
        Ok(())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(command::cargo());
        command.args(args);
        if self.strict {
            // What is built once is built faster so.
            command.env("CARGO_INCREMENTAL", "0");
        }
        if self.long {
            command.env("PROPTEST_CASES", "4096");
            command.env("KVXFER_LONG_TESTS", "1");
        }
        command
    }

    fn cargo(&mut self, args: &[&str]) -> anyhow::Result<Outcome> {
        let ended = command::show(&mut self.command(args), self.root)?;
        Ok(passed_if(ended.success))
    }

    /// A step that needs a part of the Rust toolchain which not everybody has.
    fn component(
        &mut self,
        subcommand: &str,
        component: &str,
        args: &[&str],
    ) -> anyhow::Result<Outcome> {
        let cargo = command::cargo();
        let there = quiet(&cargo.to_string_lossy(), &[subcommand, "--version"]) == Some(true)
            || quiet("rustup", &["component", "add", component]) == Some(true);
        if there {
            return self.cargo(args);
        }
        let why = format!("{component} is missing: rustup component add {component}");
        Ok(self.missing(why))
    }

    fn missing(&self, why: String) -> Outcome {
        if self.strict {
            eprintln!("{why}");
            Outcome::Failed(NONE)
        } else {
            Outcome::Skipped(why)
        }
    }

    /// Prints what happened; the last line is for machines.
    fn summary(&self) -> bool {
        println!("==> summary");
        let mut sum = Tally::default();
        let mut good = true;
        for step in &self.steps {
            println!("{}", step.line());
            match &step.outcome {
                Outcome::Passed(tally) => sum.add(*tally),
                Outcome::Failed(tally) => {
                    good = false;
                    sum.add(*tally);
                    // A step that fell before a test could fail is a failure of its own.
                    sum.failed += u64::from(tally.failed == 0);
                }
                Outcome::Skipped(_) => {}
            }
        }
        let took: Duration = self.steps.iter().map(|step| step.took).sum();
        println!("{:>9.1} s in all", took.as_secs_f64());
        if sum.skipped > 0 {
            println!(
                "{} tests ignored where the others ran: the reason of each says which step runs it",
                sum.skipped
            );
        }
        println!("{} passed, {} failed", sum.passed, sum.failed);
        good
    }
}

impl Step {
    fn line(&self) -> String {
        let (word, more) = match &self.outcome {
            Outcome::Passed(t) if *t == ONE => ("ok", String::new()),
            Outcome::Passed(t) => (
                "ok",
                format!(": {} passed, {} not run", t.passed, t.skipped),
            ),
            Outcome::Failed(t) if *t == NONE => ("FAILED", String::new()),
            Outcome::Failed(t) => (
                "FAILED",
                format!(": {} passed, {} failed", t.passed, t.failed),
            ),
            Outcome::Skipped(why) => ("skipped", format!(": {why}")),
        };
        let seconds = self.took.as_secs_f64();
        format!("{seconds:>9.1} s  {:<12} {word}{more}", self.name)
    }
}

/// The names of the fuzz targets, in order.
fn fuzz_targets(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join("fuzz/fuzz_targets"))? {
        let path = entry?.path();
        if let Some(name) = path.file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn passed_if(good: bool) -> Outcome {
    if good {
        Outcome::Passed(ONE)
    } else {
        Outcome::Failed(NONE)
    }
}

fn tested(ended: &command::Ended) -> Outcome {
    let tally = tally::count(&ended.lines);
    if ended.success {
        Outcome::Passed(tally)
    } else {
        Outcome::Failed(tally)
    }
}
