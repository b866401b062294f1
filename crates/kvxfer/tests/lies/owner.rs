//! An owner of memory that speaks the soft device's own protocol and passes what it likes: it answers
//! on the Unix socket that its device address names. The bytes are written out here once more, so that
//! a liar is not held back by what the device itself would refuse to send.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvxfer_verbs::{DeviceAddr, QpEndpoint};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const HELLO: usize = 112;
const HEADER: usize = 16;
const SLOT: usize = 64;
const SLOTS: u32 = 8;
pub(crate) const RKEY: u32 = 0x0003_0001;
const GUID: [u8; 16] = [0x77; 16];
const TOKEN: [u8; 16] = [0x5a; 16];
const QPN: u32 = 77;
const DOMAIN: u32 = 1;
/// The opening that asks for a file by a token.
const FILE: u32 = 7;
const REMOTE_READ: u32 = 4;
/// Where the memory is, as the liar says.
pub(crate) const ADDR: u64 = 0x7000_0000_0000;

/// The size-keeping seals, and those of a key table.
pub(crate) fn size_seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW
}

pub(crate) fn memfd(len: u64, content: &[u8], seals: SealFlag) -> File {
    use std::os::unix::fs::FileExt;
    let fd = memfd_create(c"lie", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
    let file = File::from(fd.expect("a memfd"));
    file.set_len(len).expect("a size");
    file.write_all_at(content, 0).expect("written");
    if !seals.is_empty() {
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
    }
    file
}

/// A table with one key: the memory of `len` bytes, in segment 1 at `offset`.
pub(crate) fn key_table(len: u64, offset: u64, seals: SealFlag) -> File {
    let mut bytes = vec![0; SLOTS as usize * SLOT];
    let slot = &mut bytes[(RKEY & 0xffff) as usize * SLOT..];
    slot[0..4].copy_from_slice(&RKEY.to_le_bytes());
    slot[4..8].copy_from_slice(&REMOTE_READ.to_le_bytes());
    slot[8..12].copy_from_slice(&DOMAIN.to_le_bytes());
    slot[12..16].copy_from_slice(&1u32.to_le_bytes());
    slot[16..24].copy_from_slice(&ADDR.to_le_bytes());
    slot[24..32].copy_from_slice(&len.to_le_bytes());
    slot[32..40].copy_from_slice(&offset.to_le_bytes());
    memfd(bytes.len() as u64, &bytes, seals)
}

/// The seals that a key table must have.
pub(crate) fn table_seals() -> SealFlag {
    size_seals() | SealFlag::F_SEAL_FUTURE_WRITE
}

pub(crate) struct Owner {
    pub(crate) device: DeviceAddr,
    pub(crate) endpoint: QpEndpoint,
    /// How often its segment was asked for, or its file by a token.
    pub(crate) asked: Arc<AtomicU32>,
}

/// What it passes.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) keys: Arc<File>,
    pub(crate) segment: Arc<File>,
    /// How many descriptors come with a segment.
    pub(crate) copies: usize,
}

impl Owner {
    /// Answers whoever comes; `like` is an address of this host.
    pub(crate) fn new(like: &DeviceAddr, files: &Files) -> Self {
        let name = format!(
            "kvxfer/lies-{}-{:p}",
            std::process::id(),
            Arc::as_ptr(&files.segment)
        );
        let address = SocketAddr::from_abstract_name(name.as_bytes()).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("bound");
        let asked = Arc::new(AtomicU32::new(0));
        let (files, count) = (files.clone(), Arc::clone(&asked));
        // Ends with the process, as its sockets do.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (files, count) = (files.clone(), Arc::clone(&count));
                std::thread::spawn(move || serve(stream, &files, &count));
            }
        });
        Self {
            device: DeviceAddr {
                name,
                guid: GUID,
                ..like.clone()
            },
            endpoint: QpEndpoint {
                qpn: QPN,
                psn: 0,
                token: TOKEN,
                port: None,
            },
            asked,
        }
    }
}

fn send(stream: &UnixStream, bytes: &[u8], file: &File, copies: usize) -> Option<()> {
    let fds = vec![file.as_raw_fd(); copies];
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if copies == 0 { &[][..] } else { &rights[..] };
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights,
        MsgFlags::empty(),
        None,
    );
    (sent == Ok(bytes.len())).then_some(())
}

fn serve(mut stream: UnixStream, files: &Files, asked: &AtomicU32) -> Option<()> {
    let mut theirs = [0; HELLO];
    stream.read_exact(&mut theirs).ok()?;
    let mut welcome = theirs;
    welcome[8..12].copy_from_slice(&4u32.to_le_bytes());
    welcome[16..32].copy_from_slice(&theirs[32..48]);
    welcome[32..48].copy_from_slice(&TOKEN);
    welcome[48..64].copy_from_slice(&GUID);
    welcome[64..80].copy_from_slice(&theirs[48..64]);
    welcome[80..84].copy_from_slice(&QPN.to_le_bytes());
    welcome[84..88].copy_from_slice(&DOMAIN.to_le_bytes());
    welcome[88..92].copy_from_slice(&7u32.to_le_bytes());
    welcome[92..96].copy_from_slice(&SLOTS.to_le_bytes());
    welcome[96..112].fill(0);
    if theirs[8..12] == FILE.to_le_bytes() {
        asked.fetch_add(1, Ordering::AcqRel);
        return send(&stream, &welcome, &files.segment, files.copies);
    }
    send(&stream, &welcome, &files.keys, 1)?;
    let mut head = [0; HEADER];
    loop {
        // What comes with descriptors is read without them, which closes them.
        stream.read_exact(&mut head).ok()?;
        if head[0] == 3 {
            asked.fetch_add(1, Ordering::AcqRel);
            let mut answer = head;
            answer[0] = 7;
            answer[2..4].copy_from_slice(&1u16.to_le_bytes());
            send(&stream, &answer, &files.segment, files.copies)?;
        }
    }
}
