//! Stores in a wrong order are found. The host build has looks into the order of its stores there, and
//! faults that can be planted (`kernels/planted.hip`); no program has that image.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use kvxfer_hipmem::HostMemory;
use kvxfer_hipmem::kernels::queue::{ALL, DIRECT, EACH, GPU_WQE, POSTED, PUT, PostArgs};
use kvxfer_hipmem::post::{Status, Taken};
use kvxfer_verbs::mlx5::SendWqe;
use kvxfer_verbs::mlx5::model::{Hca, Violation};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::ring::{self, moves};
use crate::{LONG, SHORT, ends, regions, run, wqe};

#[cfg(target_arch = "x86_64")]
const IMAGE: &[u8] = include_bytes!("../../prebuilt/planted-x86_64.so");
#[cfg(target_arch = "aarch64")]
const IMAGE: &[u8] = include_bytes!("../../prebuilt/planted-aarch64.so");

/// The numbers of `kernels/post.h`.
const NOTHING: u32 = 0;
const PHASE_FIRST: u32 = 1;
const RECORD_LATE: u32 = 2;
const BELL_FROM_SLOT: u32 = 3;
const NO_CQ_RECORD: u32 = 4;
const WQE_LATE: u32 = 5;
const NO_TURN: u32 = 6;
const TOLD_FIRST: u32 = 7;
const READY_EARLY: u32 = 8;
const READY_STALE: u32 = 9;
const BELL_OWN: u32 = 10;
const PATIENCE_TWICE: u32 = 11;
const AT_PHASE: u32 = 1;
const AT_RECORD: u32 = 2;
const AT_BELL: u32 = 3;
const AT_READY: u32 = 4;

type Look = Arc<dyn Fn(u32, u64) + Send + Sync>;
type Trap = unsafe extern "C" fn(slots: u64, what: u32, value: u64);
type Now = unsafe extern "C" fn(slots: u64) -> u64;
type PostFn = unsafe extern "C" fn(args: *const PostArgs, first: u32, end: u32, groups: u32);

fn held<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What looks at each queue, by the address of its slots.
fn looks() -> MutexGuard<'static, HashMap<u64, Look>> {
    static LOOKS: OnceLock<Mutex<HashMap<u64, Look>>> = OnceLock::new();
    held(LOOKS.get_or_init(Mutex::default))
}

unsafe extern "C" fn trap(slots: u64, what: u32, value: u64) {
    let look = looks().get(&slots).cloned();
    if let Some(look) = look {
        look(what, value);
    }
}

/// The clock of each queue that has one of its own, by the address of its slots: it goes on by a tick whenever somebody
/// looks at it, and this is called with the tick.
fn clocks() -> MutexGuard<'static, HashMap<u64, Clock>> {
    static CLOCKS: OnceLock<Mutex<HashMap<u64, Clock>>> = OnceLock::new();
    held(CLOCKS.get_or_init(Mutex::default))
}

struct Clock {
    ticks: u64,
    at: Box<dyn FnMut(u64) + Send>,
}

unsafe extern "C" fn now(slots: u64) -> u64 {
    clocks().get_mut(&slots).map_or(0, |clock| {
        clock.ticks += 1;
        (clock.at)(clock.ticks);
        clock.ticks
    })
}

/// An image of one's own, so that a fault is planted for one test alone.
struct Image {
    post: PostFn,
    library: Library,
    /// The loader knows libraries by their path: while this one is loaded, no other has its number.
    _file: File,
}

impl Image {
    fn planted(fault: u32) -> Self {
        let fd = memfd_create("kvxfer-planted", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let mut file = File::from(fd);
        file.write_all(IMAGE).expect("room");
        // Another path than that of the image that programs have.
        let path = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
        // SAFETY: the image has no initialisers and no dependencies.
        let library =
            unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.expect("it loads");
        // SAFETY: as kernels/post.hip defines it.
        let post: Symbol<PostFn> = unsafe { library.get(b"kvx_post_host\0") }.expect("it is there");
        let post = *post;
        // SAFETY: a number, as kernels/planted.hip defines it.
        let which: Symbol<*mut u32> =
            unsafe { library.get(b"kvx_planted\0") }.expect("it is there");
        // SAFETY: the image is this test's alone, and none of its code runs yet.
        unsafe { which.write(fault) };
        // SAFETY: a function pointer, as kernels/planted.hip defines it.
        let hook: Symbol<*mut Trap> = unsafe { library.get(b"kvx_trap\0") }.expect("it is there");
        // SAFETY: as above.
        unsafe { hook.write(trap) };
        Self {
            post,
            library,
            _file: file,
        }
    }

    /// With clocks that tick when they are looked at.
    fn timed(fault: u32) -> Self {
        let image = Self::planted(fault);
        // SAFETY: a function pointer, as kernels/planted.hip defines it.
        let hook: Symbol<*mut Now> =
            unsafe { image.library.get(b"kvx_now\0") }.expect("it is there");
        // SAFETY: the image is this test's alone, and none of its code runs yet.
        unsafe { hook.write(now) };
        image
    }

    fn post(&self) -> impl Fn(&PostArgs, Range<u32>) + Sync + use<'_> {
        |args, posters| {
            // SAFETY: as for the image that programs have.
            unsafe { (self.post)(args, posters.start, posters.end, args.posters) };
        }
    }
}

