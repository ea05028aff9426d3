//! What the families share: patch embedding, and the making of sites and blocks.

use std::sync::Arc;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::model::{NewSite, SiteTable};
use crate::nn::{Attention, Derived, Linear, Mlp, Role, Scope, Site};

/// Makes the sites of one unit: `scope` is the unit's place in the checkpoint.
pub(super) struct UnitBuilder<'t, 's> {
    pub(super) sites: &'t mut SiteTable,
    pub(super) scope: Scope<'s>,
    pub(super) unit: usize,
    /// Windows per image of attention sites.
    pub(super) windows: i64,
}

impl UnitBuilder<'_, '_> {
    /// The site `name` below the unit; `norm` is the LayerNorm that feeds it, below the unit too.
    pub(super) fn site(&mut self, name: &str, role: Role, norm: Option<&str>) -> Arc<Site> {
        let windows = match role {
            Role::Qkv | Role::QueryKey | Role::ScoreValue | Role::Proj => self.windows,
            Role::Embed | Role::Fc1 | Role::Fc2 | Role::Reduction | Role::Head => 1,
        };
        let norm = norm.map(|norm| self.scope.path(norm));
        let path = self.scope.path(name);
        self.sites.add(NewSite { path, role, norm: norm.as_deref(), unit: self.unit, windows })
    }

    /// The linear layer of `site`, which lies at `name` below the unit; shape is [out, in].
    pub(super) fn linear(&self, site: Arc<Site>, name: &str, shape: [i64; 2]) -> Result<Linear> {
        Linear::load(site, &self.scope.at(name), shape[0], shape[1])
    }

    /// Reads `mlp.fc1` [hidden, dim] and `mlp.fc2` [dim, hidden] below the unit; `norm2` feeds it.
    pub(super) fn mlp(&mut self, dim: i64, hidden: i64) -> Result<Mlp> {
        let fc1 = self.site("mlp.fc1", Role::Fc1, Some("norm2"));
        let fc2 = self.site("mlp.fc2", Role::Fc2, None);
        Ok(Mlp {
            fc1: self.linear(fc1, "mlp.fc1", [hidden, dim])?,
            fc2: self.linear(fc2, "mlp.fc2", [dim, hidden])?,
        })
    }

    /// Reads `attn.qkv` and `attn.proj` below the unit; `norm1` feeds the attention.
    pub(super) fn attention(&mut self, dim: i64, heads: i64) -> Result<Attention> {
        let qkv = self.site("attn.qkv", Role::Qkv, Some("norm1"));
        let query_key = self.site("attn.matmul1", Role::QueryKey, None);
        let score_value = self.site("attn.matmul2", Role::ScoreValue, None);
        let proj = self.site("attn.proj", Role::Proj, None);
        Ok(Attention {
            qkv: self.linear(qkv, "attn.qkv", [3 * dim, dim])?,
            query_key,
            score_value,
            proj: self.linear(proj, "attn.proj", [dim, dim])?,
            heads,
        })
    }
}

/// Sizes of a patch embedding.
#[derive(Clone, Copy, Debug)]
pub(super) struct PatchShape {
    /// Side of the square image in pixels.
    pub(super) image: i64,
    /// Side of a patch in pixels.
    pub(super) patch: i64,
    /// Width of a token.
    pub(super) dim: i64,
}

impl PatchShape {
    /// Patches along a side.
    pub(super) fn grid(self) -> i64 {
        self.image / self.patch
    }
}

/// timm's patch embedding: a convolution whose stride is its kernel, as unfold + linear.
///
/// A patch is laid out (row, column, channel), the order in which libtorch's convolution sums, so
/// that the linear gives timm's values to the bit.
#[derive(Debug)]
pub(super) struct PatchEmbed {
    site: Arc<Site>,
    /// The kernel as a matrix [dim, patch² · 3].
    weight: Derived,
    bias: Option<Tensor>,
    shape: PatchShape,
}

impl PatchEmbed {
    /// Reads `proj` below the unit.
    pub(super) fn load(builder: &mut UnitBuilder<'_, '_>, shape: PatchShape) -> Result<Self> {
        let site = builder.site("proj", Role::Embed, None);
        let scope = builder.scope.at("proj");
        let PatchShape { patch, dim, .. } = shape;
        let kernel = scope.get("weight", &[dim, 3, patch, patch])?;
        let weight = Derived::new(kernel, |kernel| {
            Ok(kernel.f_permute([0, 2, 3, 1])?.f_reshape([kernel.size()[0], -1])?)
        })?;
        Ok(Self { site, weight, bias: scope.get_optional("bias", &[dim])?, shape })
    }

    /// images [n, 3, h, w] → tokens [n, grid², dim].
    pub(super) fn forward(&self, exec: &mut dyn Executor, images: &Tensor) -> Result<Tensor> {
        let PatchShape { image, patch, .. } = self.shape;
        let size = images.size();
        let [n, 3, h, w] = size[..] else { return Err(self.wrong_input(&size)) };
        if n == 0 || h != image || w != image {
            return Err(self.wrong_input(&size));
        }
        let grid = self.shape.grid();
        let patches = images
            .f_reshape([n, 3, grid, patch, grid, patch])?
            .f_permute([0, 2, 4, 3, 5, 1])?
            .f_reshape([n, grid * grid, 3 * patch * patch])?;
        let proj = Linear {
            site: Arc::clone(&self.site),
            weight: self.weight.get()?,
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
        };
        exec.linear(&proj, &patches)
    }

    fn wrong_input(&self, size: &[i64]) -> Error {
        let side = self.shape.image;
        let reason = format!("shape {size:?} is not [n, 3, {side}, {side}] with n of at least 1");
        Error::invalid("images", reason)
    }
}
