//! Stores in a wrong order are found. The host build has looks into the order of its stores there, and
//! faults that can be planted (`kernels/planted.hip`); no program has that image.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvxfer_hipmem::kernels::queue::{ALL, DIRECT, EACH, GPU_WQE, PUT, PostArgs};
use kvxfer_hipmem::post::{Status, Taken};
use kvxfer_verbs::mlx5::model::Violation;
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
const AT_PHASE: u32 = 1;
const AT_RECORD: u32 = 2;
const AT_BELL: u32 = 3;

type Look = Arc<dyn Fn(u32, u64) + Send + Sync>;
type Trap = unsafe extern "C" fn(slots: u64, what: u32, value: u64);
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

/// An image of one's own, so that a fault is planted for one test alone.
struct Image {
    post: PostFn,
    _library: Library,
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
            _library: library,
            _file: file,
        }
    }

    fn post(&self) -> impl Fn(&PostArgs, Range<u32>) + Sync + use<'_> {
        |args, posters| {
            // SAFETY: as for the image that programs have.
            unsafe { (self.post)(args, posters.start, posters.end, args.posters) };
        }
    }
}

/// Posts WQEs while the device looks at each store in the moment in which it is made. What rule they
/// have broken, and what the posters were told.
fn trapped(
    fault: u32,
    kind: u32,
    posters: u32,
    each: usize,
) -> (Option<Violation>, Vec<(Status, Status)>) {
    let image = Image::planted(fault);
    let patience = if fault == NOTHING { LONG } else { SHORT };
    let bench = wqe::Bench::new(kind, 4, 4, 0xfff0, patience);
    if fault == NO_TURN {
        // Its turn never comes.
        bench.around.lose_a_ticket();
    }
    let hca = Arc::new(Mutex::new((bench.hca, None)));
    let looking = Arc::clone(&hca);
    let abort = (fault == NOTHING).then(|| bench.around.abort.clone());
    let look = move |what, value: u64| {
        let mut hca = held(&looking);
        if hca.1.is_some() {
            // A device in an undefined state.
            return;
        }
        let seen = match what {
            // It may fetch as soon as it is told.
            AT_RECORD => hca.0.see_record(),
            AT_BELL => hca.0.ring(value.to_ne_bytes()),
            _ => Ok(0),
        };
        hca.1 = seen.err();
        if let (Some(_), Some(abort)) = (&hca.1, &abort) {
            // What should not be has happened, and nobody need wait for its end.
            let _ = abort.store_u64(0, 1);
        }
    };
    looks().insert(bench.queue.slots, Arc::new(look));
    let moves = moves(each * posters as usize);
    let results = run(&image.post(), bench.queue, &moves, posters, PUT, ALL);
    looks().remove(&bench.queue.slots);
    let violation = held(&hca).1;
    if violation.is_none() {
        let hca = held(&hca);
        assert!(hca.0.sink().0[..moves.len()].iter().all(|n| *n == 1));
    }
    (violation, ends(&results))
}

#[test]
fn the_order_of_stores_is_right() {
    for kind in [DIRECT, GPU_WQE] {
        let (violation, ends) = trapped(NOTHING, kind, 3, 1000);
        assert_eq!(violation, None);
        assert!(ends.iter().all(|end| *end == (Status::Ok, Status::Ok)));
    }
}

#[test]
fn a_record_written_after_the_doorbell_is_found() {
    let (violation, _) = trapped(RECORD_LATE, DIRECT, 1, 1);
    assert_eq!(
        violation,
        Some(Violation::RecordBehind {
            doorbell: 0xfff1,
            record: 0xfff0
        })
    );
}

#[test]
fn a_doorbell_built_from_the_slot_is_found() {
    let (violation, _) = trapped(BELL_FROM_SLOT, DIRECT, 1, 1);
    assert!(
        matches!(violation, Some(Violation::Doorbell { .. })),
        "{violation:?}"
    );
}

#[test]
fn a_wqe_written_after_its_record_is_found() {
    // The model's memory is zeros before the first lap: no WQE that there is.
    let (violation, _) = trapped(WQE_LATE, DIRECT, 1, 1);
    assert!(
        matches!(violation, Some(Violation::Wqe { n: 0xfff0, .. })),
        "{violation:?}"
    );
}

#[test]
fn a_poster_that_rings_before_its_turn_is_found() {
    let (violation, _) = trapped(NO_TURN, DIRECT, 1, 1);
    assert!(
        matches!(violation, Some(Violation::Wqe { n: 0xfff0, .. })),
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
    let (violation, ends) = trapped(NO_CQ_RECORD, DIRECT, 1, 5);
    assert_eq!(
        violation,
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
