//! What the router and the two engines say to each other: one JSON object a line, over pipes. In a
//! deployment this is the HTTP between a proxy and the engines' API servers, with the ticket in
//! `kv_transfer_params`.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::mpsc::Sender;

use serde::{Deserialize, Serialize};

use kvxfer::event::{Cause, ReleaseReason};
use kvxfer::ticket::Ticket;

use crate::Failed;

/// Who reads or writes whose memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// The decode process reads.
    Read,
    /// The prefill process writes.
    Write,
}

/// What is particular about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Story {
    /// Nothing: all blocks move.
    Whole,
    /// The decode process has the first blocks already, and wants the rest.
    Prefix,
    /// READ: the decode process has all blocks already. It releases the offer without a pull.
    FullHit,
    /// The client goes when the ticket has been made; its maker takes it back, and the other side
    /// gets it too late. No byte may count as moved.
    ClientGone,
    /// WRITE: layers are pushed, and the push is committed, before the decode process expects it.
    LayersFirst,
    /// WRITE: the prompt is computed in chunks, so each layer is pushed several times.
    Chunked,
    /// WRITE: the prefill process gives up half-way.
    Abort,
}

/// A request, as both engines get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) request: String,
    pub(crate) tokens: u32,
    pub(crate) mode: Mode,
    pub(crate) story: Story,
}

/// To an engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Order {
    /// Connect to the engine that listens there.
    Connect { address: String },
    /// Work on a request. The ticket is the other side's, if that was asked first.
    Start {
        #[serde(flatten)]
        job: Job,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kv_transfer_params: Option<Box<Ticket>>,
    },
    /// The client is gone: take back what the ticket of this request allows.
    TakeBack { request: String },
    /// No more requests will come; end when all memory is back.
    Finish,
}

/// How a request ended on one side: once, and with its memory free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ending {
    /// All blocks are here, and every byte was right.
    Received,
    /// All blocks are delivered.
    Sent,
    /// Offered blocks are free again.
    Released(ReleaseReason),
    /// The transfer failed for this reason.
    Failed(Cause),
}

/// From an engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(crate) enum Answer {
    /// It takes sessions there.
    Listening { address: String },
    /// A session with the other engine stands; blocks will take this path.
    Connected { path: String },
    /// The ticket of a request, to be relayed.
    Ticket {
        request: String,
        kv_transfer_params: Ticket,
    },
    /// Layers are on their way although the other side knows nothing of the request.
    Pushing { request: String },
    /// A request is over.
    Finished {
        request: String,
        ending: Ending,
        /// Bytes that this side's transfers moved, and bytes that were checked, prefix included.
        moved: u64,
        checked: u64,
    },
    /// Nothing is under way and every block is free.
    Idle,
}

/// Writes a line.
pub(crate) fn say<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), Failed> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    Ok(to.flush()?)
}

/// Reads lines in a thread of its own and sends on what `wrap` makes of them; `None` is the end.
pub(crate) fn listen<T, M>(
    from: impl Read + Send + 'static,
    to: Sender<M>,
    wrap: impl Fn(Option<Result<T, Failed>>) -> M + Send + 'static,
) where
    T: for<'de> Deserialize<'de>,
    M: Send + 'static,
{
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            let message = line.map_err(Failed::from);
            let message = message.and_then(|line| Ok(serde_json::from_str(&line)?));
            if to.send(wrap(Some(message))).is_err() {
                return;
            }
        }
        // Whoever has stopped receiving does not need to know.
        let _ = to.send(wrap(None));
    });
}
