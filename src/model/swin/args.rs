//! Swin's `model_args`: what the tensors tell about them, and the stages that they describe.

use serde_json::Value;

use crate::error::Result;
use crate::model::args::{self, Args, BlockShape, MAX_IMAGE, MAX_SIZE, ParameterList, unusable};
use crate::model::layers::PatchShape;
use crate::model::{ModelSpec, Parameter, TensorShapes};

/// Most elements that masks and relative position biases may take: 1 GiB of float32.
const MAX_TABLE_ELEMENTS: i64 = 1 << 28;
/// Most stages; each halves the resolution.
const MAX_STAGES: usize = 12;
/// Largest window side; keeps the fourth power small.
const MAX_WINDOW: i64 = 64;

/// Checked `model_args`.
#[derive(Clone, Debug)]
pub(super) struct SwinArgs {
    pub(super) patches: PatchShape,
    pub(super) stages: Vec<Stage>,
    qkv_bias: bool,
}

/// One stage: blocks of one width and resolution.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    /// Width of a token.
    pub(super) dim: i64,
    /// Width of the MLP's hidden layer.
    pub(super) hidden: i64,
    /// Attention heads.
    pub(super) heads: i64,
    /// Blocks.
    pub(super) depth: i64,
    /// Tokens along a side.
    pub(super) resolution: i64,
    /// Tokens along a window's side; never more than the resolution.
    pub(super) window: i64,
    /// Shift of odd blocks in tokens; 0 where one window holds everything.
    pub(super) shift: i64,
    /// Width after the patch merging that ends the stage; the last stage has none.
    pub(super) merged: Option<i64>,
}

impl SwinArgs {
    pub(super) fn read(spec: &ModelSpec) -> Result<Self> {
        let args = Args(&spec.model_args);
        args::check_channels(args)?;
        match args.text("global_pool")? {
            "avg" => {}
            other => {
                return Err(unusable(format!("global_pool is `{other}`, supported is avg")));
            }
        }
        let patches = PatchShape {
            image: args.size("img_size", MAX_IMAGE)?,
            patch: args.size("patch_size", MAX_IMAGE)?,
            dim: args.size("embed_dim", MAX_SIZE)?,
        };
        if patches.image % patches.patch != 0 {
            let PatchShape { image, patch, .. } = patches;
            let text = format!("img_size {image} is not a multiple of patch_size {patch}");
            return Err(unusable(text));
        }
        let stages = read_stages(args, patches)?;
        check_tables(&stages)?;
        Ok(Self { patches, stages, qkv_bias: args.flag("qkv_bias")? })
    }

    /// Width of the last stage.
    pub(super) fn last_dim(&self) -> i64 {
        self.stages.last().map_or(self.patches.dim, |stage| stage.dim)
    }
}

fn read_stages(args: Args<'_>, patches: PatchShape) -> Result<Vec<Stage>> {
    let depths = args.sizes("depths", MAX_SIZE)?;
    let heads = args.sizes("num_heads", MAX_SIZE)?;
    let windows = match args.required("window_size")? {
        Value::Array(_) => args.sizes("window_size", MAX_WINDOW)?,
        _ => vec![args.size("window_size", MAX_WINDOW)?; depths.len()],
    };
    let ratio = args.positive("mlp_ratio", args::MAX_MLP_RATIO)?;
    if heads.len() != depths.len() || windows.len() != depths.len() || depths.len() > MAX_STAGES {
        let text = format!(
            "depths, num_heads and window_size name {}, {} and {} stages, expected the same, at most {MAX_STAGES}",
            depths.len(),
            heads.len(),
            windows.len()
        );
        return Err(unusable(text));
    }
    let mut stages = Vec::with_capacity(depths.len());
    let (mut dim, mut resolution) = (patches.dim, patches.grid());
    for (index, ((&depth, &heads), &window)) in depths.iter().zip(&heads).zip(&windows).enumerate()
    {
        let last = index + 1 == depths.len();
        let shift = if resolution <= window { 0 } else { window / 2 };
        let window = window.min(resolution);
        if resolution == 0 || resolution % window != 0 {
            return Err(unusable(format!(
                "stage {index} has {resolution} by {resolution} tokens, which windows of {window} do not divide"
            )));
        }
        if !last && resolution % 2 != 0 {
            return Err(unusable(format!(
                "stage {index} has {resolution} by {resolution} tokens, which cannot be merged in pairs"
            )));
        }
        args::check_heads(dim, heads)?;
        let hidden = args::hidden_width(dim, ratio)?;
        let merged = (!last).then_some(2 * dim);
        stages.push(Stage { dim, hidden, heads, depth, resolution, window, shift, merged });
        (dim, resolution) = (2 * dim, resolution / 2);
    }
    Ok(stages)
}

