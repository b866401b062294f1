//! The stages of a run of `kvxfer bw`, and bringing two commands to one of them.

use std::time::Duration;

use kvxfer::wire::{MessageKind, frame_kind};

use crate::support::{self, Ended, Process, TIMEOUT_TEXT, start};
use crate::tap::{Mark, Tap};

const PATHS: [&str; 3] = ["arena", "process-vm", "tcp"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
}

/// How far a run has come when somebody is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The server has accepted, and heard no word yet.
    Handshake,
    /// Queue pairs are offered.
    BringUp,
    /// The server is to fill, or poison, its blocks.
    Filling,
    /// It is to offer, or expect, its blocks.
    Ticket,
    /// The first push begins.
    FirstPass,
    /// The server is to compare every byte.
    Verifying,
    /// Transfers are timed.
    Measuring,
    /// The session of the next size begins.
    NextSize,
    /// All is measured, and tidied away.
    Ending,
}

const READ: [Stage; 7] = [
    Stage::Handshake,
    Stage::BringUp,
    Stage::Filling,
    Stage::Ticket,
    Stage::Measuring,
    Stage::NextSize,
    Stage::Ending,
];

const WRITE: [Stage; 9] = [
    Stage::Handshake,
    Stage::BringUp,
    Stage::Filling,
    Stage::Ticket,
    Stage::FirstPass,
    Stage::Verifying,
    Stage::Measuring,
    Stage::NextSize,
    Stage::Ending,
];

/// A run that somebody is struck in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) path: &'static str,
    pub(crate) op: Op,
    pub(crate) stage: Stage,
}

/// Every path in every stage of both operations.
pub(crate) fn all() -> Vec<Case> {
    let of = |path| {
        let reads = READ.map(|stage| (Op::Read, stage));
        let writes = WRITE.map(|stage| (Op::Write, stage));
        let all = reads.into_iter().chain(writes);
        all.map(move |(op, stage)| Case { path, op, stage })
    };
    PATHS.into_iter().flat_map(of).collect()
}

/// Every stage of both operations, each over one of the paths in turn; all of [`all`] where there is
/// time for long tests.
pub(crate) fn some() -> Vec<Case> {
    let all = all();
    if std::env::var_os("KVXFER_LONG_TESTS").is_some() {
        return all;
    }
    let stages = READ.len() + WRITE.len();
    let turn = |at: usize| (at % PATHS.len()) * stages + at;
    (0..stages).map(|at| all[turn(at)]).collect()
}

impl Case {
    /// The frame before which both sides are at the stage.
    fn mark(self) -> Mark {
        let bench = |says, nth| Mark::message(MessageKind::Bench, says, nth);
        let hello = |nth| Mark {
            kind: frame_kind::HELLO,
            says: "",
            nth,
        };
        match (self.stage, self.op) {
            (Stage::Handshake, _) => hello(1),
            (Stage::BringUp, _) => Mark::message(MessageKind::QpOffer, "", 1),
            (Stage::Filling, Op::Read) => bench("Fill", 1),
            (Stage::Filling, Op::Write) => bench("Poison", 1),
            (Stage::Ticket, Op::Read) => bench("Offer", 2),
            (Stage::Ticket, Op::Write) => bench("Arm", 2),
            (Stage::FirstPass, _) => Mark::message(MessageKind::PushStart, "", 1),
            (Stage::Verifying, _) => bench("Verify", 1),
            // No frame tells of a READ: the last ticket, and then `Case::reach`.
            (Stage::Measuring, Op::Read) => bench("Offer", 4),
            (Stage::Measuring, Op::Write) => Mark::message(MessageKind::PushStart, "write-1.7", 1),
            (Stage::NextSize, _) => hello(2),
            // There are four of them a size.
            (Stage::Ending, Op::Read) => Mark::message(MessageKind::Release, "", 5),
            (Stage::Ending, Op::Write) => bench("Disarm", 5),
        }
    }

