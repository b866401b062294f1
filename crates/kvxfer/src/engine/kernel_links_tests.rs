//! Kernels that may not write over GPU links. (Where they do: tests/gpu_queue/links.rs.)

use super::gpu::trial::MPS;
use super::panic_tests::{LONG, Node, groups, name_of, pair, wait_for};
use crate::Error;
use crate::config::PathKind;
use crate::engine::{Outcome, Peer, Push};
use crate::event::Event;
use crate::gpu_queue::{GpuQueueConfig, Kernels, NoLinks, QueueKind};
use crate::ids::RequestId;
use crate::mem::gpu::{Gpu, GpuRuntime, RuntimeChoice, RuntimeKind};

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
