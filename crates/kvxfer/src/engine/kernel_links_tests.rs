//! Kernels that write over GPU links, where what they belong to is in disorder, and where they may not. (Where all goes
//! well, and how it ends otherwise: tests/gpu_queue/links.rs.)

use std::time::{Duration, Instant};

use super::gpu::trial::MPS;
use super::panic_tests::{LONG, Node, SENT, groups, name_of, pair, wait_for};
use super::worker::Command;
use crate::Error;
use crate::config::PathKind;
use crate::engine::{Outcome, Peer, Push};
use crate::event::{Event, MemoryState};
use crate::gpu_queue::{GpuQueueConfig, Kernels, NoLinks, QueueKind};
use crate::ids::RequestId;
use crate::mem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind, Stream};
use crate::mem::kernels::queue::{ALL, ALL_TENSORS, LOCAL_PLACE, Move, PUT, REMOTE_PLACE};
use crate::mem::post::device::{PostBy, PostKernels, Posts};
use crate::mem::post::{Place, Status};
use crate::transfer::Cause;

const BLOCKS: u32 = 8;

fn gpu() -> Gpu {
    let runtime = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Host));
    runtime.expect("the stand-in").gpu(0).expect("one").clone()
}

/// A push of blocks that the consumer expects.
fn begin(producer: &Node, consumer: &Node, request: &str) -> (Peer, Push) {
    wait_for(&producer.engine, &mut Vec::new(), |event| {
        matches!(event, Event::PeerUp { .. })
    });
    let way = producer.engine.peer_of(&name_of(consumer));
    let way = way.expect("a session");
    let request = RequestId::from(request);
    let expected = consumer
        .engine
        .expect(&request, &groups(0..BLOCKS), 1, LONG);
    expected.expect("an expectation");
    let push = way.begin_push(&request).expect("a push");
    (way, push)
}

fn config(kind: QueueKind) -> GpuQueueConfig {
    let mut config = GpuQueueConfig::new(&gpu());
    (config.kind, config.patience) = (kind, LONG);
    config
}

/// The kernels are stopped, and what they may write is nobody's: no queue pair says that they have ended, and there is
/// nobody who could be told. So neither side's blocks come back while the process lives.
#[test]
fn blocks_that_kernels_write_stay_in_quarantine_when_a_worker_panics() {
    for looking in [false, true] {
        let (producer, consumer, instance, address) = pair(PathKind::Ipc);
        producer.fill(SENT);
        let (way, push) = begin(&producer, &consumer, "r");
        let queue = push.gpu_queue(&config(QueueKind::Links)).expect("a queue");
        let place = |block| {
            let place = Place {
                group: 0,
                tensor: ALL_TENSORS,
                layer: 0,
                block,
            };
            place.to_word()
        };
        let put = |block| Move {
            local: place(block),
            remote: place(block),
            len: queue.block_bytes(0, 0).expect("a layer"),
            flags: LOCAL_PLACE | REMOTE_PLACE,
            ..Move::default()
        };
        // Far more than is put before the panic.
        let moves: Vec<Move> = (0..BLOCKS).map(put).cycle().take(50_000).collect();
        let posts = Posts {
            moves: &moves,
            posters: 1,
            by: PostBy::Blocks,
            op: PUT,
            until: ALL,
        };
        let kernels = PostKernels::load(&gpu()).expect("kernels");
        let stream = Stream::new(&gpu()).expect("a stream");
        let posting = kernels.post(&stream, queue.device(), &posts);
        let posting = posting.expect("launched");
        consumer.await_sent();
        for worker in [0, 1] {
            producer.panic_by(
                worker,
                match looking {
                    true => Command::PanicLooking,
                    false => Command::Panic,
                },
            );
        }
        let results = posting.wait(Instant::now() + LONG).expect("it ends");
        let last = results.last().expect("many").posted;
        assert_eq!(last, Status::Stopped.number(), "looking: {looking}");
        let sent = push.abort();
        let outcome = sent.wait(LONG).expect("an outcome");
        let failure = outcome.failure().expect("its worker is gone");
        let ended = (&failure.first_cause, failure.memory);
        assert_eq!(ended, (&Cause::WorkerPanicked, MemoryState::Quarantined));
        let mut seen = Vec::new();
        let failed = wait_for(&consumer.engine, &mut seen, |event| {
            matches!(event, Event::Failed { .. })
        });
        let memory = match failed {
            Event::Failed { memory, .. } => memory,
            other => panic!("{other:?}"),
        };
        assert_eq!(memory, MemoryState::Quarantined, "looking: {looking}");
        let kept = |seen: &mut Vec<Event>| {
            std::thread::sleep(Duration::from_millis(200));
            consumer.engine.poll_events(seen);
            let is_it = |event: &Event| matches!(event, Event::Released { .. });
            assert!(!seen.iter().any(is_it), "looking {looking}: {seen:?}");
            assert!(!sent.is_released(), "looking: {looking}");
        };
        kept(&mut seen);
        queue.finish(Kernels::Ended, LONG).expect("they have ended");
        kept(&mut seen);
        drop(instance);
        producer.takes_no_more(way, &address);
        kept(&mut seen);
    }
}

/// The end of the producer's process would not say that its kernels have ended.
#[test]
fn kernels_under_mps_write_nobodys_blocks() {
    let (producer, consumer, _instance, _) = pair(PathKind::Ipc);
    let (_way, push) = begin(&producer, &consumer, "r");
    MPS.set(true);
    let refused = push.gpu_queue(&config(QueueKind::Links));
    MPS.set(false);
    let told = match refused {
        Err(error @ Error::NoLinks { why: NoLinks::Mps }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(told.contains("nvidia-cuda-mps-control"), "{told}");
    // The push goes on, with another kind.
    let queue = push.gpu_queue(&config(QueueKind::Proxy)).expect("a queue");
    queue.finish(Kernels::Ended, LONG).expect("nothing ran");
    let sent = push.commit().expect("committed");
    assert_eq!(sent.wait(LONG), Some(Outcome::Done));
}
