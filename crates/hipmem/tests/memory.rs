//! Host memory through its public API, with real files and processes.

use std::error::Error as _;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;

use kvxfer_hipmem::{
    ArenaOptions, CopyPair, Error, HostArena, HostBuffer, HostMemory, HugePages, PageBacking, bare,
};
use proptest::prelude::*;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn word(seed: u64) -> impl Fn(u64) -> u64 {
    move |i| (i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn small(len: u64) -> Result<HostArena, Error> {
    HostArena::with_options(
        len,
        ArenaOptions {
            huge: HugePages::Never,
            prefault: false,
        },
    )
}

#[test]
fn an_arena_is_zeros_aligned_and_as_long_as_asked() -> Outcome {
    let arena = HostArena::new(5_000_001)?;
    let memory = arena.memory();
    assert_eq!(memory.len(), 5_000_001);
    assert_eq!(memory.addr() % (2 << 20), 0);
    let mut bytes = vec![1; 5_000_001];
    memory.read(0, &mut bytes)?;
    assert!(bytes.iter().all(|b| *b == 0));
    Ok(())
}

#[test]
fn no_bytes_and_absurd_lengths_are_errors() {
    assert!(matches!(HostArena::new(0), Err(Error::Empty)));
    assert!(matches!(HostBuffer::new(0), Err(Error::Empty)));
    assert!(matches!(
        HostArena::new(u64::MAX),
        Err(Error::TooLarge { .. })
    ));
    let huge = HostArena::new(1 << 60).map(drop);
    let text = huge.as_ref().err().map(ToString::to_string);
    assert!(
        matches!(huge, Err(Error::SizeFile { .. } | Error::Map { .. })),
        "{text:?}"
    );
    assert!(matches!(HostBuffer::new(1 << 60), Err(Error::Map { .. })));
}

#[test]
fn a_peer_process_sees_the_bytes_and_cannot_change_or_resize_the_file() -> Outcome {
    let arena = small(3 * 4096)?;
    arena.memory().write(4000, b"the same bytes")?;
    let span = arena.memory().fd().ok_or("an arena has a file")?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), span.fd.as_raw_fd());
    let peer = |script: &str| {
        Command::new("sh")
            .args(["-c", script, "sh", &path])
            .stderr(Stdio::null())
            .output()
    };
    let seen = peer("dd if=\"$1\" bs=1 skip=4000 count=14")?;
    assert_eq!(seen.stdout, b"the same bytes");
    for forbidden in [
        "printf x | dd of=\"$1\" conv=notrunc",
        "truncate -s 4096 \"$1\"",
        "truncate -s 1M \"$1\"",
    ] {
        assert!(!peer(forbidden)?.status.success(), "{forbidden}");
    }
    let mut bytes = [0; 14];
    arena.memory().read(4000, &mut bytes)?;
    assert_eq!(&bytes, b"the same bytes");
    Ok(())
}

#[test]
fn pages_are_told_as_they_are() -> Outcome {
    let plain = small(8 << 20)?;
    let before = plain.pages();
    assert_eq!(before.resident_bytes, 0);
    assert!(
        before.to_string().contains("no page has been touched"),
        "{before}"
    );
    plain.memory().fill(0, 8 << 20, 1)?;
    let after = plain.pages();
    assert_eq!(after.resident_bytes, 8 << 20);
    // A system may force huge pages on everybody; otherwise none were asked for.
    assert!(after.how != PageBacking::HugeTlb, "{after}");
    assert!(after.to_string().contains("not asked for"), "{after}");

    for pages in [
        HostArena::new(8 << 20)?.pages(),
        HostBuffer::new(8 << 20)?.pages(),
    ] {
        assert_eq!(pages.resident_bytes, 8 << 20, "{pages}");
        match pages.how {
            PageBacking::HugeTlb => assert_eq!(pages.huge_bytes, pages.resident_bytes),
            PageBacking::Transparent => assert_eq!(pages.size, 2 << 20),
            _ => assert!(
                !pages.why_not.is_empty(),
                "ordinary pages and no reason: {pages}"
            ),
        }
    }
    Ok(())
}

