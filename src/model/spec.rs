//! What a checkpoint's `config.json` says: architecture, classes, preprocessing, labels.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Everything about a model except its weights. Stored in every artifact's header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// timm's architecture name: `vit_tiny_patch16_224`, `swin_base_patch4_window7_224`, ...
    pub architecture: String,
    /// Id of the family that builds it: `vit` (ViT and DeiT) or `swin`.
    pub family: String,
    /// Number of classes of the head.
    pub num_classes: i64,
    /// timm's `model_args` after defaults and checks; the family reads its own fields from it.
    pub model_args: Map<String, Value>,
    /// How an image becomes the model's input.
    pub preprocessing: Preprocessing,
    /// One label per class, or empty when the checkpoint names none.
    #[serde(default)]
    pub labels: Vec<String>,
}

/// timm's evaluation transform: resize the shorter side, centre crop, scale to 0..1, normalise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocessing {
    /// Height and width of the (square) model input in pixels.
    pub image_size: i64,
    /// Share of the resized image's shorter side that the crop keeps, in (0, 1].
    pub crop_pct: f64,
    /// Resampling filter of the resize.
    pub interpolation: Interpolation,
    /// Per-channel mean of the 0..1 image (R, G, B).
    pub mean: [f64; 3],
    /// Per-channel standard deviation of the 0..1 image (R, G, B).
    pub std: [f64; 3],
}

/// Resampling filters that timm configurations name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Cubic convolution with a = −0.5, antialiased.
    Bicubic,
    /// Triangle filter, antialiased.
    Bilinear,
    /// Nearest neighbour.
    Nearest,
}

impl ModelSpec {
    /// Whether token 0 of the sequence is a class token (`class_token` of the resolved arguments).
    pub fn has_class_token(&self) -> bool {
        self.model_args.get("class_token").and_then(Value::as_bool).unwrap_or(false)
    }

    /// The label of a class: its name in the checkpoint, or its index as text.
    pub fn label(&self, class: usize) -> String {
        self.labels.get(class).cloned().unwrap_or_else(|| class.to_string())
    }
}
