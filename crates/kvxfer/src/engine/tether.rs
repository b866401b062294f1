//! What ties a session that this side keeps up to those who hold its peer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::link::Link;
use super::peer_session::PeerSession;
use crate::error::Error;
use crate::event::PeerName;
use crate::transfer::Cause;
use crate::wire::GoodbyeReason;

/// Between the thread that keeps a session up and the handles of its peer.
#[derive(Debug)]
pub(crate) struct Tether {
    now: Mutex<Now>,
    again: Sender<Arc<PeerSession>>,
    came_again: Receiver<Arc<PeerSession>>,
    link: Mutex<Weak<Link>>,
    /// Dropped with the last handle, which wakes the keeper.
    held: Mutex<Option<Sender<()>>>,
}

#[derive(Debug)]
struct Now {
    session: Result<Arc<PeerSession>, Cause>,
    /// Who was met last.
    name: Option<PeerName>,
}

impl Now {
    fn up(&mut self, session: Arc<PeerSession>) {
        self.name = Some(session.name.clone());
        self.session = Ok(session);
    }
}

impl Tether {
    /// The tether, and the receiver that is cut off when the last handle goes.
    pub(crate) fn new() -> (Arc<Self>, Receiver<()>) {
        let (held, gone) = bounded(0);
        let (again, came_again) = bounded(4);
        let tether = Self {
            now: Mutex::new(Now {
                session: Err(Cause::PeerUnreachable),
                name: None,
            }),
            again,
            came_again,
            link: Mutex::new(Weak::new()),
            held: Mutex::new(Some(held)),
        };
        (Arc::new(tether), gone)
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(session) = self.came_again.try_recv() {
            now.up(session);
        }
        now
    }

    fn held(&self) -> MutexGuard<'_, Option<Sender<()>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody still wants the session.
    pub(crate) fn is_held(&self) -> bool {
        self.held().is_some()
    }

    pub(crate) fn hold_link(&self, link: &Arc<Link>) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(link);
        if !self.is_held() {
            link.close(GoodbyeReason::Finished);
        }
    }

    /// The first session stands.
    pub(crate) fn up(&self, session: Arc<PeerSession>) {
        // What has come since then is newer.
        self.now
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .up(session);
    }

    /// Where a session that stands again is told.
    pub(crate) fn again(&self) -> Sender<Arc<PeerSession>> {
        self.again.clone()
    }

    pub(crate) fn lost(&self, cause: Cause) {
        // A peer that came up again on the session that is now lost is lost with it.
        self.now().session = Err(cause);
    }

    /// The session that stands.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`].
    pub(crate) fn session(&self) -> Result<Arc<PeerSession>, Error> {
        let lost = match &self.now().session {
            Ok(session) => match session.usable() {
                Ok(()) => return Ok(Arc::clone(session)),
                Err(cause) => cause,
            },
            Err(cause) => cause.clone(),
        };
        Err(Error::NotConnected { cause: lost })
    }

    /// Who was met last.
    pub(crate) fn name(&self) -> Option<PeerName> {
        self.now().name.clone()
    }

    /// Nobody wants the session any more: it closes, and is not set up again.
    pub(crate) fn let_go(&self) {
        self.held().take();
        let link = self
            .link
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .upgrade();
        if let Some(link) = link {
            link.close(GoodbyeReason::Finished);
        }
    }
}