#[test]
fn an_owners_memory_is_kept_alive_and_let_go() -> Outcome {
    let keep = Arc::new(());
    let mut bytes = vec![7_u8; 64];
    let ptr = NonNull::new(bytes.as_mut_ptr()).ok_or("a vector has an address")?;
    let held: Arc<dyn std::any::Any + Send + Sync> = keep.clone();
    // SAFETY: `bytes` lives to the end of the test, after the memory, and is not touched meanwhile.
    let memory = unsafe { HostMemory::from_raw_parts(ptr, 64, held) };
    memory.fill(0, 8, 9)?;
    let part = memory.slice(4, 8)?;
    let token = part.as_memory();
    drop(memory);
    drop(part);
    assert_eq!(
        Arc::strong_count(&keep),
        2,
        "a token keeps the owner's memory alive"
    );
    assert_eq!(token.len(), 8);
    assert!(token.fd().is_none());
    drop(token);
    assert_eq!(Arc::strong_count(&keep), 1);
    assert_eq!(bytes.iter().filter(|b| **b == 9).count(), 8);
    Ok(())
}

#[test]
fn a_slice_knows_its_place_in_the_file() -> Outcome {
    let arena = small(8192)?;
    let inner = arena.memory().slice(100, 1000)?.slice(24, 10)?;
    assert_eq!(inner.fd().map(|span| span.offset), Some(124));
    inner.fill(0, 10, 3)?;
    let mut bytes = [0; 12];
    arena.memory().read(123, &mut bytes)?;
    assert_eq!(bytes, [0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0]);
    assert!(arena.memory().slice(8000, 193).is_err());
    Ok(())
}

/// Memory of a device, of which nothing can be read.
#[derive(Debug)]
struct Far;

// SAFETY: it has no bytes that this process could reach, and says so.
unsafe impl kvxfer_verbs::Memory for Far {
    fn addr(&self) -> u64 {
        4096
    }

    fn len(&self) -> u64 {
        4096
    }

    fn kind(&self) -> kvxfer_verbs::MemoryKind {
        let gpu = "0000:1b:00.0".parse().expect("an address");
        kvxfer_verbs::MemoryKind::Device { gpu }
    }

    fn fd(&self) -> Option<kvxfer_verbs::FdSpan<'_>> {
        None
    }
}

#[test]
fn any_host_memory_can_be_read_within_its_bounds() -> Outcome {
    let arena = small(64)?;
    arena.memory().write(60, &[1, 2, 3, 4])?;
    let memory = arena.memory().as_memory();
    let mut bytes = [0; 4];
    kvxfer_hipmem::read(&*memory, 60, &mut bytes)?;
    assert_eq!(bytes, [1, 2, 3, 4]);
    kvxfer_hipmem::read(&*memory, 64, &mut [])?;
    for offset in [61, 64, u64::MAX - 3, u64::MAX] {
        let outside = kvxfer_hipmem::read(&*memory, offset, &mut bytes);
        assert!(
            matches!(outside, Err(Error::OutOfBounds { size: 64, .. })),
            "{offset}"
        );
    }
    let far = kvxfer_hipmem::read(&Far, 0, &mut bytes);
    assert!(matches!(far, Err(Error::NotHost { .. })), "{far:?}");
    assert_eq!(bytes, [1, 2, 3, 4]);
    Ok(())
}

#[test]
fn words_are_aligned_and_in_bounds() -> Outcome {
    let memory = small(4096)?.memory().clone();
    memory.store_u64(4088, 0x0123_4567_89ab_cdef)?;
    assert_eq!(memory.load_u64(4088)?, 0x0123_4567_89ab_cdef);
    assert!(matches!(memory.load_u64(4), Err(Error::Misaligned { .. })));
    assert!(matches!(
        memory.store_u64(4090, 0),
        Err(Error::OutOfBounds { .. })
    ));
    assert!(matches!(
        memory.load_u64(u64::MAX),
        Err(Error::OutOfBounds { .. })
    ));
    Ok(())
}

#[test]
fn a_released_word_publishes_the_bytes_before_it() -> Outcome {
    let memory = small(4096)?.memory().clone();
    let writer = memory.clone();
    let thread = std::thread::spawn(move || {
        for turn in 1..=200_u64 {
            writer.fill(64, 512, turn as u8)?;
            writer.store_u64(0, turn)?;
            while writer.load_u64(8)? != turn {
                std::thread::yield_now();
            }
        }
        Ok::<_, Error>(())
    });
    let mut bytes = [0; 512];
    for turn in 1..=200_u64 {
        while memory.load_u64(0)? != turn {
            std::thread::yield_now();
        }
        memory.read(64, &mut bytes)?;
        memory.store_u64(8, turn)?;
        assert!(bytes.iter().all(|b| *b == turn as u8), "turn {turn}");
    }
    thread.join().map_err(|_| "the writer panicked")??;
    Ok(())
}

