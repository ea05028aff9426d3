//! Swin Transformer (arXiv 2103.14030), as timm 0.6.13's `SwinTransformer` computes it.
//!
//! Units: `patch_embed` (with its norm), `layers.S.blocks.N`, `layers.S.downsample` (patch merging, at
//! the end of a stage), `head` (with the final norm and pooling).

mod args;
mod window;

use std::cell::RefCell;
use std::collections::BTreeSet;

use tch::Tensor;

use crate::error::Result;
use crate::exec::{AttentionTerms, Executor, ScoreTerms};
use crate::model::layers::{PatchEmbed, UnitBuilder};
use crate::model::{FamilyEntry, IMAGENET_NORMALIZATION, ModelSpec, SiteTable, Unit, Variant};
use crate::nn::{Attention, Derived, LayerNorm, Linear, Mlp, Role, Weights, mean_of_tokens};

use args::{Stage, SwinArgs};
use window::{ShiftedWindows, relative_bias};

const EPS: f64 = 1e-5;
/// timm's name of the relative position bias, below an attention.
const SCORE_TABLE: &str = "relative_position_bias_table";

const TINY: &str = r#"{"img_size":224,"patch_size":4,"in_chans":3,"embed_dim":96,
    "depths":[2,2,6,2],"num_heads":[3,6,12,24],"window_size":7,"mlp_ratio":4.0,"qkv_bias":true,
    "global_pool":"avg"}"#;
const SMALL: &str = r#"{"img_size":224,"patch_size":4,"in_chans":3,"embed_dim":96,
    "depths":[2,2,18,2],"num_heads":[3,6,12,24],"window_size":7,"mlp_ratio":4.0,"qkv_bias":true,
    "global_pool":"avg"}"#;
const BASE: &str = r#"{"img_size":224,"patch_size":4,"in_chans":3,"embed_dim":128,
    "depths":[2,2,18,2],"num_heads":[4,8,16,32],"window_size":7,"mlp_ratio":4.0,"qkv_bias":true,
    "global_pool":"avg"}"#;

/// Swin.
pub(super) const FAMILY: FamilyEntry = FamilyEntry {
    id: "swin",
    variants: &[
        Variant {
            short: "swin_tiny",
            architecture: "swin_tiny_patch4_window7_224",
            model_args: TINY,
            normalization: IMAGENET_NORMALIZATION,
        },
        Variant {
            short: "swin_small",
            architecture: "swin_small_patch4_window7_224",
            model_args: SMALL,
            normalization: IMAGENET_NORMALIZATION,
        },
        Variant {
            short: "swin_base",
            architecture: "swin_base_patch4_window7_224",
            model_args: BASE,
            normalization: IMAGENET_NORMALIZATION,
        },
    ],
    owns: |architecture| architecture.starts_with("swin_"),
    model_args: &[
        "img_size",
        "patch_size",
        "in_chans",
        "embed_dim",
        "depths",
        "num_heads",
        "window_size",
        "mlp_ratio",
        "qkv_bias",
        "global_pool",
    ],
    neutral_args: &[("act_layer", "\"gelu\""), ("ape", "false"), ("patch_norm", "true")],
    canonical_name,
    infer: args::infer,
    parameters: args::parameters,
    build,
};

/// Names of timm 0.9 and later: the merging at the start of the next stage, the head one level down.
fn canonical_name(names: &BTreeSet<String>, name: &str) -> Option<String> {
    if name.ends_with(".relative_position_index") || name.ends_with(".attn_mask") {
        return None;
    }
    if let Some(rest) = name.strip_prefix("head.fc.") {
        return Some(format!("head.{rest}"));
    }
    let first = "layers.0.downsample.".to_owned();
    let merges_at_end = names.range(first.clone()..).next().is_some_and(|n| n.starts_with(&first));
    if !merges_at_end
        && let Some((stage, rest)) = name.strip_prefix("layers.").and_then(|n| n.split_once('.'))
        && rest.starts_with("downsample.")
        && let Ok(stage @ 1..) = stage.parse::<u32>()
    {
        return Some(format!("layers.{}.{rest}", stage - 1));
    }
    Some(name.to_owned())
}

fn build(
    spec: &ModelSpec,
    sites: &mut SiteTable,
    weights: &Weights,
    used: &RefCell<BTreeSet<String>>,
) -> Result<Vec<Box<dyn Unit>>> {
    let args = SwinArgs::read(spec)?;
    let root = weights.root(used);
    let mut builder = UnitBuilder { sites, scope: root.at("patch_embed"), unit: 0, windows: 1 };
    let mut units: Vec<Box<dyn Unit>> = vec![Box::new(Stem {
        embed: PatchEmbed::load(&mut builder, args.patches)?,
        norm: LayerNorm::load(&builder.scope.at("norm"), args.patches.dim, EPS)?,
    })];
    for (index, stage) in args.stages.iter().enumerate() {
        let layer = root.at("layers").at(index);
        let plain = ShiftedWindows::new(stage, 0)?;
        let shifted = ShiftedWindows::new(stage, stage.shift)?;
        for block in 0..stage.depth {
            builder.scope = layer.at("blocks").at(block);
            builder.unit = units.len();
            let windows = if block % 2 == 0 { &plain } else { &shifted };
            units.push(Box::new(Block::load(&mut builder, stage, windows)?));
        }
        if let Some(out) = stage.merged {
            builder.scope = layer.at("downsample");
            builder.unit = units.len();
            units.push(Box::new(Merging::load(&mut builder, stage, out)?));
        }
    }
    builder.scope = root.clone();
    builder.unit = units.len();
    let site = builder.site("head", Role::Head, None);
    let dim = args.last_dim();
    units.push(Box::new(Head {
        norm: LayerNorm::load(&root.at("norm"), dim, EPS)?,
        head: builder.linear(site, "head", [spec.num_classes, dim])?,
    }));
    Ok(units)
}

