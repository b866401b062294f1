//! The table of settings. A setting is one entry here: its field, type, default, rule, environment
//! variables, the row of `--explain-config` and the line of the reference all come from it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvxfer_hipmem::gpu::RuntimeChoice;
use kvxfer_verbs::FaultPlan;

use crate::wire::KvRole;

use super::value::{
    Any, BenchPlace, Bytes, DeviceFilter, FencePolicy, IfSet, Listen, Or, PathSet, Rule, Setting,
    Within,
};

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// Its name, as in JSON.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Variables of other systems that give it when its own is not set.
    pub env_fallbacks: &'static [&'static str],
    pub(super) set: fn(&mut Config, &str) -> bool,
    pub(super) show: fn(&Config) -> String,
    pub(super) check: fn(&Config) -> bool,
    pub(super) allowed: fn() -> String,
}

impl Key {
    /// Its own environment variable, `KVXFER_…`.
    #[must_use]
    pub fn env(&self) -> String {
        format!("{}{}", super::ENV_PREFIX, self.name.to_ascii_uppercase())
    }

    /// The values it takes, in words.
    #[must_use]
    pub fn allowed(&self) -> String {
        (self.allowed)()
    }
}

macro_rules! keys {
    ($(
        $(#[doc = $doc:literal])+
        $key:ident: $type:ty = $default:expr, $rule:expr $(, env $env:literal)*;
    )+) => {
        /// The settings of an engine. Build one with a [`ConfigBuilder`](super::ConfigBuilder), or
        /// start from the default and change fields; the engine checks it either way.
        #[derive(Debug, Clone, PartialEq)]
        #[non_exhaustive]
        pub struct Config {
            $($(#[doc = $doc])+ pub $key: $type,)+
        }

        impl Default for Config {
            fn default() -> Self {
                Config { $($key: $default,)+ }
            }
        }

        /// Every setting, in the order of the reference.
        pub static KEYS: &[Key] = &[$(Key {
            name: stringify!($key),
            doc: concat!($($doc),+).trim_ascii_start(),
            env_fallbacks: &[$($env),*],
            set: |config, text| match <$type as Setting>::read(text) {
                Some(value) if Rule::<$type>::holds(&$rule, &value) => {
                    config.$key = value;
                    true
                }
                _ => false,
            },
            show: |config| config.$key.show(),
            check: |config| Rule::<$type>::holds(&$rule, &config.$key),
            allowed: || Rule::<$type>::allowed(&$rule),
        }),+];
    };
}

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Four, or fewer on a machine with fewer cores.
fn default_workers() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(4).min(4))
}

keys! {
    /// What this instance does: kv_producer, kv_consumer or kv_both.
    kv_role: KvRole = KvRole::Both, Any;
    /// The engine's name; unset, one is made up at each start.
    engine_id: Option<String> = None, Any;

    /// Queue pairs to each peer and rail, shared by all transfers.
    qp_per_transfer: u32 = 4, Within(1, 64);
    /// Threads that post and poll.
    num_worker_threads: u32 = default_workers(), Within(1, 256);
    /// Work requests posted at once.
    post_batch_size: i32 = -1, Or(-1, "auto", 1, 65_536);
    /// Depth of a send queue.
    max_send_wr: u32 = 0, Or(0, "auto", 1, 65_536);
    /// Entries of a completion queue for what is posted; receives have room beside them, an eighth as much and for 64 queue pairs at least.
    max_cqe_num: u32 = 0, Or(0, "auto", 1, 4_194_304);
    /// Memory pieces a work request.
    max_msg_sge: u32 = 0, Or(0, "auto", 1, 256);
    /// Whether the end of a push is told on the data plane too, as over RDMA always; releases always flow.
    enable_notification: bool = false, Any;
    /// Whether checksums of what has moved are compared: of this side's pulls and pushes, where a call does
    /// not say otherwise.
    verify: bool = false, Any;
    /// Fences around what GPUs read and write: as each kind of memory needs them (on), none (off, to find out
    /// whether they are the cause of something), or with checksums compared as well (verify).
    fence: FencePolicy = FencePolicy::On, Any;
    /// Most workgroups of a kernel that moves blocks: an engine wants its compute units.
    gpu_workgroups: u32 = 0, Or(0, "auto", 1, 1024);
    /// Whether kernels of producers on this node may write into blocks that they are expected to push, over GPU links
    /// (queues of the kind links). What such a push that fails may still write is kept until the producer says that its
    /// kernels have ended, or its process has: one that is stopped keeps those blocks.
    gpu_links_in: bool = false, Any;
    /// Buffers of pinned host memory each way, out of a GPU's memory and into it, where blocks are staged.
    staging_slots: u32 = 16, Within(2, 256);
    /// Bytes of each.
    staging_slot_bytes: Bytes = Bytes(4 << 20), Within(Bytes(1 << 16), Bytes(1 << 30));
    /// The runtime by which this side has GPUs of its own accord, for bandwidth tests: HIP, else CUDA (auto),
    /// one of the two, or a stand-in that is the host. Where this side's memory is the host's, it is also
    /// whose GPUs of peers this side opens to fetch from: those of HIP and of CUDA (auto), or of the one alone.
    gpu: RuntimeChoice = RuntimeChoice::Auto, Any;
    /// Which of the GPUs that it sees this side takes then.
    gpu_device: u32 = 0, Any;
    /// Most bytes under way to one peer.
    max_inflight_bytes: Bytes = Bytes(64 << 20), Within(Bytes(1 << 16), Bytes(1 << 40));
    /// Requests that can be on offer at once.
    lease_slots: u32 = 4096, Within(1, 1 << 20);

    /// Where to listen.
    listen: Listen = Listen { host: "127.0.0.1".into(), port: None }, Any;
    /// The port to listen on, for control and soft TCP; 0 lets the system choose.
    port: u16 = super::DEFAULT_PORT, Any;
    /// The address that peers are told to connect to; unset, it is found out.
    host_ip: Option<IpAddr> = None, Any, env "ATOM_HOST_IP";
    /// The file with the secret that peers share.
    secret_file: Option<PathBuf> = None, Any;
    /// Whether to listen beyond loopback, and to connect, without a secret.
    allow_unauthenticated: bool = false, Any;
    /// Whether peers may run bandwidth tests against this engine.
    allow_bench: bool = false, Any;
    /// Most memory that bandwidth tests of peers may make this side allocate.
    max_memory: Bytes = Bytes(1 << 30), Within(Bytes(1 << 20), Bytes(1 << 50));
    /// Where the blocks of peers' bandwidth tests lie on this side: as the peer's do (peer), in host memory, or on
    /// the GPU.
    bench_memory: BenchPlace = BenchPlace::Peer, Any;

    /// How long a transfer may take.
    transfer_timeout: Duration = 30 * SECOND, Within(10 * MS, DAY);
    /// How long offered blocks are held for their readers.
    lease_ttl: Duration = 480 * SECOND, Within(100 * MS, 7 * DAY);
    /// How long connecting and agreeing with a peer may take.
    connect_timeout: Duration = 5 * SECOND, Within(10 * MS, 600 * SECOND);
    /// How often an idle control connection is proved alive.
    heartbeat_interval: Duration = SECOND, Within(10 * MS, 600 * SECOND);
    /// How long a peer may be silent before it counts as stalled.
    heartbeat_timeout: Duration = 5 * SECOND, Within(20 * MS, 3600 * SECOND);
    /// How long posted work and revoked peers may take to drain before queue pairs are reset: those with the work, and after as long again, a second at least, all of the peer's.
    drain_grace: Duration = 2 * SECOND, Within(MS, 600 * SECOND);

    /// The ways to a peer that may be used.
    path: PathSet = PathSet::auto(), Any;
    /// The RDMA devices to use, all that can be used, as rails in this order; with `^`, those not to
    /// use. Naming any makes the engine stand on them.
    rdma_devices: Option<DeviceFilter> = None, Any, env "MORI_RDMA_DEVICES";
    /// RDMA service level; it must be the fabric's no-drop priority.
    rdma_sl: Option<u8> = None, IfSet(Within(0, 15)), env "MORI_RDMA_SL";
    /// RDMA traffic class (DSCP times 4).
    rdma_tc: Option<u8> = None, IfSet(Within(0, 255)), env "MORI_RDMA_TC";
    /// Index of the GID to use on RoCE; auto takes RoCE v2 over the address that leads to the peer.
    rdma_gid_index: i32 = -1, Or(-1, "auto", 0, 255);
    /// The device's port, from 1; auto takes the best that is active.
    rdma_port: i32 = -1, Or(-1, "auto", 1, 254);
    /// Bytes of the longest packet: 256, 512, 1024, 2048 or 4096; auto takes the link's.
    rdma_mtu: i32 = -1, Or(-1, "auto", 256, 4096);
    /// Time for an answer: 4.096 us × 2^rdma_timeout, of which some devices take up to four times.
    rdma_timeout: u32 = 16, Within(1, 31);
    /// Tries after the first that are not answered.
    rdma_retry_cnt: u32 = 7, Within(0, 7);
    /// Tries after the first where the peer has no receive; 7 is for ever.
    rdma_rnr_retry: u32 = 7, Within(0, 7);
    /// Place of the partition key in the port's table.
    rdma_pkey_index: u32 = 0, Within(0, 65_535);
    /// Routers that a packet may pass.
    rdma_hop_limit: u32 = 64, Within(1, 255);
    /// What goes wrong on purpose on the software device, for tests and demonstrations.
    faults: Option<FaultPlan> = None, Any;
}