#[test]
fn the_first_wrong_word_is_named() -> Outcome {
    let memory = small(1 << 20)?.memory().clone();
    let (offset, len) = (13, (1 << 20) - 20);
    memory.fill_words(offset, len, word(5))?;
    memory.verify_words(offset, len, word(5))?;
    for at in [0, 8, 4095, 4096, 70_001, len - 1] {
        let mut byte = [0];
        memory.read(offset + at, &mut byte)?;
        memory.write(offset + at, &[byte[0] ^ 0x40])?;
        let Err(Error::Mismatch(first)) = memory.verify_words(offset, len, word(5)) else {
            return Err(format!("byte {at} was changed and not found").into());
        };
        assert_eq!(first.offset, offset + at / 8 * 8);
        assert_eq!(first.wanted ^ first.found, 0x40 << (8 * (at % 8)));
        memory.write(offset + at, &byte)?;
    }
    memory.verify_words(offset, len, word(5))?;
    Ok(())
}

#[test]
fn errors_carry_the_kernels_answer() -> Outcome {
    let memory = small(4096)?.memory().clone();
    let piece = bare::RemotePiece {
        remote_addr: 4096,
        offset: 0,
        len: 16,
    };
    let own = i32::try_from(std::process::id())?;
    let error = bare::process_vm_readv(own, &memory, &[piece], 512)
        .err()
        .ok_or("page 1 is mapped")?;
    assert_eq!(error.errno(), Some(nix::errno::Errno::EFAULT));
    assert!(error.source().is_some());
    Ok(())
}

