//! `kvxfer devices` as a process. What NICs this machine has is not known here: a library that passes
//! for libibverbs makes it one without.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::{Ended, command, locking, run, spawn, spawn_to};
use tempfile::TempDir;

/// A folder whose libibverbs cannot be loaded.
fn broken_library() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    std::fs::write(folder.path().join("libibverbs.so.1"), [b'x'; 4096]).expect("a file");
    folder
}

/// The command, where the loader looks into `folder` first.
fn devices(folder: &Path, args: &[&str], env: &[(&str, &str)]) -> Ended {
    let mut command = command(&[&["devices"], args].concat());
    command
        .env("LD_LIBRARY_PATH", folder)
        .env_remove("MORI_RDMA_DEVICES")
        .envs(env.iter().copied());
    spawn(&mut command).end()
}

/// What is there on every machine.
fn has_software(json: &Value) {
    assert_eq!(json["schema"], "kvxfer.devices/1");
    assert_eq!(json["soft"]["device"], "soft");
    let paths = json["soft"]["paths"].as_array().expect("paths");
    let names: Vec<_> = paths.iter().map(|path| &path["path"]).collect();
    assert_eq!(names, ["arena", "process-vm", "tcp"]);
    for path in paths {
        assert_eq!(path["usable"], path["why_not"].is_null(), "{path}");
    }
    assert_eq!(paths[2]["usable"], true);
    // Where there is no GPU, it is said what is missing.
    let gpu = &json["gpu"];
    let found = !json["gpus"].as_array().expect("gpus").is_empty();
    assert_eq!(gpu["missing"].is_null(), found, "{gpu}");
    assert_eq!(gpu["why"].is_null(), found, "{gpu}");
    assert_eq!(gpu["runtime"].is_null(), !found, "{gpu}");
    let moves = json["moves"].as_array().expect("moves");
    for entry in moves {
        assert_eq!(entry["usable"], entry["why_not"].is_null(), "{entry}");
        let gpus = entry["between"][0] == "gpu";
        // By a GPU inside a host; anything through pinned memory.
        let links = entry["path"] == "ipc" || entry["path"] == "staged";
        assert!(!gpus || entry["usable"] == (found && links), "{entry}");
    }
    let tcp = moves.iter().find(|entry| entry["path"] == "tcp");
    assert_eq!(tcp.expect("tcp")["usable"], true);
}

/// The command, where the loader finds libraries in `folder` that are none.
fn without_gpus(args: &[&str], runtime: &str) -> Ended {
    let folder = broken_library();
    let names = [
        "libamdhip64.so.7",
        "libamdhip64.so.6",
        "libamdhip64.so.5",
        "libamdhip64.so",
        "libcuda.so.1",
    ];
    for name in names {
        std::fs::write(folder.path().join(name), [b'x'; 4096]).expect("a file");
    }
    devices(folder.path(), args, &[("KVXFER_GPU", runtime)])
}

#[test]
fn without_a_gpu_runtime_it_is_told_what_was_tried() {
    for (runtime, tried) in [
        ("", &["libamdhip64.so.7", "libcuda.so.1"][..]),
        ("auto", &["libamdhip64.so.5", "libcuda.so.1"]),
        ("cuda", &["libcuda.so.1"]),
    ] {
        let ended = without_gpus(&["--json"], runtime);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        let json = ended.json();
        has_software(&json);
        assert_eq!(json["gpu"]["missing"], "library", "{json}");
        let why = json["gpu"]["why"].as_str().unwrap_or_default();
        for name in tried {
            assert!(
                why.contains(name) && why.contains("invalid ELF header"),
                "{why}"
            );
        }
        let text = without_gpus(&[], runtime).stdout;
        assert!(
            text.contains("\nGPUs: none; ") && text.contains("host to host over tcp"),
            "{text}"
        );
    }
}

