//! Observers that want more than a look, and engines that show an observer what is not so.

use std::net::TcpListener;

use kvxfer::config::{Config, PathKind};
use kvxfer::engine::{PeerLayout, describe};
use kvxfer::ids::Rank;
use kvxfer::session::SessionError;
use kvxfer::wire::{
    Blob, ConfigFacts, Describe, ErrorCode, Fingerprint, Goodbye, GoodbyeReason, Message,
    MessageKind, Ready, Release, Role,
};
use kvxfer::{Error, layout::KvFormat};

use crate::liar::{Liar, offer_of};
use crate::reasons;
use crate::support::{LONG, bounded};
use crate::wire::{Last, Wire};
use crate::world::World;

fn observe(world: &World) -> (Wire, Describe) {
    let mut wire = Wire::dial(world.address.get(), Some(&world.secret), Role::Observer);
    let Message::Describe(shown) = wire.hear_kind(MessageKind::Describe) else {
        unreachable!("that kind");
    };
    (wire, shown)
}

#[test]
fn an_observer_is_told_nothing_to_reach_memory_by() {
    let world = World::new(PathKind::Arena);
    let mut spy = Liar::described(&world);
    let all = spy.theirs.take().expect("described");
    drop(spy);
    reasons::logged("not established");
    reasons::forget();
    let (mut wire, shown) = observe(&world);
    let wanted = Describe {
        rails: Vec::new(),
        facts: ConfigFacts::default(),
        fd_backed: false,
        gpu: None,
        shared: None,
        ..all.clone()
    };
    assert_eq!(shown, wanted);
    assert!(all.shared.is_some());
    assert!(!all.rails[0].memories.is_empty() && !all.rails[0].device.is_empty());
    wire.say(Goodbye {
        reason: GoodbyeReason::Finished,
    });
    assert_eq!(wire.last(), Last::Silent);
    world.works();
    reasons::assert_quiet();
}

#[test]
fn an_observer_that_wants_more() {
    let world = World::new(PathKind::Arena);
    let liar = Liar::new(&world);
    let qp = liar.device.queue_pair();
    let more: [(Message, &str); 4] = [
        (liar.describe().into(), "Describe"),
        (
            offer_of(PathKind::Arena, vec![crate::liar::endpoint(&qp)]).into(),
            "QpOffer",
        ),
        (Ready {}.into(), "Ready"),
        (
            Release {
                request: "r".into(),
                nonce: kvxfer::ids::Nonce(1),
            }
            .into(),
            "Release",
        ),
    ];
    for (message, name) in more {
        let (mut wire, _) = observe(&world);
        wire.say(message);
        wire.reported(ErrorCode::UnexpectedMessage, name);
    }
    world.works();
}

/// What an engine shows is checked before anybody believes it.
#[test]
fn an_engine_that_shows_what_is_not_so() {
    let world = World::new(PathKind::Arena);
    let liar = Liar::new(&world);
    let honest = liar.describe();
    let other = KvFormat::opaque(4096, 1).expect("a format");
    type Change = Box<dyn Fn(&mut Describe)>;
    let cases: [(&str, Change); 5] = [
        ("format", Box::new(|d| d.format = Blob(vec![0xc1]))),
        ("placement", Box::new(|d| d.placement = Blob(vec![0xc1]))),
        (
            "fingerprint",
            Box::new(|d| d.fingerprint = Fingerprint([9; 32])),
        ),
        ("rank", Box::new(|d| d.rank = Rank { tp: 3, ..d.rank })),
        (
            "",
            Box::new(move |d| {
                d.format = Blob::pack("format", &other).expect("packed");
                d.fingerprint = Fingerprint(other.fingerprint().0);
            }),
        ),
    ];
    for (said, change) in cases {
        let mut shown = honest.clone();
        change(&mut shown);
        let (error, last) = shown_by(&world, shown);
        let Error::Session { source, .. } = &error else {
            panic!("{said}: {error}");
        };
        let SessionError::CutOff { code, text } = source else {
            panic!("{said}: {source}");
        };
        assert_eq!(*code, ErrorCode::Lie);
        assert!(text.contains(said), "{said}: {text}");
        assert!(
            matches!(last, Last::Reported(ErrorCode::Lie, _)),
            "{last:?}"
        );
    }
    let (shown, _) = seen(&world, honest);
    shown.expect("an honest one is believed");
    drop(liar);
    world.works();
}

fn shown_by(world: &World, shown: Describe) -> (Error, Last) {
    let (result, last) = seen(world, shown);
    (result.expect_err("it is not so"), last)
}

/// What an observer makes of a description, and the last that its peer hears.
fn seen(world: &World, shown: Describe) -> (Result<PeerLayout, Error>, Last) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let secret = world.secret.clone();
    let engine = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("an observer");
        let mut wire = Wire::accept(socket, Some(&secret));
        wire.say(shown);
        wire.last()
    });
    let mut config = Config::default();
    config.secret_file = Some(world.secret_file().to_owned());
    let result = bounded("the look", move || describe(&config, &address, LONG));
    (result, engine.join().expect("the engine ends"))
}
