//! A control connection written out by hand: handshake by the wire functions alone, and after it any
//! bytes whatever.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use kvxfer::wire::{
    Auth, AuthMode, AuthOk, Challenge, ConnectionKind, ErrorCode, ErrorReport, Frame, FrameReader,
    FrameWriter, GoodbyeReason, HandshakeNonce, Hello, Message, MessageKind, PREAMBLE_LEN, Ping,
    Pong, Preamble, Refusal, Role, Secret, SessionKeys, Side, Transcript, VERSIONS, frame_kind,
};

const MAX: u32 = 16 << 20;
/// How long the engine may take to answer or to hang up.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a session ended, as the liar was told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Last {
    Refused(Refusal),
    Reported(ErrorCode, String),
    Goodbye(GoodbyeReason),
    /// The connection ended without a word.
    Silent,
}

/// An authenticated control connection.
pub(crate) struct Wire {
    pub(crate) socket: TcpStream,
    reader: FrameReader,
    writer: FrameWriter,
    pub(crate) keys: SessionKeys,
}

pub(crate) fn preamble() -> [u8; PREAMBLE_LEN] {
    let kind = ConnectionKind::Control;
    Preamble { kind }.encode()
}

pub(crate) fn hello(secret: Option<&Secret>, role: Role) -> Hello {
    Hello {
        versions: VERSIONS,
        nonce: HandshakeNonce::random().expect("random bytes"),
        auth: secret.map_or(AuthMode::None, |_| AuthMode::SharedSecret),
        role,
        max_frame: MAX,
    }
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).expect("the engine listens");
    prepare(&socket);
    socket
}

fn prepare(socket: &TcpStream) {
    socket.set_nodelay(true).expect("a socket");
    let long = Some(PATIENCE);
    socket.set_read_timeout(long).expect("a socket");
    socket.set_write_timeout(long).expect("a socket");
}

fn next(socket: &mut TcpStream, reader: &mut FrameReader) -> Option<Frame> {
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(frame) = reader.next_frame().expect("the engine keeps to the format") {
            return Some(frame);
        }
        match socket.read(&mut buffer) {
            Ok(0) => return None,
            Ok(n) => reader.push(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("the engine says nothing: {error}"),
        }
    }
}

fn frame(writer: &mut FrameWriter, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let written = writer.write(kind, payload, u32::MAX, &mut bytes);
    written.expect("a frame");
    bytes
}

impl Wire {
    /// Connects and proves itself.
    pub(crate) fn dial(address: SocketAddr, secret: Option<&Secret>, role: Role) -> Self {
        Self::prove(connect(address), secret, role)
    }

    /// Proves itself over a connection of its own.
    pub(crate) fn prove(mut socket: TcpStream, secret: Option<&Secret>, role: Role) -> Self {
        let (mut writer, mut transcript) = (FrameWriter::new(), Transcript::new());
        let mut bytes = preamble().to_vec();
        let payload = hello(secret, role).encode().expect("a hello");
        bytes.extend(frame(&mut writer, frame_kind::HELLO, &payload));
        transcript.add(&bytes);
        socket.write_all(&bytes).expect("sent");
        let mut theirs = [0; PREAMBLE_LEN];
        socket.read_exact(&mut theirs).expect("a preamble");
        transcript.add(&theirs);
        let mut reader = FrameReader::new(1 << 16);
        let challenge = next(&mut socket, &mut reader).expect("a challenge");
        assert_eq!(challenge.kind, frame_kind::CHALLENGE);
        Challenge::decode(&challenge.payload).expect("a challenge");
        transcript.add(&challenge.header());
        transcript.add(&challenge.payload);
        let proof = transcript.proof(secret, Side::Client);
        let auth = Auth { proof }.encode().expect("a proof");
        let auth = frame(&mut writer, frame_kind::AUTH, &auth);
        transcript.add(&auth);
        socket.write_all(&auth).expect("sent");
        let ok = next(&mut socket, &mut reader).expect("an answer");
        assert_eq!(ok.kind, frame_kind::AUTH_OK);
        let ok = AuthOk::decode(&ok.payload).expect("a proof");
        assert!(transcript.verify(secret, Side::Server, &ok.proof));
        Self::open(socket, reader, writer, &transcript, secret, Side::Client)
    }

