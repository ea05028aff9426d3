//! The checkpoints and data sets that a server was given, for listing.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::data::Dataset;
use crate::engine::names::NamedFolder;
use crate::engine::registry::blocking;
use crate::error::Result;

/// How deep names are looked for: `a/b/c`.
const DEPTH: usize = 3;
/// A `config.json` is small; more is not read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// A float checkpoint on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Its name in requests.
    pub name: String,
    /// Architecture that its config names; empty if that cannot be read.
    pub architecture: String,
    /// Size of the weights in bytes.
    pub bytes: u64,
}

/// A labelled data set on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetInfo {
    /// Its name in requests.
    pub name: String,
    /// Number of images.
    pub images: usize,
    /// Class names, in class order.
    pub classes: Vec<String>,
}

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Page {
    /// Last name of the page before.
    pub after: Option<String>,
    /// Most entries to return.
    pub count: usize,
}

/// What can be listed below `--checkpoints` and `--datasets`.
#[derive(Clone, Debug)]
pub struct Resources {
    checkpoints: NamedFolder,
    datasets: NamedFolder,
}

impl Resources {
    /// Over the two folders.
    pub fn new(checkpoints: NamedFolder, datasets: NamedFolder) -> Self {
        Self { checkpoints, datasets }
    }

    /// Checkpoints by name.
    ///
    /// # Errors
    /// `Internal` when the server stops.
    pub async fn checkpoints(&self, page: Page) -> Result<Vec<CheckpointInfo>> {
        let folder = self.checkpoints.clone();
        blocking(move || {
            let is_checkpoint = |path: &Path| {
                path.join("config.json").is_file() && path.join("model.safetensors").is_file()
            };
            let names = select(folder.list(DEPTH, &is_checkpoint), page).into_iter();
            Ok(names.filter_map(|name| checkpoint(&folder, name)).collect())
        })
        .await
    }

    /// Data sets by name: folders with class folders that hold images.
    ///
    /// # Errors
    /// `Internal` when the server stops.
    pub async fn datasets(&self, page: Page) -> Result<Vec<DatasetInfo>> {
        let folder = self.datasets.clone();
        blocking(move || {
            let is_dataset = |path: &Path| Dataset::open(path, "dataset").is_ok();
            let names = select(folder.list(DEPTH, &is_dataset), page).into_iter();
            Ok(names.filter_map(|name| dataset(&folder, name)).collect())
        })
        .await
    }
}

fn select(names: Vec<String>, page: Page) -> Vec<String> {
    let Page { after, count } = page;
    let follows = |name: &String| after.as_ref().is_none_or(|after| name > after);
    names.into_iter().filter(follows).take(count).collect()
}

fn checkpoint(folder: &NamedFolder, name: String) -> Option<CheckpointInfo> {
    let path = folder.resolve(&name, "checkpoint").ok()?;
    let bytes = fs::metadata(path.join("model.safetensors")).ok()?.len();
    let architecture = architecture(&path.join("config.json")).unwrap_or_default();
    Some(CheckpointInfo { name, architecture, bytes })
}

fn architecture(config: &Path) -> Option<String> {
    if fs::metadata(config).ok()?.len() > MAX_CONFIG_BYTES {
        return None;
    }
    let config: Value = serde_json::from_slice(&fs::read(config).ok()?).ok()?;
    config.get("architecture")?.as_str().map(str::to_owned)
}

fn dataset(folder: &NamedFolder, name: String) -> Option<DatasetInfo> {
    let path = folder.resolve(&name, "dataset").ok()?;
    let Dataset { classes, samples, .. } = Dataset::open(&path, "dataset").ok()?;
    Some(DatasetInfo { name, images: samples.len(), classes })
}
