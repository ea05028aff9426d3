//! ViT and DeiT (arXiv 2010.11929, 2012.12877), as timm's `VisionTransformer` computes them.
//!
//! Units: `patch_embed` (with class token and position embedding), `blocks.N`, `head` (with the final
//! norm and pooling).

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};
use tch::Tensor;

use crate::error::Result;
use crate::exec::{AttentionTerms, Executor, ScoreTerms};
use crate::model::args::{self, Args, BlockShape, MAX_IMAGE, MAX_SIZE, ParameterList, unusable};
use crate::model::layers::{PatchEmbed, PatchShape, UnitBuilder};
use crate::model::{
    FamilyEntry, IMAGENET_NORMALIZATION, ModelSpec, Parameter, SiteTable, TensorShapes, Unit,
    Variant,
};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Role, Weights, mean_of_tokens};

const EPS: f64 = 1e-6;
/// What Google's ViT weights were trained with.
const HALF_NORMALIZATION: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);

const TINY: &str = r#"{"img_size":224,"patch_size":16,"in_chans":3,"embed_dim":192,"depth":12,
    "num_heads":3,"mlp_ratio":4.0,"qkv_bias":true,"class_token":true,"global_pool":"token"}"#;
const SMALL: &str = r#"{"img_size":224,"patch_size":16,"in_chans":3,"embed_dim":384,"depth":12,
    "num_heads":6,"mlp_ratio":4.0,"qkv_bias":true,"class_token":true,"global_pool":"token"}"#;
const BASE: &str = r#"{"img_size":224,"patch_size":16,"in_chans":3,"embed_dim":768,"depth":12,
    "num_heads":12,"mlp_ratio":4.0,"qkv_bias":true,"class_token":true,"global_pool":"token"}"#;

/// ViT and DeiT: one computation, other preprocessing.
pub(super) const FAMILY: FamilyEntry = FamilyEntry {
    id: "vit",
    variants: &[
        Variant {
            short: "vit_tiny",
            architecture: "vit_tiny_patch16_224",
            model_args: TINY,
            normalization: HALF_NORMALIZATION,
        },
        Variant {
            short: "vit_small",
            architecture: "vit_small_patch16_224",
            model_args: SMALL,
            normalization: HALF_NORMALIZATION,
        },
        Variant {
            short: "vit_base",
            architecture: "vit_base_patch16_224",
            model_args: BASE,
            normalization: HALF_NORMALIZATION,
        },
        Variant {
            short: "deit_tiny",
            architecture: "deit_tiny_patch16_224",
            model_args: TINY,
            normalization: IMAGENET_NORMALIZATION,
        },
        Variant {
            short: "deit_small",
            architecture: "deit_small_patch16_224",
            model_args: SMALL,
            normalization: IMAGENET_NORMALIZATION,
        },
        Variant {
            short: "deit_base",
            architecture: "deit_base_patch16_224",
            model_args: BASE,
            normalization: IMAGENET_NORMALIZATION,
        },
    ],
    owns: |architecture| architecture.starts_with("vit_") || architecture.starts_with("deit_"),
    model_args: &[
        "img_size",
        "patch_size",
        "in_chans",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "class_token",
        "global_pool",
        "fc_norm",
    ],
    neutral_args: &[("act_layer", "\"gelu\""), ("pre_norm", "false"), ("no_embed_class", "false")],
    canonical_name: |_, name| Some(name.to_owned()),
    infer,
    parameters,
    build,
};

/// Same parameter names and shapes, other computation (norms after the residual branches).
const OTHER_COMPUTATION: &[&str] = &["vit_base_patch16_rpn_224"];

/// timm's head counts by width, for variants that are not in the table and whose config is silent.
const HEADS_BY_WIDTH: &[(i64, i64)] = &[(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)];

/// How tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pool {
    /// The class token.
    Token,
    /// The mean over the patch tokens.
    Average,
}

/// Checked `model_args`.
#[derive(Clone, Copy, Debug)]
struct VitArgs {
    patches: PatchShape,
    depth: i64,
    heads: i64,
    block: BlockShape,
    /// 1 with a class token, else 0.
    prefix: i64,
    pool: Pool,
    /// Norm after pooling instead of before.
    fc_norm: bool,
}

