//! Who opens a stream to a context, who answers one that a context opens, and what they say.

use nix::sys::socket::{Backlog, accept, bind, listen};

use super::*;
use crate::soft::link::NAME;
use crate::{DeviceAddr, Error, PathFault};

/// Where the path is `process_vm`, that is found out at the opening.
#[test]
fn a_process_vm_opening_is_tried_at_once() {
    for role in [Role::ToResponder, Role::ToRequester, Role::Probe] {
        for (addr, errno) in [
            (None, None),
            (Some(0), Some(libc::EFAULT)),
            (Some(1), Some(0)),
        ] {
            let (victim, own) = Victim::new(SoftPath::ProcessVm);
            let liar = Liar::new(&victim.ctx);
            let mut hello = liar.hello(&victim.ctx, own, role, SoftPath::ProcessVm);
            hello.probe_addr = match addr {
                None => hello.probe_addr,
                Some(0) => 16,
                Some(_) => LIAR.token.as_ptr() as u64,
            };
            let fd = Some(liar.key_file.as_fd());
            assert_eq!(liar.stream.send(&hello.encode(), fd).unwrap(), HELLO);
            let answer = Hello::decode(&liar.read(HELLO).unwrap()).unwrap();
            match errno {
                None => assert_eq!(answer.role, Role::Welcome),
                Some(e) => {
                    assert_eq!(answer.role, Role::Barred);
                    assert_eq!(answer.errno, e.unsigned_abs(), "{role:?}");
                }
            }
        }
    }
}

/// Who has not heard of the context over a control connection gets nothing out of it.
#[test]
fn an_opening_without_the_guid_or_with_two_files_is_closed() {
    let (victim, own) = Victim::new(SoftPath::ProcessVm);
    for role in [Role::Probe, Role::ToResponder, Role::Welcome, Role::Barred] {
        let liar = Liar::new(&victim.ctx);
        let mut hello = liar.hello(&victim.ctx, own, role, SoftPath::ProcessVm);
        if !matches!(role, Role::Welcome | Role::Barred) {
            hello.target_guid[0] ^= 1;
        }
        assert_eq!(liar.open(&hello), None, "{role:?}");
    }
    let liar = Liar::new(&victim.ctx);
    let hello = liar.hello(&victim.ctx, own, Role::Probe, SoftPath::ProcessVm);
    let bytes = hello.encode();
    liar.send(&bytes[..50], Some(&liar.key_file));
    liar.send(&bytes[50..], Some(&liar.key_file));
    assert_eq!(liar.read(1), None);

    let address = victim.ctx.address();
    let hex: String = address.guid.iter().map(|b| format!("{b:02x}")).collect();
    let list = format!("{:?}", address.guid);
    assert!(!address.name.contains(&hex));
    let debug = format!("{address:?}");
    assert!(!debug.contains(&hex) && !debug.contains(&list), "{debug}");
}

/// Another user's process gets no answer, and what it passes is never taken in.
#[test]
fn a_connection_of_another_user_is_dropped_before_anything_is_received() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can act as another user");
        return;
    }
    let (victim, _) = Victim::new(SoftPath::Arena);
    let thread = std::thread::spawn(move || {
        // The bare call changes this thread alone.
        // SAFETY: takes integers only.
        let rc = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65_534, -1) };
        assert_eq!(rc, 0);
        let liar = Liar::new(&victim.ctx);
        // Too little for an opening, so nothing else is a reason to close.
        liar.send(&[0; 8], Some(&liar.key_file));
        let before = Instant::now();
        let closed = liar.read(1).is_none();
        (closed, before.elapsed(), victim)
    });
    let (closed, took, _victim) = thread.join().unwrap();
    assert!(closed);
    // An unfinished opening would be closed too, after five seconds.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// A context's dial meets somebody who has the peer's name and answers as he likes.