    /// The same as the side that was connected to.
    pub(crate) fn accept(mut socket: TcpStream, secret: Option<&Secret>) -> Self {
        prepare(&socket);
        let (mut writer, mut transcript) = (FrameWriter::new(), Transcript::new());
        let mut theirs = [0; PREAMBLE_LEN];
        socket.read_exact(&mut theirs).expect("a preamble");
        transcript.add(&theirs);
        let mut reader = FrameReader::new(1 << 16);
        let said = next(&mut socket, &mut reader).expect("a hello");
        transcript.add(&said.header());
        transcript.add(&said.payload);
        let ours = hello(secret, Role::Engine);
        let challenge = Challenge {
            version: VERSIONS.max,
            nonce: ours.nonce,
            auth: ours.auth,
            max_frame: MAX,
        };
        let mut bytes = preamble().to_vec();
        let payload = challenge.encode().expect("a challenge");
        bytes.extend(frame(&mut writer, frame_kind::CHALLENGE, &payload));
        transcript.add(&bytes);
        socket.write_all(&bytes).expect("sent");
        let auth = next(&mut socket, &mut reader).expect("a proof");
        let proof = Auth::decode(&auth.payload).expect("a proof").proof;
        assert!(transcript.verify(secret, Side::Client, &proof));
        transcript.add(&auth.header());
        transcript.add(&auth.payload);
        let proof = transcript.proof(secret, Side::Server);
        let ok = AuthOk { proof }.encode().expect("a proof");
        let ok = frame(&mut writer, frame_kind::AUTH_OK, &ok);
        socket.write_all(&ok).expect("sent");
        Self::open(socket, reader, writer, &transcript, secret, Side::Server)
    }

    fn open(
        socket: TcpStream,
        mut reader: FrameReader,
        mut writer: FrameWriter,
        transcript: &Transcript,
        secret: Option<&Secret>,
        side: Side,
    ) -> Self {
        let keys = transcript.keys(secret);
        writer.seal(keys.frames_from(side));
        reader.unseal(keys.frames_from(side.other()), MAX);
        Self {
            socket,
            reader,
            writer,
            keys,
        }
    }

    /// A sealed frame of any type with any payload.
    pub(crate) fn sealed(&mut self, code: u8, payload: &[u8]) -> Vec<u8> {
        frame(&mut self.writer, code, payload)
    }

    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        // The engine may have hung up already, and that is what is asked afterwards.
        let _ = self.socket.write_all(bytes);
    }

    pub(crate) fn say_raw(&mut self, kind: MessageKind, payload: &[u8]) {
        let bytes = self.sealed(kind as u8, payload);
        self.say_bytes(&bytes);
    }

    pub(crate) fn say(&mut self, message: impl Into<Message>) {
        let message = message.into();
        let payload = message.encode().expect("a message within bounds");
        self.say_raw(message.kind(), &payload);
    }

    /// The next message that is no heartbeat; `None` at the end of the connection.
    pub(crate) fn hear(&mut self) -> Option<Message> {
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(
                Instant::now() < end,
                "the engine says nothing but that it is alive"
            );
            let frame = next(&mut self.socket, &mut self.reader)?;
            let message = Message::decode(frame.kind, &frame.payload).expect("a message");
            match message {
                Message::Ping(Ping { sequence, echo }) => self.say(Pong { sequence, echo }),
                Message::Pong(_) => {}
                other => return Some(other),
            }
        }
    }

    /// The next message of a kind; everything before it is passed over.
    #[track_caller]
    pub(crate) fn hear_kind(&mut self, kind: MessageKind) -> Message {
        loop {
            match self.hear() {
                Some(message) if message.kind() == kind => return message,
                Some(Message::ErrorReport(report)) => panic!("no {kind}: {report:?}"),
                Some(Message::Refuse(refuse)) => panic!("no {kind}: {refuse:?}"),
                Some(_) => {}
                None => panic!("no {kind}: the connection is over"),
            }
        }
    }

    /// Listens to the end.
    pub(crate) fn last(&mut self) -> Last {
        let mut last = Last::Silent;
        while let Some(message) = self.hear() {
            match message {
                Message::Refuse(refuse) => last = Last::Refused(refuse.reason),
                Message::ErrorReport(ErrorReport { code, text }) => {
                    last = Last::Reported(code, text);
                }
                Message::Goodbye(goodbye) => last = Last::Goodbye(goodbye.reason),
                _ => {}
            }
        }
        last
    }

    #[track_caller]
    pub(crate) fn reported(&mut self, code: ErrorCode, words: &str) {
        match self.last() {
            Last::Reported(got, text) if got == code && text.contains(words) => {}
            other => panic!("not {code:?} with {words:?}: {other:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn refused_as_bad(&mut self, words: &str) {
        match self.last() {
            Last::Refused(Refusal::BadDescription { detail }) if detail.contains(words) => {}
            other => panic!("not refused with {words:?}: {other:?}"),
        }
    }
}
