//! The queues of mlx5 devices. What is taken for a WQE, a completion, a doorbell or a record is written
//! as it was read.
//!
//! Input: which one (one byte), then its bytes; what is missing is 0.
#![no_main]

use kvxfer_verbs::mlx5::{CqDepth, Cqe, Doorbell, DoorbellRecord, Gather, SendWqe, SqDepth};
use libfuzzer_sys::fuzz_target;

fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut all = [0; N];
    for (to, from) in all.iter_mut().zip(bytes) {
        *to = *from;
    }
    all
}

fuzz_target!(|data: &[u8]| {
    let Some((which, bytes)) = data.split_first() else {
        return;
    };
    match which % 5 {
        0 => {
            let block = padded(bytes);
            if let Ok(wqe) = SendWqe::decode(&block) {
                let again = wqe.encode().expect("what was decoded");
                let len = match wqe.operation.sides() {
                    Some((_, Gather::Inline(data))) => 36 + data.bytes().len(),
                    _ => 16 * usize::from(wqe.ds()),
                };
                assert_eq!(again[..len], block[..len]);
            }
        }
        1 => {
            let depth = CqDepth::new(64).expect("a power of two");
            let n = u64::from_be_bytes(padded(bytes.get(64..).unwrap_or_default()));
            let block = padded(bytes);
            if let Ok(Some(cqe)) = Cqe::decode(&block, n, depth) {
                let again = cqe.encode(n, depth);
                assert_eq!(Cqe::decode(&again, n, depth), Ok(Some(cqe)));
                assert_eq!(again[56..62], block[56..62]);
            }
        }
        2 => {
            let bytes = padded(bytes);
            if let Ok(doorbell) = Doorbell::decode(bytes) {
                assert_eq!(doorbell.encode(), bytes);
            }
        }
        3 => {
            let bytes = padded(bytes);
            if let Ok(record) = DoorbellRecord::decode(bytes) {
                assert_eq!(record.encode(), bytes);
            }
        }
        _ => {
            let [a, b, log, ..]: [u8; 19] = padded(bytes);
            let from = u64::from_be_bytes(padded(bytes.get(3..).unwrap_or_default()));
            let depth = SqDepth::new(1 << (log % 16)).expect("a power of two");
            let counter = u16::from_be_bytes([a, b]);
            let to = from.saturating_add(depth.get().into());
            if let Ok(n) = depth.whole(counter, from, to) {
                assert!((from..to).contains(&n));
                assert_eq!(n as u16, counter);
            }
        }
    }
});
