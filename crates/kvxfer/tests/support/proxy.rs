//! The network between two engines, as far as a test wants to spoil it: connections are passed on,
//! and can be cut, or go silent without an end.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Debug)]
struct State {
    to: SocketAddr,
    open: Mutex<Vec<TcpStream>>,
    silent: AtomicBool,
}

/// Passes on what comes to its address.
#[derive(Debug)]
pub(crate) struct Proxy {
    state: Arc<State>,
    pub(crate) address: String,
}

impl Proxy {
    pub(crate) fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address").to_string();
        let state = Arc::new(State {
            to,
            open: Mutex::default(),
            silent: AtomicBool::new(false),
        });
        let of = Arc::clone(&state);
        std::thread::spawn(move || {
            for from in listener.incoming().map_while(Result::ok) {
                // Nobody there: the client finds its connection closed.
                let Ok(to) = TcpStream::connect(of.to) else {
                    continue;
                };
                let twin = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
                of.open
                    .lock()
                    .expect("no panic")
                    .extend([twin(&from), twin(&to)]);
                for (from, to) in [(twin(&from), twin(&to)), (to, from)] {
                    let of = Arc::clone(&of);
                    std::thread::spawn(move || pass(&of, from, to));
                }
            }
        });
        Self { state, address }
    }

    /// Ends all connections.
    pub(crate) fn cut(&self) {
        for stream in self.state.open.lock().expect("no panic").drain(..) {
            // One that has ended already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Passes nothing on any more, not even the end of a connection.
    pub(crate) fn go_silent(&self) {
        self.state.silent.store(true, Ordering::SeqCst);
    }

    /// Passes on again.
    pub(crate) fn speak(&self) {
        self.state.silent.store(false, Ordering::SeqCst);
    }
}

fn pass(state: &State, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = from.read(&mut buffer).unwrap_or(0);
        while state.silent.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if n == 0 || to.write_all(&buffer[..n]).is_err() {
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
    }
}
