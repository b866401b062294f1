//! `kvxfer layout` on live engines: what they say is shown and compared, and nobody is disturbed.

mod support;

use kvxfer::Engine;
use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::config::{Config, KvRole};
use kvxfer::event::Event;
use kvxfer::layout::{DType, Topology, models};
use nix::sys::signal::Signal;
use support::{Ended, Secrets, run, serve};

fn layout(args: &[&str]) -> Ended {
    run(&[&["layout"], args].concat())
}

/// A real engine of a model, with blocks of so many tokens.
fn engine(role: KvRole, tokens: u32) -> (Engine, BenchSide, String) {
    let format = models::builtin("llama-3.1-8b", tokens, DType::Bf16).expect("built in");
    let shape = BenchShape {
        topology: Topology::tensor_parallel(&format, 3, 8),
        num_blocks: vec![2; format.groups().len()],
        format,
        memory: BenchMemory::Arena,
    };
    let side = BenchSide::new(&shape).expect("memory");
    let mut config = Config::default();
    config.kv_role = role;
    let (format, placement) = (side.format().clone(), side.placement().clone());
    let engine = Engine::new(config, format, placement).expect("an engine");
    let address = engine.listen("127.0.0.1:0").expect("a free port");
    (engine, side, address.to_string())
}

#[test]
fn two_live_engines_are_compared() {
    let (prefill, _p, producer) = engine(KvRole::Producer, 16);
    let (decode, _d, consumer) = engine(KvRole::Consumer, 16);
    let (_wide, _w, wide) = engine(KvRole::Consumer, 64);
    let ended = layout(&["diff", &producer, &consumer, "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["verdict"], "identical");
    let file = "llama-3.1-8b:tp=8,tp-rank=3";
    let ended = layout(&["diff", &producer, file, "--json"]);
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(0), ""),
        "{ended:?}"
    );
    assert_eq!(ended.json()["verdict"], "identical");
    let ended = layout(&["diff", &producer, &wide, "--strict"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for said in [producer.as_str(), &wide, "--block-size 16"] {
        assert!(ended.stdout.contains(said), "{said}: {ended:?}");
    }
    let ended = layout(&["show", &producer, "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let shown = ended.json();
    assert_eq!(shown["layout"]["topology"]["tp"], 8, "{shown}");
    let ended = layout(&["plan", &producer, &consumer, "--blocks", "0-1", "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for engine in [prefill, decode] {
        let mut events = Vec::new();
        engine.poll_events(&mut events);
        let of_peers =
            |event: &Event| matches!(event, Event::PeerUp { .. } | Event::PeerDown { .. });
        assert!(!events.iter().any(of_peers), "{events:?}");
    }
}

#[test]
fn a_server_shows_what_it_serves() {
    let (server, address) = serve(&["--model", "llama-3.1-8b"]);
    let ended = layout(&["diff", &address, "llama-3.1-8b:one-table", "--json"]);
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(0), ""),
        "{ended:?}"
    );
    assert_eq!(ended.json()["verdict"], "identical");
    server.signal(Signal::SIGTERM);
    let ended = server.end();
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(0), ""),
        "{ended:?}"
    );

    // Without a model it has one all the same, and says what it is.
    let (_server, address) = serve(&[]);
    let ended = layout(&["show", &address]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("blocks of no model"), "{ended:?}");
    let ended = layout(&["diff", &address, "llama-3.1-8b", "--json"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("blocks of no model"), "{ended:?}");
    assert_eq!(ended.json()["verdict"], "incompatible");
}

#[test]
fn secrets_must_be_the_same() {
    let secrets = Secrets::new();
    let (one, two) = (secrets.path("one"), secrets.path("two"));
    let (_server, address) = serve(&["--secret-file", &one]);
    let show = |more: &[&str]| layout(&[&["show", &address, "--json"], more].concat());
    let ended = show(&["--secret-file", &one]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    show(&["--secret-file", &two]).failed(3, &[&address, "another secret", "fix: "]);
    show(&[]).failed(3, &[&address, "a secret is demanded", "--secret-file"]);
}

#[test]
fn a_stopped_engine_is_given_up() {
    let (server, address) = serve(&[]);
    server.signal(Signal::SIGSTOP);
    let ended = layout(&["diff", &address, "llama-3.1-8b", "--timeout", "500ms"]);
    server.signal(Signal::SIGCONT);
    ended.failed(3, &[&address, "no answer in time", "--timeout"]);
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_live_engine_says_all_of_it_itself() {
    let (_server, address) = serve(&[]);
    let with = format!("{address}:tp=2");
    layout(&["show", &with]).failed(2, &[&address, "says all of it itself"]);
    layout(&["show", &address, "--dtype", "fp8"]).failed(2, &[&address, "says all of it itself"]);
}
