//! Bring-up of queue pairs on RDMA devices: what a peer's endpoint cannot say, and what a device does
//! not have. For a machine with RDMA devices, which `KVXFER_TEST_RDMA` names.

mod support;

use kvxfer_verbs::{
    Context, Error, Init, InitAttr, Link, PortAddr, QpCaps, QpEndpoint, QueuePair, RdmaConfig,
    RtrAttr, StateFault, open_rdma,
};
use support::{all, rdma_pairs};

fn config() -> RdmaConfig {
    let pairs = rdma_pairs();
    let (name, _) = pairs.first().expect("KVXFER_TEST_RDMA names a device");
    RdmaConfig::new(name)
}

fn queue_pair(context: &Context) -> QueuePair<Init> {
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(64).unwrap();
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    qp.init(InitAttr::new(all())).unwrap()
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn endpoints_that_nobody_has_are_refused() {
    let context = open_rdma(&config()).unwrap();
    type Change = fn(&mut QpEndpoint, &mut PortAddr);
    let changes: [(&str, Change); 12] = [
        ("no port", |_, _| {}),
        ("queue pair 0", |e, _| e.qpn = 0),
        ("queue pair 1", |e, _| e.qpn = 1),
        ("everybody's queue pair", |e, _| e.qpn = 0x00ff_ffff),
        ("a queue pair of 25 bits", |e, _| e.qpn = 1 << 24),
        ("a PSN of 25 bits", |e, _| e.psn = 1 << 24),
        ("the unspecified address", |_, p| p.gid = [0; 16]),
        ("a group", |_, p| p.gid[0] = 0xff),
        ("no MTU", |_, p| p.mtu = 0),
        ("no READs", |_, p| p.reads_in = 0),
        ("the other link", |_, p| p.ethernet = !p.ethernet),
        ("the other RoCE", |_, p| p.roce = p.roce.map(|v| 3 - v)),
    ];
    for (what, change) in changes {
        let qp = queue_pair(&context);
        let mut remote = qp.endpoint();
        let mut port = remote.port.expect("an RDMA device's");
        change(&mut remote, &mut port);
        remote.port = (what != "no port").then_some(port);
        let attr = RtrAttr {
            remote,
            link: Link::Rdma,
            min_rnr_timer: 12,
        };
        let refused = qp.rtr(attr).map(|_| ()).unwrap_err();
        let Error::Transition { fault, .. } = &refused else {
            panic!("{what}: {refused}");
        };
        // Before a driver is asked.
        assert!(
            !matches!(fault, StateFault::Device { .. }),
            "{what}: {fault}"
        );
    }
    // And its own is one that somebody has.
    let qp = queue_pair(&context);
    let remote = qp.endpoint();
    let attr = RtrAttr {
        remote,
        link: Link::Rdma,
        min_rnr_timer: 12,
    };
    qp.rtr(attr).unwrap();
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn what_a_device_does_not_have_is_named() {
    let refused = |change: &dyn Fn(&mut RdmaConfig)| {
        let mut config = config();
        change(&mut config);
        open_rdma(&config).map(|_| ()).unwrap_err()
    };
    let error = refused(&|c| c.device = "mlx5_77".into());
    assert!(matches!(&error, Error::NoSuchDevice { devices, .. } if !devices.is_empty()));
    assert!(error.to_string().contains("mlx5_77"), "{error}");
    let error = refused(&|c| c.port = Some(9));
    assert!(
        matches!(error, Error::NoSuchPort { port: 9, .. }),
        "{error}"
    );
    let error = refused(&|c| c.gid_index = Some(200));
    assert!(matches!(error, Error::Gid { .. }), "{error}");
    for mtu in [8192, 1500, 0] {
        let error = refused(&|c| c.mtu = Some(mtu));
        assert!(matches!(error, Error::Limit { .. }), "{mtu}: {error}");
    }
}
