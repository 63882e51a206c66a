#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::policy::Policy;
use crate::spec::{Attachment, GatewaySpec};
use packet::attachment::{BondId, InterfaceId};

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

fn from(prefixes: &[&str]) -> SideSpec {
    SideSpec { prefixes: nets(prefixes), ..SideSpec::default() }
}

fn in_groups(groups: &[u16]) -> SideSpec {
    SideSpec { groups: groups.to_vec(), ..SideSpec::default() }
}

fn by(interface: u16) -> Ingress {
    Ingress::Interface(InterfaceId(interface))
}

fn group(name: &str, members: &[&str]) -> GroupSpec {
    GroupSpec { name: name.to_owned(), members: nets(members) }
}

fn drop_rule() -> RuleSpec {
    RuleSpec { action: RuleAction::Drop, ..RuleSpec::default() }
}

fn compile(rules: &[RuleSpec], groups: &[GroupSpec]) -> RuleSet {
    RuleSet::compile(rules, groups, RuleAction::Allow).unwrap()
}

/// The groups as an operator would have written them.
fn specs(set: &RuleSet) -> Vec<GroupSpec> {
    let spec =
        |group: &Group| GroupSpec { name: group.name().to_owned(), members: group.members().collect() };
    set.groups().iter().map(spec).collect()
}

/// The next rule set, in which a group has lost the members in `remove` and then got those in `add`.
fn with_members(set: &RuleSet, name: &str, add: &[IpNet], remove: &[IpNet]) -> RuleSet {
    let mut groups = specs(set);
    let members = &mut groups.iter_mut().find(|group| group.name == name).unwrap().members;
    members.retain(|member| !remove.iter().any(|gone| gone.trunc() == *member));
    members.extend(add);
    set.recompile(set.rules(), &groups, set.default_action()).unwrap()
}

/// Asks about a flow written as text, of tenant 0, from interface 1 to interface 2.
fn ask(set: &RuleSet, flow: &str) -> Option<u16> {
    let key: FlowKey = flow.parse().unwrap();
    set.verdict(&Question { key: &key, tenant: 0, ingress: by(1), egress: by(2).into(), to_gateway: false })
        .rule
}

#[test]
fn the_first_match_decides_and_else_the_default() {
    let rules = [
        RuleSpec { to: from(&["1.2.3.4/32"]), dst_ports: vec![(443, 443)], ..RuleSpec::default() },
        RuleSpec { from: from(&["10.0.0.0/8"]), protocols: vec![6], ..drop_rule() },
        RuleSpec { from: from(&["10.1.0.0/16"]), action: RuleAction::Reject, ..RuleSpec::default() },
    ];
    let set = RuleSet::compile(&rules, &[], RuleAction::Drop).unwrap();
    let cases = [
        ("tcp 10.1.0.1:9 > 1.2.3.4:443", Some(0)),
        ("tcp 10.1.0.1:9 > 1.2.3.4:444", Some(1)),
        ("udp 10.1.0.1:9 > 1.2.3.4:444", Some(2)),
        ("udp 10.2.0.1:9 > 1.2.3.4:444", None),
        ("udp 10.2.0.1:9 > 1.2.3.4:443", Some(0)),
        ("tcp [2001:db8::1]:9 > [2001:db8::2]:443", None),
    ];
    for (flow, want) in cases {
        assert_eq!(ask(&set, flow), want, "{flow}");
    }
    let key = "udp 10.1.0.1:9 > 1.2.3.4:444".parse().unwrap();
    let question = Question { key: &key, tenant: 0, ingress: by(0), egress: by(0).into(), to_gateway: false };
    assert_eq!(set.verdict(&question), Verdict { action: RuleAction::Reject, rule: Some(2) });
    let key = "udp 9.1.0.1:9 > 1.2.3.4:444".parse().unwrap();
    let question = Question { key: &key, ..question };
    assert_eq!(set.verdict(&question), Verdict { action: RuleAction::Drop, rule: None });
}

