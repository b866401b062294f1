//! Two real processes: this test binary again, with the other role.
#![allow(missing_docs, reason = "a test")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kvxfer_verbs::*;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use support::*;

const N: usize = 1 << 20;
const ROLE: &str = "KVXFER_TEST_PATH";
const MARK: &str = "KVX ";

#[derive(Serialize, Deserialize)]
struct Card {
    address: DeviceAddr,
    endpoint: QpEndpoint,
    /// Sealed memfd, then anonymous.
    regions: [(u64, u32); 2],
}

fn path(how: How) -> SoftPath {
    if how == How::ProcessVm {
        SoftPath::ProcessVm
    } else {
        SoftPath::Arena
    }
}

/// The other process. Not a test of its own: alone it ends at once.
#[test]
fn child() {
    let how = match std::env::var(ROLE).as_deref() {
        Ok("process_vm") => How::ProcessVm,
        Ok(_) => How::Arena,
        Err(_) => return,
    };
    let ctx = open_soft(SoftConfig::default()).expect("open");
    let pd = ctx.alloc_pd().expect("pd");
    let cq = ctx.create_cq(64).expect("cq");
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).expect("qp");
    let qp = qp.init(InitAttr::new(all())).expect("init");
    let memories = [TestMemory::sealed(N), TestMemory::anonymous(N)];
    let regions = memories.clone().map(|m| {
        m.put(0, &pattern(N, 1));
        pd.register(m, all()).expect("register")
    });
    let card = Card {
        address: ctx.address(),
        endpoint: qp.endpoint(),
        regions: [0, 1].map(|i: usize| (regions[i].addr(), regions[i].rkey())),
    };
    // libtest has begun a line of its own.
    println!("\n{MARK}{}", serde_json::to_string(&card).expect("json"));
    let mut lines = std::io::stdin().lines();
    let line = lines.next().expect("endpoint").expect("stdin");
    let remote: QpEndpoint = serde_json::from_str(&line).expect("endpoint");
    let link = Link::SoftAwait { path: path(how) };
    let qp = qp
        .rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        })
        .expect("rtr");
    let _qp = qp.rts(RtsAttr::default()).expect("rts");
    for line in lines {
        // "seed": does each memory begin with that pattern?
        let seed: u8 = line.expect("stdin").parse().expect("seed");
        let want = pattern(N / 2, seed);
        let same = memories.iter().all(|m| m.get(0, N / 2) == want);
        println!("{MARK}{same}");
    }
}

