//! Blocks of every size arrive as they left, over as many queue pairs as are asked for.

use kvxfer::bench::scattered_pairs;

use crate::Pair;
use crate::support::pairs;

fn over_the_cable() -> u64 {
    let path = "/sys/class/net/ha/statistics/tx_bytes";
    let text = std::fs::read_to_string(path).expect("the cable's end");
    text.trim().parse().expect("a number")
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_blocks_go_over_as_many_queue_pairs_as_are_asked_for() {
    // At last with the smallest completion queue: it holds back what is posted, and has room for all receives.
    for (count, notices, entries) in [(1, false, 0), (4, true, 0), (16, true, 0), (16, true, 1)] {
        let mut pair = Pair::new(16 << 10, 96, |config| {
            config.qp_per_transfer = count;
            config.enable_notification = notices;
            config.max_cqe_num = entries;
        });
        let path = pair.instance.path().expect("up");
        let link = path.rails.first().expect("RDMA devices");
        assert_eq!(link.device, "rb");
        assert_eq!(link.queue_pairs.len(), count as usize);
        let (lanes, _) = pair.instance.lanes().expect("up");
        assert_eq!(lanes, count as usize);
        let before = over_the_cable();
        let [pulled, pushed] = pair.moves(&pair.all());
        // Two layers, both ways from `ra`.
        let bytes = (16 << 10) * 96 * 2;
        assert_eq!([pulled.bytes, pushed.bytes], [bytes; 2]);
        assert!(over_the_cable() - before > 2 * bytes, "not over the cable");
        // Whatever the setting: a receive's completion alone says that the data is there.
        assert!(pushed.data_plane_notice);
    }
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_sides_of_different_mtus_meet_at_the_smaller() {
    for mtu in [256, 1024] {
        let mut pair = Pair::new(16 << 10, 8, |config| {
            if config.kv_role == kvxfer::config::KvRole::Consumer {
                config.rdma_mtu = mtu;
            }
        });
        let path = pair.instance.path().expect("up");
        let link = path.rails.first().expect("RDMA");
        assert_eq!(i64::from(link.mtu), i64::from(mtu));
        pair.moves(&pair.all());
    }
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_ten_thousand_scattered_blocks() {
    const BLOCKS: u32 = 10_000;
    // Every block, which are next to each other on one side, and every other, of which none is.
    for (step, pieces) in [(1, 4), (2, 1)] {
        let mut pair = Pair::new(512, step * BLOCKS, |config| config.max_msg_sge = 4);
        let scattered = scattered_pairs(3, BLOCKS).into_iter();
        let table = pairs(scattered.map(|pair| (step * pair.src, step * pair.dst)));
        for report in pair.moves(&table) {
            assert_eq!(report.bytes, 512 * u64::from(BLOCKS) * 2);
            assert_eq!(report.operations, u64::from(BLOCKS) * 2 / pieces);
        }
    }
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_blocks_of_odd_lengths() {
    for bytes in [8, 509, 1003, 4095, 4097, 65_537] {
        let mut pair = Pair::new(bytes, 24, |_| {});
        // Some next to each other on both sides, some on one, some alone; not all of them.
        let table = pairs([
            (0, 3),
            (1, 4),
            (2, 5),
            (3, 9),
            (4, 8),
            (7, 23),
            (9, 1),
            (23, 0),
        ]);
        for report in pair.moves(&table) {
            assert_eq!(report.bytes, bytes * 8 * 2, "{bytes}");
        }
    }
}

/// The devices take no message of more than 8 MiB.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_blocks_longer_than_a_message() {
    for bytes in [9 << 20, (8 << 20) + 1] {
        let mut pair = Pair::new(bytes, 2, |_| {});
        for report in pair.moves(&pairs([(0, 1)])) {
            assert_eq!(report.bytes, bytes * 2);
            assert!(report.operations > 2, "not in pieces");
        }
    }
}