#[test]
fn without_rules_everything_passes() {
    assert_eq!(ask(&RuleSet::default(), "tcp 10.0.0.1:1 > 10.0.0.2:2"), None);
    assert_eq!(RuleSet::default().default_action(), RuleAction::Allow);
    assert_eq!(ask(&compile(&[RuleSpec::default()], &[]), "tcp 10.0.0.1:1 > 10.0.0.2:2"), Some(0));
}

#[test]
fn icmp_means_both_versions_and_icmpv6_one() {
    let icmp = compile(&[RuleSpec { protocols: vec![1], ..drop_rule() }], &[]);
    let icmpv6 = compile(&[RuleSpec { protocols: vec![58], ..drop_rule() }], &[]);
    let cases = [
        ("icmp 10.0.0.1 > 10.0.0.2 id 7", Some(0), None),
        ("icmpv6 2001:db8::1 > 2001:db8::2 id 7", Some(0), Some(0)),
        // ICMPv6 in IPv4 is nobody's ping.
        ("icmpv6 10.0.0.1 > 10.0.0.2", None, Some(0)),
        ("tcp 10.0.0.1:1 > 10.0.0.2:2", None, None),
    ];
    for (flow, first, second) in cases {
        assert_eq!((ask(&icmp, flow), ask(&icmpv6, flow)), (first, second), "{flow}");
    }
}

#[test]
fn ports_belong_to_protocols_that_have_ports() {
    let rules = [
        RuleSpec { dst_ports: vec![(7, 7)], ..drop_rule() },
        RuleSpec { src_ports: vec![(0, 65535)], ..drop_rule() },
    ];
    let set = compile(&rules, &[]);
    let cases = [
        ("udp 10.0.0.1:1 > 10.0.0.2:7", Some(0)),
        ("sctp 10.0.0.1:1 > 10.0.0.2:7", Some(0)),
        ("udp 10.0.0.1:1 > 10.0.0.2:8", Some(1)),
        // The identifier stands where ports stand, in one of the two slots.
        ("icmp 10.0.0.1 > 10.0.0.2 id 7", None),
        ("icmp 10.0.0.2 > 10.0.0.1 id 7", None),
        ("gre 10.0.0.1 > 10.0.0.2", None),
    ];
    for (flow, want) in cases {
        assert_eq!(ask(&set, flow), want, "{flow}");
    }
}

#[test]
fn interfaces_and_tenants_are_conditions() {
    let side =
        |attachments: &[Attachment]| SideSpec { attachments: attachments.to_vec(), ..SideSpec::default() };
    let rules = [
        RuleSpec {
            from: side(&[by(1).into(), by(4).into()]),
            to: side(&[Attachment::Gateway]),
            ..drop_rule()
        },
        RuleSpec { to: side(&[Attachment::AnyBond]), tenants: vec![3, 5], ..drop_rule() },
        RuleSpec { to: side(&[Attachment::Bond(BondId(7))]), tenants: vec![6], ..drop_rule() },
        RuleSpec { from: side(&[Attachment::AnyBond]), to: side(&[by(9).into()]), ..drop_rule() },
    ];
    let set = compile(&rules, &[]);
    let key = "tcp 10.0.0.1:1 > 10.0.0.2:2".parse().unwrap();
    let ask = |tenant, ingress, egress| {
        set.verdict(&Question { key: &key, tenant, ingress, egress, to_gateway: false }).rule
    };
    let (host, peer) = (Egress::Host, |id| Egress::Bond(BondId(id)));
    assert_eq!(ask(0, by(1), host), Some(0));
    assert_eq!(ask(9, by(4), host), Some(0));
    assert_eq!(ask(0, by(2), host), None);
    assert_eq!(ask(0, by(1), by(2).into()), None);
    assert_eq!(ask(3, by(1), peer(0)), Some(1));
    assert_eq!(ask(5, by(1), peer(BondId::MAX)), Some(1));
    assert_eq!(ask(4, by(1), peer(0)), None);
    assert_eq!(ask(5, by(1), host), Some(0));
    assert_eq!(ask(6, by(1), peer(7)), Some(2));
    assert_eq!(ask(6, by(1), peer(8)), None);
    assert_eq!(ask(0, Ingress::Bond(BondId(3)), by(9).into()), Some(3));
    assert_eq!(ask(0, Ingress::Host, by(9).into()), None);
}

