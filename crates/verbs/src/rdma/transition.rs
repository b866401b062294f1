//! What a queue pair must be told to go from one state to the next, and what it means when the device
//! refuses: pure.
//!
//! The table of attributes is that of reliable connections in the InfiniBand specification (volume 1,
//! "Modify Queue Pair") and of `ibv_modify_qp(3)`.

use std::fmt::Write;

use libc::{EHOSTUNREACH, EINVAL, ENETUNREACH, ENODEV, EOPNOTSUPP, ETIMEDOUT, c_uint};

use crate::qp::QpState;
use crate::sys::enums::{
    IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC,
    IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT,
    IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT,
};
use crate::sys::types::ibv_qp_attr;

/// RESET → INIT.
pub(super) const INIT: c_uint =
    IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
/// INIT → RTR.
pub(super) const RTR: c_uint = IBV_QP_STATE
    | IBV_QP_AV
    | IBV_QP_PATH_MTU
    | IBV_QP_DEST_QPN
    | IBV_QP_RQ_PSN
    | IBV_QP_MAX_DEST_RD_ATOMIC
    | IBV_QP_MIN_RNR_TIMER;
/// RTR → RTS.
pub(super) const RTS: c_uint = IBV_QP_STATE
    | IBV_QP_TIMEOUT
    | IBV_QP_RETRY_CNT
    | IBV_QP_RNR_RETRY
    | IBV_QP_SQ_PSN
    | IBV_QP_MAX_QP_RD_ATOMIC;
/// Any state → ERR.
pub(super) const ERR: c_uint = IBV_QP_STATE;

/// Attributes that a transition sets, with their values: what the device may have refused.
pub(super) fn told(to: QpState, attr: &ibv_qp_attr) -> String {
    let mut text = String::new();
    let ah = &attr.ah_attr;
    // Writing to a string cannot fail.
    let _ = match to {
        QpState::Init => write!(
            text,
            "port {}, pkey index {}, access {:#x}",
            attr.port_num, attr.pkey_index, attr.qp_access_flags
        ),
        QpState::Rtr => write!(
            text,
            "path MTU code {}, queue pair {:#x}, {} READs answered, RNR timer {}, port {}, service level {}, {}",
            attr.path_mtu.0,
            attr.dest_qp_num,
            attr.max_dest_rd_atomic,
            attr.min_rnr_timer,
            ah.port_num,
            ah.sl,
            if ah.is_global == 0 {
                format!("LID {:#x}", ah.dlid)
            } else {
                format!(
                    "GID index {}, hop limit {}, traffic class {}",
                    ah.grh.sgid_index, ah.grh.hop_limit, ah.grh.traffic_class
                )
            }
        ),
        QpState::Rts => write!(
            text,
            "timeout {}, retry count {}, RNR retries {}, {} READs under way",
            attr.timeout, attr.retry_cnt, attr.rnr_retry, attr.max_rd_atomic
        ),
        QpState::Reset | QpState::Err => Ok(()),
    };
    text
}

/// What a device's answer to a transition means, in words that say what to look at.
pub(super) fn meaning(to: QpState, errno: i32) -> &'static str {
    match (to, errno) {
        (QpState::Rtr, ETIMEDOUT | ENETUNREACH | EHOSTUNREACH) => {
            "no neighbour answers for the peer's address: look at the route and at ARP between the two addresses"
        }
        (QpState::Rtr, ENODEV) => "the GID's network interface is gone or down",
        (QpState::Init, EINVAL) => {
            "the port does not exist, or its table of partition keys is shorter"
        }
        (QpState::Rtr, EINVAL) => {
            "the GID index, the MTU or the number of READs is more than the port takes, or the two addresses are of different kinds"
        }
        (QpState::Rts, EINVAL) => {
            "timeout, retries or the number of READs is more than the port takes"
        }
        (_, EOPNOTSUPP) => "the driver does not know such queue pairs",
        _ => "look at the kernel's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_attributes_are_told_with_their_values() {
        let mut attr = ibv_qp_attr::default();
        attr.ah_attr.is_global = 1;
        attr.ah_attr.grh.sgid_index = 3;
        attr.ah_attr.grh.hop_limit = 64;
        attr.max_dest_rd_atomic = 16;
        let text = told(QpState::Rtr, &attr);
        assert!(
            text.contains("GID index 3") && text.contains("16 READs"),
            "{text}"
        );
        attr.ah_attr.is_global = 0;
        attr.ah_attr.dlid = 0x12;
        let text = told(QpState::Rtr, &attr);
        assert!(text.contains("LID 0x12") && !text.contains("GID"), "{text}");
    }

    #[test]
    fn an_address_that_nobody_answers_for_is_told_apart_from_a_wrong_attribute() {
        assert!(meaning(QpState::Rtr, ETIMEDOUT).contains("neighbour"));
        assert!(meaning(QpState::Rtr, EINVAL).contains("GID index"));
        assert!(meaning(QpState::Rts, EINVAL).contains("retries"));
    }

    #[test]
    fn no_attribute_is_set_in_two_transitions() {
        for (one, other) in [(INIT, RTR), (RTR, RTS), (INIT, RTS)] {
            assert_eq!(one & other, IBV_QP_STATE);
        }
    }
}
