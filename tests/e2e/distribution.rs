//! Which core reads a packet by each scheme, through the built program.

use std::process::Command;

fn bench(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .args(["bench", "distribution"])
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Row C8: every scheme reads each packet once and processes it where its flow lives. By flow nothing is handed over and
/// nothing reordered; by interface, service and groups of them a flow has one reader, so that its packets stay in order.
#[test]
fn c8_schemes_of_distribution_are_compared() {
    let (code, text, said) = bench(&["--cores", "3", "--packets", "200000", "--json"]);
    assert_eq!(code, Some(0), "{said}");
    let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rows = rows.as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["scheme"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "flow",
            "interface",
            "service",
            "round-robin",
            "least-loaded",
            "every-100-packets",
            "slice-5000-us",
            "transaction-100-us",
            "interface-flow-2",
            "service-flow-2",
        ]
    );
    for row in rows {
        let number = |field: &str| row[field].as_u64().unwrap();
        assert_eq!((number("packets"), number("processed")), (200_000, 200_000), "{row}");
        let scheme = row["scheme"].as_str().unwrap();
        let share = number("handed_over") as f64 / 200_000.0;
        let imbalance = row["reading_imbalance"].as_f64().unwrap();
        match scheme {
            "flow" => assert_eq!((number("handed_over"), number("reordered")), (0, 0), "{row}"),
            // Half of the packets are for no service and are read by their owners.
            "service" | "service-flow-2" => assert!((0.2..0.5).contains(&share), "{row}"),
            // Two thirds of what any other core reads belongs elsewhere.
            _ => assert!((0.5..0.8).contains(&share), "{row}"),
        }
        match scheme {
            "round-robin" => assert!(imbalance < 1.01, "{row}"),
            "least-loaded" | "every-100-packets" => assert!(imbalance < 1.1, "{row}"),
            // Half of the traffic is one interface's.
            "interface" => assert!(imbalance > 1.3, "{row}"),
            _ => {}
        }
        // A flow has one reader, and the ring from there to its owner keeps the order.
        if matches!(scheme, "interface" | "service" | "interface-flow-2" | "service-flow-2") {
            assert_eq!(number("reordered"), 0, "{row}");
        }
    }
}

/// Row C8: a scheme can be chosen, and one that does not exist is refused with those that do.
#[test]
fn c8_a_scheme_is_chosen_by_name() {
    let (code, text, said) = bench(&[
        "--cores",
        "2",
        "--packets",
        "1000",
        "--scheme",
        "every-7-packets",
        "--scheme",
        "slice-3-us",
    ]);
    assert_eq!(code, Some(0), "{said}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[0].starts_with("2 cores") && lines[0].contains("1000 packets"), "{text}");
    assert!(lines[2].starts_with("every-7-packets ") && lines[3].starts_with("slice-3-us "), "{text}");
    let (code, _, said) = bench(&["--scheme", "every-0-packets"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("must be flow, interface, service, round-robin"), "{said}");
}