#[test]
fn an_inner_member_counts_for_the_groups_around_it_too() {
    let groups = [group("all", &["10.0.0.0/8"]), group("some", &["10.1.0.0/16", "10.1.2.0/24"])];
    let rules = [
        RuleSpec { from: in_groups(&[1]), to: in_groups(&[0]), ..drop_rule() },
        RuleSpec { from: in_groups(&[0]), ..drop_rule() },
        RuleSpec { from: from(&["10.1.2.3/32"]), ..drop_rule() },
    ];
    let set = compile(&rules, &groups);
    assert_eq!(ask(&set, "udp 10.1.2.3:1 > 10.9.0.1:1"), Some(0));
    assert_eq!(ask(&set, "udp 10.1.2.3:1 > 11.9.0.1:1"), Some(1));
    assert_eq!(ask(&set, "udp 10.2.2.3:1 > 11.9.0.1:1"), Some(1));
    assert_eq!(ask(&set, "udp 11.2.2.3:1 > 11.9.0.1:1"), None);
    // Without the member 10.1.2.0/24 the /16 around it is still there.
    let fewer = with_members(&set, "some", &[], &nets(&["10.1.2.0/24"]));
    assert_eq!(ask(&fewer, "udp 10.1.2.3:1 > 10.9.0.1:1"), Some(0));
    let none = with_members(&fewer, "all", &[], &nets(&["10.0.0.0/8"]));
    assert_eq!(ask(&none, "udp 10.1.2.3:1 > 10.9.0.1:1"), Some(2));
    assert_eq!(ask(&set, "udp 10.1.2.3:1 > 10.9.0.1:1"), Some(0), "the old rule set is as it was");
}

#[test]
fn a_group_without_members_is_nobody_and_not_anybody() {
    let rules = [RuleSpec { from: in_groups(&[0]), ..drop_rule() }];
    let set = compile(&rules, &[group("blocked", &[])]);
    assert_eq!(ask(&set, "udp 10.1.2.3:1 > 10.9.0.1:1"), None);
    let set = with_members(&set, "blocked", &nets(&["10.1.2.3/32", "2001:db8::/32"]), &[]);
    assert_eq!(ask(&set, "udp 10.1.2.3:1 > 10.9.0.1:1"), Some(0));
    assert_eq!(ask(&set, "udp [2001:db8::1]:1 > [2001:db9::1]:1"), Some(0));
    assert_eq!(ask(&set, "udp 10.1.2.4:1 > 10.9.0.1:1"), None);
    assert_eq!(specs(&set), [group("blocked", &["10.1.2.3/32", "2001:db8::/32"])]);
}

