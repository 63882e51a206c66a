//! Units that enrol themselves by a token, and are known by their key from then on.

use testbed::cluster::FIRST_DISPATCHER;

use crate::cluster_scene::{Cluster, Plan, nothing, unit};
use crate::machine::busy;

const PLANE: u16 = 11;
const OTHER: u16 = 12;

/// Row D6: nobody enters the data plane at the manager: it is given a token, connects, and takes part. The token is good for nothing
/// afterwards, and the unit for nothing without its key; neither log nor store has the token.
#[test]
fn d6_a_unit_enrols_itself_once_by_a_token_and_is_known_by_its_key() {
    let _busy = busy();
    let plan = Plan { dispatchers: 1, data_planes: 2, services: "", manager: "" };
    let line = "token-file = \"unit.token\"\n";
    let edit = |id: u16, text: String| {
        let at = format!("node-id = {id}\n");
        if id >= PLANE { text.replacen(&at, &format!("{at}{line}"), 1) } else { text }
    };
    let (mut all, ()) = Cluster::start(&plan, &[], edit, nothing);
    let file = |all: &Cluster, name: &str| all.bed.directory().join(name);
    let wanted = [&PLANE.to_string(), "--role", "dataplane"];
    let token =
        all.until("the manager makes a token", |all| all.manage(&[&["token"], &wanted[..]].concat()).ok());
    std::fs::write(file(&all, "unit.token"), &token).unwrap();
    let standing = |all: &Cluster| {
        let status = all.status();
        let unit = unit(&status, PLANE)?;
        Some((unit["standing"].as_str()?.to_owned(), unit["connected"].as_bool()?))
    };
    let takes_part = |all: &Cluster| (standing(all)? == ("active".to_owned(), true)).then_some(());
    all.bed.start_one(PLANE).unwrap();
    all.until("it takes part", takes_part);
    let log = |all: &Cluster, id: u16| std::fs::read_to_string(all.bed.machine(id).unwrap().log()).unwrap();
    assert!(all.events().contains("by its token"), "{}", all.events());
    // Another machine with the same token, in the configuration itself.
    let config = file(&all, &format!("{OTHER}.toml"));
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(line, &format!("token = \"{}\"\n", token.trim()))).unwrap();
    all.bed.start_one(OTHER).unwrap();
    all.until("another machine is refused", |all| log(all, OTHER).contains("used or too old").then_some(()));
    assert!(unit(&all.status(), OTHER).is_none());
    let refused = all.manage(&[&["token"], &wanted[..]].concat()).unwrap_err();
    assert!(refused.contains("unit 11 is enrolled"), "{refused}");
    // The same machine without the key that it is known by.
    all.bed.stop(PLANE, false).unwrap();
    let config = file(&all, &format!("{PLANE}.toml"));
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(line, "")).unwrap();
    all.bed.start_one(PLANE).unwrap();
    all.until("it is refused", |all| log(all, PLANE).contains("which it did not prove").then_some(()));
    all.bed.stop(PLANE, false).unwrap();
    std::fs::write(&config, text).unwrap();
    all.bed.start_one(PLANE).unwrap();
    all.until("it takes part again", takes_part);
    let token = token.trim().as_bytes();
    let has_token = |bytes: &[u8]| bytes.windows(token.len()).any(|part| part == token);
    for name in ["manager.log", "cluster.redb"] {
        assert!(!has_token(&std::fs::read(file(&all, name)).unwrap()), "{name}");
    }
    assert!(!has_token(log(&all, PLANE).as_bytes()) && !has_token(log(&all, FIRST_DISPATCHER).as_bytes()));
}
