//! `kvxfer ping` as people start it: real processes, live engines, and peers that stop or die.

mod support;

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kvxfer::Engine;
use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::config::{Config, KvRole};
use kvxfer::layout::{KvFormat, Topology};
use nix::sys::signal::Signal;
use serde_json::Value;
use support::{
    Ended, LONG, Process, Secrets, children_of, command, leaves_nothing, run, serve, start,
    wait_until,
};

/// The report of a run in which every ping was answered.
#[track_caller]
fn all_answered(ended: &Ended, pings: u64, path: &str) -> Value {
    assert_eq!(ended.stderr, "", "{ended:?}");
    all_came_back(ended, pings, path)
}

/// The same, whatever was said beside it.
#[track_caller]
fn all_came_back(ended: &Ended, pings: u64, path: &str) -> Value {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert!(ended.stdout.starts_with("{\"schema\":\"kvxfer.ping/1\","));
    assert_eq!(report["path"], path, "{report}");
    assert_eq!(report["candidates"].as_array().map(Vec::len), Some(4));
    assert_eq!(
        (&report["sent"], &report["answered"]),
        (&pings.into(), &pings.into())
    );
    assert_eq!(report["lost_percent"], 0.0);
    assert_eq!(report["ended"], "finished");
    assert!(report["failure"].is_null());
    for part in ["control", "write", "read"] {
        let part = &report[part];
        assert_eq!(part["answered"], pings, "{report}");
        let of = |name: &str| {
            part[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name}: {part}"))
        };
        let order = ["min_us", "p50_us", "p99_us", "max_us"].map(of);
        assert!(order[0] > 0.0 && order.is_sorted(), "{part}");
        assert!(
            order[0] <= of("avg_us") && of("avg_us") <= order[3],
            "{part}"
        );
    }
    report
}

fn json(args: &[&str]) -> Ended {
    run(&[&["ping", "--json", "-i", "10ms", "-c", "20"], args].concat())
}

#[test]
fn its_own_target_answers_over_every_path() {
    for path in ["arena", "process-vm", "tcp"] {
        let report = all_answered(&json(&["--path", path]), 20, path);
        assert!(report["config"]["peer"].is_null());
        assert_eq!(report["config"]["count"], 20);
    }
    let report = all_answered(&json(&[]), 20, "arena");
    assert_eq!(report["config"]["path"], "auto");
}

/// On this machine by the host build of the kernel; the value that a READ brings back is the one that was posted.
#[test]
fn a_kernel_posts_the_writes() {
    for path in ["arena", "tcp"] {
        let ended = json(&["--path", path, "--initiator", "gpu"]);
        assert!(
            ended.stderr.contains("warning: there is no GPU"),
            "{ended:?}"
        );
        let report = all_came_back(&ended, 20, path);
        let config = &report["config"];
        assert_eq!(config["initiator"], "gpu");
        assert_eq!(config["executor"], "host-build");
    }
    let report = all_answered(&json(&[]), 20, "arena");
    let config = &report["config"];
    assert_eq!(config["initiator"], "host");
    assert!(config["executor"].is_null());
    let ended = run(&["ping", "-c", "2", "-i", "10ms", "--initiator", "gpu"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.stdout.contains("posted by a kernel (host-build)"),
        "{ended:?}"
    );
}

#[test]
fn people_get_a_line_a_ping_and_a_summary() {
    let ended = run(&["ping", "-c", "3", "-i", "10ms"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(lines[0].starts_with("PING 127.0.0.1:") && lines[0].contains("over arena"));
    for (at, line) in lines[1..4].iter().enumerate() {
        assert!(
            line.starts_with(&format!("seq={}  control ", at + 1)),
            "{line}"
        );
        assert!(
            line.contains("  write ") && line.contains("  read "),
            "{line}"
        );
    }
    assert!(lines[5].ends_with(" ping ---"), "{ended:?}");
    assert!(
        lines[6].starts_with("3 sent, 3 answered, 0 % lost"),
        "{ended:?}"
    );
    let parts = ["us ", "control ", "write ", "read "];
    for (line, part) in lines[7..].iter().zip(parts) {
        assert!(line.starts_with(part), "{line}");
        assert_eq!(line.split_whitespace().count(), 7, "{line}");
    }
    assert_eq!(lines.len(), 11);
}

#[test]
fn nothing_is_left_of_its_own_target() {
    leaves_nothing(start(&["ping", "-c", "20", "-i", "20ms", "--json"]));
}

#[test]
fn ctrl_c_at_a_terminal_is_for_the_command_alone() {
    let client = start(&["ping", "-c", "0", "-i", "20ms"]);
    after_two_pings(&client);
    let group = |pid| nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid)));
    let targets = children_of(client.pid());
    assert_eq!(targets.len(), 1);
    for target in targets {
        assert_eq!(group(target).map(|group| group.as_raw()), Ok(target));
    }
    client.signal(Signal::SIGINT);
    assert_eq!(client.end().code, Some(0));
}

