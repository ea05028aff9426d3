//! How much memory a process holds.

use std::fs;

use crate::shutdown::Program;

/// Resident bytes of a program that belong to no file: what it has allocated.
pub(crate) fn allocated(program: &Program) -> u64 {
    let path = format!("/proc/{}/status", program.child.id());
    let status = fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
