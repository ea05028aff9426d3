//! Small conversions that several services share.

use std::time::Duration;

use jiff::Timestamp;

use super::proto;
use crate::calib::role_bits::{RoleBits, RolePrecision};
use crate::calib::task::StemHeadPolicy;
use crate::error::{Error, Result};
use crate::nn::Role;
use crate::quant::Precision;

/// A duration; one too long for protobuf becomes the longest.
pub(super) fn duration(value: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(value.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(value.subsec_nanos()).unwrap_or(0),
    }
}

/// A duration of seconds that may come from a file; nonsense becomes zero.
pub(super) fn seconds(value: f64) -> prost_types::Duration {
    duration(Duration::try_from_secs_f64(value).unwrap_or_default())
}

/// A point in time.
pub(super) fn timestamp(value: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: value.as_second(), nanos: value.subsec_nanosecond() }
}

/// A count; one too large for the field becomes the largest.
pub(super) fn count<T: TryInto<u32>>(value: T) -> u32 {
    value.try_into().unwrap_or(u32::MAX)
}

/// Urgency of a job from the wire.
///
/// # Errors
/// `InvalidArgument` on `priority` outside -100 to 100.
pub(super) fn checked_priority(value: i32) -> Result<i32> {
    if (-100..=100).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid("priority", format!("must be -100 to 100, not {value}")))
}

/// A stem/head policy from the wire.
///
/// # Errors
/// `InvalidArgument` on `stem_head` for a number that is no policy.
pub(super) fn stem_head_from(value: i32) -> Result<StemHeadPolicy> {
    match proto::StemHead::try_from(value) {
        Ok(proto::StemHead::Unspecified | proto::StemHead::Float) => Ok(StemHeadPolicy::Float),
        Ok(proto::StemHead::Int8) => Ok(StemHeadPolicy::Int8),
        Ok(proto::StemHead::Same) => Ok(StemHeadPolicy::Same),
        Err(_) => Err(Error::invalid("stem_head", format!("{value} is no policy"))),
    }
}

/// A stem/head policy for the wire.
pub(super) fn stem_head(policy: StemHeadPolicy) -> proto::StemHead {
    match policy {
        StemHeadPolicy::Float => proto::StemHead::Float,
        StemHeadPolicy::Int8 => proto::StemHead::Int8,
        StemHeadPolicy::Same => proto::StemHead::Same,
    }
}

/// Exceptions by role from the wire.
///
/// # Errors
/// `InvalidArgument` on the field of the entry at fault: `role_bits[0].weight_bits`.
pub(super) fn role_bits_from(entries: Vec<proto::RoleBits>) -> Result<RoleBits> {
    let mut bits = RoleBits::default();
    for (index, entry) in entries.into_iter().enumerate() {
        let proto::RoleBits { role, weight_bits, activation_bits } = entry;
        let field = |name: &str| format!("role_bits[{index}].{name}");
        let role = Role::parse(&role, &field("role"))?;
        let weights = match weight_bits {
            0 if role.is_matmul() => None,
            bits => Some(Precision::new(bits, &field("weight_bits"))?),
        };
        if weights.is_some() && role.is_matmul() {
            let reason = format!("{} has no weights: must be 0", role.name());
            return Err(Error::invalid(field("weight_bits"), reason));
        }
        let activations = Precision::new(activation_bits, &field("activation_bits"))?;
        bits.insert(role, weights, activations, &field("role"))?;
    }
    Ok(bits)
}

/// An exception for the wire.
impl From<(Role, RolePrecision)> for proto::RoleBits {
    fn from((role, precision): (Role, RolePrecision)) -> Self {
        let RolePrecision { weights, activations } = precision;
        Self {
            role: role.name().to_owned(),
            weight_bits: if role.is_matmul() { 0 } else { weights.into() },
            activation_bits: activations.into(),
        }
    }
}

/// Longest request id: a UUID in its usual form.
const MAX_REQUEST_ID: usize = 36;

/// A client's request id, if it gave one.
///
/// # Errors
/// `InvalidArgument` on `request_id` for a long or unprintable one.
pub(super) fn request_id(value: String) -> Result<Option<String>> {
    if value.len() <= MAX_REQUEST_ID && value.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok((!value.is_empty()).then_some(value));
    }
    let reason = format!("has at most {MAX_REQUEST_ID} printable ASCII characters");
    Err(Error::invalid("request_id", reason))
}