/// The number of the first WQE.
const FIRST: u64 = 0xfff0;

/// A device that looks at each store in the moment in which it is made, and what it has found.
struct Trapped {
    hca: Hca<HostMemory, wqe::Counted>,
    sq: HostMemory,
    depth: u64,
    /// The first rule that was broken: from then on nothing is looked at.
    violation: Option<Violation>,
    /// Posts that others might have rung for.
    ready: usize,
    /// Of those, posts whose WQE was not there.
    not_whole: usize,
    doorbells: usize,
}

impl Trapped {
    fn new(hca: Hca<HostMemory, wqe::Counted>, sq: &HostMemory, depth: u32) -> Self {
        Self {
            hca,
            sq: sq.clone(),
            depth: depth.into(),
            violation: None,
            ready: 0,
            not_whole: 0,
            doorbells: 0,
        }
    }

    /// `false` where a rule is broken.
    fn look(&mut self, what: u32, value: u64) -> bool {
        if self.violation.is_some() {
            // A device in an undefined state.
            return true;
        }
        let seen = match what {
            // It may fetch as soon as it is told.
            AT_RECORD => self.hca.see_record(),
            AT_BELL => {
                self.doorbells += 1;
                self.hca.ring(value.to_ne_bytes())
            }
            AT_READY => {
                let mut slot = [0; 64];
                let at = 64 * (value & (self.depth - 1));
                self.sq.read(at, &mut slot).expect("inside");
                let is_whole = SendWqe::decode(&slot).is_ok_and(|wqe| wqe.index == value as u16);
                // Or somebody has rung for it meanwhile, and its slot was given back.
                let is_taken = value < self.hca.consumed();
                self.ready += 1;
                self.not_whole += usize::from(!is_whole && !is_taken);
                Ok(0)
            }
            _ => Ok(0),
        };
        self.violation = seen.err();
        self.violation.is_none()
    }
}

/// Posts WQEs while the device looks at each store. What it has found, and what the posters were told.
fn trapped(
    fault: u32,
    (kind, depth): (u32, u32),
    posters: u32,
    each: usize,
) -> (Trapped, Vec<(Status, Status)>) {
    let image = Image::planted(fault);
    let patience = if fault == NOTHING { LONG } else { SHORT };
    let bench = wqe::Bench::new(kind, depth, depth, FIRST, patience);
    if fault == NO_TURN {
        // Its turn never comes.
        bench.around.lose_a_ticket();
    }
    let device = Trapped::new(bench.hca, &bench.sq, depth);
    let device = Arc::new(Mutex::new(device));
    let looking = Arc::clone(&device);
    let abort = (fault == NOTHING).then(|| bench.around.abort.clone());
    let look = move |what, value: u64| {
        let is_well = held(&looking).look(what, value);
        if let (false, Some(abort)) = (is_well, &abort) {
            // What should not be has happened, and nobody need wait for its end.
            let _ = abort.store_u64(0, 1);
        }
        if what == AT_BELL {
            // While it is its turn others come to be ready.
            thread::yield_now();
        }
    };
    looks().insert(bench.queue.slots, Arc::new(look));
    let moves = moves(each * posters as usize);
    let results = run(&image.post(), bench.queue, &moves, posters, PUT, ALL);
    looks().remove(&bench.queue.slots);
    let device = Arc::into_inner(device).expect("nobody looks any more");
    let device = device.into_inner().unwrap_or_else(PoisonError::into_inner);
    if device.violation.is_none() {
        let done = &device.hca.sink().0[..moves.len()];
        assert!(done.iter().all(|n| *n == 1), "each once");
    }
    (device, ends(&results))
}

