//! A tap on the wire between two commands: it passes everything on, and holds one frame of the
//! client's control connection back, so that a test knows which stage both sides are at.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kvxfer::wire::{ConnectionKind, HEADER_LEN, MessageKind, PREAMBLE_LEN, Preamble, TAG_LEN};

use crate::support::LONG;

/// A frame: the `nth` of its kind in whose payload the text stands, counted over all connections.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark {
    pub(crate) kind: u8,
    pub(crate) says: &'static str,
    pub(crate) nth: u32,
}

impl Mark {
    pub(crate) fn message(kind: MessageKind, says: &'static str, nth: u32) -> Self {
        let kind = kind as u8;
        Self { kind, says, nth }
    }
}

#[derive(Debug)]
struct Book {
    mark: Mark,
    met: u32,
    held: bool,
    let_go: bool,
}

#[derive(Debug)]
struct State {
    to: String,
    book: Mutex<Book>,
    changed: Condvar,
}

#[derive(Debug)]
pub(crate) struct Tap {
    state: Arc<State>,
    pub(crate) address: String,
}

impl Tap {
    /// On the way to a server, to hold the frame that is marked.
    pub(crate) fn new(to: &str, mark: Mark) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let state = Arc::new(State {
            to: to.to_owned(),
            book: Mutex::new(Book {
                mark,
                met: 0,
                held: false,
                let_go: false,
            }),
            changed: Condvar::new(),
        });
        let of = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // Nobody there: the client finds its connection closed.
                let Ok(server) = TcpStream::connect(&of.to) else {
                    continue;
                };
                let twin = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
                let (back, to) = (twin(&server), twin(&client));
                std::thread::spawn(move || pass(back, to));
                let of = Arc::clone(&of);
                std::thread::spawn(move || of.watch(client, server));
            }
        });
        Self { state, address }
    }

    /// Waits until the frame is held.
    #[track_caller]
    pub(crate) fn held(&self) {
        let book = self.state.book.lock().expect("no panic");
        let waiting = |book: &mut Book| !book.held;
        let waited = self.state.changed.wait_timeout_while(book, LONG, waiting);
        let held = waited.expect("no panic").0.held;
        assert!(held, "the frame never came");
    }

    /// Passes the frame on, and all that comes.
    pub(crate) fn let_go(&self) {
        self.state.book.lock().expect("no panic").let_go = true;
        self.state.changed.notify_all();
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Passes one direction on until either end goes.
fn pass(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

impl State {
    /// Passes on what the client says: frame by frame, if it is a control connection.
    fn watch(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut preamble = [0; PREAMBLE_LEN];
        if from.read_exact(&mut preamble).is_ok() && to.write_all(&preamble).is_ok() {
            let kind = ConnectionKind::Control;
            if preamble == (Preamble { kind }.encode()) {
                while let Some(frame) = frame(&mut from) {
                    self.look(&frame);
                    if to.write_all(&frame).is_err() {
                        break;
                    }
                }
            }
        }
        pass(from, to);
    }

    /// Holds the frame, if it is the one.
    fn look(&self, frame: &[u8]) {
        let mut book = self.book.lock().expect("no panic");
        let says = book.mark.says.as_bytes();
        let found = says.is_empty() || frame[HEADER_LEN..].windows(says.len()).any(|w| w == says);
        if frame[4] != book.mark.kind || !found {
            return;
        }
        book.met += 1;
        if book.met == book.mark.nth {
            book.held = true;
            self.changed.notify_all();
            let waiting = |book: &mut Book| !book.let_go;
            // Longer than any test waits for what it does meanwhile.
            let limit = LONG + Duration::from_secs(60);
            drop(self.changed.wait_timeout_while(book, limit, waiting));
        }
    }
}

/// The next whole frame, sealed or not.
fn frame(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut frame = vec![0; HEADER_LEN];
    from.read_exact(&mut frame).ok()?;
    let len = frame[..4].try_into().map(u32::from_be_bytes).ok()?;
    // The kinds of the handshake come before there are keys.
    let tag = if frame[4] < 0x10 { 0 } else { TAG_LEN };
    frame.resize(HEADER_LEN + usize::try_from(len).ok()? + tag, 0);
    from.read_exact(&mut frame[HEADER_LEN..]).ok()?;
    Some(frame)
}
