//! `vitq inspect`: what an artifact holds, and whether it is intact.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::artifact::{Artifact, Header};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, bytes};
use crate::digest::sha256_hex;
use crate::error::Error;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The artifact.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Decode every tensor and quantizer, and compare the file with its canonical form and name.
    #[arg(long)]
    verify: bool,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let content = std::fs::read(&self.file).map_err(|e| Error::io(&self.file, e))?;
        let artifact = Artifact::from_bytes(&self.file.display().to_string(), &content)?;
        let digest = sha256_hex(&content);
        if self.verify {
            verify(&self.file, &artifact, &content, &digest)?;
        }
        let tensors = artifact.tensors.iter().map(|(name, tensor)| {
            json!({
                "name": name,
                "dtype": tensor.dtype.to_string(),
                "shape": tensor.shape,
                "bytes": tensor.data.len(),
            })
        });
        let json = json!({
            "digest": digest,
            "bytes": content.len(),
            "verified": self.verify,
            "header": artifact.header,
            "tensors": tensors.collect::<Vec<_>>(),
        });
        output.result(text(&artifact, content.len(), &digest, self.verify), &json)
    }
}

/// More than reading does: the canonical form, the name in a content-addressed store, all values.
fn verify(path: &Path, artifact: &Artifact, content: &[u8], digest: &str) -> Result<(), Failure> {
    let corrupt = |reason: String| Error::corrupt(path.display().to_string(), reason);
    if artifact.to_bytes()? != content {
        return Err(corrupt("the file is not in its canonical form".to_owned()).into());
    }
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    if let Some(name) = stem.filter(|stem| is_digest(stem) && stem != digest) {
        return Err(corrupt(format!("named {name}, but the content's digest is {digest}")).into());
    }
    crate::engine::QuantizedModel::load(
        artifact,
        tch::Device::Cpu,
        crate::exec::Backend::Simulated,
    )?;
    Ok(())
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn text(artifact: &Artifact, size: usize, digest: &str, verified: bool) -> String {
    let Header { model, request, calibration, source_digest, source_bytes, sites, .. } =
        &artifact.header;
    let options = request.options.iter().map(|(name, value)| format!(" {name}={value}"));
    let exceptions = request.role_bits.to_string();
    let exceptions = exceptions.split_whitespace().map(|text| format!(", {text}"));
    let share = 100.0 * size as f64 / (*source_bytes).max(1) as f64;
    let mut lines = vec![
        format!("digest       {digest}{}", if verified { " (verified)" } else { "" }),
        format!("model        {}, {} classes", model.architecture, model.num_classes),
        format!(
            "method       {}{} w{}a{}, stem and head {}{}, seed {}",
            request.method,
            options.collect::<String>(),
            request.weight_bits.get(),
            request.activation_bits.get(),
            request.stem_head.name(),
            exceptions.collect::<String>(),
            request.seed
        ),
        format!("calibration  {} images, sha256 {}", calibration.images, calibration.digest),
        format!("source       sha256 {source_digest}"),
        format!("written by   vitq {}", artifact.header.crate_version),
        format!("size         {} of {} ({share:.1} %)", bytes(size as u64), bytes(*source_bytes)),
        format!("tensors      {}", artifact.tensors.len()),
        format!("sites        {} quantized", sites.len()),
    ];
    for (path, operands) in sites {
        let sqnr: BTreeMap<&str, f64> = artifact
            .header
            .report
            .sites
            .iter()
            .filter(|site| site.path == *path)
            .map(|site| (site.operand.as_str(), site.sqnr_db))
            .collect();
        let operands = operands.iter().map(|(operand, quantizer)| {
            let sqnr = sqnr.get(operand.as_str()).map(|db| format!(" {db:.1} dB"));
            format!("{operand} {} {}b{}", quantizer.kind, quantizer.bits, sqnr.unwrap_or_default())
        });
        lines.push(format!("  {path}: {}", operands.collect::<Vec<_>>().join(", ")));
    }
    lines.extend(artifact.header.report.warnings.iter().map(|text| format!("warning: {text}")));
    lines.join("\n")
}