/// A live engine in this process, which is not the command's.
fn engine(role: KvRole, memory: BenchMemory) -> (Engine, BenchSide, String) {
    let format = KvFormat::opaque(4096, 2).expect("a format");
    let shape = BenchShape {
        topology: Topology::single(&format),
        format,
        num_blocks: vec![16],
        memory,
    };
    let side = BenchSide::new(&shape).expect("memory");
    side.poison().expect("poisoned");
    let mut config = Config::default();
    config.kv_role = role;
    config.engine_id = Some("live".into());
    assert!(!config.allow_bench);
    let (format, placement) = (side.format().clone(), side.placement().clone());
    let engine = Engine::new(config, format, placement).expect("an engine");
    let address = engine.listen("127.0.0.1:0").expect("a free port");
    (engine, side, address.to_string())
}

#[test]
fn any_live_engine_answers_and_keeps_its_blocks() {
    for (role, name) in [
        (KvRole::Producer, "kv_producer"),
        (KvRole::Consumer, "kv_consumer"),
    ] {
        for (memory, path) in [
            (BenchMemory::Arena, "arena"),
            (BenchMemory::Anonymous, "process-vm"),
        ] {
            let (_engine, side, address) = engine(role, memory);
            let report = all_answered(&json(&[&address]), 20, path);
            assert_eq!(report["config"]["peer"], address);
            assert_eq!(report["peer"]["engine"], "live");
            assert_eq!(report["peer"]["kv_role"], name);
            for memory in side.memory() {
                memory
                    .verify_words(0, memory.len(), |_| 0xa5a5_a5a5_a5a5_a5a5)
                    .expect("untouched");
            }
        }
    }
}

