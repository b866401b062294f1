//! Memory of a GPU on RDMA devices of this machine, as far as one can go without a GPU: soft-RoCE registers no
//! dma-buf, and takes an address where there is memory. For a machine with RDMA devices, which `KVXFER_TEST_RDMA`
//! names.

mod support;

use std::sync::Arc;

use kvxfer_verbs::{
    Access, DmaBuf, DmaBufFault, Error, FdSpan, Memory, MemoryKind, NoDmaBuf, Remote, SendChain,
    SendOp, Sge, WcStatus,
};
use support::{How, TestMemory, pair, pattern, reap, table};

const LEN: u64 = 0x2_0000;

/// Says that it is a GPU's. Behind its addresses is memory of the host, as it is for a NIC where the GPU's driver lends
/// a hand; or nothing.
#[derive(Debug)]
struct Vram {
    behind: Option<Arc<TestMemory>>,
    exports: bool,
}

// SAFETY: what is behind it is held, and where there is nothing nobody may go.
unsafe impl Memory for Vram {
    fn addr(&self) -> u64 {
        // The first page is never mapped.
        self.behind.as_ref().map_or(0x800, |memory| memory.addr())
    }
    fn len(&self) -> u64 {
        LEN
    }
    fn kind(&self) -> MemoryKind {
        let gpu = "0000:1b:00.0".parse().unwrap();
        MemoryKind::Device { gpu }
    }
    fn fd(&self) -> Option<FdSpan<'_>> {
        None
    }
    fn dma_buf(&self) -> Result<DmaBuf, NoDmaBuf> {
        if !self.exports {
            return Err(NoDmaBuf::NotExported);
        }
        // Of the kind that a GPU's driver would make there is none here; nobody gets as far as looking at it.
        let file = std::fs::File::open("/dev/zero").unwrap();
        Ok(DmaBuf {
            fd: file.into(),
            offset: self.addr() % 4096,
            len: LEN,
        })
    }
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn soft_roce_refuses_a_dma_buf_and_every_way_that_was_tried_is_told() {
    let (side, _) = pair(How::Rdma(0));
    for exports in [true, false] {
        let memory = Arc::new(Vram {
            behind: None,
            exports,
        });
        let refused = side.pd.register(memory, Access::LOCAL_WRITE).unwrap_err();
        let words = refused.to_string();
        let Error::RegisterDevice {
            dma_buf, address, ..
        } = refused
        else {
            panic!("{words}");
        };
        println!("{words}");
        assert_eq!(address.raw_os_error(), Some(libc::EFAULT), "{words}");
        match *dma_buf {
            DmaBufFault::Refused(e) if exports => {
                assert_eq!(e.raw_os_error(), Some(libc::EOPNOTSUPP), "{words}");
            }
            DmaBufFault::NoDmaBuf(NoDmaBuf::NotExported) if !exports => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn memory_that_is_registered_by_its_address_is_read_and_written() {
    let (a, b) = pair(How::Rdma(0));
    let (near, far) = (
        TestMemory::anonymous(LEN as usize),
        TestMemory::anonymous(LEN as usize),
    );
    let vram = |behind: &Arc<TestMemory>| {
        Arc::new(Vram {
            behind: Some(Arc::clone(behind)),
            exports: true,
        })
    };
    let here = a.pd.register(vram(&near), Access::LOCAL_WRITE).unwrap();
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    let there = b.pd.register(vram(&far), access).unwrap();
    let (sent, kept) = (pattern(5000, 1), pattern(3000, 2));
    near.put(100, &sent);
    far.put(40_000, &kept);
    let remote = |offset| Remote {
        addr: there.addr() + offset,
        rkey: there.rkey(),
    };
    let sge = |offset, len| Sge {
        region: 0,
        len,
        offset,
    };
    let mut chain = SendChain::new();
    chain.push(1, SendOp::Write(remote(7)), false, &[sge(100, 5000)]);
    let read = SendOp::Read(remote(40_000));
    chain.push(2, read, true, &[sge(60_000, 3000)]);
    a.qp.post_send(&chain, &table(&[&here])).unwrap();
    let ended = reap(&a.send_cq, 1);
    assert_eq!((ended[0].wr_id, ended[0].status), (2, WcStatus::Success));
    assert!(far.get(7, 5000) == sent && near.get(60_000, 3000) == kept);
}

/// Its addresses are the GPU's, and the software device would take them for pointers.
#[test]
#[ignore = "needs an RDMA device: the virtual machine of cargo xtask test has some"]
fn the_software_device_takes_no_region_of_it_from_another_devices_table() {
    let (nic, _) = pair(How::Rdma(0));
    let (soft, peer) = pair(How::Arena);
    let behind = Some(TestMemory::anonymous(LEN as usize));
    let memory = Arc::new(Vram {
        behind,
        exports: false,
    });
    let vram = nic.pd.register(memory, Access::LOCAL_WRITE).unwrap();
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    let there = peer.region(&TestMemory::sealed(4096), access);
    let mut chain = SendChain::new();
    let remote = Remote {
        addr: there.addr(),
        rkey: there.rkey(),
    };
    let span = Sge {
        region: 0,
        len: 8,
        offset: 0,
    };
    chain.push(1, SendOp::Write(remote), true, &[span]);
    soft.qp.post_send(&chain, &table(&[&vram])).unwrap();
    assert_eq!(reap(&soft.send_cq, 1)[0].status, WcStatus::LocProt);
}