#[test]
fn the_stand_in_is_listed_where_it_is_asked_for() {
    let json = without_gpus(&["--json"], "host").json();
    has_software(&json);
    assert_eq!(json["gpu"]["runtime"], "host stand-in");
    let gpu = &json["gpus"][0];
    assert_eq!(
        (&gpu["arch"], &gpu["dma_buf"]),
        (&"host".into(), &false.into())
    );
    assert!(gpu["memory"].as_u64().is_some_and(|bytes| bytes > 0));
    assert_eq!(gpu["classes"][0]["class"], "local");
    let text = without_gpus(&[], "host").stdout;
    assert!(text.contains("\nGPU 0  host stand-in, host, "), "{text}");
}

/// The stand-in's memory is the host's, which a card takes by its address if it may be locked.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_card_that_takes_a_gpus_memory_is_told_and_one_that_does_not_why() {
    let look = |memlock, args: &[&str]| {
        let plain = command(&[&["devices"], args].concat());
        let mut limited = locking(memlock, &plain);
        spawn(limited.env("KVXFER_GPU", "host")).end()
    };
    for (memlock, usable) in [("unlimited", true), ("1048576", false)] {
        let json = look(memlock, &["--json"]).json();
        let nics = json["gpus"][0]["registers"].as_array().expect("tried");
        let why_not = nics[0]["why_not"].as_str().unwrap_or_default();
        for nic in nics {
            assert_eq!(nic["usable"], usable, "{nic}");
        }
        let of_gpus = |a_move: &&Value| a_move["between"][0] == "gpu" && a_move["path"] == "rdma";
        let moves = json["moves"].as_array().expect("moves");
        let moves: Vec<&Value> = moves.iter().filter(of_gpus).collect();
        assert_eq!(moves.len(), 2, "{json}");
        for a_move in moves {
            assert_eq!(a_move["usable"], usable, "{a_move}");
            assert_eq!(a_move["why_not"].as_str().unwrap_or_default(), why_not);
        }
        let text = look(memlock, &[]).stdout;
        let state = if usable { "any host" } else { "no, see above" };
        for whom in ["GPU", "host"] {
            let way = format!("GPU to {whom} over rdma");
            let line = format!("\n{way:<28}  {state}\n");
            assert!(text.contains(&line), "{text}");
        }
        if usable {
            assert!(text.contains("  registered with rxe0  yes\n"), "{text}");
            continue;
        }
        for reason in ["As a dma-buf: ", "By its address: Cannot allocate memory"] {
            assert!(why_not.contains(reason) && text.contains(reason), "{text}");
        }
    }
}

#[test]
fn a_runtime_that_nobody_knows_is_refused() {
    without_gpus(&[], "vulkan").failed(2, &["KVXFER_GPU", "vulkan", "auto, hip, cuda or host"]);
}

#[test]
fn this_machine_gives_devices_or_one_of_the_reasons_why_not() {
    let json = run(&["devices", "--json"]).json();
    has_software(&json);
    let devices = json["devices"].as_array().expect("devices");
    match json["rdma"]["missing"].as_str() {
        None => assert!(!devices.is_empty(), "{json}"),
        Some(missing) => {
            assert!(devices.is_empty(), "{json}");
            let known = ["library", "symbol", "kernel", "device"];
            assert!(known.contains(&missing), "{json}");
            assert!(
                json["rdma"]["why"]
                    .as_str()
                    .is_some_and(|why| !why.is_empty())
            );
        }
    }
}

#[test]
fn without_a_library_it_is_told_and_the_software_device_listed() {
    let folder = broken_library();
    for args in [
        &[][..],
        &["-d", "soft"],
        &["-d", "^mlx5_0"],
        &["-x", "3"],
        &["--near", "0"],
    ] {
        let ended = devices(folder.path(), args, &[]);
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(0), ""),
            "{args:?}"
        );
        let text = ended.stdout;
        assert!(
            text.starts_with("no RDMA: libibverbs cannot be loaded"),
            "{text}"
        );
        assert!(text.contains("invalid ELF header") && text.contains("install rdma-core"));
        assert!(
            text.contains("\nsoft  ") && text.contains("\n  tcp "),
            "{text}"
        );
    }
    let ended = devices(folder.path(), &["--json"], &[]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let json = ended.json();
    has_software(&json);
    assert_eq!(json["rdma"]["missing"], "library");
    assert_eq!(
        (&json["devices"], &json["order"]),
        (&Value::Array(vec![]), &Value::Array(vec![]))
    );
}

