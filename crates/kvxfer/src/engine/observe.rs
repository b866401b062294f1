//! A look at a live engine: who it is and how its blocks lie, and nothing else.
//!
//! It is a session of its own (the *observer* role), with the same handshake and secret as a real
//! peer. The engine answers with its format and the description of its placement, and with no
//! address, key or device to reach it by; then the observer says goodbye. No queue pair is made, and
//! the engine's events know nothing of it.

use std::time::{Duration, Instant};

use super::net;
use super::runtime::{random_nonce, session_config};
use crate::config::{Config, DEFAULT_PORT, KvRole};
use crate::control::Control;
use crate::error::Error;
use crate::event::PeerName;
use crate::ids::Generation;
use crate::layout::{KvFormat, PlacementDesc};
use crate::session::{Event, Session};
use crate::wire::{ConfigFacts, Describe, Role, Secret};

/// What a live rank says of its layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerLayout {
    /// Its engine and rank.
    pub name: PeerName,
    /// This life of it.
    pub generation: Generation,
    /// What it does with KV blocks.
    pub kv_role: KvRole,
    /// Whether both sides have proved that they know a shared secret.
    pub by_secret: bool,
    /// What a block of it is.
    pub format: KvFormat,
    /// Where it keeps its blocks: offsets and strides within its memories, whose addresses are not told.
    pub placement: PlacementDesc,
}

/// Asks the rank that listens at `address` (`HOST` or `HOST:PORT`) for its layout, all of it within
/// `timeout`. Of the configuration it takes the secret and the heartbeat.
///
/// # Errors
///
/// [`Error::Config`], [`Error::Secret`]; [`Error::Resolve`], [`Error::Unreachable`] (nobody listens,
/// or no answer), [`Error::Session`] (not kvxfer, another version, a wrong secret, silence, no room, a
/// description that makes no sense), [`Error::NotConnected`] (it said goodbye first).
///
/// ```no_run
/// use std::time::Duration;
/// use kvxfer::config::Config;
///
/// # fn main() -> Result<(), kvxfer::Error> {
/// let limit = Duration::from_secs(5);
/// let peer = kvxfer::engine::describe(&Config::default(), "node7:7301", limit)?;
/// println!("{} keeps {} blocks", peer.name.engine, peer.placement.num_blocks(0).unwrap_or(0));
/// # Ok(())
/// # }
/// ```
pub fn describe(config: &Config, address: &str, timeout: Duration) -> Result<PeerLayout, Error> {
    config.check()?;
    let until = net::after(timeout);
    let secret = match &config.secret_file {
        Some(file) => Some(Secret::from_file(file)?.secret),
        None => None,
    };
    let addresses = net::resolve_by(address, DEFAULT_PORT, net::resolve, until, &net::NEVER)?;
    let socket = net::connect(address, &addresses, until, &net::NEVER)?;
    let mut settings = session_config(config, secret, Role::Observer);
    let left = until.saturating_duration_since(Instant::now());
    settings.handshake_timeout = left;
    settings.establish_timeout = left;
    let session = Session::client(settings, random_nonce()?);
    let mut control = Control::new(session, socket, address.to_owned())?;
    let mut proved = false;
    loop {
        control.turn();
        while let Some(event) = control.event()? {
            match event {
                Event::Authenticated { by_secret, .. } => proved = by_secret,
                Event::PeerDescribed(describe) => {
                    return match layout(*describe, proved) {
                        Ok(layout) => {
                            control.close();
                            Ok(layout)
                        }
                        Err(detail) => Err(control.cut_off(&detail)),
                    };
                }
                _ => {}
            }
        }
        if Instant::now() >= until {
            return Err(control.late(timeout));
        }
        control.sleep(until, None);
    }
}

/// What the description says, if it agrees with itself; the error says where it does not.
fn layout(describe: Describe, by_secret: bool) -> Result<PeerLayout, String> {
    let unpacked = |error: crate::wire::WireError| error.to_string();
    let format: KvFormat = describe.format.unpack("format").map_err(unpacked)?;
    let placement: PlacementDesc = describe.placement.unpack("placement").map_err(unpacked)?;
    super::description::agree(&describe, &format, &placement)?;
    Ok(PeerLayout {
        name: PeerName {
            engine: describe.engine,
            rank: describe.rank,
        },
        generation: describe.generation,
        kv_role: describe.kv_role,
        by_secret,
        format,
        placement,
    })
}

/// What an observer is told of all that an engine tells its peers.
pub(crate) fn shown(describe: Describe) -> Describe {
    Describe {
        // They tell how a stranger could open a queue pair, or a GPU's memory.
        rails: Vec::new(),
        gpu: None,
        shared: None,
        facts: ConfigFacts::default(),
        fd_backed: false,
        ..describe
    }
}
