//! How finely a tensor is divided into parts that have a scale of their own.

use serde::{Deserialize, Serialize};

/// The field's four granularities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One scale for the whole tensor.
    PerTensor,
    /// One scale per index of axis 0 (a weight's output channels).
    PerChannel,
    /// One scale per token, i.e. per index of all axes but the last.
    PerToken,
    /// One scale per token and contiguous block of channels.
    PerGroup {
        /// Number of blocks; must divide the channel count.
        groups: i64,
    },
}
