//! What travels packed inside messages: addresses of devices, endpoints, causes.
//!
//! Input: which one (one byte), then its bytes.
#![no_main]

use std::fmt::Debug;

use kvxfer::transfer::Cause;
use kvxfer::wire::Blob;
use kvxfer_verbs::{DeviceAddr, QpEndpoint};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};

fn comes_back<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8]) {
    if let Ok(value) = Blob(bytes.to_vec()).unpack::<T>("blob") {
        let again = Blob::pack("blob", &value).expect("what was unpacked");
        let back: T = again.unpack("blob").expect("just packed");
        assert_eq!(format!("{value:?}"), format!("{back:?}"));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((which, bytes)) = data.split_first() else {
        return;
    };
    match which % 3 {
        0 => comes_back::<DeviceAddr>(bytes),
        1 => comes_back::<QpEndpoint>(bytes),
        _ => comes_back::<Cause>(bytes),
    }
});