/// The rule that one poster breaks.
fn broken(fault: u32, each: usize) -> Option<Violation> {
    trapped(fault, (DIRECT, 4), 1, each).0.violation
}

#[test]
fn the_order_of_stores_is_right() {
    for kind in [DIRECT, GPU_WQE] {
        let (device, ends) = trapped(NOTHING, (kind, 4), 3, 1000);
        assert_eq!(device.violation, None);
        assert_eq!((device.ready, device.not_whole), (3000, 0));
        assert!(ends.iter().all(|end| *end == (Status::Ok, Status::Ok)));
    }
}

#[test]
fn a_hundred_thousand_posts_have_fewer_doorbells() {
    let (device, ends) = trapped(NOTHING, (DIRECT, 64), 4, 25_000);
    assert_eq!((device.violation, device.not_whole), (None, 0));
    assert!(ends.iter().all(|end| *end == (Status::Ok, Status::Ok)));
    println!("{} doorbells for {} posts", device.doorbells, device.ready);
    assert_eq!(device.ready, 100_000);
    // Four posters have four posts ready at most.
    assert!(
        (25_000..100_000).contains(&device.doorbells),
        "{}",
        device.doorbells
    );
}

/// Three posts whose turn comes when all of them are ready: somebody before them was slow.
fn together(fault: u32) -> (Trapped, Vec<(Status, Status)>) {
    const DEPTH: u32 = 8;
    let image = Image::planted(fault);
    let bench = wqe::Bench::new(DIRECT, DEPTH, DEPTH, FIRST, LONG);
    bench.around.lose_a_ticket();
    let device = Trapped::new(bench.hca, &bench.sq, DEPTH);
    let device = Arc::new(Mutex::new(device));
    let (looking, all) = (Arc::clone(&device), moves(4));
    let (sq, record, state) = (
        bench.sq.clone(),
        bench.record.clone(),
        bench.around.state.clone(),
    );
    let late = wqe::put(FIRST, &all[3]);
    let look = move |what, value: u64| {
        let mut device = held(&looking);
        device.look(what, value);
        if (what, device.ready) == (AT_READY, 3) {
            // It comes to itself, and is told of.
            let at = 64 * (FIRST & u64::from(DEPTH - 1));
            sq.write(at, &late).expect("inside");
            record.write(6, &[0xff, 0xf1]).expect("inside");
            let head = late.first_chunk().expect("eight bytes");
            assert_eq!(device.hca.ring(*head), Ok(1));
            state.store_u64(24, FIRST + 1).expect("inside");
        }
    };
    looks().insert(bench.queue.slots, Arc::new(look));
    let results = run(&image.post(), bench.queue, &all[..3], 3, PUT, POSTED);
    looks().remove(&bench.queue.slots);
    let device = Arc::into_inner(device).expect("nobody looks any more");
    let device = device.into_inner().unwrap_or_else(PoisonError::into_inner);
    (device, ends(&results))
}

#[test]
fn who_has_the_turn_rings_once_for_all_that_are_ready() {
    let (device, ends) = together(NOTHING);
    assert_eq!((device.violation, device.doorbells), (None, 1));
    assert!(ends.iter().all(|(posted, _)| *posted == Status::Ok));
    assert_eq!(device.hca.consumed(), FIRST + 4);
    assert_eq!(device.hca.sink().0[..4], [1; 4]);
}

