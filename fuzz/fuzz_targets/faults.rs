//! The text of a fault plan (`KVXFER_FAULTS`). What is taken says itself in words that are taken, too,
//! and mean the same.
#![no_main]

use kvxfer_verbs::FaultPlan;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(plan) = text.parse::<FaultPlan>() {
        let said = plan.to_string();
        let again: FaultPlan = said.parse().expect("its own words");
        assert_eq!(again.to_string(), said);
    }
});
