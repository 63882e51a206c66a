//! Tells the program when it was built: a clock before that is wrong.

use std::time::{SystemTime, UNIX_EPOCH};

fn main() {
    // Reproducible builds set it: https://reproducible-builds.org/specs/source-date-epoch/
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    println!("cargo:rerun-if-changed=build.rs");
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    println!("cargo:rustc-env=ANABRANCH_BUILT_AT={}", given.unwrap_or(now));
}
