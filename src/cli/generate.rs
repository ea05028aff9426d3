//! `vitq generate`: a full-size checkpoint whose weights come from a hash.
//!
//! It classifies nothing, but it costs what the published model costs.

use std::path::PathBuf;

use serde_json::json;

use crate::cli::failure::Failure;
use crate::cli::output::{Output, bytes};
use crate::error::Error;
use crate::model::Checkpoint;
use crate::model::generated::{GeneratedOptions, generate};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Published variant, by its short or timm name: deit_small, swin_tiny_patch4_window7_224.
    #[arg(long, value_name = "NAME")]
    architecture: String,
    /// Folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of classes.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(i64).range(1..))]
    classes: i64,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Replace a checkpoint that is in the folder already.
    #[arg(long)]
    force: bool,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let is_taken = |file: &&&str| self.out.join(file).exists();
        if let Some(file) = Checkpoint::FILES.iter().find(is_taken).filter(|_| !self.force) {
            let reason =
                format!("{} holds a {file} already: --force replaces it", self.out.display());
            return Err(Failure::of_setting(Error::invalid("out", reason)));
        }
        let options = GeneratedOptions {
            num_classes: self.classes,
            seed: self.seed,
            ..GeneratedOptions::default()
        };
        let checkpoint = generate(&self.architecture, options).map_err(Failure::of_setting)?;
        checkpoint.save(&self.out)?;
        let architecture = &checkpoint.spec.architecture;
        let text = format!(
            "{architecture} with generated weights, {}, in {}",
            bytes(checkpoint.bytes),
            self.out.display()
        );
        let json = json!({
            "architecture": architecture,
            "digest": checkpoint.digest,
            "bytes": checkpoint.bytes,
            "out": self.out,
        });
        output.result(text, &json)
    }
}