/// Who rings has looked, and is slow: meanwhile one that it has found gives its turn up.
#[test]
fn what_was_given_up_may_have_been_rung_for_and_has_failed_the_queue() {
    let image = Image::planted(NOTHING);
    // The second one has to be found before that is over, on a busy machine too.
    let patience = 200 * SHORT;
    let mut bench = wqe::Bench::new(DIRECT, 4, 4, FIRST, patience);
    let all = moves(2);
    let (queue, post) = (bench.queue, image.post());
    let (ready, is_ready) = channel();
    let (ends_here, has_ended) = channel();
    let (found, is_found) = channel();
    let has_ended = Mutex::new(has_ended);
    let look = move |what, value| match what {
        // The first one is ready, and does not look before the second one is.
        AT_READY if value == FIRST => {
            let _ = found.send(());
            let _ = held(&has_ended).recv();
        }
        AT_READY => {
            let _ = ready.send(());
        }
        // It has found both: the other one gives up.
        AT_RECORD => {
            let _ = held(&has_ended).recv();
        }
        _ => {}
    };
    looks().insert(queue.slots, Arc::new(look));
    let (first, second) = thread::scope(|scope| {
        let first = scope.spawn(|| run(&post, queue, &all[..1], 1, PUT, POSTED));
        is_found.recv().expect("it has a number");
        let second = scope.spawn(|| run(&post, queue, &all[1..], 1, PUT, POSTED));
        is_ready.recv().expect("it is ready");
        ends_here.send(()).expect("it goes on to look");
        let second = second.join().expect("it gives up");
        ends_here.send(()).expect("it goes on to ring");
        (first.join().expect("it rings"), second)
    });
    looks().remove(&queue.slots);
    assert_eq!(ends(&first)[0].0, Status::Ok);
    assert_eq!(ends(&second)[0].0, Status::Timeout);
    assert_eq!(bench.hca.look(u64::MAX), Ok(2), "both were rung for");
    assert_eq!(bench.hca.sink().0[..2], [1, 1]);
    let fault = bench.report.load_u64(8).expect("inside");
    assert_eq!((fault >> 8, fault & 0xff), (FIRST + 2, 1));
}

#[test]
fn a_doorbell_of_ones_own_for_all_is_found() {
    let (device, _) = together(BELL_OWN);
    assert_eq!(
        device.violation,
        Some(Violation::RecordBehind {
            doorbell: 0xfff2,
            record: 0xfff4
        })
    );
}

#[test]
fn a_post_that_is_ready_before_its_wqe_is_found() {
    let (device, _) = trapped(READY_EARLY, (DIRECT, 4), 1, 2);
    assert_eq!((device.ready, device.not_whole), (2, 2));
}

#[test]
fn ringing_for_posts_of_the_lap_before_is_found() {
    // Of four slots: behind the fourth post is what the first has left.
    assert_eq!(broken(READY_STALE, 3), None);
    assert_eq!(
        broken(READY_STALE, 4),
        Some(Violation::RecordSpan {
            record: 0xfff1,
            consumed: 0xfff3,
            depth: 4
        })
    );
}

#[test]
fn a_record_written_after_the_doorbell_is_found() {
    assert_eq!(
        broken(RECORD_LATE, 1),
        Some(Violation::RecordBehind {
            doorbell: 0xfff1,
            record: 0xfff0
        })
    );
}

#[test]
fn a_doorbell_built_from_the_slot_is_found() {
    let violation = broken(BELL_FROM_SLOT, 1);
    assert!(
        matches!(violation, Some(Violation::Doorbell { .. })),
        "{violation:?}"
    );
}

#[test]
fn a_wqe_written_after_its_record_is_found() {
    // The model's memory is zeros before the first lap: no WQE that there is.
    let violation = broken(WQE_LATE, 1);
    assert!(
        matches!(violation, Some(Violation::Wqe { n: FIRST, .. })),
        "{violation:?}"
    );
}

#[test]
fn a_poster_that_rings_before_its_turn_is_found() {
    let violation = broken(NO_TURN, 1);
    assert!(
        matches!(violation, Some(Violation::Wqe { n: FIRST, .. })),
        "{violation:?}"
    );
}

#[test]
fn a_ticket_that_ends_with_its_first_piece_is_found() {
    let image = Image::planted(TOLD_FIRST);
    let late = regions::told(&image.post(), SHORT);
    assert_eq!(late, [(Status::Ok, Status::Timeout)], "and nobody hangs");
    let image = Image::planted(NOTHING);
    let well = regions::told(&image.post(), LONG);
    assert_eq!(well, [(Status::Ok, Status::Ok)]);
}

#[test]
fn completions_that_are_not_given_back_are_found() {
    let (device, ends) = trapped(NO_CQ_RECORD, (DIRECT, 4), 1, 5);
    assert_eq!(
        device.violation,
        Some(Violation::NoRoom {
            n: 0xfff4,
            taken: 0xfff0,
            depth: 4
        })
    );
    assert_eq!(ends[4], (Status::Ok, Status::Timeout), "and nobody hangs");
}

