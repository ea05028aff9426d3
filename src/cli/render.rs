//! The server's messages as text and as JSON.

use serde_json::{Value, json};

use crate::cli::failure::{inner_status, status_json, status_text};
use crate::cli::output;
use crate::grpc::proto::{
    CalibrationReport, EvaluateResult, EvaluationMetrics, JobMetadata, JobState, Label, Model,
    QuantizeResult, RoleBits, SiteCounts, SiteReport, StemHead, model,
};
use crate::quant::bits::FLOAT_BITS;

/// The bit width that stands for float.
const FLOAT: u32 = FLOAT_BITS as u32;
/// Worst operands that a text report names.
const WORST_SITES: usize = 3;

/// A duration in seconds.
pub(super) fn seconds(duration: &prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

/// A time as RFC 3339 text; empty if it cannot be one.
pub(super) fn time(timestamp: Option<&prost_types::Timestamp>) -> String {
    timestamp
        .and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok())
        .map(|time| time.to_string())
        .unwrap_or_default()
}

/// The same as JSON: null if there is none.
pub(super) fn time_json(timestamp: Option<&prost_types::Timestamp>) -> Value {
    Some(time(timestamp)).filter(|time| !time.is_empty()).into()
}

/// The bit widths in short: `w4a4`.
pub(super) fn bits(model: &Model) -> String {
    format!("w{}a{}", model.weight_bits, model.activation_bits)
}

/// Exceptions from the bit widths as flags spell them: `, reduction=8/8`.
fn role_bits(model: &Model) -> String {
    let precision = |bits| match bits {
        FLOAT => "float".to_owned(),
        bits => bits.to_string(),
    };
    let entry = |entry: &RoleBits| {
        let activations = precision(entry.activation_bits);
        match entry.weight_bits {
            0 => format!(", {}={activations}", entry.role),
            weights => format!(", {}={}/{activations}", entry.role, precision(weights)),
        }
    };
    model.role_bits.iter().map(entry).collect()
}

/// `stored`, `loading`, `ready`, `failed`.
pub(super) fn model_state(model: &Model) -> &'static str {
    match model.state() {
        model::State::Unspecified => "unknown",
        model::State::Stored => "stored",
        model::State::Loading => "loading",
        model::State::Ready => "ready",
        model::State::Failed => "failed",
    }
}

/// `queued`, `running`, ...
pub(super) fn job_state(job: &JobMetadata) -> &'static str {
    match job.state() {
        JobState::Unspecified => "unknown",
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Cancelling => "cancelling",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

fn stem_head(model: &Model) -> &'static str {
    match model.stem_head() {
        StemHead::Unspecified | StemHead::Float => "float",
        StemHead::Int8 => "int8",
        StemHead::Same => "same",
    }
}

/// A model on several lines.
pub(super) fn model_text(model: &Model) -> String {
    let options = model.options.iter().map(|(name, value)| format!(" {name}={value}"));
    let share = 100.0 * model.artifact_bytes as f64 / model.source_bytes.max(1) as f64;
    let mut lines = vec![
        format!("model {} ({})", model.id, model_state(model)),
        format!("  version      {}", model.digest),
        format!("  architecture {}", model.architecture),
        format!("  input        {0}x{0} pixels, {1} classes", model.image_size, model.num_classes),
        format!(
            "  method       {}{} {}, stem and head {}{}",
            model.method,
            options.collect::<String>(),
            bits(model),
            stem_head(model),
            role_bits(model)
        ),
        format!(
            "  calibration  {} images, seed {}, from {}",
            model.calibration_images, model.seed, model.checkpoint
        ),
        format!(
            "  size         {} of {} ({share:.1} %)",
            output::bytes(model.artifact_bytes),
            output::bytes(model.source_bytes)
        ),
    ];
    if !model.aliases.is_empty() {
        lines.push(format!("  aliases      {}", model.aliases.join(", ")));
    }
    if model.resident_bytes > 0 {
        let resident = output::bytes(model.resident_bytes);
        lines.push(format!("  loaded       {resident} on {}, {}", model.device, model.executor));
    }
    if let Some(SiteCounts { integer, simulated, float }) = model.sites {
        lines.push(format!(
            "  products     {integer} integer, {simulated} simulated, {float} float"
        ));
    }
    if let Some(error) = &model.error {
        lines.push(format!("  error        {}", status_text(&inner_status(error.clone()))));
    }
    lines.join("\n")
}

/// A model as JSON.
pub(super) fn model_json(model: &Model) -> Value {
    json!({
        "id": model.id,
        "state": model_state(model),
        "digest": model.digest,
        "architecture": model.architecture,
        "image_size": model.image_size,
        "num_classes": model.num_classes,
        "method": model.method,
        "options": model.options,
        "weight_bits": model.weight_bits,
        "activation_bits": model.activation_bits,
        "stem_head": stem_head(model),
        "role_bits": model.role_bits.iter().map(|entry| json!({
            "role": entry.role,
            "weight_bits": entry.weight_bits,
            "activation_bits": entry.activation_bits,
        })).collect::<Vec<_>>(),
        "seed": model.seed,
        "checkpoint": model.checkpoint,
        "source_digest": model.source_digest,
        "source_bytes": model.source_bytes,
        "calibration_images": model.calibration_images,
        "calibration_digest": model.calibration_digest,
        "artifact_bytes": model.artifact_bytes,
        "resident_bytes": model.resident_bytes,
        "device": model.device,
        "executor": model.executor,
        "sites": model.sites.map(|sites| json!({
            "integer": sites.integer,
            "simulated": sites.simulated,
            "float": sites.float,
        })),
        "labels": model.labels,
        "aliases": model.aliases,
        "create_time": time_json(model.create_time.as_ref()),
        "error": model.error.clone().map(|error| status_json(&inner_status(error))),
    })
}

