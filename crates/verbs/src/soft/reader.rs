//! Whom this process lets read its memory, under Yama.
//!
//! Under `kernel.yama.ptrace_scope` 1 a process is read only by its ancestors, by a process with
//! `CAP_SYS_PTRACE`, and by the one process (with its descendants) that it has named with
//! `PR_SET_PTRACER`. There is one such place a process, so two peers would take it from each other
//! in the middle of their work. It goes to the first peer and stays with it until the last of its
//! streams has ended or it has died. A later peer is not named; whether it may read all the same
//! (an ancestor, a capability) its attempt shows, and if not the reason names who has the place.
//!
//! Of those that dial, only one that has proved itself is named: an opening carries the token of a queue pair, or, for
//! a probe, the context's guid. Both are random and travel over the control connection only. Whoever is
//! dialled is named before it has answered, for it must read to answer.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::soft::process_vm::{PeerProcess, alive};

const SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// Whether naming a reader is what lets it read. In scope 0 every process of the user may, in 2 and
/// 3 no naming helps, and a kernel without Yama has no such file.
fn naming_helps(scope: &io::Result<String>) -> bool {
    matches!(scope, Ok(text) if text.trim() == "1")
}

/// The one place, and who has it. Who lives and what the kernel is told is its user's business.
#[derive(Debug)]
struct Place<P> {
    named: Option<Named<P>>,
    turns: u64,
}

#[derive(Debug)]
struct Named<P> {
    pid: i32,
    process: P,
    /// Tells this naming from earlier ones.
    turn: u64,
    holds: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Claim {
    /// It had the place already.
    Joined { turn: u64 },
    /// It has it now, and the kernel must be told.
    New { turn: u64 },
    /// A living process has it.
    Taken { by: i32 },
}

impl<P> Place<P> {
    const fn new() -> Self {
        Self {
            named: None,
            turns: 0,
        }
    }

    fn claim(&mut self, pid: i32, process: P, lives: impl Fn(&P) -> bool) -> Claim {
        // While a process lives, its pid is its own: the same pid then is the same process.
        if let Some(named) = self.named.as_mut().filter(|n| lives(&n.process)) {
            if named.pid != pid {
                return Claim::Taken { by: named.pid };
            }
            named.holds += 1;
            return Claim::Joined { turn: named.turn };
        }
        self.turns += 1;
        let turn = self.turns;
        self.named = Some(Named {
            pid,
            process,
            turn,
            holds: 1,
        });
        Claim::New { turn }
    }

    /// `true` when nobody has the place any more, and the kernel must be told.
    fn let_go(&mut self, turn: u64) -> bool {
        let Some(named) = self.named.as_mut().filter(|n| n.turn == turn) else {
            return false;
        };
        named.holds -= 1;
        if named.holds > 0 {
            return false;
        }
        self.named = None;
        true
    }
}

fn place() -> MutexGuard<'static, Place<OwnedFd>> {
    // Not `sync::lock`: loom's lock cannot be made in a static.
    static PLACE: Mutex<Place<OwnedFd>> = Mutex::new(Place::new());
    PLACE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a peer named. The last one to go takes its right away.
#[derive(Debug)]
pub(crate) struct Hold {
    turn: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut place = place();
        if place.let_go(self.turn) {
            // Fails only without Yama, and then nobody was named.
            let _ = tell_kernel(0);
        }
    }
}

/// Lets the peer read this process, where that must be said. `Err` is the process that has the place.
pub(crate) fn name(peer: &PeerProcess) -> Result<Option<Hold>, i32> {
    let Some((pid, pidfd)) = peer.identity() else {
        return Ok(None);
    };
    let own = i32::try_from(std::process::id()).ok();
    if own == Some(pid) || !naming_helps(&fs::read_to_string(SCOPE)) {
        return Ok(None);
    }
    let Ok(pidfd) = pidfd.try_clone_to_owned() else {
        // Out of descriptors: not named, so the attempt to read says why it is refused.
        return Ok(None);
    };
    let mut place = place();
    match place.claim(pid, pidfd, |p| alive(p.as_fd())) {
        Claim::Joined { turn } => Ok(Some(Hold { turn })),
        Claim::Taken { by } => Err(by),
        Claim::New { turn } => {
            if tell_kernel(pid).is_err() {
                // It has died meanwhile.
                place.let_go(turn);
                return Ok(None);
            }
            Ok(Some(Hold { turn }))
        }
    }
}

fn tell_kernel(pid: i32) -> nix::Result<()> {
    // SAFETY: the call takes integers only.
    let rc = unsafe { libc::prctl(libc::PR_SET_PTRACER, pid as libc::c_ulong, 0, 0, 0) };
    nix::errno::Errno::result(rc).map(drop)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Processes are numbers here, and the dead are listed.
    struct World {
        place: RefCell<Place<i32>>,
        dead: RefCell<Vec<i32>>,
    }

    impl World {
        fn claim(&self, pid: i32, process: i32) -> Claim {
            let lives = |p: &i32| !self.dead.borrow().contains(p);
            self.place.borrow_mut().claim(pid, process, lives)
        }
    }

    fn world() -> World {
        World {
            place: RefCell::new(Place::new()),
            dead: RefCell::default(),
        }
    }

    #[test]
    fn the_first_peer_keeps_the_place_until_its_last_stream_ends() {
        let w = world();
        assert_eq!(w.claim(10, 1), Claim::New { turn: 1 });
        assert_eq!(w.claim(20, 2), Claim::Taken { by: 10 });
        assert_eq!(w.claim(10, 1), Claim::Joined { turn: 1 });
        assert!(!w.place.borrow_mut().let_go(1));
        assert_eq!(w.claim(20, 2), Claim::Taken { by: 10 });
        assert!(w.place.borrow_mut().let_go(1));
        assert_eq!(w.claim(20, 2), Claim::New { turn: 2 });
    }

    #[test]
    fn a_dead_peer_has_no_place_and_its_late_streams_take_none_away() {
        let w = world();
        assert_eq!(w.claim(10, 1), Claim::New { turn: 1 });
        w.dead.borrow_mut().push(1);
        assert_eq!(w.claim(20, 2), Claim::New { turn: 2 });
        // The dead one's stream is noticed only now.
        assert!(!w.place.borrow_mut().let_go(1));
        assert_eq!(w.claim(30, 3), Claim::Taken { by: 20 });
        // A new process with a dead one's pid is another process.
        w.dead.borrow_mut().push(2);
        assert_eq!(w.claim(20, 4), Claim::New { turn: 3 });
    }

    #[test]
    fn only_scope_1_needs_a_name() {
        assert!(naming_helps(&Ok("1\n".to_owned())));
        for other in ["0\n", "2\n", "3\n", "", "11"] {
            assert!(!naming_helps(&Ok(other.to_owned())), "{other:?}");
        }
        assert!(!naming_helps(&Err(io::ErrorKind::NotFound.into())));
    }
}
