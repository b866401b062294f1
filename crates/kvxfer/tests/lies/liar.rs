//! A peer made of the wire's and the verbs' own pieces, which says and posts what it likes.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvxfer::bench::{BenchMemory, BenchShape, BenchSide};
use kvxfer::config::{KvRole, PathKind};
use kvxfer::event::PeerName;
use kvxfer::ids::Generation;
use kvxfer::layout::{KvFormat, PlacementDesc, Topology};
use kvxfer::wire::{
    Blob, ConfigFacts, Describe, Fingerprint, Message, MessageKind, QpAnswer, QpOffer, RailDesc,
    RailEndpoint, Ready, RemoteSpan, Role, Secret, Side, StreamHalf, StreamKey, StreamOpening,
};
use kvxfer_verbs::{
    Access, Completion, CompletionQueue, Context, Init, InitAttr, Link, ProtectionDomain, QpCaps,
    QpEndpoint, QueuePair, RegionTable, Remote, RtrAttr, Rts, RtsAttr, SendChain, SendOp, Sge,
    SoftConfig, SoftPath, open_soft,
};

use crate::support::LONG;
use crate::wire::Wire;
use crate::world::{BLOCK, BLOCKS, World};

const SLOT: u64 = 64;

/// Memory and queue pairs of a liar.
pub(crate) struct Device {
    pub(crate) context: Context,
    pub(crate) side: BenchSide,
    table: Arc<RegionTable>,
    cq: CompletionQueue,
    pd: ProtectionDomain,
}

impl Device {
    fn new() -> Self {
        let format = KvFormat::opaque(BLOCK, 2).expect("a format");
        let shape = BenchShape {
            topology: Topology::single(&format),
            format,
            num_blocks: vec![BLOCKS],
            memory: BenchMemory::Arena,
        };
        let side = BenchSide::new(&shape).expect("memory");
        let context = open_soft(SoftConfig::default()).expect("a device");
        let pd = context.alloc_pd().expect("a domain");
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        let memory = side.memory()[0].as_memory();
        let region = pd.register(memory, access).expect("registered");
        Self {
            cq: context.create_cq(1 << 12).expect("a queue"),
            table: Arc::new(RegionTable::new(vec![region])),
            context,
            side,
            pd,
        }
    }

    pub(crate) fn queue_pair(&self) -> QueuePair<Init> {
        let caps = QpCaps {
            max_send_wr: 64,
            max_recv_wr: 16,
            max_send_sge: 1,
            max_recv_sge: 1,
        };
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        let qp = (self.pd.create_qp(caps, &self.cq, &self.cq)).expect("a queue pair");
        qp.init(InitAttr::new(access)).expect("in INIT")
    }

    pub(crate) fn span(&self) -> RemoteSpan {
        let region = &self.table.regions()[0];
        RemoteSpan {
            addr: region.addr(),
            len: region.len(),
            rkey: region.rkey(),
        }
    }

    fn join(&self, qp: QueuePair<Init>, remote: QpEndpoint, link: Link) -> QueuePair<Rts> {
        let attr = RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        };
        let rts = RtsAttr {
            timeout: 18,
            retry_cnt: 7,
            rnr_retry: 7,
        };
        qp.rtr(attr).expect("in RTR").rts(rts).expect("in RTS")
    }
}

pub(crate) fn endpoint(qp: &QueuePair<Init>) -> Blob {
    Blob::pack("endpoint", &qp.endpoint()).expect("an endpoint")
}

pub(crate) fn offer_of(path: PathKind, endpoints: Vec<Blob>) -> QpOffer {
    QpOffer {
        offer: 1,
        replaces: None,
        path,
        candidates: Vec::new(),
        endpoints: endpoints.into_iter().map(RailEndpoint::first).collect(),
    }
}

/// What a liar is called; never the same twice.
pub(crate) fn fresh() -> (String, Generation) {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut generation = [7; 16];
    generation[..8].copy_from_slice(&n.to_le_bytes());
    (format!("liar-{n}"), Generation(generation))
}

pub(crate) struct Liar {
    pub(crate) wire: Wire,
    pub(crate) device: Device,
    pub(crate) name: PeerName,
    pub(crate) generation: Generation,
    pub(crate) role: KvRole,
    /// What the engine has said of itself, once it was heard.
    pub(crate) theirs: Option<Describe>,
    pub(crate) lanes: Vec<QueuePair<Rts>>,
    address: SocketAddr,
    posted: u64,
}

impl Liar {
    /// Authenticated, and nothing more.
    pub(crate) fn new(world: &World) -> Self {
        let wire = Wire::dial(world.address.get(), Some(&world.secret), Role::Engine);
        Self::over(wire, world.address.get())
    }

    /// The same for an engine that connects to it.
    pub(crate) fn accept(socket: TcpStream, secret: &Secret) -> Self {
        let address = socket.local_addr().expect("an address");
        Self::over(Wire::accept(socket, Some(secret)), address)
    }

    fn over(wire: Wire, address: SocketAddr) -> Self {
        let device = Device::new();
        let (name, generation) = fresh();
        let rank = device.side.placement().desc().topology().rank;
        Self {
            wire,
            name: PeerName {
                engine: name.as_str().into(),
                rank,
            },
            device,
            generation,
            role: KvRole::Both,
            theirs: None,
            lanes: Vec::new(),
            address,
            posted: 0,
        }
    }

