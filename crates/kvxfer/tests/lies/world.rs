//! An engine that is lied to, and an honest peer of it.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvxfer::config::{Config, KvRole, PathKind, PathSet};
use kvxfer::engine::{Instance, Outcome, PullOptions};
use kvxfer::event::{Event, PeerName};
use kvxfer::ids::RequestId;
use kvxfer::transfer::Cause;
use kvxfer::wire::{ErrorCode, Secret};

use crate::reasons;
use crate::support::{LONG, Log, Node, POISON, Recipe, groups, pairs, recipe};

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const BLOCKS: u32 = 40;
const WORDS: &str = "a secret that liars know too";

/// One at a time in a process: descriptors, threads and memory are counted, and there is one log.
static ALONE: Mutex<()> = Mutex::new(());

struct SecretFile(PathBuf);

impl Drop for SecretFile {
    fn drop(&mut self) {
        // Left to the system otherwise.
        let _ = std::fs::remove_file(&self.0);
    }
}

pub(crate) struct World {
    pub(crate) instance: Instance,
    pub(crate) honest: Node,
    pub(crate) target: Node,
    /// Where the engine that is lied to listens.
    pub(crate) address: Cell<SocketAddr>,
    pub(crate) secret: Secret,
    pub(crate) log: RefCell<Log>,
    rounds: Cell<u64>,
    file: SecretFile,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    pub(crate) fn new(path: PathKind) -> Self {
        Self::with(path, |_| {})
    }

    /// Both engines take any path; the honest one has chosen `path`.
    pub(crate) fn with(path: PathKind, change: impl Fn(&mut Config)) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        reasons::keep();
        let name = format!("kvxfer-lies-{}", std::process::id());
        let file = SecretFile(std::env::temp_dir().join(name));
        std::fs::write(&file.0, WORDS).expect("a secret");
        // Both have memory of the kind that the path wants.
        let memory = match path {
            PathKind::Ipc | PathKind::Staged => PathKind::Ipc,
            _ => PathKind::Arena,
        };
        let side = |path: Option<PathKind>| -> Recipe {
            let either = recipe(KvRole::Both, memory, BLOCK, BLOCKS);
            either.with(|config| {
                config.path = path.map_or_else(|| Config::default().path, PathSet::only);
                config.secret_file = Some(file.0.clone());
                change(config);
            })
        };
        let (target, honest) = (side(None).node(), side(Some(path)).node());
        target.side.poison().expect("poisoned");
        honest.side.poison().expect("poisoned");
        let address = target.engine.listen("127.0.0.1:0").expect("a free port");
        let instance = honest
            .engine
            .connect(&address.to_string(), LONG)
            .expect("a session");
        let world = Self {
            log: RefCell::new(Log::new(&target.engine)),
            instance,
            honest,
            target,
            address: Cell::new(address),
            secret: Secret::new(WORDS.as_bytes().to_vec()).expect("a secret"),
            rounds: Cell::new(0),
            file,
            _alone: alone,
        };
        world.works();
        world
    }

    pub(crate) fn secret_file(&self) -> &std::path::Path {
        &self.file.0
    }

    /// An engine that knows the secret, too.
    pub(crate) fn another(&self, role: KvRole, path: PathKind) -> Node {
        let secret = self.file.0.clone();
        recipe(role, path, BLOCK, BLOCKS)
            .with(|config| config.secret_file = Some(secret))
            .node()
    }

    /// The honest peer reads from the target and writes to it, and every byte is compared.
    #[track_caller]
    pub(crate) fn works(&self) {
        let (target, honest) = (&self.target, &self.honest);
        self.rounds.set(self.rounds.get() + 1);
        let word = 0x0101_0101_0000_0000 + 2 * self.rounds.get();
        target.fill_blocks(0..8, word);
        honest.fill_blocks(8..16, POISON);
        let request = RequestId::from(format!("pull-{word:x}"));
        let ticket = (target.engine.offer(&request, &groups(0..8), 1, LONG)).expect("an offer");
        let wanted = pairs((0..8).map(|b| (b, b + 8)));
        let pull = self.instance.pull(&ticket, &wanted, PullOptions::default());
        assert_eq!(pull.expect("a pull").wait(LONG), Some(Outcome::Done));
        honest.assert_blocks(8..16, word);

        honest.fill_blocks(16..24, word + 1);
        target.fill_blocks(24..32, POISON);
        let request = RequestId::from(format!("push-{word:x}"));
        let push = self.instance.begin_push(&request).expect("a push");
        let written = pairs((16..24).map(|b| (b, b + 8)));
        push.all_layers(&written, None).expect("in range");
        let expected = target.engine.expect(&request, &groups(24..32), 1, LONG);
        expected.expect("an expectation");
        let sent = push.commit().expect("not ended").wait(LONG);
        assert_eq!(sent, Some(Outcome::Done));
        self.log.borrow_mut().wait(
            "push",
            |e| matches!(e, Event::Received { request: r, .. } if *r == request),
        );
        target.assert_blocks(24..32, word + 1);
        // Nobody has touched the rest.
        target.assert_blocks(32..BLOCKS, POISON);
    }

    /// The target has cut a peer off, and its owner is told why.
    #[track_caller]
    pub(crate) fn was_cut_off(&self, name: &PeerName, reason: ErrorCode) {
        let down = self.log.borrow_mut().wait(
            "end of the liar",
            |e| matches!(e, Event::PeerDown { peer, .. } if peer == name),
        );
        let Event::PeerDown { cause, .. } = down else {
            panic!("{down:?}");
        };
        assert_eq!(cause, Cause::CutOff { reason });
        assert!(self.target.engine.peer_of(name).is_none());
    }
}
