//! A cluster of real programs: a manager, two dispatchers with one shared interface each, four data planes.

use std::process::Command;

use serde_json::Value;

use crate::machine::alone;

/// Thousands of real connections through address translation, every byte checked at both ends, while data planes come, drain and
/// change their share, several at once now and then: none breaks, no UDP association is lost, and flows stay where they began
/// although their buckets have moved.
#[test]
fn d1_d2_d3_d4_d5_d6_d8_d9_d10_connections_go_on_while_units_come_and_go() {
    let _alone = alone();
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .args(["demo", "--cluster", "--seconds", "15", "--json"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("no {name}: {report}"));
    assert!(output.status.success(), "{report:#}\n{said}");
    assert_eq!((number("broken"), number("udp_lost"), number("undecided")), (0.0, 0.0, 0.0), "{report:#}");
    assert!(number("connections") > 1_500.0 && number("events") >= 3.0, "{report:#}");
    // Some flows were reached over their bucket's chain, and most packets took no second hop.
    let hops = number("second_hops_percent");
    assert!(hops > 0.0 && hops < 30.0, "{report:#}");
    let units = report["units"].as_array().unwrap();
    let busy =
        units.iter().filter(|unit| unit["role"] == "dataplane" && unit["packets"].as_u64() > Some(1_000));
    assert!(busy.count() >= 3, "{report:#}");
}
