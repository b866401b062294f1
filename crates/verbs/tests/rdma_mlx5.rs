//! What is said of devices that are no mlx5 devices, with the libmlx5 that is installed. For a machine with RDMA devices,
//! which `KVXFER_TEST_RDMA` names; none of them may be an mlx5 device. No test here has seen one.

mod support;

use kvxfer_verbs::mlx5::{MappedQueues, Mlx5, NoMlx5};
use kvxfer_verbs::{QpCaps, RdmaConfig, open_rdma};
use support::rdma_pairs;

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn soft_roce_is_no_mlx5_device_by_its_name() {
    let (name, _) = rdma_pairs().remove(0);
    let context = open_rdma(&RdmaConfig::new(name.clone())).expect("it opens");
    let pd = context.alloc_pd().expect("a protection domain");
    let cq = context.create_cq(16).expect("a queue");
    let other = context.create_cq(16).expect("a queue");
    let library = Mlx5::get().expect("rdma-core's providers are installed");
    println!("{}", library.path().display());
    let qp = pd
        .create_qp(QpCaps::default(), &cq, &other)
        .expect("a queue pair");
    let refused = MappedQueues::new(qp, &cq).expect_err("it is no mlx5 device");
    println!("{refused}");
    let NoMlx5::NotMlx5 { device } = refused else {
        panic!("{refused}");
    };
    assert_eq!(device, name);
}