    /// Starts a run against the server, and waits until it is at the stage.
    pub(crate) fn reach(self, server: &str) -> (Tap, Process) {
        let tap = Tap::new(server, self.mark());
        let op = match self.op {
            Op::Read => "read",
            Op::Write => "write",
        };
        let common = [
            "bw",
            &tap.address,
            "--json",
            "--path",
            self.path,
            "--op",
            op,
        ];
        let length: &[&str] = match self.stage {
            // Ten minutes: whenever this is, it is in the middle.
            Stage::Measuring => &["--size", "64K", "-D", "600"],
            _ => &["--size", "4K,16K", "-n", "8"],
        };
        let rest = ["--blocks", "16", "--timeout", TIMEOUT_TEXT];
        let client = start(&[&common, length, &rest].concat());
        tap.held();
        if (self.stage, self.op) == (Stage::Measuring, Op::Read) {
            let before = cpu(client.pid());
            tap.let_go();
            // Much more than the first pass takes, of a quarter of a mebibyte.
            support::wait_until("much work", || {
                cpu(client.pid()) >= before + Duration::from_millis(300)
            });
        }
        (tap, client)
    }
}

/// A server that gives up as soon as its clients.
pub(crate) fn server(listen: &str) -> (Process, String) {
    let args = ["serve", "--listen", listen, "--timeout", TIMEOUT_TEXT];
    let server = start(&args);
    let address = server.address();
    (server, address)
}

/// Whether a client was done before it could be struck: at the end of a READ all is measured, and a
/// release has no answer. It has given its whole report then.
#[track_caller]
pub(crate) fn done(ended: &Ended, case: Case) -> bool {
    let done = (case.stage, case.op) == (Stage::Ending, Op::Read) && ended.code == Some(0);
    if done {
        assert_eq!(ended.json()["rows"].as_array().map(Vec::len), Some(2));
        assert_eq!(ended.stderr, "", "{case:?}");
    }
    done
}

/// What a client says that has lost its server: all of it, and no report.
#[track_caller]
pub(crate) fn told(ended: &Ended, case: Case, address: &str) {
    if done(ended, case) {
        return;
    }
    ended.failed(3, &["kvxfer: ", address, "\n  evidence: ", "\n  fix: "]);
    assert_eq!(ended.stdout, "", "{case:?}: {ended:?}");
    assert_eq!(ended.stderr.matches("kvxfer: ").count(), 1, "{ended:?}");
}

/// Ends a server in good order, which says nothing of what became of its clients but in its log.
#[track_caller]
pub(crate) fn ends_well(server: Process) {
    let ended = server.end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.stderr.contains("panicked"), "{ended:?}");
}

/// The processor time that a process has had.
pub(crate) fn cpu(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks = |at| {
        let field = after.split_whitespace().nth(at);
        field.and_then(|field| field.parse().ok()).unwrap_or(0)
    };
    let (user, system): (u64, u64) = (ticks(11), ticks(12));
    // The kernel tells it in hundredths of a second.
    Duration::from_millis((user + system) * 10)
}

/// Does something for every case, a few at a time: most of them wait.
pub(crate) fn each(cases: &[Case], at_once: usize, act: impl Fn(Case) + Sync) {
    let next = std::sync::Mutex::new(cases.iter());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let case = next.lock().expect("no panic").next().copied();
                    let Some(case) = case else { return };
                    let named = Named(case);
                    act(case);
                    drop(named);
                }
            });
        }
    });
}

/// Does something for every path, at the same time.
pub(crate) fn each_path(act: impl Fn(&'static str) + Sync) {
    std::thread::scope(|scope| {
        for path in PATHS {
            let act = &act;
            scope.spawn(move || act(path));
        }
    });
}

/// Names the case, should something in it fail.
struct Named(Case);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("that was {:?}", self.0);
        }
    }
}
