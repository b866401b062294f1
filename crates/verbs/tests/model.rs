//! Random operations against byte arrays that do the same.
#![allow(missing_docs, reason = "a test")]

mod support;

use std::ops::Range;

use kvxfer_verbs::{Remote, SendChain, SendOp, Sge, WcStatus};
use proptest::prelude::*;
use support::*;

const N: usize = 20_000;

#[derive(Debug, Clone)]
struct Step {
    read: bool,
    remote: usize,
    sges: Vec<(usize, usize)>,
    post: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![3 => 0usize..64, 2 => 0usize..3000, 1 => Just(4096usize)];
    let sges = prop::collection::vec((0usize..N - 4096, len), 0..4);
    (any::<bool>(), 0usize..N, sges, prop::bool::weighted(0.2)).prop_map(
        |(read, remote, sges, post)| {
            let total: usize = sges.iter().map(|s| s.1).sum();
            Step {
                read,
                remote: remote.min(N - total.min(N)),
                sges,
                post,
            }
        },
    )
}

fn run(how: How, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut o = Options::default();
    // Small slices, so that operations are cut in the middle.
    o.config.poll_budget = 5000;
    let (a, b) = pair_with(how, &o);
    // Sources of WRITEs and destinations of READs are apart: a WRITE may leave before an earlier
    // READ has arrived.
    let (src, dst, far) = (
        TestMemory::sealed(N),
        TestMemory::sealed(N),
        TestMemory::sealed(N),
    );
    let (m_src, mut m_dst, mut m_far) = (pattern(N, 1), pattern(N, 2), pattern(N, 3));
    src.put(0, &m_src);
    dst.put(0, &m_dst);
    far.put(0, &m_far);
    let (rs, rd, rf) = (
        a.region(&src, all()),
        a.region(&dst, all()),
        b.region(&far, all()),
    );
    let t = table(&[&rs, &rd]);
    let mut chain = SendChain::new();
    let (mut signalled, mut got) = (0, Vec::new());
    let mut being_read: Vec<Range<usize>> = Vec::new();
    for (i, s) in steps.iter().enumerate() {
        let mut at = s.remote;
        let span = at..at + s.sges.iter().map(|(_, len)| len).sum::<usize>();
        // A READ whose answer is lost is repeated, and carried out anew: a later WRITE may have been there then.
        let overtakes = |read: &Range<usize>| read.start < span.end && span.start < read.end;
        if matches!(how, How::Rdma(_)) && !s.read && being_read.iter().any(overtakes) {
            let nothing = Remote {
                addr: rf.addr(),
                rkey: rf.rkey(),
            };
            chain.push(i as u64, SendOp::Write(nothing), true, &[]);
            a.qp.post_send(&chain, &t).expect("post");
            chain.clear();
            got.extend(reap(&a.send_cq, signalled + 1));
            signalled = 0;
            being_read.clear();
        }
        if s.read {
            being_read.push(span);
        }
        for (offset, len) in &s.sges {
            if s.read {
                m_dst[*offset..offset + len].copy_from_slice(&m_far[at..at + len]);
            } else {
                m_far[at..at + len].copy_from_slice(&m_src[*offset..offset + len]);
            }
            at += len;
        }
        let remote = Remote {
            addr: rf.addr() + s.remote as u64,
            rkey: rf.rkey(),
        };
        let op = if s.read {
            SendOp::Read(remote)
        } else {
            SendOp::Write(remote)
        };
        let region = u32::from(s.read);
        let sges: Vec<_> = s
            .sges
            .iter()
            .map(|(offset, len)| Sge {
                region,
                len: *len as u32,
                offset: *offset as u64,
            })
            .collect();
        let last = i + 1 == steps.len();
        chain.push(i as u64, op, s.post || last, &sges);
        if s.post || last {
            a.qp.post_send(&chain, &t).expect("post");
            chain.clear();
            signalled += 1;
        }
    }
    got.extend(reap(&a.send_cq, signalled));
    prop_assert!(
        got.iter().all(|c| c.status == WcStatus::Success),
        "{how:?} {got:?}"
    );
    prop_assert!(got.is_sorted_by_key(|c| c.wr_id));
    prop_assert!(dst.get(0, N) == m_dst, "{how:?} destination");
    prop_assert!(far.get(0, N) == m_far, "{how:?} target");
    prop_assert_eq!(a.qp.send_credits(), o.caps.max_send_wr);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn every_path_does_what_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
        for how in every() {
            run(how, &steps)?;
        }
    }
}
