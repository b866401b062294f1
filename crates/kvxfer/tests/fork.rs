//! An engine in a forked child: every call is refused, nothing hangs, and what the child drops is
//! not taken from its parent. The one place outside the crates for unsafe code that has some: there
//! is no safe fork.

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use kvxfer::Error;
use kvxfer::config::{KvRole, PathKind};
use kvxfer::engine::{Engine, GpuQueue, Instance, Outcome, PullOptions, Push, Transfer};
use kvxfer::gpu_queue::{GpuQueueConfig, Kernels};
use kvxfer::ids::RequestId;
use kvxfer::mem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use kvxfer::mem::kernels::queue::{ALL, ALL_TENSORS, LOCAL_PLACE, Move, PUT, REMOTE_PLACE};
use kvxfer::mem::post::Place;
use kvxfer::mem::post::device::{PostBy, PostKernels, Posts};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Cause;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use support::{LONG, Node, dealt, groups, pairs, recipe, until};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 128;
/// Blocks that a kernel of the parent pushes.
const QUEUED: u32 = 8;

/// Runs `body` in a forked child; its answer is the child's exit status.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child is a copy of this thread alone. It takes no lock that a thread of its parent
    // may have held (that is what is tested), allocates, for which the C library prepares its heap
    // at fork, and ends with `exit` below without going back into the test harness.
    let forked = unsafe { fork() };
    let child = match forked.expect("a child") {
        ForkResult::Child => {
            let status = catch_unwind(AssertUnwindSafe(body)).unwrap_or(101);
            std::process::exit(status)
        }
        ForkResult::Parent { child } => child,
    };
    let end = Instant::now() + LONG;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).expect("it is there") {
            WaitStatus::Exited(_, status) => return status,
            WaitStatus::StillAlive if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            WaitStatus::StillAlive => {
                kill(child, Signal::SIGKILL).expect("it is there");
                waitpid(child, None).expect("it ends");
                panic!("the child hangs");
            }
            other => panic!("{other:?}"),
        }
    }
}

fn forked<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Forked { engine, here })
        if engine != here && here == std::process::id())
}

/// Everything that the child has of its parent's engine.
struct Inherited {
    node: Node,
    instance: Instance,
    ticket: Ticket,
    push: Push,
    committed: Push,
    /// Kernels post to it, in the parent.
    queue: GpuQueue,
    gpu: Gpu,
    transfer: Transfer,
}

/// What of it is not refused; nothing, if all is well.
fn try_all(of: Inherited) -> i32 {
    let Inherited {
        node,
        instance,
        ticket,
        push,
        committed,
        queue,
        gpu,
        transfer,
    } = of;
    let engine: &Engine = &node.engine;
    let request = RequestId::from("child");
    let wanted = pairs([(0, 0)]);
    let mut events = Vec::new();
    let refused = [
        forked(engine.listen("127.0.0.1:0")),
        forked(engine.connect("127.0.0.1:1", LONG)),
        forked(engine.metadata()),
        forked(engine.offer(&request, &groups(0..1), 1, LONG)),
        forked(engine.expect(&request, &groups(0..1), 1, LONG)),
        !engine.retract(&RequestId::from("parent")),
        !engine.cancel_expect(&RequestId::from("parent")),
        engine.poll_events(&mut events) == 0,
        engine.wait_events(&mut events, LONG) == 0,
        engine.peer_of(&instance.peers()[0].name()).is_none(),
        forked(instance.path()),
        forked(instance.lanes()),
        forked(instance.facts()),
        !instance.is_up(),
        forked(instance.pull(&ticket, &wanted, PullOptions::default())),
        forked(instance.release(&ticket)),
        forked(instance.begin_push(&request)),
        forked(push.all_layers(&wanted, None)),
        forked(push.layer(0, &wanted, None)),
        forked(push.gpu_queue(&GpuQueueConfig::new(&gpu))),
        // Its own has been asked for by nobody.
        queue.report().taken == 0,
        forked(queue.finish(Kernels::Ended, LONG)),
        forked(committed.commit()),
        matches!(transfer.wait(LONG), Some(Outcome::Failed(failure))
            if failure.first_cause == Cause::Forked),
        !transfer.is_released() && !transfer.wait_released(LONG),
    ];
    transfer.cancel();
    drop(push.abort());
    drop((transfer, instance, node));
    refused
        .iter()
        .position(|refused| !refused)
        .map_or(0, |at| at as i32 + 1)
}

