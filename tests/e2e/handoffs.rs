//! Which core gets a reply, through the built program and many random flows.

use std::process::Command;

/// Rows C2, C3, C4: with random flows of random clients, servers and ports every reply comes to the core of its request
/// where the port is chosen for it; where nothing may be changed, and after buckets moved, exactly as many are handed
/// over as the hash demands; and every port that can serve a core and a destination is given out, without a search.
#[test]
fn replies_of_random_flows_come_to_the_core_of_their_request() {
    for cores in ["1", "3"] {
        let output = Command::new(env!("CARGO_BIN_EXE_anabranch"))
            .args(["bench", "handoffs", "--json", "--flows", "50000", "--cores", cores])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((output.status.code(), report["kept"].as_bool()), (Some(0), Some(true)), "{text}");
        let rows = report["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 7, "{text}");
        for row in rows {
            let number = |field: &str| row[field].as_u64().unwrap();
            let (name, what) = (row["row"].as_str().unwrap(), row["what"].as_str().unwrap());
            assert_eq!((number("flows"), number("failures")), (50_000, 0), "{row}");
            assert_eq!(number("replies_elsewhere"), number("replies_demanded"), "{row}");
            let at_rest = name != "C4" && number("buckets_moved") == 0;
            if at_rest {
                assert_eq!((number("replies_elsewhere"), number("requests_handed_over")), (0, 0), "{row}");
            } else if cores != "1" && what != "none" {
                // The test is one only if there was something to hand over.
                assert!(number("replies_elsewhere") > 1_000, "{row}");
            }
        }
        for port in report["ports"].as_array().unwrap() {
            let (usable, opened) = (port["usable"].as_u64().unwrap(), port["opened"].as_u64().unwrap());
            assert_eq!(opened, usable, "{port}");
            assert!(usable > 10_000 && port["checks_max"].as_u64() == Some(0), "{port}");
        }
    }
}
