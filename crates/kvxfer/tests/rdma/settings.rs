//! Settings that name what is not there: refused when the engine is made, by their names.

use kvxfer::Error;
use kvxfer::config::{Config, ConfigBuilder, KvRole, PathKind};
use kvxfer_verbs::Error as VerbsError;

use crate::sh;
use crate::support::{LONG, recipe, until};

/// On `rb`.
fn refused(change: impl FnOnce(&mut Config)) -> Error {
    let recipe = recipe(KvRole::Consumer, PathKind::Rdma, 4096, 8).with(change);
    recipe.try_node().expect_err("it must be refused")
}

/// Why `rb`'s port was not taken.
#[track_caller]
fn why_not(error: &Error) -> &str {
    let Error::NoRdmaPort { candidates } = error else {
        panic!("{error:?}");
    };
    let ours = candidates.iter().find(|(port, _)| port == "rb port 1");
    &ours.expect("rb was looked at").1
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_gid_that_does_not_exist() {
    let error = refused(|config| config.rdma_gid_index = 77);
    let why = why_not(&error);
    assert!(
        why.contains("no GID 77") && why.contains("10.1.0.2"),
        "{why}"
    );
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_port_that_does_not_exist() {
    let error = refused(|config| config.rdma_port = 9);
    assert_eq!(why_not(&error), "port 9 was asked for");
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_device_that_does_not_exist() {
    let error = refused(|config| {
        let mut builder = ConfigBuilder::new();
        let given = builder.flag("rdma_devices", "a test", "rb,mlx5_9");
        let given = given.and_then(|builder| builder.build());
        config.rdma_devices = given.expect("names of devices").rdma_devices;
    });
    let Error::RdmaDevice { asked, source } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(asked, "rb,mlx5_9");
    let VerbsError::NoSuchDevice { device, devices } = source else {
        panic!("{source:?}");
    };
    assert_eq!(device, "mlx5_9");
    for there in ["rxe0", "ra", "rb"] {
        assert!(devices.iter().any(|device| device == there), "{devices:?}");
    }
}

/// Both ends of the cable have a length of frames again when this goes.
struct ShortFrames;

impl ShortFrames {
    fn new() -> Self {
        let frames = Self;
        sh("ip link set ha mtu 1500; ip link set hb mtu 1500");
        frames
    }
}

impl Drop for ShortFrames {
    fn drop(&mut self) {
        sh("ip link set ha mtu 4500; ip link set hb mtu 4500");
    }
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_an_mtu_above_the_links() {
    let limit = |mtu| {
        let error = refused(|config| config.rdma_mtu = mtu);
        let Error::RdmaDevice { source, .. } = &error else {
            panic!("{error:?}");
        };
        let VerbsError::Limit { what, asked, max } = source else {
            panic!("{source:?}");
        };
        assert!(what.starts_with("mtu"), "{what}");
        (*asked, *max)
    };
    // No packet is so long.
    assert_eq!(limit(1000), (1000, 4096));
    let frames = ShortFrames::new();
    assert_eq!(limit(2048), (2048, 1024));
    drop(frames);
    let recipe = recipe(KvRole::Consumer, PathKind::Rdma, 4096, 8);
    recipe.with(|config| config.rdma_mtu = 4096).node();
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_port_that_is_down() {
    struct Down;
    impl Drop for Down {
        fn drop(&mut self) {
            sh("sh \"$KVXFER_VM/two-hosts.sh\" mend");
        }
    }
    let down = Down;
    sh("ip link set hb down");
    let error = refused(|_| {});
    let why = why_not(&error);
    assert!(why.contains("DOWN") && why.contains("ip link set"), "{why}");
    drop(down);
    let recipe = recipe(KvRole::Consumer, PathKind::Rdma, 4096, 8);
    until("the port", || recipe.try_node().is_ok());
}

/// An address of another subnet on `hb`, which nobody answers for; it goes with this.
struct Elsewhere;

impl Elsewhere {
    const ADDRESS: &str = "10.77.0.2";

    fn new() -> Self {
        let elsewhere = Self;
        sh(&format!("ip addr add {}/32 dev hb", Self::ADDRESS));
        // Linux takes what it knows no route to for a neighbour: nobody there says so.
        sh("echo 8 >/proc/sys/net/ipv4/conf/hb/arp_ignore");
        elsewhere
    }

    /// Its place among the GIDs of `rb`.
    fn gid_index() -> i32 {
        let of = |index: &i32| {
            let path = "/sys/class/infiniband/rb/ports/1/gids";
            let text = std::fs::read_to_string(format!("{path}/{index}")).unwrap_or_default();
            text.trim().ends_with(":ffff:0a4d:0002")
        };
        let mut found = None;
        until("its GID", || {
            found = (0..32).find(of);
            found.is_some()
        });
        found.expect("just found")
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let script = format!(
            "echo 0 >/proc/sys/net/ipv4/conf/hb/arp_ignore; ip addr del {}/32 dev hb",
            Self::ADDRESS
        );
        let _ = std::process::Command::new("sh")
            .args(["-c", &script])
            .status();
    }
}

/// The session is refused with what the device said and what to look at, on the side that was not asked too.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn on_rdma_a_peer_on_another_subnet() {
    let elsewhere = Elsewhere::new();
    let producer = recipe(KvRole::Producer, PathKind::Rdma, 4096, 8).node();
    let index = Elsewhere::gid_index();
    let consumer = recipe(KvRole::Consumer, PathKind::Rdma, 4096, 8)
        .with(|config| config.rdma_gid_index = index)
        .node();
    let address = producer.engine.listen("127.0.0.1:0").expect("a port");
    let refused = consumer.engine.connect(&address.to_string(), LONG);
    let refused = refused.map(drop).expect_err("no way leads there");
    let mut words = refused.to_string();
    let mut source = std::error::Error::source(&refused);
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    println!("{words}");
    let told = words.contains("no neighbour answers") && words.contains("INIT to RTR");
    assert!(told, "{words}");
    drop(elsewhere);
}