    /// A description with nothing wrong in it.
    pub(crate) fn describe(&self) -> Describe {
        let side = &self.device.side;
        let span = self.device.span();
        Describe {
            engine: self.name.engine.clone(),
            generation: self.generation,
            rank: self.name.rank,
            kv_role: self.role,
            wanted: None,
            fingerprint: Fingerprint(side.format().fingerprint().0),
            format: Blob::pack("format", side.format()).expect("a format"),
            placement: Blob::pack("placement", side.placement().desc()).expect("a placement"),
            rails: vec![RailDesc {
                place: 0,
                device: Blob::pack("device", &self.device.context.address()).expect("an address"),
                memories: vec![span],
                leases: Some(RemoteSpan {
                    addr: span.addr + span.len,
                    len: SLOT,
                    rkey: span.rkey,
                }),
                scratch: None,
                staging: None,
            }],
            facts: ConfigFacts {
                qp_per_transfer: 1,
                enable_notification: true,
                ..ConfigFacts::default()
            },
            fd_backed: true,
            gpu: None,
            shared: None,
        }
    }

    pub(crate) fn desc(&self) -> &PlacementDesc {
        self.device.side.placement().desc()
    }

    /// The engine's own description.
    pub(crate) fn hear_describe(&mut self) -> Describe {
        let Message::Describe(theirs) = self.wire.hear_kind(MessageKind::Describe) else {
            unreachable!("that kind");
        };
        self.theirs = Some(theirs.clone());
        theirs
    }

    /// Both have described themselves, in earnest.
    pub(crate) fn described(world: &World) -> Self {
        Self::described_as(world, KvRole::Both)
    }

    pub(crate) fn described_as(world: &World, role: KvRole) -> Self {
        let mut liar = Self::new(world);
        liar.role = role;
        let describe = liar.describe();
        liar.wire.say(describe);
        liar.hear_describe();
        liar
    }

    /// A session that stands, with one queue pair that works.
    pub(crate) fn established(world: &World, role: KvRole, path: PathKind) -> Self {
        Self::described_as(world, role).join(path)
    }

    /// Goes on from the descriptions to a session that stands.
    pub(crate) fn join(self, path: PathKind) -> Self {
        let mut liar = self;
        let qp = liar.device.queue_pair();
        liar.wire.say(offer_of(path, vec![endpoint(&qp)]));
        let Message::QpAnswer(answer) = liar.wire.hear_kind(MessageKind::QpAnswer) else {
            unreachable!("that kind");
        };
        let remote = remotes(&answer)[0];
        let link = match path {
            PathKind::Tcp => {
                let key = liar.wire.keys.streams_from(Side::Client);
                Link::SoftTcp {
                    requester: liar.stream(&key, 0, StreamHalf::Requester, 0),
                    responder: liar.stream(&key, 0, StreamHalf::Responder, 1),
                }
            }
            _ => Link::SoftDial {
                peer: liar.their_device(),
                path: SoftPath::Arena,
                deadline: Instant::now() + LONG,
            },
        };
        let lane = liar.device.join(qp, remote, link);
        liar.lanes.push(lane);
        liar.wire.say(Ready {});
        liar.wire.hear_kind(MessageKind::Ready);
        liar
    }

    pub(crate) fn their_device(&self) -> kvxfer_verbs::DeviceAddr {
        let theirs = self.theirs.as_ref().expect("described");
        theirs.rails[0].device.unpack("device").expect("an address")
    }

    /// A data stream that the engine has admitted.
    pub(crate) fn stream(
        &self,
        key: &StreamKey,
        qp: u32,
        half: StreamHalf,
        sequence: u64,
    ) -> TcpStream {
        use std::io::{Read, Write};
        let opening = StreamOpening {
            session: self.wire.keys.id,
            qp,
            half,
            sequence,
        };
        let mut socket = crate::wire::connect(self.address);
        socket.write_all(&opening.encode(key)).expect("sent");
        let mut answer = [0; 16];
        socket.read_exact(&mut answer).expect("admitted");
        assert!(opening.verify_answer(key, &answer));
        socket
    }

    /// Posts one operation over the liar's first bytes and waits for how it ends.
    pub(crate) fn post(&mut self, op: SendOp, len: u32) -> Completion {
        let mut chain = SendChain::new();
        let sge = Sge {
            region: 0,
            len,
            offset: 0,
        };
        self.posted += 1;
        chain.push(self.posted, op, true, &[sge]);
        let lane = self.lanes.first().expect("a queue pair");
        lane.post_send(&chain, &self.device.table).expect("posted");
        let mut out = Vec::new();
        let end = Instant::now() + LONG;
        while out.is_empty() {
            self.device.cq.poll(&mut out, 1).expect("polled");
            assert!(Instant::now() < end, "no completion");
            std::thread::yield_now();
        }
        out[0]
    }

    /// Sends bytes over the queue pair, as notices go.
    pub(crate) fn notify(&mut self, bytes: &[u8]) -> Completion {
        let memory = &self.device.side.memory()[0];
        memory.write(0, bytes).expect("room");
        let len = u32::try_from(bytes.len()).expect("a few bytes");
        self.post(SendOp::Send, len)
    }
}

pub(crate) fn remotes(answer: &QpAnswer) -> Vec<QpEndpoint> {
    let unpack = |end: &RailEndpoint| end.endpoint.unpack("endpoint").expect("an endpoint");
    answer.endpoints.iter().map(unpack).collect()
}

pub(crate) fn at(span: RemoteSpan, offset: u64) -> Remote {
    Remote {
        addr: span.addr.wrapping_add(offset),
        rkey: span.rkey,
    }
}
