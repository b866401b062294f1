//! The asynchronous events of a device of an engine: what no completion tells, or none tells in full.
//!
//! Every worker has the device's descriptor among what it sleeps on, and looks now and then while it is
//! busy. Whoever comes first reads for all, and every worker is then told to look what has become of its
//! own. A queue pair is found by its number and known by what was made for it: an event that comes
//! when it is gone changes nothing, whoever has its number then.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tracing::{error, info, warn};

use kvxfer_verbs::{AsyncEvent, CompletionQueue, Context, DeviceKind};

use super::Clock;
use super::health::Health;
use super::worker::{Command, WorkerHandle};
use crate::error::Error;
use crate::time::Time;
use crate::transfer::{Cause, QpEvent};

/// What has become of a completion queue, to those who complete on it.
#[derive(Debug)]
struct CqFate {
    /// The device's number for it: unique while it is there.
    number: u32,
    failed: AtomicBool,
}

/// A worker's completion queue.
#[derive(Debug, Clone)]
pub(crate) struct WatchedCq {
    pub(crate) cq: CompletionQueue,
    fate: Arc<CqFate>,
}

/// A queue pair, to those who hear of its events; what it is made for keeps it.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// Of the completion queue that it completes on.
    cq: Option<Arc<CqFate>>,
    fate: OnceLock<Cause>,
}

impl Watched {
    /// Why it has failed, if an event has told.
    pub(crate) fn fate(&self) -> Option<&Cause> {
        self.fate.get()
    }

    /// Whether its completions may never come, whatever was told first: only destroying it ends what
    /// is posted on it.
    pub(crate) fn is_mute(&self) -> bool {
        let failed = |cq: &Arc<CqFate>| cq.failed.load(Ordering::Acquire);
        self.cq.as_ref().is_some_and(failed)
    }

    /// The first event stands.
    fn fail(&self, cause: Cause) {
        let _ = self.fate.set(cause);
    }
}

/// The device's port, as its events tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Port {
    /// Its number and the time when it went down, while it is.
    down: Option<(u8, Time)>,
    /// Its number and the time when it came up again.
    was_down: Option<(u8, Time)>,
}

impl Port {
    /// What keeps work from moving, if it is down.
    pub(crate) fn cause(&self) -> Option<Cause> {
        self.down.map(|(port, _)| Cause::PortDown { port })
    }

    /// Since when it has been down, if it is.
    pub(crate) fn down_since(&self) -> Option<Time> {
        self.down.map(|(_, since)| since)
    }

    /// Since when it has been up, if it is; the origin, if it has never been down.
    pub(crate) fn up_since(&self) -> Option<Time> {
        let last = self.was_down.map_or(Time(0), |(_, up)| up);
        self.down.is_none().then_some(last)
    }

    /// What a request has failed for that has tried for `tried`, if the port was down in that time.
    pub(crate) fn blame(&self, now: Time, tried: Duration) -> Option<Cause> {
        let lately = self.was_down.filter(|(_, up)| now.since(*up) < tried);
        let port = self.down.or(lately).map(|(port, _)| port);
        port.map(|port| Cause::PortDown { port })
    }
}

/// What events have told; pure.
#[derive(Debug, Default)]
struct Desk {
    /// The port of this device that counts.
    port_num: u8,
    watched: HashMap<u32, Weak<Watched>>,
    cqs: Vec<Weak<CqFate>>,
    port: Port,
    failed: bool,
}

/// What an event was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    QueuePair,
    CompletionQueue,
    PortDown,
    PortUp,
    Device,
    /// A queue pair that no transfer uses.
    Nobody,
    /// What ends no work.
    Other,
}

impl About {
    /// Whether it matters to what workers do.
    fn matters(self) -> bool {
        !matches!(self, Self::Nobody | Self::Other)
    }