/// Posts descriptors while the consumer looks in the moment in which each phase is stored.
fn trapped_ring(fault: u32, posters: u32, each: usize) -> (Vec<Taken>, Vec<(Status, Status)>) {
    let image = Image::planted(fault);
    let patience = if fault == NOTHING { LONG } else { SHORT };
    let bench = ring::Bench::new(4, 0xfff0, patience);
    let shared = Arc::new(Mutex::new((bench.consumer, Vec::new())));
    let looking = Arc::clone(&shared);
    let words = bench.ring.clone();
    let look = move |what, _| {
        let mut shared = held(&looking);
        let (consumer, all) = &mut *shared;
        while what == AT_PHASE
            && let Ok(Some(taken)) = consumer.take(&words)
        {
            if let Taken::Post(post) = &taken {
                let ended = consumer.complete(&words, post.ticket, Status::Ok);
                assert!(matches!(ended, Ok(Ok(()))));
            }
            all.push(taken);
        }
    };
    looks().insert(bench.queue.slots, Arc::new(look));
    let moves = moves(each * posters as usize);
    let results = run(&image.post(), bench.queue, &moves, posters, PUT, EACH);
    looks().remove(&bench.queue.slots);
    let all = std::mem::take(&mut held(&shared).1);
    (all, ends(&results))
}

#[test]
fn descriptors_are_whole_when_their_phase_is_there() {
    let (taken, ends) = trapped_ring(NOTHING, 3, 1000);
    assert_eq!(taken.len(), 3000);
    assert!(taken.iter().all(|taken| matches!(taken, Taken::Post(_))));
    assert!(ends.iter().all(|end| *end == (Status::Ok, Status::Ok)));
}

#[test]
fn a_phase_stored_first_is_found() {
    let (taken, ends) = trapped_ring(PHASE_FIRST, 1, 1);
    assert!(matches!(taken[..], [Taken::Refused(_)]), "{taken:?}");
    assert_eq!(ends, [(Status::Ok, Status::Malformed)]);
}

/// Ticks that a call has patience for, and of those what is waited for room at most.
const PATIENCE: u64 = 1000;
const FOR_ROOM: u64 = PATIENCE - PATIENCE / 4;

/// A post to a queue of two slots that is full until this tick of it, and whose turn never comes. What it was told, and
/// how many ticks it has looked for.
fn waits(fault: u32, room_at: u64) -> (Status, u64) {
    let image = Image::timed(fault);
    let wqe::Bench {
        queue,
        mut hca,
        around,
        ..
    } = wqe::Bench::new(DIRECT, 2, 2, 0, PATIENCE);
    let of_one = |at: Box<dyn FnMut(u64) + Send>| {
        clocks().insert(queue.slots, Clock { ticks: 0, at });
        let results = run(&image.post(), queue, &moves(1), 1, PUT, POSTED);
        let clock = clocks().remove(&queue.slots).expect("it is there");
        (ends(&results)[0].0, clock.ticks)
    };
    // It has begun, and nothing was to be waited for.
    let looks = 1 + u64::from(fault == PATIENCE_TWICE);
    assert_eq!(of_one(Box::new(|_| {})), (Status::Ok, looks));
    around.lose_a_ticket();
    of_one(Box::new(move |tick| {
        if tick == room_at {
            assert_eq!(hca.look(u64::MAX), Ok(1), "the first one ends");
        }
    }))
}

#[test]
fn a_post_has_one_patience_for_room_and_for_its_turn() {
    // The first tick is its beginning, the last one more than it is patient.
    for room_at in [2, 600, FOR_ROOM] {
        let waited = waits(NOTHING, room_at);
        assert_eq!(waited, (Status::Timeout, PATIENCE + 2), "{room_at}");
        let (status, twice) = waits(PATIENCE_TWICE, room_at);
        assert_eq!(status, Status::Timeout);
        assert!(
            twice >= PATIENCE + room_at,
            "a patience of its own is found"
        );
    }
    // Who has waited too long for room takes no number, which would leave no time for its turn.
    assert_eq!(
        waits(NOTHING, FOR_ROOM + 3),
        (Status::Timeout, FOR_ROOM + 2)
    );
}

#[test]
fn a_post_to_a_ring_waits_for_room_as_long_as_it_is_patient() {
    let image = Image::timed(NOTHING);
    let bench = ring::Bench::new(1, 0, PATIENCE);
    for (status, ticks) in [(Status::Ok, 1), (Status::Timeout, PATIENCE + 2)] {
        let at = Box::new(|_| {});
        clocks().insert(bench.queue.slots, Clock { ticks: 0, at });
        let results = run(&image.post(), bench.queue, &moves(1), 1, PUT, POSTED);
        let clock = clocks().remove(&bench.queue.slots).expect("it is there");
        assert_eq!((ends(&results)[0].0, clock.ticks), (status, ticks));
    }
}
