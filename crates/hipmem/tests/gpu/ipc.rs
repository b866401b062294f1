//! One process's memory in another.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gpu::{GpuFault, GpuMemory, IpcHandle, RuntimeKind};
use kvxfer_hipmem::post::device::DeviceQueue;

use crate::{Outcome, fault, gpu, pattern, soon};

const LEN: u64 = 8 << 20;
/// Where in its allocation the child's memory begins, and its bytes.
const PART: (u64, u64) = (12_345, 100_001);

/// Not a test by itself: a process that exports memory, and says what is in it when it is asked.
#[test]
fn child_that_exports() -> Outcome {
    if std::env::var_os("KVXFER_TEST_CHILD").is_none() {
        return Ok(());
    }
    let whole = GpuMemory::new(&gpu(), LEN)?;
    whole.fill(0, LEN, 0)?;
    let part = whole.slice(PART.0, PART.1)?;
    part.write(0, &pattern(PART.1 as usize, 3))?;
    let bytes = part.export()?.to_bytes();
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    println!("\nhandle={hex}");
    for line in std::io::stdin().lock().lines() {
        let at: u64 = line?.parse()?;
        let mut byte = [0];
        whole.read(at, &mut byte)?;
        println!("\nbyte={}", byte[0]);
    }
    Ok(())
}

struct Exporter {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    handle: IpcHandle,
}

impl Exporter {
    fn start() -> Result<Self, Box<dyn std::error::Error>> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "ipc::child_that_exports", "--nocapture"])
            .env("KVXFER_TEST_CHILD", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let ask = child.stdin.take().ok_or("no stdin")?;
        let mut answers = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        let hex = answer(&mut answers, "handle=")?;
        let bytes: Result<Vec<u8>, _> = (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16))
            .collect();
        let handle = IpcHandle::from_bytes(&bytes?)?;
        Ok(Self {
            child,
            ask,
            answers,
            handle,
        })
    }

    fn byte(&mut self, at: u64) -> Result<u8, Box<dyn std::error::Error>> {
        writeln!(self.ask, "{at}")?;
        Ok(answer(&mut self.answers, "byte=")?.parse()?)
    }

    fn end(mut self) -> Result<IpcHandle, Box<dyn std::error::Error>> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(self.handle.clone())
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn answer(
    from: &mut impl BufRead,
    key: &str,
) -> Result<String, Box<dyn std::error::Error>> {
    let mut seen = String::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(format!("the child ended: {seen}").into());
        }
        if let Some(value) = line.strip_prefix(key) {
            return Ok(value.trim().to_owned());
        }
        seen.push_str(&line);
    }
}

#[test]
fn another_processes_memory_is_read_and_written() -> Outcome {
    let mut exporter = Exporter::start()?;
    let gpu = gpu();
    assert_eq!(exporter.handle.pci(), gpu.info().pci);
    assert_eq!(exporter.handle.len(), PART.1);
    let memory = GpuMemory::open(&gpu, &exporter.handle)?;
    assert_eq!((memory.len(), memory.gpu()), (PART.1, &gpu));
    let mut bytes = vec![0; PART.1 as usize];
    memory.read(0, &mut bytes)?;
    assert!(bytes == pattern(PART.1 as usize, 3));
    memory.fill(PART.1 - 1, 1, 77)?;
    assert_eq!(exporter.byte(PART.0 + PART.1 - 1)?, 77);
    assert_eq!(exporter.byte(PART.0 + PART.1)?, 0);
    // A GPU's own copy, from it to memory of ours.
    let ours = GpuMemory::new(&gpu, PART.1)?;
    ours.copy_from(&memory, 0, 0, PART.1)?;
    ours.read(0, &mut bytes)?;
    bytes[PART.1 as usize - 1] = pattern(PART.1 as usize, 3)[PART.1 as usize - 1];
    assert!(bytes == pattern(PART.1 as usize, 3));
    // It is not ours to export.
    assert!(matches!(
        fault(memory.export()),
        GpuFault::NotExportable { .. }
    ));
    let part = memory.slice(1, 1)?;
    assert!(matches!(
        fault(part.export()),
        GpuFault::NotExportable { .. }
    ));
    Ok(())
}