#[test]
fn a_library_without_the_symbols_is_another_answer() {
    let folder = TempDir::new().expect("a folder");
    let (source, library) = (
        folder.path().join("a.c"),
        folder.path().join("libibverbs.so.1"),
    );
    std::fs::write(&source, "int nothing;\n").expect("source");
    let cc = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(cc.expect("cc").success());
    let ended = devices(folder.path(), &["--json"], &[]);
    assert_eq!(ended.code, Some(0));
    let json = ended.json();
    assert_eq!(json["rdma"]["missing"], "symbol");
    let why = json["rdma"]["why"].as_str().unwrap_or_default();
    assert!(
        why.contains("ibv_get_device_list") && why.contains("LD_LIBRARY_PATH"),
        "{why}"
    );
}

#[test]
fn a_nic_that_is_asked_for_and_not_there_is_exit_4_after_the_report() {
    let folder = broken_library();
    let own = ("KVXFER_RDMA_DEVICES", "mlx5_9,soft");
    let other = ("MORI_RDMA_DEVICES", "mlx5_9");
    for (args, env, from) in [
        (
            &[][..],
            &[own][..],
            "environment variable KVXFER_RDMA_DEVICES",
        ),
        (&[], &[other], "environment variable MORI_RDMA_DEVICES"),
        (&["-d", "mlx5_9"], &[], "flag --device"),
        (
            &["-d", "mlx5_9"],
            &[("KVXFER_RDMA_DEVICES", "^mlx5_9")],
            "flag --device",
        ),
    ] {
        let args = [args, &["--json"]].concat();
        let ended = devices(folder.path(), &args, env);
        ended.failed(
            4,
            &[
                "no NIC mlx5_9",
                from,
                "evidence: ",
                "install rdma-core",
                "fix: ",
            ],
        );
        let json = ended.json();
        has_software(&json);
        assert!(
            json["config"]["rdma_devices"]
                .as_str()
                .is_some_and(|l| l.contains("mlx5_9"))
        );
    }
}

#[test]
fn what_is_no_value_is_bad_usage_and_nothing_on_stdout() {
    for args in [
        &["-x", "256"][..],
        &["-x", "-1"],
        &["-d", "a b"],
        &["-d", ""],
        &["-d", "^"],
        &["--near", "0000:41"],
        &["--near", "../../devices"],
        &["--near", ""],
        &["--csv"],
        &["mlx5_0"],
    ] {
        let ended = run(&[&["devices"], args].concat());
        ended.failed(2, &[]);
        assert_eq!(ended.stdout, "", "{args:?}");
        assert!(!ended.stderr.is_empty(), "{args:?}");
    }
    let bad = spawn(command(&["devices"]).env("KVXFER_RDMA_GID_INDEX", "many")).end();
    bad.failed(2, &["rdma_gid_index", "many"]);
    for peer in ["", "no such host"] {
        let ended = run(&["devices", "--peer", peer]);
        ended.failed(3, &["fix: "]);
        assert_eq!(ended.stdout, "");
    }
}

#[test]
fn the_peer_is_told_with_its_addresses() {
    let folder = broken_library();
    let ended = devices(
        folder.path(),
        &["--peer", "192.0.2.7", "-x", "0", "--json"],
        &[],
    );
    let config = &ended.json()["config"];
    assert_eq!(config["peer"], "192.0.2.7");
    assert_eq!(config["peer_addresses"], serde_json::json!(["192.0.2.7"]));
    assert_eq!(
        (&config["rdma_gid_index"], &config["near"]),
        (&0.into(), &Value::Null)
    );
}

#[test]
fn standard_output_that_is_closed_is_no_failure_and_one_that_is_full_is() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let ended = spawn_to(&mut command(&["devices", "--json"]), Stdio::from(writer)).end();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let full = std::fs::File::options().write(true).open("/dev/full");
    let ended = spawn_to(
        &mut command(&["devices"]),
        Stdio::from(full.expect("/dev/full")),
    )
    .end();
    ended.failed(1, &["could not be written to standard output"]);
}
