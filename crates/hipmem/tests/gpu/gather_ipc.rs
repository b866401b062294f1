//! Gathering from and into another process's memory, kernels that put blocks there, and what is left when one of the two is killed.

use std::io::BufReader;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gather::{
    GatherEnd, GatherOptions, GatherSection, GatherTable, GpuKernels, TensorPlaces,
};
use kvxfer_hipmem::gpu::{Gpu, GpuMemory, IpcHandle, Place, Stream};
use kvxfer_hipmem::kernels::queue::{ALL_TENSORS, LOCAL_PLACE, Move, REMOTE_PLACE};
use kvxfer_hipmem::kernels::{Pair, Piece};
use kvxfer_hipmem::post::Place as BlockPlace;
use kvxfer_hipmem::post::device::{LinkLayer, LinkPiece, LinkQueue, LinkSide, PostKernels};

use crate::ipc::answer;
use crate::{Outcome, gpu, pattern, runtime, soon};

const BLOCK: u64 = 16_384;
const BLOCKS: u32 = 512;
const LEN: u64 = BLOCK * BLOCKS as u64;

/// The device that the other process uses: another one, where there is one.
fn theirs() -> Gpu {
    runtime().gpus().last().expect("a device").clone()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes(hex: &str) -> Result<Vec<u8>, std::num::ParseIntError> {
    let byte = |i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16);
    (0..hex.len() / 2).map(byte).collect()
}

/// From one memory to the other, each block to its place counted from the end.
fn table(kernels: &GpuKernels, src: &GpuMemory, dst: &GpuMemory) -> Result<GatherTable, Error> {
    let section = GatherSection {
        tensors: &[TensorPlaces {
            src: Place::Gpu(src, 0),
            dst: Place::Gpu(dst, 0),
        }],
        pieces: &[Piece {
            src: 0,
            dst: 0,
            len: BLOCK,
        }],
        strides: (BLOCK, BLOCK),
        blocks: (BLOCKS, BLOCKS),
    };
    kernels.table(&[section], GatherOptions::default())
}

fn pairs(times: u32) -> Vec<Pair> {
    let block = |i| Pair {
        src: i % BLOCKS,
        dst: BLOCKS - 1 - i % BLOCKS,
    };
    (0..BLOCKS * times).map(block).collect()
}

fn turned(bytes: &[u8]) -> Vec<u8> {
    bytes.rchunks(BLOCK as usize).flatten().copied().collect()
}

/// Not a test by itself: a process that exports memory with a pattern, or gathers into what was given to it over
/// and over.
#[test]
fn child_that_exports_or_gathers() -> Outcome {
    let Some(role) = std::env::var_os("KVXFER_TEST_CHILD_GATHERS") else {
        return Ok(());
    };
    let gpu = theirs();
    let memory = GpuMemory::new(&gpu, LEN)?;
    memory.write(0, &pattern(LEN as usize, 3))?;
    let Some(handle) = role.to_str().filter(|role| *role != "export") else {
        println!("\nhandle={}", hex(&memory.export()?.to_bytes()));
        // Until the parent closes it or kills this.
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        return Ok(());
    };
    let handle = IpcHandle::from_bytes(&bytes(handle)?)?;
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let other = GpuMemory::open(&gpu, &handle)?;
    let (pull, push) = (
        table(&kernels, &other, &memory)?,
        table(&kernels, &memory, &other)?,
    );
    let pairs = pairs(200);
    // As long as a child may live.
    let deadline = soon() + Duration::from_secs(40);
    for i in 0.. {
        push.gather(&stream, &[&pairs])?.wait(soon())?;
        pull.gather(&stream, &[&pairs])?.wait(soon())?;
        println!("\nround={i}");
        if Instant::now() > deadline {
            return Err("nobody has ended this process".into());
        }
    }
    Ok(())
}

struct Other {
    child: Child,
    _ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Other {
    fn start(role: &str) -> Result<Self, Box<dyn std::error::Error>> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "gather_ipc::child_that_exports_or_gathers",
                "--nocapture",
            ])
            .env("KVXFER_TEST_CHILD_GATHERS", role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let ask = child.stdin.take().ok_or("no stdin")?;
        let answers = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        Ok(Self {
            child,
            _ask: ask,
            answers,
        })
    }

    fn exporter() -> Result<(Self, IpcHandle), Box<dyn std::error::Error>> {
        let mut other = Self::start("export")?;
        let handle = answer(&mut other.answers, "handle=")?;
        Ok((other, IpcHandle::from_bytes(&bytes(&handle)?)?))
    }

    /// SIGKILL.
    fn kill(mut self) -> Outcome {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A transfer from another process that lives, whose every byte is looked at.
fn fresh(kernels: &GpuKernels, stream: &Stream) -> Outcome {
    let (_exporter, handle) = Other::exporter()?;
    let gpu = kernels.gpu();
    let far = GpuMemory::open(gpu, &handle)?;
    let near = GpuMemory::new(gpu, LEN)?;
    let end = table(kernels, &far, &near)?
        .gather(stream, &[&pairs(1)])?
        .wait(soon())?;
    assert!(matches!(end, GatherEnd::Whole), "{end:?}");
    let mut found = vec![0; LEN as usize];
    near.read(0, &mut found)?;
    assert!(found == turned(&pattern(LEN as usize, 3)));
    Ok(())
}

#[test]
fn blocks_come_from_and_go_to_another_processs_memory() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    fresh(&kernels, &stream)?;
    let (_exporter, handle) = Other::exporter()?;
    let far = GpuMemory::open(&gpu, &handle)?;
    let near = GpuMemory::new(&gpu, LEN)?;
    near.write(0, &pattern(LEN as usize, 99))?;
    let mut push = table(&kernels, &near, &far)?.gather(&stream, &[&pairs(1)])?;
    let end = push.wait(soon())?;
    assert!(matches!(end, GatherEnd::Whole), "{end:?}");
    let mut found = vec![0; LEN as usize];
    far.read(0, &mut found)?;
    assert!(found == turned(&pattern(LEN as usize, 99)));
    Ok(())
}

