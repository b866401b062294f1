//! What goes wrong, and how it is told.
#![allow(missing_docs, clippy::field_reassign_with_default, reason = "a test")]

#[path = "../support/mod.rs"]
mod support;

mod access;
mod bringup;
mod peers;
mod queues;

use kvxfer_verbs::*;

pub(crate) const S: u32 = 1 << 16;

pub(crate) fn sge(len: u32, offset: u64) -> Sge {
    Sge {
        region: 0,
        len,
        offset,
    }
}

pub(crate) fn init(ctx: &Context) -> (CompletionQueue, QueuePair<Init>) {
    let pd = ctx.alloc_pd().unwrap();
    let cq = ctx.create_cq(16).unwrap();
    let qp = pd.create_qp(QpCaps::default(), &cq, &cq).unwrap();
    (cq, qp.init(InitAttr::new(Access::NONE)).unwrap())
}
