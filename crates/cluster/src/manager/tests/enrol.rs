use super::harness::*;
use crate::manager::*;
use crate::message::{Refusal, Role};

const KEY_3: [u8; 32] = [0x33; 32];
const OTHER: [u8; 32] = [0x44; 32];
const DIGEST: [u8; 32] = [0x55; 32];

fn token(node: u16) -> Token {
    Token { digest: DIGEST, node, role: Role::DataPlane, weight: None, ends_s: 1_000 }
}

/// A cluster of one data plane, which needs no key, with a token for unit 3.
fn cluster() -> Cluster {
    let pool = Vec::new();
    let mut cluster = Cluster::with_settings(1, Settings { pool, ..settings() });
    assert!(issue(&mut cluster, token(3)).is_ok());
    cluster
}

fn issue(cluster: &mut Cluster, token: Token) -> Result<u64, CommandError> {
    let now_ns = cluster.now_ns();
    cluster.manager.issue(now_ns, 1, token, 500);
    cluster.run();
    cluster.answers.last().unwrap().clone()
}

fn refused(cluster: &Cluster, node: u16) -> Vec<Refusal> {
    cluster.units[&node].refused.clone()
}

#[test]
fn a_key_becomes_known_by_a_token_and_is_needed_from_then_on() {
    let mut cluster = cluster();
    cluster.start_with(3, Role::DataPlane, 7, Some(KEY_3), Some((DIGEST, 999)));
    cluster.pass(2_000);
    assert_eq!(
        (refused(&cluster, 3), cluster.standing(3)),
        (vec![], Standing::Active),
        "{:?}",
        cluster.events
    );
    assert_eq!(cluster.owned()[1], 32, "it takes part, as any unit");
    assert_eq!((cluster.manager.state().keys[&3], cluster.manager.state().tokens.len()), (KEY_3, 0));
    // Another process on the machine, without the key, and with another one, before and after a restart of the manager.
    for key in [None, Some(OTHER)] {
        for restarts in [false, true] {
            cluster.kill(3);
            if restarts {
                cluster.restart();
            }
            cluster.start_with(3, Role::DataPlane, 8, key, None);
            assert_eq!(refused(&cluster, 3), [Refusal::Key], "{key:?}");
        }
    }
    cluster.kill(3);
    // The token that is still in its file is of no account.
    cluster.start_with(3, Role::DataPlane, 9, Some(KEY_3), Some((DIGEST, 999_999)));
    cluster.pass(2_000);
    assert_eq!((refused(&cluster, 3), cluster.standing(3)), (vec![], Standing::Active));
}

#[test]
fn a_token_is_used_once_in_its_time_and_for_its_unit() {
    for (digest, now_s, reason) in [([0; 32], 999, Refusal::Token), (DIGEST, 1_000, Refusal::Token)] {
        let mut cluster = cluster();
        cluster.start_with(3, Role::DataPlane, 7, Some(KEY_3), Some((digest, now_s)));
        assert_eq!((refused(&cluster, 3), cluster.manager.state().tokens.len()), (vec![reason], 1));
    }
    let mut cluster = cluster();
    cluster.start_with(4, Role::DataPlane, 7, Some(OTHER), Some((DIGEST, 999)));
    assert_eq!(refused(&cluster, 4), [Refusal::Identity], "it is unit 3's");
    // Whoever used it, it is used: a second key is turned away.
    cluster.kill(4);
    cluster.start_with(3, Role::DataPlane, 7, Some(KEY_3), Some((DIGEST, 999)));
    assert_eq!(refused(&cluster, 3), [Refusal::Token]);
}

#[test]
fn an_enrolment_that_is_not_stored_did_not_happen() {
    let mut cluster = cluster();
    cluster.disk_full = true;
    cluster.start_with(3, Role::DataPlane, 7, Some(KEY_3), Some((DIGEST, 999)));
    assert!(cluster.said("a unit is not enrolled"), "{:?}", cluster.events);
    assert_eq!((cluster.manager.state().tokens.len(), cluster.manager.state().keys.len()), (1, 0));
    cluster.disk_full = false;
    cluster.connect(3);
    assert_eq!((refused(&cluster, 3), cluster.manager.state().keys.len()), (vec![], 1));
    // Removed, the unit is a stranger again, whose node id may have another token.
    cluster.pass(2_000);
    cluster.step(Step::Remove { node: 3, force: true }).unwrap();
    cluster.pass(4_000);
    cluster.kill(3);
    cluster.step(Step::Remove { node: 3, force: true }).unwrap();
    cluster.pass(1_000);
    assert_eq!(cluster.manager.state().keys.len(), 0, "{:?}", cluster.events);
    assert!(issue(&mut cluster, token(3)).is_ok());
}

#[test]
fn tokens_have_limits() {
    let mut cluster = cluster();
    assert!(issue(&mut cluster, Token { digest: [1; 32], ..token(3) }).is_ok());
    assert_eq!(cluster.manager.state().tokens.len(), 1, "the later one of a unit counts");
    assert!(matches!(issue(&mut cluster, token(1)), Err(CommandError::Conflict(_))), "it is enrolled");
    assert!(matches!(issue(&mut cluster, token(4_096)), Err(CommandError::Invalid(_))));
    let weight = Token { weight: Some(0), ..token(5) };
    assert!(matches!(issue(&mut cluster, weight), Err(CommandError::Invalid(_))));
    for node in 10..9 + TOKENS_MAX as u16 {
        assert!(issue(&mut cluster, token(node)).is_ok(), "{node}");
    }
    assert!(matches!(issue(&mut cluster, token(2_000)), Err(CommandError::Conflict(_))));
    // Those whose time is over make room.
    let now_ns = cluster.now_ns();
    cluster.manager.issue(now_ns, 1, Token { ends_s: 9_000, ..token(2_000) }, 5_000);
    cluster.run();
    assert_eq!(cluster.manager.state().tokens.len(), 1);
    assert!(!format!("{:?}", cluster.manager.state().tokens).contains("85"), "the digest is not for logs");
}
