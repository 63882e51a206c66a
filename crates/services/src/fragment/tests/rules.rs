use super::*;
use crate::spec::{TCP, UDP};

/// Row C5: every combination, against the row written out as what is *not* assembled.
#[test]
fn every_combination_of_facts() {
    let flags = [false, true];
    let services = [None, Some(TCP), Some(UDP), Some(132), Some(1)];
    let mut assembled = 0;
    for protocol in 0..=255 {
        for connection_exists in flags {
            for nat_assemble_flag in flags {
                for reverse_nat in flags {
                    for configured_service in services {
                        let facts = Facts {
                            protocol,
                            connection_exists,
                            nat_assemble_flag,
                            configured_service,
                            reverse_nat,
                        };
                        let bridged = match (protocol, connection_exists, nat_assemble_flag, reverse_nat) {
                            (6, false, false, false) | (17, _, false, _) => {
                                configured_service.is_none() || configured_service == Some(17)
                            }
                            (6 | 17, ..) => false,
                            _ => true,
                        };
                        let wanted = if bridged { Action::Bridge } else { Action::Assemble };
                        assert_eq!(action(&facts), wanted, "{facts:?}");
                        assembled += usize::from(!bridged);
                    }
                }
            }
        }
    }
    // TCP: all 40 but 2. UDP: 20 with the flag, and 3 of 5 services of the other 20.
    assert_eq!(assembled, 38 + 20 + 12);
}

#[test]
fn each_rule_by_itself() {
    let tcp = Facts { protocol: TCP, ..Facts::default() };
    let udp = Facts { protocol: UDP, ..Facts::default() };
    let cases = [
        (tcp, Action::Bridge),
        (Facts { connection_exists: true, ..tcp }, Action::Assemble),
        (Facts { nat_assemble_flag: true, ..tcp }, Action::Assemble),
        (Facts { configured_service: Some(TCP), ..tcp }, Action::Assemble),
        (Facts { configured_service: Some(UDP), ..tcp }, Action::Bridge),
        (Facts { reverse_nat: true, ..tcp }, Action::Assemble),
        (udp, Action::Bridge),
        (Facts { connection_exists: true, ..udp }, Action::Bridge),
        (Facts { nat_assemble_flag: true, ..udp }, Action::Assemble),
        (Facts { configured_service: Some(TCP), ..udp }, Action::Assemble),
        (Facts { configured_service: Some(UDP), ..udp }, Action::Bridge),
        (Facts { reverse_nat: true, ..udp }, Action::Bridge),
    ];
    for (facts, wanted) in cases {
        assert_eq!(action(&facts), wanted, "{facts:?}");
    }
}

#[test]
fn variants() {
    let known = Measure { bytes: Some(3_000), fragments: Some(3) };
    let unknown = Measure::default();
    let bridged = Facts { protocol: UDP, ..Facts::default() };
    let assembled = Facts { nat_assemble_flag: true, ..bridged };
    let cases = [
        (Variant::Rules, known, 0, false, true),
        (Variant::Assemble, known, 0, true, true),
        (Variant::Bridge, known, 0, false, false),
        (Variant::UpToBytes(3_000), known, 0, true, true),
        (Variant::UpToBytes(2_999), known, 0, false, false),
        (Variant::UpToBytes(3_000), unknown, 0, false, true),
        (Variant::UpToFragments(3), known, 0, true, true),
        (Variant::UpToFragments(2), known, 0, false, false),
        (Variant::UpToFragments(2), unknown, 0, false, true),
        (Variant::LoadBelow(80), known, 79, true, true),
        (Variant::LoadBelow(80), known, 80, false, false),
    ];
    for (variant, measure, load, of_bridged, of_assembled) in cases {
        let is = |facts| variant.action(&facts, &measure, load) == Action::Assemble;
        assert_eq!((is(bridged), is(assembled)), (of_bridged, of_assembled), "{variant:?} {measure:?}");
    }
    assert_eq!(Variant::default(), Variant::Rules);
}