#[test]
fn what_is_opened_twice_is_mapped_once_until_the_last_goes() -> Outcome {
    let exporter = Exporter::start()?;
    let gpu = gpu();
    let first = GpuMemory::open(&gpu, &exporter.handle)?;
    let second = GpuMemory::open(&gpu, &exporter.handle)?;
    assert_eq!(first.addr(), second.addr());
    drop(first);
    let part = second.slice(100, 100)?;
    drop(second);
    let mut bytes = [0; 100];
    part.read(0, &mut bytes)?;
    assert_eq!(bytes[..], pattern(PART.1 as usize, 3)[100..200]);
    drop(part);
    // And once more from the beginning.
    let mut byte = [0];
    GpuMemory::open(&gpu, &exporter.handle)?.read(7, &mut byte)?;
    assert_eq!(byte[0], pattern(8, 3)[7]);
    Ok(())
}

/// While kernels may post, nothing is closed: what was let go of is there for who opens it again, until a queue's end.
#[test]
fn what_is_let_go_of_beside_a_queue_is_closed_behind_it() -> Outcome {
    let exporter = Exporter::start()?;
    let gpu = gpu();
    let (queue, _consumer) = DeviceQueue::new(&gpu, 4, Duration::from_secs(1))?;
    let first = GpuMemory::open(&gpu, &exporter.handle)?;
    let at = first.addr();
    drop(first);
    // Twice, and in use again when it could be closed.
    drop(GpuMemory::open(&gpu, &exporter.handle)?);
    let second = GpuMemory::open(&gpu, &exporter.handle)?;
    assert_eq!(second.addr(), at);
    drop(queue);
    // Waits for what is being closed.
    let (queue, _consumer) = DeviceQueue::new(&gpu, 4, Duration::from_secs(1))?;
    let mut byte = [0];
    second.read(7, &mut byte)?;
    assert_eq!(byte[0], pattern(8, 3)[7]);
    drop(second);
    let handle = exporter.end()?;
    // There still, though the process is not.
    GpuMemory::open(&gpu, &handle)?.read(7, &mut byte)?;
    assert_eq!(byte[0], pattern(8, 3)[7]);
    drop(queue);
    let deadline = soon();
    while let Ok(memory) = GpuMemory::open(&gpu, &handle) {
        drop(memory);
        std::thread::sleep(Duration::from_millis(20));
        assert!(Instant::now() < deadline, "it is never closed");
    }
    let found = fault(GpuMemory::open(&gpu, &handle));
    assert!(matches!(found, GpuFault::IpcOpen { .. }), "{found}");
    Ok(())
}

#[test]
fn ones_own_handle_is_refused() -> Outcome {
    let gpu = gpu();
    let memory = GpuMemory::new(&gpu, LEN)?;
    let handle = memory.slice(1, 2)?.export()?;
    assert_eq!(fault(GpuMemory::open(&gpu, &handle)), GpuFault::IpcOwn);
    Ok(())
}

#[test]
fn ones_own_handle_leads_to_the_memory_while_it_is_there() -> Outcome {
    let gpu = gpu();
    let memory = GpuMemory::new(&gpu, LEN)?;
    let (part, other) = (memory.slice(1, 2)?, memory.slice(1, 3)?);
    let handle = part.export()?;
    let again = IpcHandle::from_bytes(&handle.to_bytes())?;
    let found = GpuMemory::exported(&again).ok_or("it is not found")?;
    assert_eq!((found.addr(), found.len()), (memory.addr() + 1, 2));
    assert_eq!(
        GpuMemory::exported(&other.export()?).map(|m| m.len()),
        Some(3)
    );
    drop((part, found));
    assert!(GpuMemory::exported(&handle).is_none());
    let theirs = Exporter::start()?;
    assert!(GpuMemory::exported(&theirs.handle).is_none());
    Ok(())
}