#[test]
fn who_gathers_outlives_an_exporter_that_is_killed() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let near = GpuMemory::new(&gpu, LEN)?;
    let pairs = pairs(200);
    for round in 0..5_u64 {
        let (exporter, handle) = Other::exporter()?;
        let far = GpuMemory::open(&gpu, &handle)?;
        let (pull, push) = (table(&kernels, &far, &near)?, table(&kernels, &near, &far)?);
        let mut running = Vec::new();
        for _ in 0..4 {
            running.push(pull.gather(&stream, &[&pairs])?);
            running.push(push.gather(&stream, &[&pairs])?);
        }
        std::thread::sleep(Duration::from_millis(3 * round));
        let ran = !stream.is_done()?;
        exporter.kill()?;
        let mut ends = Vec::new();
        for gather in &mut running {
            ends.push(match gather.wait(soon())? {
                GatherEnd::Whole => "whole".to_owned(),
                GatherEnd::Failed(error) => error.to_string(),
                other => panic!("{other:?}"),
            });
        }
        ends.dedup();
        println!("round {round}, running when it was killed: {ran}: {ends:?}");
        drop((running, pull, push, far));
        fresh(&kernels, &stream)?;
    }
    Ok(())
}

#[test]
fn who_exports_outlives_one_that_gathers_and_is_killed() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let memory = GpuMemory::new(&gpu, LEN)?;
    let role = hex(&memory.export()?.to_bytes());
    for round in 0..3_u64 {
        memory.fill(0, LEN, 0)?;
        let mut other = Other::start(&role)?;
        answer(&mut other.answers, "round=")?;
        std::thread::sleep(Duration::from_millis(2 * round));
        other.kill()?;
        // What it wrote is there, and so is the memory.
        let mut found = vec![0; LEN as usize];
        memory.read(0, &mut found)?;
        let sent = pattern(LEN as usize, 3);
        // It gives back what it has taken, so each round leaves the same.
        assert!(found == turned(&sent));
        let near = GpuMemory::new(&gpu, LEN)?;
        memory.write(0, &sent)?;
        let end = table(&kernels, &memory, &near)?
            .gather(&stream, &[&pairs(1)])?
            .wait(soon())?;
        assert!(matches!(end, GatherEnd::Whole), "{end:?}");
        near.read(0, &mut found)?;
        assert!(found == turned(&sent));
        fresh(&kernels, &stream)?;
    }
    Ok(())
}

#[test]
fn a_kernel_puts_blocks_into_another_processs_memory() -> Outcome {
    let (other, handle) = Other::exporter()?;
    let gpu = gpu();
    let (kernels, stream) = (PostKernels::load(&gpu)?, Stream::new(&gpu)?);
    let theirs = GpuMemory::open(&gpu, &handle)?;
    let ours = GpuMemory::new(&gpu, LEN)?;
    let bytes = pattern(LEN as usize, 9);
    ours.write(0, &bytes)?;
    let side = |memory| LinkSide {
        place: Place::Gpu(memory, 0),
        stride: BLOCK,
    };
    let layer = LinkLayer {
        group: 0,
        layer: 0,
        local_blocks: BLOCKS,
        remote_blocks: BLOCKS,
        tensors: vec![vec![LinkPiece {
            local: side(&ours),
            remote: side(&theirs),
            len: BLOCK,
        }]],
    };
    let queue = Arc::new(LinkQueue::new(&gpu, &[layer])?);
    let place = |block| {
        let (group, tensor, layer) = (0, ALL_TENSORS, 0);
        let of = BlockPlace {
            group,
            tensor,
            layer,
            block,
        };
        of.to_word()
    };
    let moves: Vec<_> = pairs(1)
        .iter()
        .map(|pair| Move {
            local: place(pair.src),
            remote: place(pair.dst),
            len: BLOCK,
            flags: LOCAL_PLACE | REMOTE_PLACE,
            ..Move::default()
        })
        .collect();
    let push = kernels.prepare_push(&stream, &moves)?;
    let results = kernels.push(&stream, &queue, &push, 16)?.wait(soon())?;
    assert!(results.iter().all(|r| (r.posted, r.ended) == (0, 0)));
    let mut found = vec![0; LEN as usize];
    theirs.read(0, &mut found)?;
    assert!(found == turned(&bytes), "the blocks are not there");
    drop(queue);
    other.kill()
}
