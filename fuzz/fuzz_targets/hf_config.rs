//! Any text as a model's config.json. What is made of it is a format that can be used, and every
//! refusal says where in the file.
//!
//! Input: options (one byte), the text.
#![no_main]

use kvxfer::layout::{
    ConfigError, DType, HfOptions, KvFormat, KvPlacement, LayoutError, Packing, Topology,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((options, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let options = HfOptions {
        block_tokens: [1, 16, 64, 1 << 20][usize::from(options & 3)],
        dtype: [None, Some(DType::F8E4m3)][usize::from(options >> 2 & 1)],
        mtp: options & 8 != 0,
        one_table: options & 16 != 0,
        ..HfOptions::default()
    };
    match KvFormat::from_hf_config(text, &options) {
        Ok(format) => {
            assert!(format.bytes_per_token() > 0);
            let _ = format.fingerprint();
            let blocks = vec![1; format.groups().len()];
            let topology = Topology::single(&format);
            KvPlacement::uniform(&format, topology, &blocks, Packing::PerTensor, 64)
                .expect("one block of any model can be placed");
        }
        // The file's numbers are bounded one by one, so that the format's own checks find nothing.
        Err(LayoutError::Config(error)) => {
            assert!(error.to_string().len() < 1024);
            if let ConfigError::Missing { path, .. } | ConfigError::Range { path, .. } = error {
                assert!(!path.is_empty());
            }
        }
        Err(other) => panic!("{other}"),
    }
});