/// Not a test by itself: the process that `process_vm_readv` reads from.
#[test]
fn child_with_memory() -> Outcome {
    if std::env::var_os("KVXFER_TEST_CHILD").is_none() {
        return Ok(());
    }
    let buffer = HostBuffer::new(1 << 20)?;
    buffer.memory().fill_words(0, 1 << 20, word(11))?;
    println!("addr={}", buffer.memory().addr());
    // The parent closes our stdin when it has read, or when it dies.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

#[test]
fn process_vm_readv_reads_a_childs_memory() -> Outcome {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", "child_with_memory", "--nocapture"])
        .env("KVXFER_TEST_CHILD", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut out = child.stdout.take().ok_or("no stdout")?;
    let mut text = String::new();
    let mut byte = [0];
    let addr = loop {
        if out.read(&mut byte)? == 0 {
            return Err(format!("the child ended: {text}").into());
        }
        text.push(char::from(byte[0]));
        let line = text
            .split_once("addr=")
            .and_then(|(_, rest)| rest.split_once('\n'));
        if let Some((addr, _)) = line {
            break addr.parse::<u64>()?;
        }
    };
    let memory = small(1 << 20)?.memory().clone();
    let pieces: Vec<_> = (0..256)
        .map(|i| bare::RemotePiece {
            remote_addr: addr + (255 - i) * 4096,
            offset: (255 - i) * 4096,
            len: 4096,
        })
        .collect();
    let pid = i32::try_from(child.id())?;
    let copied = bare::process_vm_readv(pid, &memory, &pieces, 100)?;
    assert_eq!(copied, 1 << 20);
    memory.verify_words(0, 1 << 20, word(11))?;
    let last = bare::RemotePiece {
        remote_addr: 0,
        offset: 0,
        len: 4096,
    };
    let short = bare::process_vm_readv(pid, &memory, &[pieces[0], last], 100);
    assert!(
        matches!(short, Err(Error::ProcessVmShort { got: 4096, .. })),
        "{short:?}"
    );
    drop(child.stdin.take());
    assert!(child.wait()?.success());
    Ok(())
}

#[test]
fn streams_carry_pieces_across_partial_calls() -> Outcome {
    use std::os::fd::AsFd;
    let (a, b) = UnixStream::pair()?;
    let src = small(4 << 20)?.memory().clone();
    let dst = small(4 << 20)?.memory().clone();
    src.fill_words(0, 4 << 20, word(3))?;
    let pieces: Vec<_> = (0..1024)
        .rev()
        .map(|i| bare::Piece {
            offset: i * 4096,
            len: if i == 7 { 0 } else { 4096 },
        })
        .collect();
    let sender = {
        let (src, pieces) = (src.clone(), pieces.clone());
        std::thread::spawn(move || bare::writev(a.as_fd(), &src, &pieces, 300))
    };
    let total = (4 << 20) - 4096;
    assert_eq!(bare::readv(b.as_fd(), &dst, &pieces, 1024)?, total);
    assert_eq!(sender.join().map_err(|_| "the sender panicked")??, total);
    dst.verify_words(0, 7 * 4096, word(3))?;
    dst.verify_words(8 * 4096, (4 << 20) - 8 * 4096, |i| word(3)(i + 4096))?;
    let ended = bare::readv(b.as_fd(), &dst, &pieces, 8);
    assert!(
        matches!(ended, Err(Error::StreamEnded { done: 0 })),
        "{ended:?}"
    );
    let (c, _) = UnixStream::pair()?;
    (&c).write_all(b"x")
        .err()
        .ok_or("nobody is there to read")?;
    assert!(matches!(
        bare::writev(c.as_fd(), &src, &pieces, 8),
        Err(Error::Stream { .. })
    ));
    Ok(())
}

/// A memory of 4096 bytes and the plain bytes it should hold.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Fill(u64, u64, u8),
    Copy(Vec<(u64, u64, u64)>),
    Words(u64, u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..4200_u64;
    let len = 0..700_u64;
    prop_oneof![
        (at.clone(), prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(o, b)| Step::Write(o, b)),
        (at.clone(), len.clone(), any::<u8>()).prop_map(|(o, l, b)| Step::Fill(o, l, b)),
        prop::collection::vec((at.clone(), at.clone(), len.clone()), 0..5).prop_map(Step::Copy),
        (at, len, any::<u64>()).prop_map(|(o, l, s)| Step::Words(o, l, s)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn memory_does_what_a_vector_would(steps in prop::collection::vec(step(), 1..30)) {
        let size = 4096_usize;
        let memory = small(size as u64).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let memory = memory.memory();
        let mut model = vec![0_u8; size];
        for step in steps {
            let range = |o: u64, l: u64| {
                let range = o as usize..(o + l) as usize;
                (range.end <= size).then_some(range)
            };
            match step {
                Step::Write(o, bytes) => {
                    let wanted = range(o, bytes.len() as u64);
                    prop_assert_eq!(memory.write(o, &bytes).is_ok(), wanted.is_some());
                    if let Some(r) = wanted { model[r].copy_from_slice(&bytes); }
                }
                Step::Fill(o, l, b) => {
                    let wanted = range(o, l);
                    prop_assert_eq!(memory.fill(o, l, b).is_ok(), wanted.is_some());
                    if let Some(r) = wanted { model[r].fill(b); }
                }
                Step::Copy(pairs) => {
                    let all: Option<Vec<_>> = pairs
                        .iter()
                        .map(|(s, d, l)| Some((range(*s, *l)?, range(*d, *l)?)))
                        .collect();
                    let pairs: Vec<_> = pairs
                        .iter()
                        .map(|&(src, dst, len)| CopyPair { src, dst, len })
                        .collect();
                    prop_assert_eq!(memory.copy_pairs(memory, &pairs).is_ok(), all.is_some());
                    for (s, d) in all.into_iter().flatten() { model.copy_within(s, d.start); }
                }
                Step::Words(o, l, seed) => {
                    let wanted = range(o, l);
                    prop_assert_eq!(memory.fill_words(o, l, word(seed)).is_ok(), wanted.is_some());
                    if let Some(r) = wanted {
                        for (i, piece) in model[r].chunks_mut(8).enumerate() {
                            let bytes = word(seed)(i as u64).to_le_bytes();
                            piece.copy_from_slice(&bytes[..piece.len()]);
                        }
                        prop_assert!(memory.verify_words(o, l, word(seed)).is_ok());
                    }
                }
            }
            let mut bytes = vec![0; size];
            memory.read(0, &mut bytes).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(&bytes, &model);
        }
    }
}