#[test]
fn answers_that_are_not_the_peers_are_refused() {
    let ctx = open_soft(SoftConfig::default()).unwrap();
    let (keys, key_file) = KeyTable::new(16).unwrap();
    let guid = Box::new([0xa5u8; 16]);
    let ask = |name: &str, path, reply: &dyn Fn(Hello) -> (Vec<u8>, usize)| {
        let name = format!("{name}{:032x}", std::process::id());
        let kind = SockType::Stream;
        let listener = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let addr = UnixAddr::new_abstract(name.as_bytes()).unwrap();
        bind(listener.as_raw_fd(), &addr).unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        let peer = DeviceAddr {
            name,
            guid: *guid,
            ..ctx.address()
        };
        std::thread::scope(|s| {
            let probe = s.spawn(|| ctx.probe(&peer, path));
            let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            // Nobody comes to a name that is none of ours.
            while poll(&mut fds, 1u16) == Ok(0) && !probe.is_finished() {}
            if !probe.is_finished() {
                let raw = accept(listener.as_raw_fd()).unwrap();
                // SAFETY: the kernel has just made this descriptor for us.
                let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                let stream = Stream::new(fd, true);
                let liar = Liar {
                    stream,
                    guid: guid.clone(),
                    keys: KeyTable::new(16).unwrap().0,
                    key_file: key_file.try_clone().unwrap(),
                };
                let opening = Hello::decode(&liar.read(HELLO).unwrap()).unwrap();
                assert_eq!(opening.role, Role::Probe);
                let (bytes, files) = reply(Hello {
                    role: Role::Welcome,
                    guid: *guid,
                    slots: keys.slots(),
                    probe_addr: guid.as_ptr() as u64,
                    ..opening
                });
                // Each file comes with a part of the answer.
                for (i, part) in bytes.chunks(40).enumerate() {
                    liar.send(part, (i < files).then_some(&liar.key_file));
                }
            }
            match probe.join().unwrap() {
                Ok(()) => None,
                Err(Error::Path { fault, .. }) => Some(fault),
                Err(e) => panic!("{e}"),
            }
        })
    };
    let says = |change: fn(&mut Hello), files| {
        move |mut h: Hello| {
            change(&mut h);
            (h.encode().to_vec(), files)
        }
    };
    let vm = SoftPath::ProcessVm;
    assert!(ask(NAME, vm, &says(|_| {}, 1)).is_none());
    let fault = |reply: &dyn Fn(Hello) -> (Vec<u8>, usize)| ask(NAME, vm, reply).unwrap();
    let f = fault(&says(|_| {}, 0));
    assert!(matches!(f, PathFault::Protocol), "{f}");
    let f = fault(&says(|_| {}, 2));
    assert!(matches!(f, PathFault::Protocol), "{f}");
    let f = fault(&says(|h| h.path = path_code(SoftPath::Arena), 1));
    assert!(matches!(f, PathFault::Protocol), "{f}");
    let f = fault(&says(|h| h.role = Role::Probe, 1));
    assert!(matches!(f, PathFault::Protocol), "{f}");
    let f = fault(&|_| (vec![7; HELLO], 1));
    assert!(matches!(f, PathFault::Protocol), "{f}");
    let f = fault(&says(|h| h.guid = [1; 16], 1));
    assert!(matches!(f, PathFault::Identity), "{f}");
    let f = fault(&says(|h| h.probe_addr += 1, 1));
    assert!(matches!(f, PathFault::Identity), "{f}");
    let f = fault(&says(|h| h.probe_addr = 16, 1));
    assert!(matches!(f, PathFault::ProcessVm(_)), "{f}");
    let f = fault(&says(|h| h.role = Role::Refused, 0));
    assert!(matches!(f, PathFault::Token), "{f}");
    let barred = |h: &mut Hello| (h.role, h.errno) = (Role::Barred, libc::EPERM.unsigned_abs());
    let f = fault(&says(barred, 0));
    assert!(matches!(f, PathFault::Unreadable(e) if e.raw_os_error() == Some(libc::EPERM)));
    let f = ask("another/", vm, &says(|_| {}, 1)).unwrap();
    assert!(matches!(f, PathFault::Protocol), "{f}");
}
