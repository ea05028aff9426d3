//! The largest resident memory of this process over a stretch of work, as Linux counts it.

use std::fs;

/// Starts counting anew; `None` where the system does not offer it.
pub fn watch_peak() -> Option<PeakWatch> {
    // 5 resets the high-water mark (man 5 proc); other systems have no such file.
    fs::write("/proc/self/clear_refs", "5").ok()?;
    Some(PeakWatch(()))
}

/// The high-water mark since [`watch_peak`].
#[derive(Debug)]
pub struct PeakWatch(());

impl PeakWatch {
    /// The largest resident memory since then, in bytes.
    pub fn peak_bytes(&self) -> Option<u64> {
        peak_bytes(&fs::read_to_string("/proc/self/status").ok()?)
    }
}

/// `VmHWM:   123 kB` of a status file, in bytes.
fn peak_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_water_mark_is_read_in_bytes() {
        let status = "Name:\tvitq\nVmPeak:\t  900 kB\nVmHWM:\t    512 kB\nVmRSS:\t 100 kB\n";
        assert_eq!(peak_bytes(status), Some(512 * 1024));
        assert_eq!(peak_bytes("VmRSS:\t 100 kB\n"), None);
        assert_eq!(peak_bytes("VmHWM:\t lots\n"), None);
    }

    #[test]
    fn memory_that_was_used_in_between_counts() {
        let Some(watch) = watch_peak() else { return }; // not Linux
        let before = watch.peak_bytes().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(std::hint::black_box(&block).iter().all(|byte| *byte == 1));
        drop(block);
        assert!(watch.peak_bytes().unwrap() >= before + (48 << 20));
    }
}
