//! Sites: the quantizable products of a model, and the roles by which methods choose.

use serde::{Deserialize, Serialize};

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