#[test]
fn a_forked_child() {
    for path in [PathKind::Arena, PathKind::ProcessVm, PathKind::Tcp] {
        let producer = recipe(KvRole::Both, path, BLOCK, BLOCKS + QUEUED).node();
        producer.side.fill(7).expect("filled");
        let consumer = recipe(KvRole::Both, path, BLOCK, BLOCKS + QUEUED).node();
        consumer.side.poison().expect("poisoned");
        let address = producer.engine.listen("127.0.0.1:0").expect("a port");
        let instance = consumer
            .engine
            .connect(&address.to_string(), LONG)
            .expect("a session");
        let ticket = producer
            .engine
            .offer(&RequestId::from("parent"), &groups(0..BLOCKS), 1, LONG)
            .expect("an offer");
        let begin = |request: &str| {
            producer
                .engine
                .expect(&RequestId::from(request), &groups(0..0), 1, LONG)
                .expect("an expectation");
            instance
                .begin_push(&RequestId::from(request))
                .expect("a push")
        };
        let (push, committed) = (begin("push"), begin("committed"));
        let queued = RequestId::from("queued");
        producer
            .engine
            .expect(&queued, &groups(BLOCKS..BLOCKS + QUEUED), 1, LONG)
            .expect("an expectation");
        let queued = instance.begin_push(&queued).expect("a push");
        let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host));
        let gpu = runtime.expect("the stand-in").gpu(0).expect("one").clone();
        let queue = queued.gpu_queue(&GpuQueueConfig::new(&gpu));
        let queue = queue.expect("a queue");
        // Kernels may have it from now on.
        let _ = queue.handle();
        let wanted = pairs((0..BLOCKS).map(|b| (b, BLOCKS - 1 - b)));
        let pull = |(tag, wanted): (u64, Vec<_>)| {
            let options = PullOptions {
                tag,
                hold: true,
                ..PullOptions::default()
            };
            instance.pull(&ticket, &wanted, options).expect("a pull")
        };
        let mut running: Vec<Transfer> = (0..).zip(dealt(&wanted, 32)).map(pull).collect();
        // All of it moves into the child; the parent keeps its own copy of the memory.
        let mine = Inherited {
            transfer: running.pop().expect("many"),
            node: consumer,
            instance: instance.clone(),
            ticket: ticket.clone(),
            push,
            committed,
            queue,
            gpu,
        };
        let mut slot = Some(mine);
        let status = in_child(|| try_all(slot.take().expect("inherited")));
        assert_eq!(
            status, 0,
            "the check of this number, from 1, was not passed"
        );
        // The parent has lost nothing by it.
        let Inherited {
            node,
            transfer,
            push,
            committed,
            queue,
            gpu,
            ..
        } = slot.expect("the parent's");
        running.push(transfer);
        for transfer in &running {
            assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        }
        node.side.verify(7, &wanted).expect("every byte");
        let transfer = pull((99, wanted.clone()));
        assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        let place = |block| {
            let place = Place {
                group: 0,
                tensor: ALL_TENSORS,
                layer: 0,
                block,
            };
            place.to_word()
        };
        let moves: Vec<Move> = (BLOCKS..BLOCKS + QUEUED)
            .map(|block| Move {
                local: place(block),
                remote: place(block),
                len: queue.block_bytes(0, 0).expect("a layer"),
                flags: LOCAL_PLACE | REMOTE_PLACE,
                ..Move::default()
            })
            .collect();
        let posts = Posts {
            moves: &moves,
            posters: 1,
            by: PostBy::Blocks,
            op: PUT,
            until: ALL,
        };
        let kernels = PostKernels::load(&gpu).expect("kernels");
        let stream = Stream::new(&gpu).expect("a stream");
        let posting = kernels.post(&stream, queue.device(), &posts);
        let posting = posting.expect("launched");
        queue
            .finish(Kernels::Behind(posting.event()), LONG)
            .expect("they end");
        for push in [push, committed, queued] {
            let transfer = push.commit().expect("committed");
            assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
        }
        instance.release(&ticket).expect("released");
        let mut events = Vec::new();
        until("the release", || {
            producer
                .engine
                .wait_events(&mut events, Duration::from_millis(100));
            events
                .iter()
                .any(|event| matches!(event, kvxfer::event::Event::Released { .. }))
        });
        assert!(instance.is_up());
    }
}
