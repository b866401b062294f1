//! Two rails: each side has two devices, on two cables. One cable is cut while blocks move, and they
//! arrive all the same, over the other.

use kvxfer::blocks::GroupPairs;
use kvxfer::config::{Config, ConfigBuilder, KvRole, PathKind};
use kvxfer::engine::Outcome;
use kvxfer::event::Event;

use crate::support::{LONG, dealt, until};
use crate::vram::on_gpus;
use crate::{Pair, sh};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 128;
/// Pushes of the same bytes, so that one is long enough to be struck.
const TIMES: u32 = 4;

/// The second cable, which is there from the first use on; both are mended when this goes.
struct Rails;

impl Rails {
    fn new() -> Self {
        let second = std::path::Path::new("/sys/class/infiniband/ra2");
        if !second.exists() {
            sh("sh \"$KVXFER_VM/two-hosts.sh\" make 2");
        }
        let rails = Self;
        rails.up();
        rails
    }

    fn up(&self) {
        let state = |device: &str| {
            let path = format!("/sys/class/infiniband/{device}/ports/1/state");
            std::fs::read_to_string(path).unwrap_or_default()
        };
        let up = |device: &&str| state(device).contains("ACTIVE");
        until("all ports", || ["ra", "rb", "ra2", "rb2"].iter().all(up));
    }

    fn mend(&self) {
        sh("sh \"$KVXFER_VM/two-hosts.sh\" mend; sh \"$KVXFER_VM/two-hosts.sh\" mend 2");
    }
}

impl Drop for Rails {
    fn drop(&mut self) {
        self.mend();
    }
}

/// The devices of a side.
fn two_rails(config: &mut Config) {
    let names = match config.kv_role {
        KvRole::Consumer => "rb,rb2",
        _ => "ra,ra2",
    };
    let mut builder = ConfigBuilder::new();
    let given = builder.flag("rdma_devices", "a test", names);
    let given = given.and_then(|builder| builder.build());
    config.rdma_devices = given.expect("names of devices").rdma_devices;
    // Soft-RoCE loses its place in a write that it tries again: what waits behind much else is not to be
    // late.
    config.max_inflight_bytes.0 = 8 << 20;
}

fn sent_on(end: &str) -> u64 {
    let path = format!("/sys/class/net/{end}/statistics/tx_bytes");
    let text = std::fs::read_to_string(path).expect("a cable's end");
    text.trim().parse().expect("a number")
}

/// The devices that the way goes over, and those that it does without.
fn devices(pair: &Pair) -> (Vec<String>, Vec<String>) {
    let path = pair.instance.path().expect("the session stands");
    let skipped = path.skipped.iter().map(|rail| {
        println!("{}: {}", rail.device, rail.reason);
        rail.device.clone()
    });
    let rails = path.rails.iter().map(|rail| rail.device.clone());
    (rails.collect(), skipped.collect())
}

fn never_down(pair: &mut Pair) {
    let name = pair.consumer.name();
    assert!(pair.instance.wait_up(LONG));
    assert!(pair.producer.engine.peer_of(&name).is_some());
    pair.told_once();
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_blocks_go_over_both_rails() {
    let rails = Rails::new();
    // Between memories of the host, and of GPUs.
    for mems in [(false, false), (true, true)] {
        let mut pair = Pair::of(BLOCK, BLOCKS, |recipe| {
            two_rails(&mut recipe.config);
            on_gpus(recipe, mems);
        });
        let path = pair.instance.path().expect("up").path;
        assert_eq!(path, PathKind::Rdma, "{mems:?}");
        let both = vec!["rb".to_owned(), "rb2".to_owned()];
        assert_eq!(devices(&pair), (both, Vec::new()));
        let (lanes, _) = pair.instance.lanes().expect("up");
        assert_eq!(lanes, 8, "four on each rail");
        let before = ["ha", "ha2"].map(sent_on);
        let [pulled, pushed] = pair.moves(&pair.all());
        let bytes = pulled.bytes + pushed.bytes;
        for (end, before) in ["ha", "ha2"].into_iter().zip(before) {
            let sent = sent_on(end) - before;
            println!("{end}: {sent} of {bytes}");
            assert!(sent > bytes / 8, "{end} carries {sent} of {bytes}");
        }
    }
    drop(rails);
}

/// A part of all blocks, for what only has to work.
fn few(pair: &Pair) -> Vec<GroupPairs> {
    let mut parts = dealt(&pair.all(), 8);
    parts.pop().expect("a part")
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_pull_goes_on_when_a_rail_is_cut() {
    let rails = Rails::new();
    let mut pair = Pair::new(BLOCK, BLOCKS, two_rails);
    let table = pair.all();
    let transfer = pair.pull(&table, LONG).expect("a transfer");
    pair.bytes_have_come();
    sh("ip link set ha2 down");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    pair.arrived(&table);
    // Should it have been done before: what comes next finds the cable cut.
    pair.moves(&few(&pair));
    // A side that had nothing there hears of it a moment later.
    until("the rail that is set aside", || devices(&pair).1 == ["rb2"]);
    rails.mend();
    rails.up();
    pair.moves(&few(&pair));
    never_down(&mut pair);
}

/// A push goes on too; and when it is received, nothing of what was lost lands in blocks that are the
/// owner's again, also when the cable is back.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_push_goes_on_when_a_rail_is_cut() {
    const RECYCLED: u64 = 0x5c5c_5c5c_5c5c_5c5c;
    let rails = Rails::new();
    let mut pair = Pair::new(BLOCK, BLOCKS, two_rails);
    let table = pair.all();
    let (request, transfer) = pair.push_times(TIMES, &table, LONG).expect("a transfer");
    pair.bytes_have_come();
    sh("ip link set ha down");
    assert_eq!(transfer.wait(LONG), Some(Outcome::Done));
    let of = |event: &Event| event.request().is_some_and(|(r, _)| *r == request);
    let ended = pair.told[1].wait("end of the expectation", of);
    assert!(matches!(ended, Event::Received { .. }), "{ended:?}");
    pair.arrived(&table);
    // A side that had nothing there hears of it a moment later.
    until("the rail that is set aside", || devices(&pair).1 == ["rb"]);
    pair.consumer.fill_blocks(0..BLOCKS, RECYCLED);
    rails.mend();
    rails.up();
    std::thread::sleep(std::time::Duration::from_millis(500));
    pair.consumer.assert_blocks(0..BLOCKS, RECYCLED);
    pair.consumer.side.poison().expect("poisoned");
    pair.moves(&few(&pair));
    never_down(&mut pair);
}
