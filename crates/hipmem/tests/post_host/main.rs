//! Posts by kernels (`kernels/post.h`), as they are built for the host: through the proxy ring to its
//! consumer, and as WQEs to a model of an mlx5 device. The same entry points run on a GPU.
//!
//! The model stands for a device where there is none. What passes here is the protocol, against a
//! model; nothing of it has run on a NIC.

mod planted;
mod regions;
mod ring;
mod wqe;

use std::ops::Range;
use std::sync::OnceLock;
use std::thread;

use kvxfer_hipmem::kernels::HostKernels;
use kvxfer_hipmem::kernels::queue::{Move, PostArgs, PostResult, Queue, QueueState};
use kvxfer_hipmem::post::Status;
use kvxfer_hipmem::{HostBuffer, HostMemory};

/// Ticks that are never over in a test that passes: ten seconds of the fastest counter.
const LONG: u64 = 10 << 32;
/// Ticks that are soon over: some milliseconds.
const SHORT: u64 = 10_000_000;

type Post<'a> = dyn Fn(&PostArgs, Range<u32>) + Sync + 'a;

/// The image that programs have.
fn shipped(args: &PostArgs, posters: Range<u32>) {
    static KERNELS: OnceLock<HostKernels> = OnceLock::new();
    let kernels = KERNELS.get_or_init(|| HostKernels::load().expect("the host image loads"));
    // SAFETY: `run` keeps moves, results and the queue's memory until its threads have ended; the
    // queue's words are reached by atomics alone.
    unsafe { kernels.post(args, posters) };
}

/// Memory of which parts are given out.
struct Memory {
    whole: HostMemory,
    used: u64,
    /// Keeps it.
    _buffer: HostBuffer,
}

impl Memory {
    fn new() -> Self {
        let buffer = HostBuffer::new(1 << 20).expect("memory");
        Self {
            whole: buffer.memory().clone(),
            used: 0,
            _buffer: buffer,
        }
    }

    /// Bytes on cache lines of their own.
    fn take(&mut self, len: u64) -> HostMemory {
        let part = self.whole.slice(self.used, len).expect("room");
        self.used += len.next_multiple_of(64);
        part
    }
}

/// What every queue has beside its slots.
struct Around {
    state: HostMemory,
    abort: HostMemory,
}

impl Around {
    fn new(memory: &mut Memory, first: u64) -> Self {
        let state = memory.take(48);
        let bytes = QueueState::starting_at(first).bytes();
        state.write(0, &bytes).expect("room");
        let abort = memory.take(8);
        Self { state, abort }
    }

    /// As if a kernel had been killed after it had taken a ticket.
    fn lose_a_ticket(&self) {
        let next = self.state.load_u64(0).expect("inside");
        self.state.store_u64(0, next + 1).expect("inside");
    }

    /// The number that the next post gets.
    fn next(&self) -> u64 {
        self.state.load_u64(0).expect("inside")
    }

    fn set_abort(&self) {
        self.abort.store_u64(0, 1).expect("inside");
    }

    /// What ends all posters if this thread panics.
    fn end_with_me(&self) -> EndWithMe {
        EndWithMe(self.abort.clone())
    }
}

/// Sets the abort word when it is dropped by a panic, so that no poster waits for who is not there.
struct EndWithMe(HostMemory);

impl Drop for EndWithMe {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.store_u64(0, 1);
        }
    }
}

/// Posts by as many threads as there are posters; `moves` has those of each, one after the other.
fn run(
    post: &Post<'_>,
    queue: Queue,
    moves: &[Move],
    posters: u32,
    op: u32,
    until: u32,
) -> Vec<PostResult> {
    let mut results = vec![PostResult::default(); moves.len()];
    let args = PostArgs {
        queue,
        moves: moves.as_ptr().expose_provenance() as u64,
        results: results.as_mut_ptr().expose_provenance() as u64,
        count: u32::try_from(moves.len()).expect("few") / posters,
        posters,
        op,
        until,
    };
    thread::scope(|scope| {
        for poster in 0..posters {
            let args = &args;
            scope.spawn(move || post(args, poster..poster + 1));
        }
    });
    results
}

/// What became of posts, as pairs of what the post and the wait said.
fn ends(results: &[PostResult]) -> Vec<(Status, Status)> {
    let status = |n| Status::from_number(n).expect("a status");
    let ends = results.iter();
    ends.map(|r| (status(r.posted), status(r.ended))).collect()
}

/// Numbers that come in no order (xorshift).
struct Noise(u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}
