//! Peers without the secret: what they hear, and that they keep nobody out.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::wire::{
    Auth, AuthMode, Blob, Challenge, FrameReader, FrameWriter, Hello, MAX_UNAUTHENTICATED_FRAME,
    PREAMBLE_LEN, Reject, RejectCode, Role, Secret, StreamHalf, StreamOpening, Transcript,
    VERSIONS, VersionRange, frame_kind,
};

use crate::liar::Liar;
use crate::support::LONG;
use crate::support::counts::Counts;
use crate::wire::{Wire, connect, hello, preamble};
use crate::world::World;

/// Everything that is heard after `said`, to the end of the connection.
fn hear(world: &World, said: &[u8]) -> Vec<u8> {
    let mut socket = connect(world.address.get());
    // It may hang up in the middle.
    let _ = socket.write_all(said);
    let _ = socket.shutdown(Shutdown::Write);
    let mut heard = Vec::new();
    // A reset is an end, too.
    let _ = socket.read_to_end(&mut heard);
    heard
}

fn frames(kinds: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let (mut bytes, mut writer) = (preamble().to_vec(), FrameWriter::new());
    for (kind, payload) in kinds {
        writer
            .write(*kind, payload, u32::MAX, &mut bytes)
            .expect("a frame");
    }
    bytes
}

/// What a stranger may hear: nothing; or a preamble and a refusal; or a preamble, a challenge and a
/// refusal. Each is read whole, so that no byte is left that could tell more.
fn refusal(heard: &[u8]) -> Option<(Option<Challenge>, RejectCode)> {
    if heard.is_empty() {
        return None;
    }
    assert_eq!(heard[..PREAMBLE_LEN], preamble());
    let mut reader = FrameReader::new(MAX_UNAUTHENTICATED_FRAME);
    reader.push(&heard[PREAMBLE_LEN..]);
    let mut challenge = None;
    let mut refused = None;
    while let Some(frame) = reader.next_frame().expect("frames") {
        assert!(refused.is_none(), "a frame after the refusal");
        if frame.kind == frame_kind::CHALLENGE {
            let said = Challenge::decode(&frame.payload).expect("a challenge");
            assert_eq!((said.version, said.auth), (1, AuthMode::SharedSecret));
            challenge = Some(said);
        } else {
            assert_eq!(frame.kind, frame_kind::REJECT);
            let said = Reject::decode(&frame.payload).expect("a refusal");
            assert_eq!(said.versions, VERSIONS);
            refused = Some(said.code);
        }
    }
    assert_eq!(reader.buffered(), 0);
    refused.map(|code| (challenge, code))
}

fn contains(heard: &[u8], secret: &[u8]) -> bool {
    heard.windows(secret.len()).any(|window| window == secret)
}

#[test]
fn strangers_learn_nothing() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let secrets: Vec<Vec<u8>> = {
        let mut spy = Liar::described(&world);
        let theirs = spy.theirs.take().expect("described");
        let key = theirs.rails[0].memories[0];
        let device = spy_device(&theirs.rails[0].device);
        vec![
            theirs.engine.0.as_bytes().to_vec(),
            theirs.generation.0.to_vec(),
            theirs.fingerprint.0[..8].to_vec(),
            key.addr.to_be_bytes().to_vec(),
            key.addr.to_le_bytes().to_vec(),
            device.0.into_bytes(),
            device.1.to_vec(),
            world.honest.engine.id().0.as_bytes().to_vec(),
        ]
    };
    let wrong = Secret::new(b"another secret, of some length".to_vec()).expect("a secret");
    let with = |secret: Option<&Secret>| hello(secret, Role::Engine).encode().expect("a hello");
    let proof = |proof: [u8; 32]| Auth { proof }.encode().expect("a proof");
    let guess = Transcript::new().proof(Some(&wrong), kvxfer::wire::Side::Client);
    let later = |min, max| {
        let versions = VersionRange { min, max };
        let hello = Hello {
            versions,
            ..hello(Some(&wrong), Role::Engine)
        };
        hello.encode().expect("a hello")
    };
    use frame_kind::{AUTH, AUTH_OK, CHALLENGE, HELLO, REJECT};
    let stream = StreamOpening {
        session: kvxfer::wire::SessionId([3; 16]),
        qp: 0,
        half: StreamHalf::Requester,
        sequence: 0,
    };
    let key = Transcript::new().keys(Some(&wrong));
    let stream = stream.encode(&key.streams_from(kvxfer::wire::Side::Client));
    let malformed = Some(RejectCode::Malformed);
    let said: Vec<(&str, Vec<u8>, Option<RejectCode>)> = vec![
        ("nothing", Vec::new(), None),
        ("one byte", vec![0x8b], None),
        ("half a preamble", preamble()[..6].to_vec(), None),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), None),
        (
            "TLS",
            vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0, 0, 0],
            None,
        ),
        (
            "another framing",
            [&preamble()[..8], &[9, 1, 0, 0]].concat(),
            None,
        ),
        ("a stream of nobody's", stream.to_vec(), None),
        ("half a stream", stream[..40].to_vec(), None),
        (
            "no secret",
            frames(&[(HELLO, with(None))]),
            Some(RejectCode::SecretRequired),
        ),
        (
            "a wrong proof",
            frames(&[(HELLO, with(Some(&wrong))), (AUTH, proof(guess))]),
            Some(RejectCode::NotAuthorised),
        ),
        (
            "no proof",
            frames(&[(HELLO, with(Some(&wrong))), (AUTH, Vec::new())]),
            malformed,
        ),
        (
            "later versions",
            frames(&[(HELLO, later(7, 9))]),
            Some(RejectCode::VersionMismatch),
        ),
        ("no hello", frames(&[(HELLO, vec![0xc1; 50])]), malformed),
        (
            "two hellos",
            frames(&[(HELLO, with(Some(&wrong))), (HELLO, with(Some(&wrong)))]),
            malformed,
        ),
        ("a proof first", frames(&[(AUTH, proof(guess))]), malformed),
        (
            "a server's part",
            frames(&[(CHALLENGE, vec![0x94])]),
            malformed,
        ),
        (
            "success",
            frames(&[(HELLO, with(Some(&wrong))), (AUTH_OK, proof(guess))]),
            malformed,
        ),
        ("a refusal", frames(&[(REJECT, vec![0x92])]), malformed),
        (
            "a message",
            frames(&[(0x10, Blob(vec![0; 100]).0)]),
            malformed,
        ),
        (
            "a large frame",
            [&preamble()[..], &(64u32 << 10 | 1).to_be_bytes()].concat(),
            malformed,
        ),
    ];
    for (what, said, code) in said {
        let heard = hear(&world, &said);
        let got = refusal(&heard);
        assert_eq!(
            got.as_ref().map(|(_, code)| *code),
            code,
            "{what}: {heard:02x?}"
        );
        for secret in &secrets {
            assert!(!contains(&heard, secret), "{what}: {heard:02x?}");
        }
        assert!(heard.len() < 160, "{what}: {} bytes", heard.len());
    }
    world.works();
    before.settle("after the strangers");
}

