#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt;

use super::*;

fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("anabranch-handover-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

fn placement() -> Placement {
    let table = BucketTable::from_owners(3, (0..CORE_BUCKETS as u16).map(|bucket| bucket % 2).collect());
    Placement { cores: 2, key: [7; KEY_BYTES], table: table.unwrap() }
}

/// A file with these records, as `write_to` makes it.
fn file(path: &Path, boot: [u8; 16], now_ns: u64, records: &[&[u8]]) {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).unwrap();
    let mut out = Summed::new(file);
    out.write_all(&head(&placement(), boot, now_ns)).unwrap();
    records.iter().for_each(|record| out.write_all(record).unwrap());
    out.finish().unwrap();
}

const RECORDS: [&[u8]; 2] = [&[1, 1, 0, 6, 8, 9], &[1, 2, 0, 4]];

#[test]
fn records_come_back_once() {
    let directory = directory("once");
    let path = path(&directory.join("gw.sock"));
    assert!(waiting(&path).is_none(), "nothing there");
    let now_ns = linux::clock::monotonic_ns();
    file(&path, boot_id().unwrap(), now_ns.saturating_sub(2_000_000_000), &RECORDS);
    let arrivals = waiting(&path).unwrap();
    assert!((2_000..4_000).contains(&arrivals.away_ms), "{}", arrivals.away_ms);
    assert_eq!((arrivals.placement.cores, arrivals.placement.key), (2, [7; KEY_BYTES]));
    assert_eq!(arrivals.placement.table, placement().table);
    assert_eq!(arrivals.records.collect::<Vec<_>>(), RECORDS);
    // A start that fails leaves them to the next one.
    assert!(waiting(&path).is_some());
    discard(&path);
    assert!(!path.exists() && waiting(&path).is_none());
    assert_eq!(count(&RECORDS.concat()), 2);
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn files_that_are_old_foreign_or_damaged_are_not_used() {
    let directory = directory("bad");
    let path = directory.join("gw.flows");
    let (boot, now_ns) = (boot_id().unwrap(), linux::clock::monotonic_ns());
    let error = |path: &Path| read(File::open(path).unwrap()).err().map(|error| error.to_string());
    file(&path, boot, now_ns, &RECORDS);
    assert_eq!(error(&path), None);
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..at]).unwrap();
        assert!(error(&path).is_some(), "cut at {at}");
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        fs::write(&path, flipped).unwrap();
        assert!(error(&path).unwrap().contains("damaged"), "flipped at {at}");
    }
    file(&path, [9; 16], now_ns, &RECORDS);
    assert!(error(&path).unwrap().contains("started anew"));
    file(&path, boot, now_ns + 60_000_000_000, &RECORDS);
    assert!(error(&path).unwrap().contains("started anew"), "a time to come");
    if let Some(old_ns) = now_ns.checked_sub(61_000_000_000) {
        file(&path, boot, old_ns, &RECORDS);
        assert!(error(&path).unwrap().contains("61 s old"));
    }
    file(&path, boot, now_ns, &RECORDS);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(error(&path).unwrap().contains("somebody else"));
    // A link leads elsewhere.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let link = directory.join("link.flows");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(waiting(&link).is_none() && path.exists() && !link.exists());
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn the_result_in_words() {
    let mut taken = TakenOver { flows: 12, ..TakenOver::default() };
    assert_eq!(text(&status(&taken)), "12 flows taken over from the run before, 0 not");
    taken.refusals.add_many(services::handover::Refusal::Port, 2);
    taken.refusals.add(services::handover::Refusal::Firewall);
    assert_eq!(
        text(&status(&taken)),
        "12 flows taken over from the run before, 3 not: firewall 1, port not free 2"
    );
}