#[test]
fn a_change_of_one_group_compiles_nothing_else() {
    let many: Vec<String> =
        (0..4_096).map(|number| format!("10.{}.{}.1/32", number / 256, number % 256)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let groups = [group("many", &many), group("few", &["192.0.2.0/24"])];
    let rules = [
        RuleSpec { from: in_groups(&[0]), ..drop_rule() },
        RuleSpec { from: in_groups(&[1]), ..drop_rule() },
    ];
    let set = compile(&rules, &groups);
    let next = with_members(&set, "few", &nets(&["10.0.7.0/24"]), &[]);
    assert!(Arc::ptr_eq(&set.fixed, &next.fixed), "rules, ports and sides stay");
    let same =
        |place| std::ptr::eq(set.groups.by_place(place).unwrap(), next.groups.by_place(place).unwrap());
    assert_eq!((same(0), same(1)), (true, false));
    // One class more: in both groups, inside the new prefix; that of the prefix itself was there.
    assert_eq!(next.addresses.classes(), set.addresses.classes() + 1);
    assert_eq!(
        next.addresses.shared_with(&set.addresses),
        next.addresses.len() - 2,
        "prefixes left as they were"
    );
    assert_eq!(ask(&next, "udp 10.0.7.1:1 > 10.9.0.1:1"), Some(0));
    assert_eq!(ask(&next, "udp 10.0.7.2:1 > 10.9.0.1:1"), Some(1));
    assert_eq!(ask(&set, "udp 10.0.7.2:1 > 10.9.0.1:1"), None);
    // Other rules, another default or other groups: all is compiled anew.
    for (rules, groups, default) in [
        (&rules[..1], &groups[..], RuleAction::Allow),
        (&rules[..], &groups[..], RuleAction::Drop),
        (&rules[..1], &groups[..1], RuleAction::Allow),
    ] {
        let other = set.recompile(rules, groups, default).unwrap();
        assert!(!Arc::ptr_eq(&set.fixed, &other.fixed));
        assert_eq!((other.rules(), other.default_action()), (rules, default));
    }
}

#[test]
fn a_policy_takes_the_rules_of_the_one_before() {
    let rules = vec![RuleSpec { from: in_groups(&[0]), ..drop_rule() }];
    let mut spec = GatewaySpec { rules, groups: vec![group("blocked", &[])], ..GatewaySpec::default() };
    let before = Policy::compile(spec.clone(), None, 0).unwrap().0;
    spec.groups = vec![group("blocked", &["10.0.0.0/8"])];
    let after = Policy::compile(spec, Some(&before), 0).unwrap().0;
    assert!(Arc::ptr_eq(&before.rules.fixed, &after.rules.fixed));
    assert_eq!(ask(&after.rules, "udp 10.0.7.2:1 > 192.0.2.1:1"), Some(0));
}

#[test]
fn changes_without_end_do_not_grow() {
    // Each change makes a combination of groups that was never there before.
    let groups: Vec<GroupSpec> = (0..11).map(|number| group(&format!("g{number}"), &[])).collect();
    let mut set = compile(&[RuleSpec { from: in_groups(&[3]), ..drop_rule() }], &groups);
    let member = nets(&["10.0.0.1/32"]);
    let mut classes_max = 0;
    for round in 1..2_048u32 {
        // Gray code: one group at a time.
        let (before, after) = ((round - 1) ^ (round - 1) >> 1, round ^ round >> 1);
        let name = format!("g{}", (before ^ after).trailing_zeros());
        let (add, remove) =
            if after & !before != 0 { (&member[..], &[][..]) } else { (&[][..], &member[..]) };
        set = with_members(&set, &name, add, remove);
        classes_max = classes_max.max(set.addresses.classes());
        assert_eq!(ask(&set, "udp 10.0.0.1:1 > 10.9.0.1:1").is_some(), after & 8 != 0, "round {round}");
    }
    assert!(classes_max < 1_100, "{classes_max}");
}

#[test]
fn what_cannot_be_meant_is_refused_with_a_sentence() {
    let fails = |rules: &[RuleSpec], groups: &[GroupSpec]| {
        RuleSet::compile(rules, groups, RuleAction::Allow).unwrap_err()
    };
    let twice = fails(&[], &[group("a", &[]), group("a", &[])]);
    assert_eq!(twice, "group \"a\" is there twice: give each its own name");
    let unknown = fails(&[RuleSpec { from: in_groups(&[1]), ..drop_rule() }], &[group("a", &[])]);
    assert_eq!(unknown, "rule 0: group number 1 of 1: there is no such group");
    let named = RuleSpec { name: "web".to_owned(), dst_ports: vec![(9, 8)], ..drop_rule() };
    let reversed = fails(&[named], &[]);
    assert_eq!(reversed, "rule 0 \"web\": ports 9-8: the first must not be above the last");
    let many = fails(&vec![drop_rule(); RULES_MAX + 1], &[]);
    assert_eq!(many, "65536 rules: at most 65535 are possible");
}

#[test]
fn explain_tells_the_rule_the_groups_and_the_near_misses() {
    let groups = [group("clients", &["10.0.0.0/8"]), group("staff", &["10.1.0.0/16"])];
    let rules = [
        RuleSpec { name: "web".to_owned(), dst_ports: vec![(443, 443)], ..RuleSpec::default() },
        RuleSpec { from: from(&["11.0.0.0/8"]), ..RuleSpec::default() },
        RuleSpec { from: in_groups(&[1]), to: from(&["1.2.0.0/16"]), ..drop_rule() },
    ];
    let set = compile(&rules, &groups);
    let explain = |flow: &str| {
        let key = flow.parse().unwrap();
        set.explain(&Question {
            key: &key,
            tenant: 4,
            ingress: by(1),
            egress: Egress::Host,
            to_gateway: true,
        })
    };
    let want = "\
tcp 10.1.2.3:9 > 1.2.3.4:80, tenant 4, in by interface 1, out by the gateway itself
dropped: rule 2
  source 10.1.2.3 is in group staff (10.1.0.0/16)
  destination 1.2.3.4 is in 1.2.0.0/16
groups of 10.1.2.3: clients, staff
groups of 1.2.3.4: none
not rule 0 \"web\": destination port differs
not rule 1: source differs
";
    assert_eq!(explain("tcp 10.1.2.3:9 > 1.2.3.4:80"), want);
    let unmatched = explain("tcp 10.2.2.3:9 > 1.2.3.4:80");
    assert!(unmatched.contains("allowed: no rule matches, the default action"), "{unmatched}");
    assert!(unmatched.contains("not rule 2: source differs"), "{unmatched}");
}

#[test]
fn ports_that_are_cut_into_too_many_pieces_are_still_exact() {
    // 20,000 ranges: pieces are joined.
    let rules: Vec<RuleSpec> = (0..20_000u16)
        .map(|number| RuleSpec { dst_ports: vec![(number * 3, number * 3 + 1)], ..drop_rule() })
        .collect();
    let set = compile(&rules, &[]);
    for port in (0..=u16::MAX).step_by(7) {
        let want = (port < 60_000 && port % 3 != 2).then_some(port / 3);
        assert_eq!(ask(&set, &format!("tcp 10.0.0.1:1 > 10.0.0.2:{port}")), want, "port {port}");
    }
}

/// The module page, rule by rule, without any of its data structures.
fn naive(rules: &[RuleSpec], groups: &[GroupSpec], question: &Question<'_>) -> Option<u16> {
    let key = question.key;
    let in_side = |side: &SideSpec, address: IpAddr| {
        let any = side.prefixes.is_empty() && side.groups.is_empty();
        let listed = |list: &[IpNet]| list.iter().any(|prefix| prefix.contains(&address));
        any || listed(&side.prefixes)
            || side.groups.iter().any(|&group| listed(&groups[usize::from(group)].members))
    };
    let ports = [6, 17, 132, 136].contains(&key.protocol);
    let in_ranges = |ranges: &[(u16, u16)], port: u16| {
        ranges.is_empty() || ports && ranges.iter().any(|range| range.0 <= port && port <= range.1)
    };
    let protocol =
        |wanted: &u8| *wanted == key.protocol || *wanted == 1 && key.protocol == 58 && key.src.is_ipv6();
    let one_of = |list: &[Attachment], value: Egress| {
        let is = |attachment: &Attachment| match attachment {
            Attachment::Interface(id) => value == Egress::Interface(*id),
            Attachment::Gateway => value == Egress::Host,
            Attachment::Bond(id) => value == Egress::Bond(*id),
            Attachment::AnyBond => matches!(value, Egress::Bond(_)),
        };
        list.is_empty() || list.iter().any(is)
    };
    let matches = |rule: &RuleSpec| {
        in_side(&rule.from, key.src)
            && in_side(&rule.to, key.dst)
            && one_of(&rule.from.attachments, question.ingress.into())
            && (one_of(&rule.to.attachments, question.egress)
                || question.to_gateway && rule.to.attachments.contains(&Attachment::Gateway))
            && (rule.tenants.is_empty() || rule.tenants.contains(&question.tenant))
            && (rule.protocols.is_empty() || rule.protocols.iter().any(protocol))
            && in_ranges(&rule.dst_ports, key.dst_port)
            && in_ranges(&rule.src_ports, key.src_port)
    };
    rules.iter().position(matches).map(|place| place as u16)
}

/// Few addresses, close together, of both families.
fn address(v6: bool) -> impl Strategy<Value = IpAddr> {
    (0u32..4, 0u32..16).prop_map(move |(high, low)| {
        if v6 {
            IpAddr::from(((0x2001_0db8 + u128::from(high)) << 96 | u128::from(low)).to_be_bytes())
        } else {
            IpAddr::from(((10 + high) << 24 | low).to_be_bytes())
        }
    })
}

fn prefix() -> impl Strategy<Value = IpNet> {
    (any::<bool>().prop_flat_map(address), 0usize..7).prop_map(|(address, place)| {
        let bits = [0, 6, 8, 16, 29, 31, 32][place];
        let bits = if address.is_ipv6() { [0, 30, 32, 64, 125, 127, 128][place] } else { bits };
        IpNet::new(address, bits).unwrap()
    })
}

fn some<T: fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![2 => Just(0usize), 1 => 1usize..4].prop_flat_map({
        let of = std::rc::Rc::new(of);
        move |count| proptest::collection::vec(of.clone(), count)
    })
}

