//! Somebody on the way who has no secret: he repeats, swaps, changes and keeps the bytes of two
//! honest engines, and plays them again.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::Instance;
use kvxfer::event::Event;
use kvxfer::transfer::Cause;
use kvxfer::wire::{ErrorCode, HEADER_LEN, PREAMBLE_LEN, TAG_LEN};

use crate::reasons::{forget, logged};
use crate::support::counts::Counts;
use crate::support::{LONG, Log, Node, until};
use crate::wire::{connect, preamble};
use crate::world::World;

const NOTHING: u8 = 0;
const REPEAT: u8 = 1;
const SWAP: u8 = 2;
const FLIP_PAYLOAD: u8 = 3;
const FLIP_TAG: u8 = 4;
const FLIP_SEQUENCE: u8 = 5;
const LOSE: u8 = 6;
const FIRST_AGAIN: u8 = 7;
const SHORTEN: u8 = 8;

/// Passes frames on. What is set in `deed` is done once, to a sealed frame of the client's.
struct Meddler {
    address: String,
    deed: Arc<AtomicU8>,
    /// What the clients have said, each from its first byte.
    said: Arc<Mutex<Vec<Vec<u8>>>>,
}

fn frame(from: &mut TcpStream, sealed: bool) -> Option<Vec<u8>> {
    let mut bytes = vec![0; HEADER_LEN];
    from.read_exact(&mut bytes).ok()?;
    let len = u32::from_be_bytes(*bytes.first_chunk()?) as usize;
    let tag = if sealed { TAG_LEN } else { 0 };
    bytes.resize(HEADER_LEN + len + tag, 0);
    from.read_exact(&mut bytes[HEADER_LEN..]).ok()?;
    Some(bytes)
}

impl Meddler {
    fn new(to: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let (deed, said) = (Arc::new(AtomicU8::new(NOTHING)), Arc::default());
        let this = Self {
            address,
            deed: Arc::clone(&deed),
            said: Arc::clone(&said),
        };
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(to) else {
                    continue;
                };
                let twin = |socket: &TcpStream| socket.try_clone().expect("a socket");
                let (mut back, mut there) = (twin(&server), twin(&client));
                std::thread::spawn(move || {
                    // Either side may hang up at any time.
                    let _ = std::io::copy(&mut back, &mut there);
                    let _ = there.shutdown(Shutdown::Both);
                });
                let (deed, said) = (Arc::clone(&deed), Arc::clone(&said));
                std::thread::spawn(move || {
                    let ends = (twin(&client), twin(&server));
                    meddle(client, server, &deed, &said);
                    let _ = ends.0.shutdown(Shutdown::Both);
                    let _ = ends.1.shutdown(Shutdown::Both);
                });
            }
        });
        this
    }

    /// An honest peer of the world's target, with all that it says passing through here.
    fn joined(&self, world: &World) -> (Node, Instance) {
        let peer = world.another(KvRole::Both, PathKind::Arena);
        let instance = peer.engine.connect(&self.address, LONG).expect("a session");
        (peer, instance)
    }
}

fn meddle(
    mut from: TcpStream,
    mut to: TcpStream,
    deed: &AtomicU8,
    said: &Mutex<Vec<Vec<u8>>>,
) -> Option<()> {
    let mut all = vec![0; PREAMBLE_LEN];
    from.read_exact(&mut all).ok()?;
    to.write_all(&all).ok()?;
    let place = {
        let mut said = said.lock().expect("no panic");
        said.push(Vec::new());
        said.len() - 1
    };
    let mut first = None;
    for count in 0u32.. {
        let sealed = count >= 2;
        let mut bytes = frame(&mut from, sealed)?;
        all.extend_from_slice(&bytes);
        said.lock().expect("no panic")[place] = all.clone();
        let what = match sealed {
            true => deed.swap(NOTHING, Ordering::SeqCst),
            false => NOTHING,
        };
        let last = bytes.len() - 1;
        match what {
            REPEAT => to.write_all(&bytes).ok()?,
            SWAP => {
                let second = frame(&mut from, true)?;
                to.write_all(&second).ok()?;
            }
            FLIP_PAYLOAD => bytes[HEADER_LEN] ^= 1,
            FLIP_TAG => bytes[last] ^= 0x80,
            FLIP_SEQUENCE => bytes[15] ^= 1,
            SHORTEN => bytes[3] ^= 1,
            LOSE => continue,
            FIRST_AGAIN => bytes = first.clone()?,
            _ => {}
        }
        if sealed {
            first.get_or_insert_with(|| bytes.clone());
        }
        to.write_all(&bytes).ok()?;
    }
    None
}

#[test]
fn bytes_changed_on_the_way() {
    let world = World::with(PathKind::Arena, |config| {
        config.heartbeat_interval = std::time::Duration::from_millis(20);
    });
    let meddler = Meddler::new(world.address.get());
    let before = Counts::now();
    {
        let (peer, instance) = meddler.joined(&world);
        let name = peer.name();
        let mut log = Log::new(&world.target.engine);
        for deed in [
            REPEAT,
            SWAP,
            FLIP_PAYLOAD,
            FLIP_TAG,
            FLIP_SEQUENCE,
            LOSE,
            FIRST_AGAIN,
            SHORTEN,
        ] {
            assert!(instance.wait_up(LONG), "deed {deed}");
            until("the target has it too", || {
                world.target.engine.peer_of(&name).is_some()
            });
            forget();
            log.forget();
            meddler.deed.store(deed, Ordering::SeqCst);
            let down = log.wait(
                "end of the session",
                |event| matches!(event, Event::PeerDown { peer, .. } if *peer == name),
            );
            let Event::PeerDown { cause, .. } = down else {
                unreachable!("that event")
            };
            let reason = ErrorCode::Protocol;
            assert_eq!(cause, Cause::CutOff { reason }, "deed {deed}");
            logged(match deed {
                REPEAT | SWAP | LOSE | FIRST_AGAIN => "replayed, lost or reordered",
                _ => "authentication",
            });
            world.works();
        }
        // Set up again by itself, and nothing of before is in the way.
        assert!(instance.wait_up(LONG));
    }
    world.works();
    // The meddler's own threads end with their connections.
    before.settle("after the meddling");
}

/// A conversation that was recorded, played again: the whole of it, and parts.
#[test]
fn a_recorded_handshake_proves_nothing() {
    let world = World::new(PathKind::Arena);
    let meddler = Meddler::new(world.address.get());
    let before = Counts::now();
    {
        let (peer, instance) = meddler.joined(&world);
        let recorded = meddler.said.lock().expect("no panic")[0].clone();
        assert!(instance.is_up());
        assert!(recorded.len() > 500);
        for (played, times) in [(recorded.clone(), 3), (recorded[..400].to_vec(), 1)] {
            for _ in 0..times {
                let mut socket = connect(world.address.get());
                let _ = socket.write_all(&played);
                let mut heard = Vec::new();
                // It may be reset with what was not read.
                let _ = socket.read_to_end(&mut heard);
                // Preamble, challenge, and that the proof is wrong: its answer was to another nonce.
                assert!(heard.len() < 160, "{heard:02x?}");
                if let Some(start) = heard.get(..PREAMBLE_LEN) {
                    assert_eq!(start, preamble());
                }
            }
        }
        logged("different secrets");
        assert!(instance.is_up());
        // The side that is connected to hears a moment later that the session stands.
        until("the session", || {
            world.target.engine.peer_of(&peer.name()).is_some()
        });
    }
    world.works();
    before.settle("after the recordings");
}