#[test]
fn many_pingers_of_one_server() {
    let (server, address) = serve(&[]);
    let clients: Vec<_> = (0..4)
        .map(|_| start(&["ping", &address, "--json", "-c", "20", "-i", "10ms"]))
        .collect();
    for client in clients {
        all_answered(&client.end(), 20, "arena");
    }
    server.signal(Signal::SIGTERM);
    let ended = server.end();
    // Sessions that were nothing but pings are nothing to warn of.
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

/// Waits until pings are answered.
#[track_caller]
fn after_two_pings(client: &Process) {
    assert!(client.line().starts_with("PING "));
    for sequence in 1..=2 {
        let line = client.line();
        assert!(
            line.starts_with(&format!("seq={sequence}  control ")),
            "{line}"
        );
    }
}

/// Starts endless pings of a server, and has it get `signal` when they run.
fn struck(signal: Signal, args: &[&str]) -> Ended {
    let (server, address) = serve(&[]);
    let client = start(&[&["ping", &address, "-i", "50ms", "-W", "300ms"], args].concat());
    after_two_pings(&client);
    server.signal(signal);
    let ended = client.end();
    ended.failed(3, &[&address, "evidence: ", "fix: "]);
    assert!(ended.stdout.contains(" ping ---\n"), "{ended:?}");
    ended
}

#[test]
fn a_stopped_peer_is_stalled_and_can_still_be_read() {
    let ended = struck(Signal::SIGSTOP, &["-c", "14"]);
    ended.failed(3, &["of 14 pings", "were lost", "`ps -o stat`"]);
    let lost: Vec<&str> = ended
        .stdout
        .lines()
        .filter(|l| l.contains("stalled"))
        .collect();
    assert!(lost.len() >= 2, "{ended:?}");
    // But for the one that was under way, nothing had been written that was not taken.
    let readable = lost.iter().filter(|line| line.contains("  read ")).count();
    assert!(readable + 1 >= lost.len(), "{ended:?}");
    let ended = struck(Signal::SIGSTOP, &["-c", "14", "--path", "tcp"]);
    ended.failed(3, &["were lost"]);
    assert!(ended.stdout.contains("stalled"), "{ended:?}");
}

#[test]
fn a_kernel_that_waits_for_a_stopped_or_dead_peer_ends() {
    for path in ["arena", "tcp"] {
        let args = ["-c", "14", "--path", path, "--initiator", "gpu"];
        let ended = struck(Signal::SIGSTOP, &args);
        ended.failed(3, &["of 14 pings", "were lost"]);
        assert!(ended.stdout.contains("stalled"), "{ended:?}");
        let args = ["-c", "0", "--path", path, "--initiator", "gpu"];
        let ended = struck(Signal::SIGKILL, &args);
        ended.failed(3, &["died, or the connection to it was cut"]);
    }
}

#[test]
fn a_killed_peer_is_dead() {
    for path in ["arena", "process-vm", "tcp"] {
        let ended = struck(Signal::SIGKILL, &["-c", "0", "--path", path]);
        ended.failed(3, &["died, or the connection to it was cut"]);
        assert!(!ended.stdout.contains("stalled"), "{ended:?}");
    }
}

#[test]
fn a_peer_that_ends_in_good_order_has_gone() {
    struck(Signal::SIGTERM, &["-c", "0"]).failed(3, &["the server is gone", "start it again"]);
}

#[test]
fn a_report_is_had_of_pings_that_failed() {
    let (server, address) = serve(&[]);
    let args = ["ping", &address, "--json", "-c", "0", "-i", "10ms"];
    let client = start(&args);
    wait_until("a session", || answers_pings(server.pid()));
    std::thread::sleep(Duration::from_millis(300));
    server.signal(Signal::SIGKILL);
    let ended = client.end();
    ended.failed(3, &[&address, "died"]);
    let report = ended.json();
    assert_eq!(report["ended"], "failed");
    assert!(
        report["failure"]
            .as_str()
            .is_some_and(|why| why.contains("died"))
    );
    assert!(report["sent"].is_u64(), "{report}");
}

/// Whether a process has a thread for a pinger.
fn answers_pings(pid: i32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter();
    tasks.flatten().flatten().any(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.trim() == "kvx-ping")
    })
}

#[test]
fn a_peer_that_was_stopped_before_is_silent() {
    let (server, address) = serve(&[]);
    server.signal(Signal::SIGSTOP);
    let ended = run(&["ping", &address, "--timeout", "500ms"]);
    ended.failed(3, &[&address, "no answer in time", "stopped"]);
    assert!(ended.stdout.is_empty(), "{ended:?}");
}

#[test]
fn a_host_that_does_not_answer_cannot_be_reached() {
    // A queue of connections that is full: the system answers no more.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let fd = std::os::fd::AsFd::as_fd(&listener);
    nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(0).expect("none")).expect("set");
    let to = listener.local_addr().expect("bound");
    let soon = Duration::from_millis(200);
    let waiting: Vec<_> =
        std::iter::from_fn(|| std::net::TcpStream::connect_timeout(&to, soon).ok())
            .take(64)
            .collect();
    assert!(
        !waiting.is_empty() && waiting.len() < 64,
        "{}",
        listener.as_raw_fd()
    );
    let begun = Instant::now();
    let ended = run(&["ping", &to.to_string(), "--timeout", "500ms"]);
    ended.failed(
        3,
        &[
            &to.to_string(),
            "cannot be reached",
            "timed out",
            "firewall",
        ],
    );
    assert!(begun.elapsed() < LONG);
}