fn ingress() -> impl Strategy<Value = Ingress> {
    prop_oneof![
        (0u16..3).prop_map(by),
        Just(Ingress::Host),
        (0u16..2).prop_map(|id| Ingress::Bond(BondId(id)))
    ]
}

fn side(groups: u16) -> impl Strategy<Value = SideSpec> {
    let attachment = prop_oneof![ingress().prop_map(Attachment::from), Just(Attachment::AnyBond)];
    (some(prefix()), some(0..groups), some(attachment)).prop_map(|(prefixes, groups, attachments)| SideSpec {
        prefixes,
        groups,
        attachments,
    })
}

const GROUPS: u16 = 4;

fn rule() -> impl Strategy<Value = RuleSpec> {
    let range = || (0u16..30, 0u16..8).prop_map(|(first, more)| (first, first + more));
    let protocol = prop_oneof![Just(1u8), Just(6), Just(17), Just(58), Just(47)];
    (side(GROUPS), side(GROUPS), some(protocol), some(range()), some(range()), some(0u16..3)).prop_map(
        |(from, to, protocols, dst_ports, src_ports, tenants)| RuleSpec {
            from,
            to,
            protocols,
            dst_ports,
            src_ports,
            tenants,
            ..drop_rule()
        },
    )
}

fn members() -> impl Strategy<Value = Vec<IpNet>> {
    proptest::collection::vec(prefix(), 0..5)
}

