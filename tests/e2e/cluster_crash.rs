//! How soon a cluster goes on without a data plane: killed, stopped, cut off; and one that only got no CPU for a moment stays.

use std::process::Command;

use serde_json::Value;

use crate::machine::alone;

/// A data plane that is stopped for 300 ms is not left out and breaks nothing. One that dies takes its own flows with it and no others; it
/// is missed within 400 ms, and new flows begin elsewhere within 500 ms. The bounds are those of the median: other work on this machine makes
/// single ones late.
#[test]
fn d6_a_data_plane_is_missed_within_400_ms_and_a_stall_of_300_ms_is_survived() {
    let _alone = alone();
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .args(["bench", "crash", "--data-planes", "3", "--long", "90", "--outages", "3", "--json"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("no {name}: {report}"));
    assert_eq!(report["stolen_left_out"], false, "{report:#}\n{said}");
    assert_eq!(number("stolen_broken"), 0, "{report:#}\n{said}");
    assert!(number("broken") <= number("flows_of_the_dead"), "{report:#}\n{said}");
    for outages in report["outages"].as_array().unwrap() {
        let median = |name: &str| {
            let mut times: Vec<f64> =
                outages[name].as_array().unwrap().iter().map(|time| time.as_f64().unwrap()).collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        assert!(median("detected_ms") <= 400.0, "{report:#}\n{said}");
        assert!(median("new_flows_back_ms") <= 500.0, "{report:#}\n{said}");
    }
}