/// The socket's name and the random guid of a device.
fn spy_device(device: &Blob) -> (String, [u8; 16]) {
    let device: kvxfer_verbs::DeviceAddr = device.unpack("device").expect("an address");
    (device.name, device.guid)
}

/// More connections that say nothing, or a byte now and then, than there are places. An honest peer
/// comes in all the same, and each stranger's place ends.
#[test]
fn strangers_who_dawdle_keep_nobody_out() {
    let world = World::new(PathKind::Arena);
    let before = Counts::now();
    let address = world.address.get();
    let mut idle: Vec<TcpStream> = (0..400).map(|_| connect(address)).collect();
    let (head, tail) = idle.split_at_mut(200);
    for socket in head {
        socket.write_all(&preamble()).expect("sent");
    }
    let slow = frames(&[(frame_kind::HELLO, vec![0; 1000])]);
    let newcomer = world.another(KvRole::Both, PathKind::Arena);
    let connecting = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| newcomer.engine.connect(&address.to_string(), LONG));
        let mut at = 0;
        while !connecting.is_finished() {
            for socket in tail.iter_mut() {
                // Those that have lost their place are told so.
                let _ = socket.write_all(&slow[at % slow.len()..=at % slow.len()]);
            }
            at += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        connecting.join().expect("no panic")
    });
    assert!(connecting.expect("a place").is_up());
    world.works();
    drop(newcomer);
    // Nobody waits any more, and each of them has until its own deadline, bytes or not.
    let begun = Instant::now();
    for socket in &mut idle {
        let mut heard = Vec::new();
        // With or without a reset.
        let _ = socket.read_to_end(&mut heard);
        let said = refusal(&heard);
        assert!(
            said.is_none_or(|(challenge, _)| challenge.is_none()),
            "{heard:02x?}"
        );
    }
    assert!(begun.elapsed() < LONG);
    drop(idle);
    world.works();
    before.settle("after the strangers");
}

/// All the connections there can be, by somebody who knows the secret: the next is told that there is
/// no room; and when they are gone there is.
#[test]
fn connections_have_a_limit() {
    let world = World::with(PathKind::Arena, |config| {
        config.connect_timeout = LONG;
    });
    let before = Counts::now();
    let address = world.address.get();
    let mut open = Vec::new();
    let busy = loop {
        let socket = connect(address);
        let mut first = socket.try_clone().expect("a socket");
        first.set_nonblocking(true).expect("a socket");
        // A listener with no room says so at once; one with room waits to be spoken to.
        let mut bytes = [0; 64];
        let end = Instant::now() + Duration::from_millis(if open.len() < 1000 { 0 } else { 300 });
        let mut got = first.read(&mut bytes);
        while got.is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
            got = first.read(&mut bytes);
        }
        if let Ok(n) = got {
            break bytes[..n].to_vec();
        }
        first.set_nonblocking(false).expect("a socket");
        drop(first);
        open.push(Wire::prove(socket, Some(&world.secret), Role::Engine));
        assert!(open.len() < 1100, "no limit");
    };
    assert!(
        matches!(refusal(&busy), Some((None, RejectCode::Busy))),
        "{busy:02x?}"
    );
    world.works();
    drop(open);
    let newcomer = world.another(KvRole::Both, PathKind::Arena);
    let end = Instant::now() + LONG;
    while newcomer.engine.connect(&address.to_string(), LONG).is_err() {
        assert!(Instant::now() < end, "no room again");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(newcomer);
    world.works();
    before.settle("after the connections");
}