fn flow() -> impl Strategy<Value = (FlowKey, u16, Ingress, Egress)> {
    let protocol = prop_oneof![Just(1u8), Just(6), Just(17), Just(58), Just(47)];
    let ends = any::<bool>().prop_flat_map(|v6| (address(v6), address(v6)));
    (ends, 0u16..40, 0u16..40, protocol, 0u16..4, ingress(), ingress()).prop_map(
        |((src, dst), src_port, dst_port, protocol, tenant, ingress, egress)| {
            (FlowKey { src, dst, src_port, dst_port, protocol }, tenant, ingress, egress.into())
        },
    )
}

fn named(members: Vec<Vec<IpNet>>) -> Vec<GroupSpec> {
    let name = |number: usize| format!("group {number}");
    let groups = members.into_iter().enumerate();
    groups.map(|(number, members)| GroupSpec { name: name(number), members }).collect()
}

proptest! {
    #[test]
    fn as_the_list_read_from_top_to_bottom(
        rules in proptest::collection::vec(rule(), 0..150),
        members in proptest::collection::vec(members(), usize::from(GROUPS)),
        changes in proptest::collection::vec((0..usize::from(GROUPS), members(), members()), 0..4),
        flows in proptest::collection::vec(flow(), 1..60),
    ) {
        let mut groups = named(members);
        let mut set = compile(&rules, &groups);
        for (place, add, remove) in std::iter::once((0, Vec::new(), Vec::new())).chain(changes) {
            set = with_members(&set, &groups[place].name, &add, &remove);
            let gone: Vec<IpNet> = remove.iter().map(IpNet::trunc).collect();
            let members = &mut groups[place].members;
            members.retain(|member| !gone.contains(&member.trunc()));
            members.extend(add);
            for (key, tenant, ingress, egress) in &flows {
                let to_gateway = key.src_port % 3 == 0;
            let question =
                Question { key, tenant: *tenant, ingress: *ingress, egress: *egress, to_gateway };
                let want = naive(&rules, &groups, &question);
                prop_assert_eq!(set.verdict(&question).rule, want, "{}", set.explain(&question));
            }
        }
    }

    #[test]
    fn a_replaced_group_is_as_if_compiled_with_it(
        rules in proptest::collection::vec(rule(), 0..40),
        before in proptest::collection::vec(members(), usize::from(GROUPS)),
        after in proptest::collection::vec(members(), usize::from(GROUPS)),
        flows in proptest::collection::vec(flow(), 1..40),
    ) {
        let groups = named(after);
        let set = compile(&rules, &named(before)).recompile(&rules, &groups, RuleAction::Allow).unwrap();
        let fresh = compile(&rules, &groups);
        prop_assert_eq!(set.groups(), fresh.groups());
        prop_assert_eq!(set.addresses.len(), fresh.addresses.len());
        for (key, tenant, ingress, egress) in &flows {
            let to_gateway = key.src_port % 3 == 0;
            let question =
                Question { key, tenant: *tenant, ingress: *ingress, egress: *egress, to_gateway };
            prop_assert_eq!(set.verdict(&question), fresh.verdict(&question));
            prop_assert_eq!(set.explain(&question), fresh.explain(&question));
        }
    }
}