    fn log(self, device: &str, event: AsyncEvent) {
        match self {
            Self::QueuePair => warn!(device, %event, "the device"),
            Self::CompletionQueue => error!(device, %event, "the device: its queue pairs are lost"),
            Self::PortDown => {
                warn!(device, %event, "the device's port: what is posted waits, and fails if that lasts");
            }
            Self::PortUp => info!(device, %event, "the device's port"),
            Self::Device => error!(device, "the device has failed: its queue pairs are lost"),
            Self::Nobody => info!(device, %event, "of a queue pair that no transfer uses"),
            Self::Other => {
                info!(device, %event, "the device tells of something that ends no work");
            }
        }
    }
}

impl Desk {
    fn add_cq(&mut self, number: u32) -> Arc<CqFate> {
        self.cqs.retain(|cq| cq.strong_count() > 0);
        let fate = Arc::new(CqFate {
            number,
            failed: AtomicBool::new(self.failed),
        });
        self.cqs.push(Arc::downgrade(&fate));
        fate
    }

    fn watch(&mut self, qp_num: u32, cq: &Arc<CqFate>) -> Arc<Watched> {
        self.watched.retain(|_, watched| watched.strong_count() > 0);
        let watched = Arc::new(Watched {
            cq: Some(Arc::clone(cq)),
            fate: OnceLock::new(),
        });
        if self.failed {
            watched.fail(Cause::DeviceFatal);
        } else if watched.is_mute() {
            watched.fail(Cause::CompletionQueue);
        }
        self.watched.insert(qp_num, Arc::downgrade(&watched));
        watched
    }

    /// Takes an event in.
    fn event(&mut self, now: Time, event: AsyncEvent) -> About {
        match event {
            AsyncEvent::QpFatal { qp_num } => self.of_qp(qp_num, QpEvent::Fatal),
            AsyncEvent::QpRequestError { qp_num } => self.of_qp(qp_num, QpEvent::RequestError),
            AsyncEvent::QpAccessError { qp_num } => self.of_qp(qp_num, QpEvent::AccessError),
            AsyncEvent::PortDown { port } if port == self.port_num => {
                self.port.down.get_or_insert((port, now));
                About::PortDown
            }
            AsyncEvent::PortUp { port } if port == self.port_num => {
                if self.port.down.take().is_some() {
                    self.port.was_down = Some((port, now));
                }
                About::PortUp
            }
            AsyncEvent::CqError { cq } => {
                self.cqs_fail(|fate| fate.number == cq, Cause::CompletionQueue);
                About::CompletionQueue
            }
            AsyncEvent::DeviceFatal => {
                self.failed = true;
                self.cqs_fail(|_| true, Cause::DeviceFatal);
                About::Device
            }
            _ => About::Other,
        }
    }

    fn of_qp(&mut self, qp_num: u32, kind: QpEvent) -> About {
        let watched = self.watched.get(&qp_num).and_then(Weak::upgrade);
        let Some(watched) = watched else {
            return About::Nobody;
        };
        watched.fail(Cause::QueuePair { event: kind });
        About::QueuePair
    }

    /// These completion queues are mute from now on, and what completes on them fails.
    fn cqs_fail(&mut self, which: impl Fn(&CqFate) -> bool, cause: Cause) {
        for fate in self.cqs.iter().filter_map(Weak::upgrade) {
            if which(&fate) {
                fate.failed.store(true, Ordering::Release);
            }
        }
        for watched in self.watched.values().filter_map(Weak::upgrade) {
            if watched.is_mute() {
                watched.fail(cause.clone());
            }
        }
    }
}

/// How the device stands with one worker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    pub(crate) port: Port,
    /// Whether the worker's completion queue has failed and the device has not.
    pub(crate) needs_cq: bool,
}

/// The events of one device, and the completion queues that its workers use.
#[derive(Debug)]
pub(crate) struct AsyncEvents {
    context: Context,
    clock: Clock,
    health: Arc<Health>,
    /// One a worker. A worker puts another in the place of one that has failed.
    cqs: Mutex<Vec<WatchedCq>>,
    /// Held while events are taken and what they are about is found.
    desk: Mutex<Desk>,
    over: AtomicBool,
}