struct Other {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Other {
    fn start(how: How) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("exe"))
            .args(["--exact", "child", "--nocapture"])
            .env(
                ROLE,
                if how == How::ProcessVm {
                    "process_vm"
                } else {
                    "arena"
                },
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self {
            child,
            stdin,
            stdout,
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(
                self.stdout.read_line(&mut line).expect("read") > 0,
                "the child ended"
            );
            if let Some(rest) = line.strip_prefix(MARK) {
                return rest.trim().to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("kill");
    }
}

fn talk(how: How) {
    let mut other = Other::start(how);
    let card: Card = serde_json::from_str(&other.line()).expect("card");
    let ctx = open_soft(SoftConfig::default()).expect("open");
    ctx.probe(&card.address, path(how)).expect("probe");
    let life = ctx.life_of(&card.address).expect("it is seen");
    assert!(!life.has_ended());
    let mut another = card.address.clone();
    another.guid[0] ^= 1;
    let refused = ctx.life_of(&another);
    assert!(refused.is_err(), "the life of another: {refused:?}");
    let pd = ctx.alloc_pd().expect("pd");
    let cq = ctx.create_cq(64).expect("cq");
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).expect("qp");
    let qp = qp.init(InitAttr::new(all())).expect("init");
    let own = serde_json::to_string(&qp.endpoint()).expect("json");
    writeln!(other.stdin, "{own}").expect("stdin");
    let deadline = Instant::now() + WAIT;
    let link = Link::SoftDial {
        peer: card.address.clone(),
        path: path(how),
        deadline,
    };
    let qp = qp
        .rtr(RtrAttr {
            remote: card.endpoint,
            link,
            min_rnr_timer: 12,
        })
        .expect("rtr");
    let qp = qp
        .rts(RtsAttr {
            timeout: 0,
            ..RtsAttr::default()
        })
        .expect("rts");

    let (file, anon) = (TestMemory::sealed(N), TestMemory::anonymous(N));
    let regions = [&file, &anon].map(|m| pd.register(m.clone(), all()).expect("register"));
    let t = table(&[&regions[0], &regions[1]]);
    let remote = |i: usize| Remote {
        addr: card.regions[i].0,
        rkey: card.regions[i].1,
    };
    let sge = |region| Sge {
        region,
        len: (N / 2) as u32,
        offset: 0,
    };
    let post = |ops: &[(SendOp, u32)]| {
        let mut chain = SendChain::new();
        for (i, (op, region)) in ops.iter().enumerate() {
            chain.push(i as u64, *op, i + 1 == ops.len(), &[sge(*region)]);
        }
        qp.post_send(&chain, &t).expect("post");
    };
    let read = |what: &str| {
        file.put(0, &vec![0; N / 2]);
        anon.put(0, &vec![0; N / 2]);
        post(&[(SendOp::Read(remote(0)), 1), (SendOp::Read(remote(1)), 0)]);
        let c = reap(&cq, 1)[0];
        assert_eq!(c.status, WcStatus::Success, "{how:?} {what} {c:?}");
    };
    read("at first");
    assert!(file.get(0, N / 2) == pattern(N / 2, 1) && anon.get(0, N / 2) == pattern(N / 2, 1));

    for m in [&file, &anon] {
        m.put(0, &pattern(N / 2, 5));
    }
    post(&[(SendOp::Write(remote(0)), 1), (SendOp::Write(remote(1)), 0)]);
    assert_eq!(reap(&cq, 1)[0].status, WcStatus::Success, "{how:?}");
    writeln!(other.stdin, "5").expect("stdin");
    assert_eq!(other.line(), "true", "{how:?}");

    // A stopped process: READs go on, WRITEs wait, and nothing blocks here.
    other.signal(Signal::SIGSTOP);
    // Told when all its threads have stopped.
    let pid = Pid::from_raw(other.child.id() as i32);
    let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("waitpid");
    assert_eq!(stopped, WaitStatus::Stopped(pid, Signal::SIGSTOP));
    read("stopped");
    assert!(file.get(0, N / 2) == pattern(N / 2, 5), "{how:?}");
    assert!(!life.has_ended(), "stopped is not ended");
    let (late, _cq) = {
        let cq = ctx.create_cq(4).expect("cq");
        let qp = pd.create_qp(QpCaps::default(), &cq, &cq).expect("qp");
        (qp.init(InitAttr::new(all())).expect("init"), cq)
    };
    let deadline = Instant::now() + Duration::from_millis(20);
    let link = Link::SoftDial {
        peer: card.address.clone(),
        path: path(how),
        deadline,
    };
    let e = late
        .rtr(RtrAttr {
            remote: card.endpoint,
            link,
            min_rnr_timer: 12,
        })
        .expect_err("dial");
    assert!(matches!(e, Error::DialDeadline { .. }), "{e}");
    for m in [&file, &anon] {
        m.put(0, &pattern(N / 2, 6));
    }
    post(&[(SendOp::Write(remote(0)), 0), (SendOp::Write(remote(1)), 1)]);
    let mut out = Vec::new();
    for _ in 0..20 {
        cq.poll(&mut out, 1).expect("poll");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(out.is_empty(), "{how:?}");
    other.signal(Signal::SIGCONT);
    assert_eq!(reap(&cq, 1)[0].status, WcStatus::Success, "{how:?}");
    writeln!(other.stdin, "6").expect("stdin");
    assert_eq!(other.line(), "true", "{how:?}");

    // A dead one: what is mapped can still be read, nothing else.
    other.signal(Signal::SIGKILL);
    other.child.wait().expect("wait");
    assert!(life.has_ended());
    if how == How::Arena {
        file.put(0, &vec![0; N]);
        post(&[(SendOp::Read(remote(0)), 0)]);
        assert_eq!(reap(&cq, 1)[0].status, WcStatus::Success);
        assert!(file.get(0, N / 2) == pattern(N / 2, 6));
    }
    post(&[(SendOp::Read(remote(1)), 0), (SendOp::Write(remote(0)), 0)]);
    let got = reap(&cq, 2);
    assert_eq!(
        (got[0].status, got[0].vendor_err),
        (WcStatus::RetryExc, vendor::PEER_GONE)
    );
    assert_eq!(got[1].status, WcStatus::WrFlush, "{how:?}");
}

#[test]
fn two_processes_over_arena() {
    talk(How::Arena);
}

#[test]
fn two_processes_over_process_vm() {
    talk(How::ProcessVm);
}