#[test]
fn a_token_leads_back_to_the_memory() -> Outcome {
    let memory = GpuMemory::new(&gpu(), LEN)?;
    let part = memory.slice(5, 7)?;
    let found = GpuMemory::of(&part.as_memory()).ok_or("it is not found")?;
    assert_eq!((found.addr(), found.len()), (memory.addr() + 5, 7));
    memory.write(5, b"written")?;
    let mut bytes = [0; 7];
    kvxfer_hipmem::read(&*part.as_memory(), 0, &mut bytes)?;
    assert_eq!(&bytes, b"written");
    assert!(kvxfer_hipmem::read(&*part.as_memory(), 1, &mut bytes).is_err());
    let host = kvxfer_hipmem::HostBuffer::new(10)?;
    assert!(GpuMemory::of(&host.memory().as_memory()).is_none());
    Ok(())
}

#[test]
fn a_handle_of_a_process_that_has_ended_is_refused() -> Outcome {
    let handle = Exporter::start()?.end()?;
    let gpu = gpu();
    let found = fault(GpuMemory::open(&gpu, &handle));
    println!("{found}");
    let GpuFault::IpcOpen {
        exporter,
        opener,
        refused,
        ..
    } = &found
    else {
        panic!("{found}");
    };
    assert_eq!((*exporter, *opener), (handle.pci(), gpu.info().pci));
    assert_ne!(refused.code.number, 0);
    assert!(found.to_string().contains("may have ended"), "{found}");
    // The device is as good as before.
    let memory = GpuMemory::new(&gpu, 100)?;
    memory.fill(0, 100, 1)?;
    Ok(())
}

/// Whose memory it was is gone while it is open here: that is the peer's to avoid, and must not hurt more than
/// what is in the memory.
#[test]
fn a_process_that_ends_leaves_others_usable() -> Outcome {
    let exporter = Exporter::start()?;
    let gpu = gpu();
    let memory = GpuMemory::open(&gpu, &exporter.handle)?;
    exporter.end()?;
    drop(memory);
    let memory = GpuMemory::new(&gpu, 100)?;
    memory.fill(0, 100, 4)?;
    let mut byte = [0];
    memory.read(99, &mut byte)?;
    assert_eq!(byte, [4]);
    Ok(())
}

#[test]
fn a_handle_of_another_runtime_or_of_lies_is_refused() -> Outcome {
    let exporter = Exporter::start()?;
    let gpu = gpu();
    let good = exporter.handle.to_bytes();
    let read = |at: usize, bytes: &[u8]| {
        let mut lie = good;
        lie[at..at + bytes.len()].copy_from_slice(bytes);
        IpcHandle::from_bytes(&lie)
    };
    let (ours, other, theirs) = match gpu.runtime() {
        RuntimeKind::Hip => (RuntimeKind::Hip, 2, RuntimeKind::Cuda),
        ours => (ours, 1, RuntimeKind::Hip),
    };
    let foreign = read(4, &[other])?;
    let expected = GpuFault::IpcRuntime { ours, theirs };
    assert_eq!(fault(GpuMemory::open(&gpu, &foreign)), expected);
    // An allocation that is said to be larger than what is mapped.
    let size_at = 4 + 1 + 64;
    let large = read(size_at, &(1_u64 << 50).to_le_bytes())?;
    let found = fault(GpuMemory::open(&gpu, &large));
    assert!(
        matches!(found, GpuFault::IpcSize { said, .. } if said == 1 << 50),
        "{found}"
    );
    let refused = read(size_at, &1_u64.to_le_bytes()).map(drop);
    assert!(matches!(&refused, Err(Error::Gpu(f)) if matches!(**f, GpuFault::IpcForm(_))));
    // The one that is true is opened still.
    GpuMemory::open(&gpu, &exporter.handle)?;
    Ok(())
}