impl AsyncEvents {
    pub(crate) fn new(
        context: Context,
        clock: Clock,
        health: Arc<Health>,
        cqs: Vec<CompletionQueue>,
    ) -> Self {
        let mut desk = Desk {
            port_num: context.device().port,
            ..Desk::default()
        };
        let cqs = cqs.into_iter().map(|cq| {
            let fate = desk.add_cq(cq.number());
            WatchedCq { cq, fate }
        });
        let cqs = Mutex::new(cqs.collect());
        Self {
            context,
            clock,
            health,
            cqs,
            desk: Mutex::new(desk),
            over: AtomicBool::new(false),
        }
    }

    /// Whether the device is the software device, whose codes for errors are known.
    pub(crate) fn is_soft(&self) -> bool {
        self.context.device().kind == DeviceKind::Soft
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Each event is taken in as a whole or not at all.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the i-th worker's queue pairs complete.
    pub(crate) fn cq(&self, worker: u16) -> Option<WatchedCq> {
        self.cqs().get(usize::from(worker)).cloned()
    }

    fn cqs(&self) -> MutexGuard<'_, Vec<WatchedCq>> {
        self.cqs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another completion queue in place of a worker's that has failed.
    ///
    /// # Errors
    ///
    /// Those of making one.
    pub(crate) fn replace_cq(&self, worker: u16, depth: u32) -> Result<CompletionQueue, Error> {
        let cq = self.context.create_cq(depth)?;
        let fate = self.desk().add_cq(cq.number());
        if let Some(place) = self.cqs().get_mut(usize::from(worker)) {
            let cq = cq.clone();
            *place = WatchedCq { cq, fate };
        }
        Ok(cq)
    }

    /// Hears of a queue pair's events from now on.
    pub(crate) fn watch(&self, qp_num: u32, cq: &WatchedCq) -> Arc<Watched> {
        self.desk().watch(qp_num, &cq.fate)
    }

    /// Whether the device has failed as a whole.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether nobody has said that the port is down.
    pub(crate) fn port_is_up(&self) -> bool {
        self.desk().port.cause().is_none()
    }

    /// Readable while the device has something to tell; nothing once it has failed.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        if self.is_over() {
            return None;
        }
        self.context.async_fd()
    }

    /// Takes what the device has to tell, and tells the workers to look.
    pub(crate) fn read(&self, workers: &[WorkerHandle]) {
        let mut news = Vec::new();
        let mut desk = self.desk();
        while let Some(event) = self.context.async_event() {
            news.push((event, desk.event(self.clock.now(), event)));
        }
        self.told(desk, &news, workers);
    }

    /// The device does not do what it must: as if it had said that it has failed.
    pub(crate) fn give_up(&self, workers: &[WorkerHandle]) {
        let mut desk = self.desk();
        let event = AsyncEvent::DeviceFatal;
        let news = [(event, desk.event(self.clock.now(), event))];
        self.told(desk, &news, workers);
    }

    fn told(
        &self,
        desk: MutexGuard<'_, Desk>,
        news: &[(AsyncEvent, About)],
        workers: &[WorkerHandle],
    ) {
        if desk.failed && !self.over.swap(true, Ordering::AcqRel) {
            // Before anybody is told: who hears of the end and asks again is refused.
            self.health.device_failed();
        }
        // A log that takes nothing more must not hold the other workers up.
        drop(desk);
        if news.iter().any(|(_, about)| about.matters()) {
            for worker in workers {
                worker.send(Command::AsyncEvents);
            }
        }
        for (event, about) in news {
            about.log(&self.context.device().name, *event);
        }
    }

    /// How the device stands, to a worker.
    pub(crate) fn standing(&self, worker: u16) -> Standing {
        let cq = self.cq(worker);
        let desk = self.desk();
        let failed = |cq: WatchedCq| cq.fate.failed.load(Ordering::Acquire);
        Standing {
            port: desk.port,
            needs_cq: !desk.failed && cq.is_some_and(failed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{BlockPair, GroupBlocks, GroupPairs};
    use crate::config::PathKind;
    use crate::engine::panic_tests::{LONG, name_of, pair_with, wait_for};
    use crate::event::Event;
    use crate::ids::RequestId;

    const PORT: u8 = 1;

    fn desk() -> (Desk, Arc<CqFate>) {
        let mut desk = Desk {
            port_num: PORT,
            ..Desk::default()
        };
        let cq = desk.add_cq(1);
        (desk, cq)
    }

    fn at(seconds: u64) -> Time {
        Time::from_millis(seconds * 1000)
    }

    #[test]
    fn an_event_reaches_its_queue_pair_and_no_other() {
        type Kind = (fn(u32) -> AsyncEvent, QpEvent);
        let kinds: [Kind; 3] = [
            (|qp_num| AsyncEvent::QpFatal { qp_num }, QpEvent::Fatal),
            (
                |qp_num| AsyncEvent::QpRequestError { qp_num },
                QpEvent::RequestError,
            ),
            (
                |qp_num| AsyncEvent::QpAccessError { qp_num },
                QpEvent::AccessError,
            ),
        ];
        for (of, kind) in kinds {
            let (mut desk, cq) = desk();
            let (one, two) = (desk.watch(7, &cq), desk.watch(8, &cq));
            assert_eq!(desk.event(at(0), of(7)), About::QueuePair);
            assert_eq!(one.fate(), Some(&Cause::QueuePair { event: kind }));
            assert_eq!(two.fate(), None);
            assert!(!one.is_mute(), "its work is flushed");
            // What comes later is not the first cause.
            assert_eq!(desk.event(at(0), AsyncEvent::DeviceFatal), About::Device);
            assert_eq!(one.fate(), Some(&Cause::QueuePair { event: kind }));
            assert!(one.is_mute(), "nothing completes any more");
            assert_eq!(two.fate(), Some(&Cause::DeviceFatal));
        }
    }

    #[test]
    fn a_queue_pair_that_had_failed_is_mute_with_its_completion_queue() {
        let (mut desk, cq) = desk();
        let watched = desk.watch(7, &cq);
        desk.event(at(0), AsyncEvent::QpFatal { qp_num: 7 });
        assert!(!watched.is_mute(), "its work is flushed");
        desk.event(at(0), AsyncEvent::CqError { cq: 1 });
        assert!(watched.is_mute());
        let event = QpEvent::Fatal;
        assert_eq!(watched.fate(), Some(&Cause::QueuePair { event }));
    }

    /// A device may give the number of a completion queue that is gone to the next one.
    #[test]
    fn a_number_that_comes_again_is_another_completion_queue() {
        let (mut desk, old) = desk();
        desk.event(at(0), AsyncEvent::CqError { cq: 1 });
        drop(old);
        let new = desk.add_cq(1);
        assert_eq!(desk.watch(7, &new).fate(), None);
    }

    #[test]
    fn an_event_of_a_queue_pair_that_is_gone_hits_nobody() {
        let (mut desk, cq) = desk();
        let fatal = AsyncEvent::QpFatal { qp_num: 7 };
        let old = desk.watch(7, &cq);
        drop(old);
        assert_eq!(desk.event(at(0), fatal), About::Nobody, "it is gone");
        // The event was for the old one; the number has a new one, which lives when the old one goes.
        let old = desk.watch(7, &cq);
        let new = desk.watch(7, &cq);
        drop(old);
        assert_eq!(new.fate(), None);
        assert_eq!(desk.event(at(0), fatal), About::QueuePair, "the new one's");
        assert!(new.fate().is_some());
        let other = AsyncEvent::QpFatal { qp_num: 9 };
        assert_eq!(desk.event(at(0), other), About::Nobody);
    }

    #[test]
    fn a_completion_queue_takes_its_queue_pairs_along_also_later_ones() {
        let (mut desk, one) = desk();
        let (two, three) = (desk.add_cq(2), desk.add_cq(3));
        let (on, off) = (desk.watch(7, &one), desk.watch(8, &two));
        let failed = AsyncEvent::CqError { cq: 1 };
        assert_eq!(desk.event(at(0), failed), About::CompletionQueue);
        assert_eq!(on.fate(), Some(&Cause::CompletionQueue));
        assert!(on.is_mute());
        assert_eq!(off.fate(), None);
        assert!(!off.is_mute());
        let later = desk.watch(9, &one);
        assert_eq!(later.fate(), Some(&Cause::CompletionQueue));
        assert_eq!(desk.watch(9, &three).fate(), None);
    }

    #[test]
    fn a_failed_device_has_no_good_queue_pair() {
        let (mut desk, cq) = desk();
        let before = desk.watch(7, &cq);
        desk.event(at(0), AsyncEvent::DeviceFatal);
        let another = desk.add_cq(2);
        for watched in [before, desk.watch(8, &cq), desk.watch(9, &another)] {
            assert_eq!(watched.fate(), Some(&Cause::DeviceFatal));
            assert!(watched.is_mute());
        }
    }

    #[test]
    fn a_port_is_to_blame_while_it_is_down_and_for_what_was_tried_then() {
        let (mut desk, _cq) = desk();
        let tried = Duration::from_secs(8);
        let down = Some(Cause::PortDown { port: PORT });
        let (goes, comes) = (
            AsyncEvent::PortDown { port: PORT },
            AsyncEvent::PortUp { port: PORT },
        );
        assert_eq!(desk.port.blame(at(0), tried), None);
        // Another port of the card is nobody's here.
        let other = AsyncEvent::PortDown { port: 2 };
        assert_eq!(desk.event(at(1), other), About::Other);
        assert_eq!(desk.port, Port::default());
        assert_eq!(desk.event(at(1), goes), About::PortDown);
        assert_eq!(desk.port.cause(), down);
        assert_eq!(desk.port.blame(at(1000), tried), down);
        assert_eq!(desk.event(at(1000), comes), About::PortUp);
        assert_eq!(desk.port.cause(), None);
        assert_eq!(desk.port.blame(at(1007), tried), down);
        assert_eq!(desk.port.blame(at(1008), tried), None);
        // Up again without having been down, after a change of speed for one.
        desk.event(at(2000), comes);
        assert_eq!(desk.port.blame(at(2001), tried), None);
    }

    #[test]
    fn other_events_change_nothing() {
        let (mut desk, cq) = desk();
        let watched = desk.watch(7, &cq);
        for code in 0..100 {
            let about = desk.event(at(0), AsyncEvent::Other { code });
            assert!(!about.matters());
        }
        assert_eq!(watched.fate(), None);
        assert_eq!(desk.port, Port::default());
    }

    /// One worker has read what another's completions are about, and that one is not told yet.
    #[test]
    fn an_event_that_another_worker_has_read_names_the_cause() {
        let plan = "qp-fatal=1,event-lag=1000s,delay=1:500ms";
        let (producer, consumer, _instance, _) = pair_with(PathKind::Arena, Some(plan));
        let request = RequestId::from("r");
        let blocks = vec![GroupBlocks {
            group: 0,
            blocks: vec![0],
        }];
        let expected = consumer.engine.expect(&request, &blocks, 1, LONG);
        expected.expect("an expectation");
        let mut seen = Vec::new();
        wait_for(&producer.engine, &mut seen, |event| {
            matches!(event, Event::PeerUp { .. })
        });
        let back = producer.engine.peer_of(&name_of(&consumer));
        let push = back.expect("a session").begin_push(&request);
        let push = push.expect("a push");
        let pairs = vec![GroupPairs {
            group: 0,
            pairs: vec![BlockPair { src: 0, dst: 0 }],
        }];
        push.all_layers(&pairs, None).expect("fits");
        // It is posted by then, and completes later.
        std::thread::sleep(Duration::from_millis(100));
        producer.engine.inner().runtime.rails()[0]
            .events
            .give_up(&[]);
        let outcome = push.commit().expect("a push").wait(LONG);
        let outcome = outcome.expect("an outcome");
        let failure = outcome.failure().expect("its queue pair fails");
        assert_eq!(failure.first_cause, Cause::DeviceFatal);
    }
}