impl VitArgs {
    fn read(spec: &ModelSpec) -> Result<Self> {
        let args = Args(&spec.model_args);
        let patches = PatchShape {
            image: args.size("img_size", MAX_IMAGE)?,
            patch: args.size("patch_size", MAX_IMAGE)?,
            dim: args.size("embed_dim", MAX_SIZE)?,
        };
        let PatchShape { image, patch, dim } = patches;
        if image % patch != 0 {
            let text = format!("img_size {image} is not a multiple of patch_size {patch}");
            return Err(unusable(text));
        }
        args::check_channels(args)?;
        let heads = args.size("num_heads", MAX_SIZE)?;
        args::check_heads(dim, heads)?;
        let ratio = args.positive("mlp_ratio", args::MAX_MLP_RATIO)?;
        let class_token = args.flag("class_token")?;
        let pool = match args.text("global_pool")? {
            "token" if class_token => Pool::Token,
            "token" => return Err(unusable("global_pool is token, but there is no class token")),
            "avg" => Pool::Average,
            other => {
                let text = format!("global_pool is `{other}`, supported are token and avg");
                return Err(unusable(text));
            }
        };
        let fc_norm = match spec.model_args.get("fc_norm") {
            None => pool == Pool::Average,
            Some(_) => args.flag("fc_norm")?,
        };
        Ok(Self {
            patches,
            depth: args.size("depth", MAX_SIZE)?,
            heads,
            block: BlockShape {
                dim,
                hidden: args::hidden_width(dim, ratio)?,
                qkv_bias: args.flag("qkv_bias")?,
            },
            prefix: i64::from(class_token),
            pool,
            fc_norm,
        })
    }

    fn tokens(&self) -> i64 {
        self.patches.grid().pow(2) + self.prefix
    }
}

/// Fills `model_args` from the tensors.
fn infer(spec: &mut ModelSpec, shapes: &TensorShapes) -> Result<()> {
    if OTHER_COMPUTATION.contains(&spec.architecture.as_str()) {
        let text = format!("architecture {} is not supported", spec.architecture);
        return Err(unusable(text));
    }
    if shapes.contains_key("dist_token") || shapes.contains_key("head_dist.weight") {
        return Err(unusable("distilled models with a second head are not supported"));
    }
    let (dim, patch) = args::patch_embedding(shapes)?;
    let class_token = shapes.contains_key("cls_token");
    let args = &mut spec.model_args;
    args::settle(args, "embed_dim", dim.into())?;
    args::settle(args, "patch_size", patch.into())?;
    args::settle(args, "in_chans", 3.into())?;
    args::settle(args, "class_token", class_token.into())?;
    args::settle(args, "depth", args::count_children(shapes, "blocks.").into())?;
    let qkv_bias = shapes.contains_key("blocks.0.attn.qkv.bias");
    args::settle(args, "qkv_bias", qkv_bias.into())?;
    args::settle_mlp(args, dim, args::first_axis(shapes, "blocks.0.mlp.fc1.weight")?)?;
    infer_image_size(args, shapes)?;
    infer_pooling(args, shapes)?;
    if !args.contains_key("num_heads")
        && super::variant(&spec.architecture).is_none()
        && let Some((_, heads)) = HEADS_BY_WIDTH.iter().find(|(width, _)| *width == dim)
    {
        spec.model_args.insert("num_heads".to_owned(), Value::from(*heads));
    }
    Ok(())
}

fn infer_image_size(args: &mut Map<String, Value>, shapes: &TensorShapes) -> Result<()> {
    let read = Args(args);
    let patch = read.size("patch_size", MAX_IMAGE)?;
    let prefix = i64::from(read.flag("class_token")?);
    let tokens = match *args::shape(shapes, "pos_embed")? {
        [1, tokens, _] if (1..=MAX_IMAGE * MAX_IMAGE).contains(&tokens) => tokens - prefix,
        ref other => {
            let text =
                format!("parameter pos_embed has shape {other:?}, expected [1, tokens, dim]");
            return Err(unusable(text));
        }
    };
    let grid = tokens.isqrt();
    if grid * grid != tokens || grid == 0 {
        return Err(unusable(format!("pos_embed has {tokens} patch tokens, which is no square")));
    }
    if args.contains_key("img_size") {
        let image = Args(args).size("img_size", MAX_IMAGE)?;
        if image % patch != 0 {
            let text = format!("img_size {image} is not a multiple of patch_size {patch}");
            return Err(unusable(text));
        }
    }
    args::settle(args, "img_size", (grid * patch).into())
}

fn infer_pooling(args: &mut Map<String, Value>, shapes: &TensorShapes) -> Result<()> {
    let fc_norm = shapes.contains_key("fc_norm.weight");
    if !args.contains_key("global_pool") {
        let pool = if fc_norm { "avg" } else { "token" };
        args.insert("global_pool".to_owned(), pool.into());
    }
    let default = args.get("global_pool").and_then(Value::as_str) == Some("avg");
    // timm's own configs name `fc_norm` only where it departs from the default.
    if args.contains_key("fc_norm") || fc_norm != default {
        args::settle(args, "fc_norm", fc_norm.into())?;
    }
    Ok(())
}

fn parameters(spec: &ModelSpec) -> Result<Vec<Parameter>> {
    let args = VitArgs::read(spec)?;
    let PatchShape { patch, dim, .. } = args.patches;
    let mut list = ParameterList::default();
    list.tensor("patch_embed.proj.weight", &[dim, 3, patch, patch]);
    list.tensor("patch_embed.proj.bias", &[dim]);
    if args.prefix == 1 {
        list.tensor("cls_token", &[1, 1, dim]);
    }
    list.tensor("pos_embed", &[1, args.tokens(), dim]);
    for block in 0..args.depth {
        list.block(&format!("blocks.{block}"), args.block);
    }
    list.norm(if args.fc_norm { "fc_norm" } else { "norm" }, dim);
    list.linear("head", spec.num_classes, dim);
    Ok(list.0)
}

