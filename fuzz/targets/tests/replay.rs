//! Every file of the committed corpora through its target, as an ordinary test.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use fuzz_targets::TARGETS;

fn fuzz() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The corpus of a target: name and contents.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let files = fs::read_dir(fuzz().join("corpus").join(target)).unwrap();
    let mut files: Vec<_> = files
        .map(|file| file.unwrap())
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn the_corpora_hold_no_surprise() {
    for (name, target) in TARGETS {
        let files = corpus(name);
        assert!(files.len() >= 5, "{name} has a corpus of {}", files.len());
        for (file, bytes) in files {
            if std::panic::catch_unwind(|| target(&bytes)).is_err() {
                panic!("fuzz/corpus/{name}/{file} makes the target `{name}` panic");
            }
        }
    }
}

/// Truncated and bit-flipped input of every type.
#[test]
fn cut_and_flipped_seeds_hold_no_surprise() {
    for (name, target) in TARGETS {
        for (file, bytes) in corpus(name) {
            let dear = matches!(*name, "gateway" | "handshake" | "peer_frames" | "tampering");
            let step = if dear { bytes.len() / 8 } else { bytes.len() / 96 } + 1;
            for at in (0..bytes.len()).step_by(step) {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << (at % 8);
                let run = || {
                    target(&bytes[..at]);
                    target(&flipped);
                };
                if std::panic::catch_unwind(run).is_err() {
                    panic!(
                        "fuzz/corpus/{name}/{file}, cut or flipped at {at}, makes the target `{name}` panic"
                    );
                }
            }
        }
    }
}

/// A target that cargo-fuzz does not run, or a corpus that nobody replays, would go unnoticed.
#[test]
fn every_target_has_a_program_and_a_corpus() {
    let names = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(fuzz().join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("corpus"), targets);
    assert_eq!(names("fuzz_targets"), targets);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in &targets {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml does not build {name}");
    }
}