/// The worst operands and all remarks of a calibration.
pub(super) fn report_text(report: &CalibrationReport) -> String {
    let mut sites: Vec<&SiteReport> = report.sites.iter().collect();
    sites.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    let worst = sites.iter().take(WORST_SITES).map(|site| {
        format!("  {:.1} dB      {} {} ({})", site.sqnr_db, site.path, site.operand, site.kind)
    });
    let header = (!sites.is_empty())
        .then(|| format!("lowest SQNR of {} quantized operands", report.sites.len()));
    let warnings = report.warnings.iter().map(|warning| format!("warning: {warning}"));
    header.into_iter().chain(worst).chain(warnings).collect::<Vec<_>>().join("\n")
}

/// A calibration report as JSON.
pub(super) fn report_json(report: &CalibrationReport) -> Value {
    let sites = report.sites.iter().map(|site| {
        json!({
            "path": site.path,
            "role": site.role,
            "operand": site.operand,
            "kind": site.kind,
            "bits": site.bits,
            "sqnr_db": site.sqnr_db,
        })
    });
    json!({
        "images": report.images,
        "sites": sites.collect::<Vec<_>>(),
        "warnings": report.warnings,
    })
}

/// A finished quantization as text.
pub(super) fn quantized_text(result: &QuantizeResult) -> String {
    let mut parts: Vec<String> = result.model.iter().map(model_text).collect();
    if let Some(time) = &result.calibration_time {
        parts.push(format!("calibrated in {:.2} s", seconds(time)));
    }
    parts.extend(result.report.iter().map(report_text).filter(|text| !text.is_empty()));
    parts.join("\n")
}

/// A finished quantization as JSON.
pub(super) fn quantized_json(operation: &str, result: &QuantizeResult) -> Value {
    json!({
        "operation": operation,
        "model": result.model.as_ref().map(model_json),
        "report": result.report.as_ref().map(report_json),
        "calibration_seconds": result.calibration_time.as_ref().map(seconds),
    })
}

/// A finished evaluation as text.
pub(super) fn evaluated_text(result: &EvaluateResult) -> String {
    let metrics = result.metrics.unwrap_or_default();
    let EvaluationMetrics {
        images,
        top1_percent,
        top5_percent,
        agreement_percent,
        sqnr_db,
        images_per_second,
    } = metrics;
    let mut lines = vec![
        format!("model {} on {}: {images} images", result.model, result.dataset),
        format!("  top-1        {top1_percent:.2} %"),
        format!("  top-5        {top5_percent:.2} %"),
    ];
    if let Some(agreement) = agreement_percent {
        lines.push(format!("  agreement    {agreement:.2} % with the float model"));
    }
    if let Some(sqnr) = sqnr_db {
        lines.push(format!("  logits SQNR  {sqnr:.2} dB"));
    }
    lines.push(format!("  speed        {images_per_second:.1} images/s"));
    lines.extend(result.warnings.iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n")
}

/// A finished evaluation as JSON.
pub(super) fn evaluated_json(operation: &str, result: &EvaluateResult) -> Value {
    let metrics = result.metrics.unwrap_or_default();
    json!({
        "operation": operation,
        "model": result.model,
        "model_version": result.model_version,
        "dataset": result.dataset,
        "images": metrics.images,
        "top1": metrics.top1_percent,
        "top5": metrics.top5_percent,
        "agreement": metrics.agreement_percent,
        "sqnr_db": metrics.sqnr_db,
        "images_per_second": metrics.images_per_second,
        "warnings": result.warnings,
    })
}

/// A job's metadata as JSON.
pub(super) fn job_json(name: &str, job: &JobMetadata) -> Value {
    let progress = job.progress.as_ref().map(|progress| {
        json!({
            "stage": progress.stage,
            "unit": progress.unit,
            "units": progress.units,
            "images": progress.images,
            "images_total": progress.images_total,
            "elapsed_seconds": progress.elapsed.as_ref().map(seconds),
            "eta_seconds": progress.eta.as_ref().map(seconds),
        })
    });
    json!({
        "name": name,
        "kind": job.kind,
        "state": job_state(job),
        "model": job.model,
        "create_time": time_json(job.create_time.as_ref()),
        "start_time": time_json(job.start_time.as_ref()),
        "end_time": time_json(job.end_time.as_ref()),
        "progress": progress,
        "last_sequence": job.last_sequence,
        "attempt": job.attempt,
        "worker": job.worker,
    })
}

/// A label and its score as JSON.
pub(super) fn label_json(label: &Label) -> Value {
    json!({
        "index": label.index,
        "label": label.label,
        "probability": label.probability,
        "logit": label.logit,
    })
}
