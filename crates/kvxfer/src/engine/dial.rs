//! Data streams that this side opens to the port of a session's control connection.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::net;
use crate::error::Error;
use crate::wire::{SessionId, StreamHalf, StreamKey, StreamOpening};

/// Opens the data streams of a session.
#[derive(Debug)]
pub(crate) struct Dialler<'a> {
    /// Where its control connection went.
    pub(crate) address: SocketAddr,
    pub(crate) session: SessionId,
    pub(crate) key: &'a StreamKey,
    pub(crate) deadline: Instant,
    /// Set when whoever dials gives up.
    pub(crate) stop: &'a AtomicBool,
}

impl Dialler<'_> {
    pub(crate) fn dial(
        &self,
        qp: u32,
        half: StreamHalf,
        sequence: u64,
    ) -> Result<TcpStream, Error> {
        let name = self.address.to_string();
        let mut stream = net::connect(&name, &[self.address], self.deadline, self.stop)?;
        let opening = StreamOpening {
            session: self.session,
            qp,
            half,
            sequence,
        };
        let mut answer = [0; crate::wire::STREAM_ANSWER_LEN];
        stream
            .write_all(&opening.encode(self.key))
            .and_then(|()| net::read_exact_by(&stream, &mut answer, self.deadline, self.stop))
            .map_err(|source| Error::Stream {
                address: name.clone(),
                source,
            })?;
        if !opening.verify_answer(self.key, &answer) {
            return Err(Error::StreamNotAuthentic { address: name });
        }
        Ok(stream)
    }
}
