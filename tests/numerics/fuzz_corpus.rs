//! What the fuzzer has found, and the neighbourhood of it, stays harmless.
//!
//! `FUZZ_NEIGHBOURS` says how many mutations of each file are tried (100 unless given). Searching for
//! more is the fuzzer's task: docs/testing.md.

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;

use vitq::fuzzing::TARGETS;

use crate::reference::root;

/// Numbers from a seed (Steele, Lea and Flood 2014: splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// A file with a few things wrong with it.
fn neighbour(bytes: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len());
        let end = (at + 1 + numbers.below(8)).min(bytes.len());
        match numbers.below(6) {
            _ if bytes.is_empty() => bytes.push(numbers.next() as u8),
            0 => bytes[at] ^= 1 << numbers.below(8),
            1 => bytes[at] = numbers.next() as u8,
            2 => bytes[at] = [0, 0x7f, 0x80, 0xff][numbers.below(4)],
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..end)),
            _ => {
                let piece = bytes[at..end].to_vec();
                let to = numbers.below(bytes.len());
                bytes.splice(to..to, piece);
            }
        }
    }
    bytes
}

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = root("tests/fixtures/fuzz").join(target);
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn nothing_that_was_found_does_harm_again() {
    let count: u64 = std::env::var("FUZZ_NEIGHBOURS").map_or(100, |text| text.parse().unwrap());
    for (name, target) in TARGETS {
        let files = corpus(name);
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            let bytes = fs::read(&file).unwrap();
            let harmless = |bytes: &[u8]| catch_unwind(|| target(bytes)).is_ok();
            assert!(harmless(&bytes), "{}", file.display());
            for seed in 0..count {
                let mutated = neighbour(&bytes, &mut Numbers(seed));
                assert!(harmless(&mutated), "{}, mutation {seed}", file.display());
            }
        }
    }
}