#[test]
fn secrets_must_be_the_same() {
    let secrets = Secrets::new();
    let (one, two) = (secrets.path("one"), secrets.path("two"));
    let (_server, address) = serve(&["--secret-file", &one]);
    let report = all_answered(&json(&[&address, "--secret-file", &one]), 20, "arena");
    assert_eq!(report["peer"]["authenticated"], true);
    json(&[&address, "--secret-file", &two]).failed(3, &[&address, "another secret", "fix: "]);
    json(&[&address]).failed(3, &[&address, "a secret is demanded", "--secret-file"]);
    let (_open, open) = serve(&[]);
    json(&[&open, "--secret-file", &one]).failed(3, &[&open, "server has no secret"]);
    // Through to a target of its own.
    let report = all_answered(&json(&["--secret-file", &two]), 20, "arena");
    assert_eq!(report["peer"]["authenticated"], true);
}

#[test]
fn ctrl_c_ends_with_the_summary() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let client = start(&["ping", "-c", "0", "-i", "20ms"]);
        after_two_pings(&client);
        client.signal(signal);
        let ended = client.end();
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        assert!(ended.stdout.contains(" 0 % lost"), "{ended:?}");
    }
    // Also while a long wait is under way.
    let (server, address) = serve(&[]);
    let client = start(&["ping", &address, "-c", "0", "-i", "20ms", "-W", "1000"]);
    after_two_pings(&client);
    server.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(200));
    client.signal(Signal::SIGINT);
    let ended = client.end();
    assert_eq!(
        ended.code,
        Some(0),
        "what was cut short is not lost: {ended:?}"
    );
    // And while it connects to somebody who is silent.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let client = start(&["ping", &address, "--timeout", "600"]);
    let (_socket, _) = listener.accept().expect("a client");
    client.signal(Signal::SIGINT);
    client.end().failed(3, &["interrupted", &address]);
}

#[test]
fn the_timeout_bounds_all_of_it() {
    let endless = run(&[
        "ping",
        "--json",
        "-c",
        "0",
        "-i",
        "20ms",
        "--timeout",
        "1500ms",
    ]);
    assert_eq!(endless.code, Some(0), "{endless:?}");
    let report = endless.json();
    assert_eq!(report["ended"], "timeout");
    assert!(report["sent"].as_u64() > Some(0), "{report}");
    // So many pings were asked for, as with ping(8)'s -c and -w.
    let short = run(&[
        "ping",
        "--json",
        "-c",
        "1000000",
        "-i",
        "20ms",
        "--timeout",
        "1500ms",
    ]);
    short.failed(3, &["pings of", "--timeout passed", "fix: "]);
    assert_eq!(short.json()["ended"], "timeout");
}

#[test]
fn the_timeout_bounds_a_long_wait_for_a_stopped_peer() {
    let (server, address) = serve(&[]);
    let begun = Instant::now();
    let options = ["-c", "0", "-i", "300ms", "-W", "600", "--timeout", "5"];
    let client = start(&[&["ping", &address, "--path", "tcp"], &options[..]].concat());
    after_two_pings(&client);
    server.signal(Signal::SIGSTOP);
    let ended = client.end();
    let took = begun.elapsed();
    // Every part of the last ping had so long, once.
    assert!(took < Duration::from_secs(8), "{took:?}: {ended:?}");
    assert_eq!(
        ended.code,
        Some(0),
        "what was cut short is not lost: {ended:?}"
    );
}

#[test]
fn a_reader_that_goes_ends_it() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let endless = &mut command(&["ping", "-c", "0", "-i", "10ms"]);
    let ended = support::spawn_to(endless, writer.into()).end();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn bad_arguments_are_usage_errors() {
    for args in [
        &["-c", "x"][..],
        &["-c", "-1"],
        &["-i", "0"],
        &["-i", "soon"],
        &["-W", "0"],
        &["--timeout", "0"],
        &["--path", "shm"],
        &["host:port"],
        &["a", "b"],
        &["--csv"],
        &["--secret-file", "/nonexistent"],
        &["--kv-transfer-config", "garbage"],
    ] {
        let ended = run(&[&["ping"], args].concat());
        ended.failed(2, &[]);
        assert!(
            ended.stdout.is_empty() && !ended.stderr.is_empty(),
            "{ended:?}"
        );
    }
    run(&["ping", "-d", "mlx5_77"]).failed(4, &["mlx5_77", "soft"]);
    run(&["ping", "--path", "rdma"]).failed(4, &["rdma", "--path auto"]);
}