/// A reproducible sequence, for sets that are too large for proptest.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(below)) as u32
    }

    fn net(&mut self, low: u8, high: u8) -> IpNet {
        let address = IpAddr::from((0x0a00_0000 | self.next(1 << 24)).to_be_bytes());
        let bits = low + self.next(u32::from(high - low) + 1) as u8;
        IpNet::new(address, bits).unwrap().trunc()
    }
}

/// 10,000 rules as large installations have them: host and network pairs, ports, some groups and tenants.
fn large(numbers: &mut Numbers) -> (Vec<RuleSpec>, Vec<GroupSpec>) {
    let groups = (0..50).map(|_| (0..40).map(|_| numbers.net(16, 32)).collect()).collect();
    let mut rules = Vec::new();
    for _ in 0..10_000 {
        let mut rule = drop_rule();
        match numbers.next(3) {
            0 => rule.from.groups = vec![numbers.next(50) as u16],
            1 => rule.from.prefixes = vec![numbers.net(12, 32)],
            _ => {}
        }
        if numbers.next(8) != 0 {
            rule.to.prefixes = vec![numbers.net(18, 32)];
        } else {
            rule.tenants = vec![1 + numbers.next(500) as u16];
        }
        rule.protocols = vec![[6, 17][numbers.next(2) as usize]];
        let first = numbers.next(60_000) as u16;
        rule.dst_ports = vec![(first, first + numbers.next(100) as u16)];
        rules.push(rule);
    }
    (rules, named(groups))
}

#[test]
fn ten_thousand_rules_answer_as_the_list_does() {
    let mut numbers = Numbers(7);
    let (rules, groups) = large(&mut numbers);
    let set = compile(&rules, &groups);
    let mut matched = 0;
    for round in 0..400 {
        // Every second question is near a rule, so that many match.
        let near = &rules[numbers.next(10_000) as usize];
        let inside = |list: &[IpNet], other: IpNet| list.first().map_or(other.addr(), IpNet::addr);
        let (src, dst) = (numbers.net(32, 32), numbers.net(32, 32));
        let mut key = FlowKey {
            src: inside(&near.from.prefixes, src),
            dst: inside(&near.to.prefixes, dst),
            src_port: 1,
            dst_port: near.dst_ports[0].0,
            protocol: near.protocols[0],
        };
        if round % 2 == 0 {
            key.dst = dst.addr();
        }
        let tenant = near.tenants.first().copied().unwrap_or(0);
        let question =
            Question { key: &key, tenant, ingress: by(0), egress: by(1).into(), to_gateway: false };
        let want = naive(&rules, &groups, &question);
        matched += usize::from(want.is_some());
        assert_eq!(set.verdict(&question).rule, want, "{}", set.explain(&question));
    }
    assert!((100..300).contains(&matched), "{matched} of 400 match: a test of nothing");
}

