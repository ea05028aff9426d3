//! Sites: the quantizable products of a model, and the roles by which methods choose.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Index of a site within its model, in forward order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SiteId(pub u32);

/// What a product computes; methods select by role, never by pieces of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Patch embedding (the stem).
    Embed,
    /// Input of the attention: q, k and v in one linear.
    Qkv,
    /// q · kᵀ.
    QueryKey,
    /// softmax(scores) · v.
    ScoreValue,
    /// Output projection of the attention.
    Proj,
    /// First linear of the MLP.
    Fc1,
    /// Second linear of the MLP; its input is post-GELU.
    Fc2,
    /// Swin's patch merging.
    Reduction,
    /// Classifier.
    Head,
}

impl Role {
    /// Every role, in the order of a forward.
    pub const ALL: [Self; 9] = [
        Self::Embed,
        Self::Qkv,
        Self::QueryKey,
        Self::ScoreValue,
        Self::Proj,
        Self::Fc1,
        Self::Fc2,
        Self::Reduction,
        Self::Head,
    ];

    /// The name in requests, artifacts and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Qkv => "qkv",
            Self::QueryKey => "query_key",
            Self::ScoreValue => "score_value",
            Self::Proj => "proj",
            Self::Fc1 => "fc1",
            Self::Fc2 => "fc2",
            Self::Reduction => "reduction",
            Self::Head => "head",
        }
    }

    /// The role of that name.
    ///
    /// # Errors
    /// `InvalidArgument` on `field`, naming the known roles.
    pub fn parse(text: &str, field: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::invalid(field, format!("unknown role `{text}`, known are {known}"))
        })
    }

    /// Whether the site is an activation-activation product (no weight).
    pub fn is_matmul(self) -> bool {
        matches!(self, Self::QueryKey | Self::ScoreValue)
    }

    /// Whether the stem/head policy governs the site.
    pub fn is_stem_or_head(self) -> bool {
        matches!(self, Self::Embed | Self::Head)
    }
}

/// The two sides of a product. Of a linear, `Lhs` is the input and `Rhs` the weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// Input of a linear; q; attention scores.
    Lhs,
    /// Weight of a linear; k; vᵀ.
    Rhs,
}

/// A quantizable product `lhs · rhsᵀ`. Both operands are laid out (.., free, reduce).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Position in forward order.
    pub id: SiteId,
    /// timm's module path: `blocks.3.attn.qkv`, `layers.1.blocks.0.attn.matmul2`.
    pub path: String,
    /// What the product computes.
    pub role: Role,
    /// Path of the LayerNorm whose output is this site's input, if one feeds it directly.
    pub norm: Option<String>,
    /// Index of the unit (stem, block, merging, head) that holds the site.
    pub unit: usize,
    /// Windows per image: an operand's leading axis is images × windows (1 outside Swin's attention).
    pub windows: i64,
}

impl Site {
    /// Name of an operand in artifacts and reports: `input`/`weight` of a linear, `lhs`/`rhs` of a matmul.
    pub fn operand_name(&self, operand: Operand) -> &'static str {
        match (self.role.is_matmul(), operand) {
            (false, Operand::Lhs) => "input",
            (false, Operand::Rhs) => "weight",
            (true, Operand::Lhs) => "lhs",
            (true, Operand::Rhs) => "rhs",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_has_one_name_everywhere() {
        for role in Role::ALL {
            assert_eq!(serde_json::to_value(role).unwrap(), role.name());
            assert_eq!(Role::parse(role.name(), "role").unwrap(), role);
        }
        let error = Role::parse("attn", "role").unwrap_err();
        assert!(error.to_string().contains("score_value"), "{error}");
    }
}
