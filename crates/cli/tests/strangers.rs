//! What the command says of a peer that is not as it should be: somebody else's port, another
//! version, nobody, silence. Each is told with its cause and what to do, and ends with code 3.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use kvxfer::wire::{
    ConnectionKind, FrameWriter, HEADER_LEN, Hello, MAX_UNAUTHENTICATED_FRAME, PREAMBLE_LEN,
    Preamble, Reject, RejectCode, VersionRange, frame_kind,
};
use support::{LONG, run};

/// Every command that meets a peer.
const COMMANDS: [&[&str]; 3] = [
    &["bw", "--size", "4K", "--blocks", "16", "--iters", "12"],
    &["ping", "-c", "1"],
    &["layout", "show"],
];

/// Runs each command against a peer of one connection that does `act`; it must end with code 3
/// and say all of `said`.
#[track_caller]
fn each(timeout: &str, said: &[&str], act: impl Fn(TcpStream) + Clone + Send + 'static) {
    for command in COMMANDS {
        let (address, peer) = scripted(act.clone());
        let ended = run(&[command, &[&address, "--timeout", timeout]].concat());
        ended.failed(
            3,
            &[&[address.as_str(), "evidence: ", "fix: "], said].concat(),
        );
        assert!(ended.stdout.is_empty(), "{ended:?}");
        peer.join().expect("the peer ends");
    }
}

fn scripted(act: impl FnOnce(TcpStream) + Send + 'static) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("a client");
        socket.set_read_timeout(Some(LONG)).expect("set");
        act(socket);
    });
    (address, thread)
}

/// Reads until the client goes.
fn until_it_goes(mut socket: TcpStream) {
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
}

/// Reads the client's preamble and Hello, and says what it speaks.
fn hello(socket: &mut TcpStream) -> VersionRange {
    let mut head = [0; PREAMBLE_LEN + HEADER_LEN];
    socket
        .read_exact(&mut head)
        .expect("a preamble and a header");
    let len = head[PREAMBLE_LEN..][..4].try_into().map(u32::from_be_bytes);
    let mut payload = vec![0; len.expect("four bytes") as usize];
    socket.read_exact(&mut payload).expect("a Hello");
    Hello::decode_versions(&payload).expect("versions")
}

#[test]
fn another_version_is_told_with_both_ranges() {
    each(
        "20",
        &["another version", "8 to 9", "the same version"],
        |mut socket| {
            let theirs = hello(&mut socket);
            assert!(theirs.max < 8, "this test is of a later version");
            let kind = ConnectionKind::Control;
            let mut bytes = Preamble { kind }.encode().to_vec();
            let reject = Reject {
                code: RejectCode::VersionMismatch,
                versions: VersionRange { min: 8, max: 9 },
            };
            let payload = reject.encode().expect("encodes");
            FrameWriter::new()
                .write(
                    frame_kind::REJECT,
                    &payload,
                    MAX_UNAUTHENTICATED_FRAME,
                    &mut bytes,
                )
                .expect("fits");
            socket.write_all(&bytes).expect("answered");
            until_it_goes(socket);
        },
    );
}

#[test]
fn another_framing_is_another_version() {
    each("20", &["another version", "framing 7"], |mut socket| {
        let kind = ConnectionKind::Control;
        let mut preamble = Preamble { kind }.encode();
        preamble[8] = 7;
        socket.write_all(&preamble).expect("answered");
        until_it_goes(socket);
    });
}

#[test]
fn who_is_not_kvxfer_is_told() {
    for (answer, saw) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"[..],
            "HTTP",
        ),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "SSH"),
        (b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "00"),
    ] {
        each("20", &["is not kvxfer", saw], move |mut socket| {
            socket.write_all(answer).expect("answered");
            until_it_goes(socket);
        });
    }
}

#[test]
fn garbage_after_a_good_beginning_is_told() {
    each("20", &["the session ended", "log"], |mut socket| {
        let kind = ConnectionKind::Control;
        socket.write_all(&Preamble { kind }.encode()).expect("sent");
        socket.write_all(&[0xff; 64]).expect("sent");
        until_it_goes(socket);
    });
}

#[test]
fn who_closes_at_once_is_told() {
    each("20", &["closed the connection before", "ss -ltnp"], drop);
}

#[test]
fn who_never_answers_is_given_up() {
    each("500ms", &["no answer in time", "stopped"], until_it_goes);
}

#[test]
fn nobody_there_is_told() {
    for command in COMMANDS {
        // A port that was free a moment ago.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let ended = run(&[command, &[&address]].concat());
        ended.failed(
            3,
            &[
                &address,
                "cannot be reached",
                "refused",
                "fix: ",
                "kvxfer serve",
            ],
        );
    }
}

#[test]
fn a_host_that_is_not_known_is_told() {
    for command in COMMANDS {
        // RFC 2606: this name never resolves. A layout is a live engine's if it has a port.
        let host = match command[0] {
            "layout" => "no-such-host.invalid:7301",
            _ => "no-such-host.invalid",
        };
        let ended = run(&[command, &[host]].concat());
        ended.failed(
            3,
            &["no-such-host.invalid:7301", "evidence: ", "fix: say HOST"],
        );
    }
}

#[test]
fn a_port_out_of_range_is_bad_usage() {
    for command in COMMANDS {
        for address in ["127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:"] {
            run(&[command, &[address]].concat()).failed(2, &[address, "HOST:PORT"]);
        }
    }
    for address in ["127.0.0.1:65536", "nowhere:99999"] {
        run(&["serve", "--listen", address]).failed(2, &[address, "HOST:PORT"]);
    }
}
