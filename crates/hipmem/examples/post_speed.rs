//! How fast posts go through the proxy ring on this machine's processor: one poster (the host build of
//! `kernels/post.h`) and one consumer that checks and completes each. First each of them alone, a ring's
//! fill at a time, which a busy machine disturbs little; then side by side, a thread each.
//!
//! ```text
//! cargo run --release -p kvxfer-hipmem --example post_speed
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use kvxfer_hipmem::kernels::HostKernels;
use kvxfer_hipmem::kernels::queue::{
    IDLE, Move, POSTED, PUT, PostArgs, PostResult, Queue, QueueState,
};
use kvxfer_hipmem::post::{Checks, Consumer, ProxyRing, RingAddresses, Span, Status, Taken};
use kvxfer_hipmem::{Error, HostBuffer};

const POSTS: usize = 500_000;
const DEPTH: u32 = 1024;
const ROUNDS: usize = 5;
const FILLS: usize = 500;

/// A ring and its consumer, with what they lie in.
struct Bench {
    ring: ProxyRing,
    consumer: Consumer,
    queue: Queue,
    _memory: [HostBuffer; 2],
}

impl Bench {
    fn new() -> Result<Self, Error> {
        let words = HostBuffer::new(ProxyRing::bytes(DEPTH))?;
        let own = HostBuffer::new(4096)?;
        own.memory().write(0, &QueueState::starting_at(0).bytes())?;
        let (ring, consumer) = ProxyRing::new(words.memory().clone(), DEPTH, 0)?;
        let at = RingAddresses {
            ring: words.memory().addr(),
            state: own.memory().addr(),
            abort: own.memory().addr() + 128,
        };
        Ok(Self {
            queue: ring.queue(at, 10 << 32),
            ring,
            consumer,
            _memory: [words, own],
        })
    }

    /// Carries out what there is.
    fn drain(&mut self, checks: &Checks) -> Result<usize, Error> {
        let mut served = 0;
        while let Some(taken) = self.consumer.take(&self.ring)? {
            let Taken::Post(post) = taken else { continue };
            let status = checks.check(&post).err().unwrap_or(Status::Ok);
            // It is under way: it has just been taken.
            let _ = self.consumer.complete(&self.ring, post.ticket, status)?;
            served += 1;
        }
        Ok(served)
    }
}

fn args(queue: Queue, moves: &[Move], results: &mut [PostResult], until: u32) -> PostArgs {
    PostArgs {
        queue,
        moves: moves.as_ptr().expose_provenance() as u64,
        results: results.as_mut_ptr().expose_provenance() as u64,
        count: moves.len() as u32,
        posters: 1,
        op: PUT,
        until,
    }
}

fn median(of: &mut [f64]) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kernels = HostKernels::load()?;
    let moves: Vec<_> = (0..POSTS as u64)
        .map(|i| Move {
            local: 64 * i,
            remote: 64 * i,
            len: 64,
            lkey: 1,
            rkey: 2,
            ..Move::default()
        })
        .collect();
    let mut results = vec![PostResult::default(); POSTS];
    let span = Span {
        addr: 0,
        len: 64 * POSTS as u64,
        writable: true,
    };
    let checks = Checks {
        local: [(1, span)].into(),
        remote: [(2, span)].into(),
        max_len: 64,
        ..Checks::default()
    };

    let mut bench = Bench::new()?;
    let (mut posting, mut serving) = (Vec::new(), Vec::new());
    let fill = args(bench.queue, &moves[..DEPTH as usize], &mut results, POSTED);
    for _ in 0..FILLS {
        let start = Instant::now();
        // SAFETY: all that it names is held here until the call is over, and as long as the arguments
        // say.
        unsafe { kernels.post(&fill, 0..1) };
        let posted = Instant::now();
        let served = bench.drain(&checks)?;
        let each = |from: Instant, to: Instant| (to - from).as_nanos() as f64 / f64::from(DEPTH);
        posting.push(each(start, posted));
        serving.push(each(posted, Instant::now()));
        if served != DEPTH as usize {
            return Err(format!("{served} of {DEPTH} were carried out").into());
        }
    }
    let (posting, serving) = (median(&mut posting), median(&mut serving));
    println!("alone: {posting:.1} ns a post, {serving:.1} ns to take, check and complete it");

    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let mut bench = Bench::new()?;
        let all = args(bench.queue, &moves, &mut results, IDLE);
        let over = AtomicBool::new(false);
        let started = Instant::now();
        let served = thread::scope(|scope| {
            let serving = scope.spawn(|| -> Result<usize, Error> {
                let mut served = 0;
                while !over.load(Ordering::Acquire) {
                    served += bench.drain(&checks)?;
                    std::hint::spin_loop();
                }
                Ok(served)
            });
            // SAFETY: as above.
            unsafe { kernels.post(&all, 0..1) };
            over.store(true, Ordering::Release);
            serving.join()
        });
        let took = started.elapsed();
        let served = served.map_err(|_| "the consumer panicked")??;
        if served != POSTS {
            return Err(format!("{served} of {POSTS} were carried out").into());
        }
        rates.push(POSTS as f64 / took.as_secs_f64() / 1e6);
    }
    let rate = median(&mut rates);
    println!("side by side, {DEPTH} slots: {rate:.2} M posts/s (median of {ROUNDS})");
    Ok(())
}