fn build(
    spec: &ModelSpec,
    sites: &mut SiteTable,
    weights: &Weights,
    used: &RefCell<BTreeSet<String>>,
) -> Result<Vec<Box<dyn Unit>>> {
    let args = VitArgs::read(spec)?;
    let root = weights.root(used);
    let dim = args.patches.dim;
    let mut builder = UnitBuilder { sites, scope: root.at("patch_embed"), unit: 0, windows: 1 };
    let mut units: Vec<Box<dyn Unit>> = Vec::new();
    units.push(Box::new(Stem {
        embed: PatchEmbed::load(&mut builder, args.patches)?,
        class_token: match args.prefix {
            1 => Some(root.get("cls_token", &[1, 1, dim])?),
            _ => None,
        },
        positions: root.get("pos_embed", &[1, args.tokens(), dim])?,
    }));
    for block in 0..args.depth {
        builder.scope = root.at("blocks").at(block);
        builder.unit = units.len();
        units.push(Box::new(Block {
            path: builder.scope.here().to_owned(),
            norm1: LayerNorm::load(&builder.scope.at("norm1"), dim, EPS)?,
            attention: builder.attention(dim, args.heads)?,
            norm2: LayerNorm::load(&builder.scope.at("norm2"), dim, EPS)?,
            mlp: builder.mlp(dim, args.block.hidden)?,
        }));
    }
    builder.scope = root.clone();
    builder.unit = units.len();
    let norm = if args.fc_norm { "fc_norm" } else { "norm" };
    // Taking one token commutes with the norm, so the norm feeds the head; averaging does not.
    let feeds = (args.fc_norm || args.pool == Pool::Token).then_some(norm);
    let site = builder.site("head", Role::Head, feeds);
    units.push(Box::new(Head {
        norm: LayerNorm::load(&root.at(norm), dim, EPS)?,
        norm_last: args.fc_norm,
        pool: args.pool,
        prefix: args.prefix,
        head: builder.linear(site, "head", [spec.num_classes, dim])?,
    }));
    Ok(units)
}

/// Patch embedding, class token, position embedding.
#[derive(Debug)]
struct Stem {
    embed: PatchEmbed,
    class_token: Option<Tensor>,
    positions: Tensor,
}

impl Unit for Stem {
    fn path(&self) -> &str {
        "patch_embed"
    }

    fn forward(&self, exec: &mut dyn Executor, images: &Tensor) -> Result<Tensor> {
        let patches = self.embed.forward(exec, images)?; // [n, patches, dim]
        let tokens = match &self.class_token {
            None => patches,
            Some(token) => {
                let (n, _, dim) = patches.size3()?;
                Tensor::f_cat(&[token.f_expand([n, 1, dim], false)?, patches], 1)?
            }
        };
        Ok(tokens.f_add(&self.positions)?)
    }
}

/// x + attention(norm1(x)), then x + mlp(norm2(x)).
#[derive(Debug)]
struct Block {
    path: String,
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Unit for Block {
    fn path(&self) -> &str {
        &self.path
    }

    fn forward(&self, exec: &mut dyn Executor, x: &Tensor) -> Result<Tensor> {
        // timm 0.6.13 scales the product, so a quantizer of q sees it unscaled.
        let scores = ScoreTerms { scale: Some(self.attention.scale()), ..ScoreTerms::default() };
        let terms = AttentionTerms { scores, ..AttentionTerms::default() };
        let x = exec.add_attention(&self.norm1, &self.attention, &terms, x)?;
        exec.add_mlp(&self.norm2, &self.mlp, &x)
    }
}

/// Final norm, pooling, classifier.
#[derive(Debug)]
struct Head {
    norm: LayerNorm,
    norm_last: bool,
    pool: Pool,
    prefix: i64,
    head: Linear,
}

impl Head {
    /// [n, tokens, dim] → [n, dim].
    fn pooled(&self, x: &Tensor) -> Result<Tensor> {
        match self.pool {
            Pool::Token => Ok(x.f_select(1, 0)?),
            Pool::Average => {
                let patches = x.size()[1] - self.prefix;
                mean_of_tokens(&x.f_narrow(1, self.prefix, patches)?)
            }
        }
    }
}

impl Unit for Head {
    fn path(&self) -> &str {
        "head"
    }

    fn forward(&self, exec: &mut dyn Executor, x: &Tensor) -> Result<Tensor> {
        // A norm of single tokens may as well come last.
        let pooled = if self.norm_last || matches!(self.pool, Pool::Token) {
            exec.layer_norm(&self.norm, &self.pooled(x)?)?
        } else {
            self.pooled(&exec.layer_norm(&self.norm, x)?)?
        };
        exec.linear(&self.head, &pooled)
    }
}
