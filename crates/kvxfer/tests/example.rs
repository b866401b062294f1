//! The example that engine authors copy from, run as they would run it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(150);

/// `cargo test` builds the examples next to the tests.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test.parent().and_then(|deps| deps.parent());
    let path = profile.expect("target/PROFILE/deps").join("examples");
    let path = path.join(name);
    assert!(
        path.exists(),
        "{} is not built: cargo build --example {name}",
        path.display()
    );
    path
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs it to its end, and returns what it printed.
fn run(name: &str, args: &[&str]) -> String {
    let mut command = Command::new(example(name));
    // Settings of whoever runs the tests are not the test's.
    let ours = |(key, _): &(std::ffi::OsString, _)| key.to_string_lossy().starts_with("KVXFER_");
    for (key, _) in std::env::vars_os().filter(ours) {
        command.env_remove(key);
    }
    let child = command.args(args).stdout(Stdio::piped()).spawn();
    let mut child = Killed(child.expect("the example starts"));
    let until = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.0.try_wait().expect("a child can be waited for") {
            break status;
        }
        assert!(Instant::now() < until, "{name} {args:?}: not over in time");
        std::thread::sleep(Duration::from_millis(20));
    };
    // It prints a line a mode: that fits into the pipe.
    let out = child.0.stdout.take().expect("a pipe was asked for");
    let out = std::io::read_to_string(out).expect("text");
    assert!(status.success(), "{name} {args:?}: {status}\n{out}");
    out
}

fn both_modes(path: &str) {
    let out = run("prefill_decode", &["--path", path]);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 2, "{out}");
    for (line, mode) in lines.into_iter().zip(["read", "write"]) {
        assert!(line.starts_with(&format!("{mode}: 64 requests")), "{line}");
        assert!(line.contains(&format!("over {path};")), "{line}");
    }
}

#[test]
fn prefill_decode_over_arena() {
    both_modes("arena");
}

#[test]
fn prefill_decode_over_process_vm() {
    both_modes("process-vm");
}

#[test]
fn prefill_decode_over_tcp() {
    both_modes("tcp");
}

#[test]
fn one_mode_alone() {
    for mode in ["read", "write"] {
        let out = run("prefill_decode", &["--mode", mode, "--requests", "8"]);
        assert!(out.starts_with(mode) && out.lines().count() == 1, "{out}");
    }
}

#[test]
fn an_unusable_path_is_an_error() {
    let child = Command::new(example("prefill_decode"))
        .args(["--path", "rdma", "--requests", "1"])
        .output();
    let child = child.expect("the example starts");
    assert_eq!(child.status.code(), Some(1), "{child:?}");
}

#[test]
fn waiting_with_tokio() {
    let out = run("tokio_waiting", &[]);
    assert!(out.contains("future: Done"), "{out}");
    assert!(out.contains("event fd: Received"), "{out}");
    assert!(out.contains("poll loop: Received"), "{out}");
}

#[test]
fn a_kernel_pushes_what_it_makes() {
    let out = run("gpu_push", &["--gpu", "host", "--blocks", "65"]);
    assert!(out.starts_with("executor: host-build"), "{out}");
    let bytes = 33 * 8 * (16 << 10);
    assert!(out.contains(&format!("{bytes} bytes of 8 layers")), "{out}");
    assert!(out.contains("verified, over arena"), "{out}");
}

#[test]
fn a_kernel_writes_work_requests_of_what_it_makes() {
    for queue in ["gpu-wqe", "direct"] {
        let out = run(
            "gpu_push",
            &["--gpu", "host", "--blocks", "9", "--queue", queue],
        );
        assert!(out.contains("hca: model"), "{out}");
        let bytes = 5 * 8 * (16 << 10);
        assert!(out.contains(&format!("{bytes} bytes of 8 layers")), "{out}");
    }
}

#[test]
fn posts_have_a_rate() {
    for memory in ["host", "gpu"] {
        let out = run(
            "post_rate",
            &[
                "--gpu", "host", "--memory", memory, "--queues", "2", "--blocks", "64", "--rounds",
                "2",
            ],
        );
        assert!(out.contains("512 posts of 64 bytes in 2 queues"), "{out}");
        assert!(out.ends_with("verified\n"), "{out}");
    }
}
