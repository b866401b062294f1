//! What devices do not tell of themselves: pure.

/// A device that does less, or does something slower, than it says.
#[derive(Debug)]
pub(super) struct Quirk {
    /// The vendor's number in `ibv_device_attr`.
    vendor_id: u32,
    /// Scatter/gather elements of a work request.
    pub(super) max_sge: u32,
    /// Work requests of a queue.
    pub(super) max_qp_wr: u32,
    /// Bytes of a message beyond which it gets slower.
    pub(super) best_msg_sz: u64,
    /// Tries after the first.
    pub(super) max_retry_cnt: u8,
    /// Why, for whoever reads the log.
    pub(super) why: &'static str,
}

const NONE: Quirk = Quirk {
    vendor_id: 0,
    max_sge: u32::MAX,
    max_qp_wr: u32::MAX,
    best_msg_sz: u64::MAX,
    max_retry_cnt: u8::MAX,
    why: "",
};

/// Broadcom's RDMA READ cannot be inline and siw's neither: nothing here is. AMD's refuse remote
/// atomics: nobody asks for them.
const TABLE: [Quirk; 2] = [
    Quirk {
        vendor_id: 0x1dd8,
        max_sge: 2,
        max_qp_wr: 32_767,
        why: "AMD Pensando (ionic): 2 scatter/gather elements, 32,767 work requests",
        ..NONE
    },
    Quirk {
        vendor_id: 0x00ff_ffff,
        best_msg_sz: 1 << 20,
        max_retry_cnt: 6,
        why: "soft-RoCE (rdma_rxe): READs of more than 1 MiB are slow, and 7 retries are retries for ever",
        ..NONE
    },
];

/// What is known of a vendor's devices.
pub(super) fn of(vendor_id: u32) -> Option<&'static Quirk> {
    TABLE.iter().find(|quirk| quirk.vendor_id == vendor_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vendor_is_there_once_and_says_why() {
        for (at, quirk) in TABLE.iter().enumerate() {
            assert!(!quirk.why.is_empty());
            assert!(!TABLE[..at].iter().any(|q| q.vendor_id == quirk.vendor_id));
        }
        assert_eq!(of(0x1dd8).map(|quirk| quirk.max_sge), Some(2));
        assert!(of(0x15b3).is_none(), "NVIDIA's tell the truth");
    }
}