/// Patch embedding and norm.
#[derive(Debug)]
struct Stem {
    embed: PatchEmbed,
    norm: LayerNorm,
}

impl Unit for Stem {
    fn path(&self) -> &str {
        "patch_embed"
    }

    fn forward(&self, exec: &mut dyn Executor, images: &Tensor) -> Result<Tensor> {
        let tokens = self.embed.forward(exec, images)?;
        exec.layer_norm(&self.norm, &tokens)
    }
}

/// x + windowed attention(norm1(x)), then x + mlp(norm2(x)).
#[derive(Debug)]
struct Block {
    path: String,
    windows: ShiftedWindows,
    norm1: LayerNorm,
    attention: Attention,
    /// Relative position bias [1, heads, window², window²].
    bias: Derived,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn load(
        builder: &mut UnitBuilder<'_, '_>,
        stage: &Stage,
        windows: &ShiftedWindows,
    ) -> Result<Self> {
        builder.windows = windows.tokens().per_image();
        let scope = builder.scope.clone();
        let rows = (2 * stage.window - 1).pow(2);
        let table = scope.at("attn").get(SCORE_TABLE, &[rows, stage.heads])?;
        Ok(Self {
            path: scope.here().to_owned(),
            windows: windows.to_device(table.device())?,
            norm1: LayerNorm::load(&scope.at("norm1"), stage.dim, EPS)?,
            attention: builder.attention(stage.dim, stage.heads)?,
            bias: Derived::new(table, relative_bias)?,
            norm2: LayerNorm::load(&scope.at("norm2"), stage.dim, EPS)?,
            mlp: builder.mlp(stage.dim, stage.hidden)?,
        })
    }
}

impl Unit for Block {
    fn path(&self) -> &str {
        &self.path
    }

    fn score_tables(&self) -> Vec<String> {
        vec![format!("{}.attn.{SCORE_TABLE}", self.path)]
    }

    fn forward(&self, exec: &mut dyn Executor, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.get()?;
        let mask = self.windows.score_mask();
        let terms = AttentionTerms {
            // timm scales q before the product, so a quantizer of q sees it scaled.
            query_scale: Some(self.attention.scale()),
            scores: ScoreTerms { scale: None, bias: Some(&bias), mask },
            windows: Some(self.windows.tokens()),
        };
        let x = exec.add_attention(&self.norm1, &self.attention, &terms, x)?;
        exec.add_mlp(&self.norm2, &self.mlp, &x)
    }
}

/// Patch merging: four neighbours become one token.
#[derive(Debug)]
struct Merging {
    path: String,
    /// Tokens along a side before merging.
    resolution: i64,
    norm: LayerNorm,
    reduction: Linear,
}

impl Merging {
    fn load(builder: &mut UnitBuilder<'_, '_>, stage: &Stage, out: i64) -> Result<Self> {
        let input = 4 * stage.dim;
        let site = builder.site("reduction", Role::Reduction, Some("norm"));
        Ok(Self {
            path: builder.scope.here().to_owned(),
            resolution: stage.resolution,
            norm: LayerNorm::load(&builder.scope.at("norm"), input, EPS)?,
            reduction: builder.linear(site, "reduction", [out, input])?,
        })
    }
}

impl Unit for Merging {
    fn path(&self) -> &str {
        &self.path
    }

    fn forward(&self, exec: &mut dyn Executor, x: &Tensor) -> Result<Tensor> {
        let (n, _, dim) = x.size3()?;
        let half = self.resolution / 2;
        // Neighbours in the order (row, column) = (0,0), (1,0), (0,1), (1,1): the column is outer.
        let merged = x
            .f_reshape([n, half, 2, half, 2, dim])?
            .f_permute([0, 1, 3, 4, 2, 5])?
            .f_reshape([n, half * half, 4 * dim])?;
        let normed = exec.layer_norm(&self.norm, &merged)?;
        exec.linear(&self.reduction, &normed)
    }
}

/// Final norm, mean over the tokens, classifier.
#[derive(Debug)]
struct Head {
    norm: LayerNorm,
    head: Linear,
}

impl Unit for Head {
    fn path(&self) -> &str {
        "head"
    }

    fn forward(&self, exec: &mut dyn Executor, x: &Tensor) -> Result<Tensor> {
        let normed = exec.layer_norm(&self.norm, x)?;
        exec.linear(&self.head, &mean_of_tokens(&normed)?)
    }
}