/// Small tensors may ask for large tables: a bias per pair of tokens, and a mask per window.
fn check_tables(stages: &[Stage]) -> Result<()> {
    let elements: i64 = stages
        .iter()
        .map(|stage| {
            let pairs = stage.window.pow(4);
            let windows = (stage.resolution / stage.window).pow(2);
            pairs.saturating_mul(stage.depth.saturating_mul(stage.heads).saturating_add(windows))
        })
        .fold(0, i64::saturating_add);
    if elements > MAX_TABLE_ELEMENTS {
        let text = format!("the windows' tables would take {elements} elements, more than 2^28");
        return Err(unusable(text));
    }
    Ok(())
}

/// Fills `model_args` from the tensors.
pub(super) fn infer(spec: &mut ModelSpec, shapes: &TensorShapes) -> Result<()> {
    let (dim, patch) = args::patch_embedding(shapes)?;
    let args = &mut spec.model_args;
    args::settle(args, "embed_dim", dim.into())?;
    args::settle(args, "patch_size", patch.into())?;
    args::settle(args, "in_chans", 3.into())?;
    let (mut depths, mut heads, mut windows) = (Vec::new(), Vec::new(), Vec::new());
    for stage in 0..args::count_children(shapes, "layers.") {
        let prefix = format!("layers.{stage}.blocks.");
        let table = format!("{prefix}0.attn.relative_position_bias_table");
        let (window, stage_heads) = match *args::shape(shapes, &table)? {
            [rows, heads] if rows > 0 && (rows.isqrt().pow(2), rows % 2) == (rows, 1) => {
                ((rows.isqrt() + 1) / 2, heads)
            }
            ref other => {
                let text =
                    format!("parameter {table} has shape {other:?}, expected [(2w-1)², heads]");
                return Err(unusable(text));
            }
        };
        depths.push(args::count_children(shapes, &prefix));
        heads.push(stage_heads);
        windows.push(window);
    }
    args::settle(args, "depths", depths.into())?;
    args::settle(args, "num_heads", heads.into())?;
    let qkv_bias = shapes.contains_key("layers.0.blocks.0.attn.qkv.bias");
    args::settle(args, "qkv_bias", qkv_bias.into())?;
    args::settle_mlp(args, dim, args::first_axis(shapes, "layers.0.blocks.0.mlp.fc1.weight")?)?;
    // A window is cut to the resolution, so a table may be smaller than the config's window: a given
    // size is left to the check of shapes.
    if !args.contains_key("window_size") {
        args.insert("window_size".to_owned(), windows.into());
    }
    if !args.contains_key("global_pool") {
        args.insert("global_pool".to_owned(), "avg".into());
    }
    Ok(())
}

/// Every parameter of the architecture.
pub(super) fn parameters(spec: &ModelSpec) -> Result<Vec<Parameter>> {
    let args = SwinArgs::read(spec)?;
    let PatchShape { patch, dim, .. } = args.patches;
    let mut list = ParameterList::default();
    list.tensor("patch_embed.proj.weight", &[dim, 3, patch, patch]);
    list.tensor("patch_embed.proj.bias", &[dim]);
    list.norm("patch_embed.norm", dim);
    for (index, stage) in args.stages.iter().enumerate() {
        let &Stage { dim, hidden, heads, depth, window, merged, .. } = stage;
        for block in 0..depth {
            let path = format!("layers.{index}.blocks.{block}");
            list.block(&path, BlockShape { dim, hidden, qkv_bias: args.qkv_bias });
            let table = format!("{path}.attn.relative_position_bias_table");
            list.tensor(table, &[(2 * window - 1).pow(2), heads]);
        }
        if let Some(out) = merged {
            list.norm(&format!("layers.{index}.downsample.norm"), 4 * dim);
            // Published weights have no bias here; methods that fold a shift into the layer add one.
            list.linear_without_bias(&format!("layers.{index}.downsample.reduction"), out, 4 * dim);
        }
    }
    list.norm("norm", args.last_dim());
    list.linear("head", spec.num_classes, args.last_dim());
    Ok(list.0)
}