#[test]
fn counts_go_on_with_the_rules_they_belong_to() {
    let named = |name: &str, port| RuleSpec {
        name: name.to_owned(),
        dst_ports: vec![(port, port)],
        ..RuleSpec::default()
    };
    let old = [named("web", 80), named("", 22), named("twice", 1), named("twice", 2), named("", 23)];
    let hits = [10, 20, 30, 40, 50, 7];
    let new = [named("", 23), named("new", 80), named("web", 443), named("twice", 9), named("twice", 1)];
    let carry = |old: &[RuleSpec], hits: &[u64], new: &[RuleSpec]| carry_hits(&places_before(old, new), hits);
    assert_eq!(carry(&old, &hits, &new), [50, 0, 10, 30, 40, 7]);
    assert_eq!(carry(&[], &[], &new), [0; 6]);
    assert_eq!(carry(&old, &hits, &[]), [7]);
}

#[test]
fn counts_go_on_over_a_policy_that_was_never_followed() {
    use crate::policy::Policy;
    use crate::spec::GatewaySpec;
    let policy = |names: &[&str], before: Option<&Policy>| {
        let rule = |name: &&str| RuleSpec { name: (*name).to_owned(), ..RuleSpec::default() };
        let spec = GatewaySpec { rules: names.iter().map(rule).collect(), ..GatewaySpec::default() };
        Policy::compile(spec, before, 0).unwrap().0
    };
    let first = policy(&["a", "b"], None);
    let second = policy(&["c"], Some(&first));
    let third = policy(&["b", "a", "c"], Some(&second));
    assert_eq!(second.carry_hits(&first, &[1, 2, 3]), [0, 3]);
    assert_eq!(third.carry_hits(&second, &[9, 3]), [0, 0, 9, 3]);
    assert_eq!(third.carry_hits(&first, &[1, 2, 3]), [2, 1, 0, 3]);
    assert_eq!(first.carry_hits(&first, &[]), [0, 0, 0]);
}

#[test]
fn the_gateway_is_what_was_addressed_and_the_interface_what_is_behind() {
    let side =
        |attachments: &[Attachment]| SideSpec { attachments: attachments.to_vec(), ..SideSpec::default() };
    let key = "tcp 10.0.0.1:1 > 10.0.0.2:2".parse().unwrap();
    let rules = [
        RuleSpec { to: side(&[by(7).into()]), dst_ports: vec![(1, 1)], ..drop_rule() },
        RuleSpec { to: side(&[Attachment::Gateway]), ..drop_rule() },
        RuleSpec { to: side(&[by(2).into()]), ..drop_rule() },
    ];
    let set = compile(&rules, &[]);
    let ask = |egress: Egress, to_gateway| {
        set.verdict(&Question { key: &key, tenant: 0, ingress: by(1), egress, to_gateway }).rule
    };
    assert_eq!(ask(by(2).into(), true), Some(1), "to the gateway, whatever is behind");
    assert_eq!(ask(by(2).into(), false), Some(2));
    assert_eq!(ask(by(3).into(), true), Some(1));
    assert_eq!(ask(by(3).into(), false), None);
    assert_eq!(ask(Egress::Host, true), Some(1));
    let text = set.explain(&Question {
        key: &key,
        tenant: 0,
        ingress: by(1),
        egress: by(2).into(),
        to_gateway: true,
    });
    assert!(text.contains("dropped: rule 1") && text.contains("addressed to the gateway"), "{text}");
}
