//! Flag values that several commands share, checked while the command line is parsed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tch::Device;

use crate::calib::RoleBits;
use crate::calib::task::StemHeadPolicy;
use crate::cli::failure::Failure;
use crate::device;
use crate::error::{Error, Result};
use crate::methods;
use crate::quant::{BitWidth, Precision};

/// The longest time that a flag takes.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// A method id.
pub(super) fn method(text: &str) -> Result<String> {
    Ok(methods::find(text)?.id.to_owned())
}

/// A bit width from 3 to 8.
pub(super) fn bit_width(text: &str) -> Result<BitWidth> {
    let bits = text.parse().map_err(|_| Error::invalid("bits", "not a whole number"))?;
    BitWidth::new(bits, "bits")
}

/// A bit width from 3 to 8, or `float`.
pub(super) fn precision(text: &str) -> Result<Precision> {
    Precision::parse(text, "bits")
}

/// Exceptions by role, as `reduction=8/8`; a role given twice is a mistake.
pub(super) fn role_bits(texts: &[String]) -> Result<RoleBits, Failure> {
    let mut bits = RoleBits::default();
    for text in texts {
        bits.insert_text(text).map_err(Failure::of_setting)?;
    }
    Ok(bits)
}

/// A treatment of stem and head.
pub(super) fn stem_head(text: &str) -> Result<StemHeadPolicy> {
    StemHeadPolicy::parse(text)
}

/// The devices of a comma-separated list; opens libtorch's CUDA side first.
pub(super) fn devices(text: &str) -> Result<Vec<Device>, Failure> {
    device::open_cuda_libraries();
    device::parse_list(text).map_err(Failure::of_setting)
}

/// One device; opens libtorch's CUDA side first.
pub(super) fn device(text: &str) -> Result<Device, Failure> {
    device::open_cuda_libraries();
    device::parse(text).map_err(Failure::of_setting)
}

/// A number from 1.
pub(super) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("not a whole number".to_owned()),
    }
}

/// A time in seconds, up to a day.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| *time <= LONGEST)
        .ok_or_else(|| "must be a number of seconds, at most a day".to_owned())
}

/// A time in seconds that leaves some.
pub(super) fn timeout(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        Duration::ZERO => Err("must be above 0".to_owned()),
        time => Ok(time),
    }
}

/// `key=value`.
pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected key=value".to_owned()),
    }
}

/// Pairs as a map; a key given twice is a mistake.
pub(super) fn unique(
    pairs: Vec<(String, String)>,
    flag: &str,
) -> Result<BTreeMap<String, String>, Failure> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        if map.insert(key.clone(), value).is_some() {
            let error = Error::invalid(flag, format!("`{key}` is given twice"));
            return Err(Failure::of_setting(error));
        }
    }
    Ok(map)
}

/// The lines of a list file, without blank ones; there has to be one.
pub(super) fn list_file(path: &Path) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.map(str::to_owned).collect();
    if lines.is_empty() {
        let reason = format!("{} names no image", path.display());
        return Err(Failure::of_setting(Error::invalid("calib-files", reason)));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_need_a_key_and_must_not_repeat() {
        assert_eq!(key_value("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert!(key_value("=b").is_err() && key_value("a").is_err());
        let twice = vec![key_value("a=1").unwrap(), key_value("a=2").unwrap()];
        assert!(unique(twice, "option").is_err());
    }

    #[test]
    fn a_timeout_is_not_over_at_once() {
        assert_eq!(timeout("0.5"), Ok(Duration::from_millis(500)));
        assert!(["0", "1e-12", "-1", "soon"].iter().all(|text| timeout(text).is_err()));
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
    }

    #[test]
    fn numbers_and_methods_are_checked() {
        assert!(positive("0").is_err() && positive("-1").is_err() && positive("8").is_ok());
        assert!(bit_width("2").is_err() && bit_width("x").is_err() && bit_width("4").is_ok());
        assert!(method("float").is_ok() && method("ubb").is_ok() && method("gptq").is_err());
    }
}
