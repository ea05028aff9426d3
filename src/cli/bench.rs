//! `vitq bench`: methods × models × bit widths in this process, resumable.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::bench::matrix::{ArtifactPolicy, CalibrationChoice, Matrix, Selection};
use crate::bench::results::FLOAT_METHOD;
use crate::bench::runner::{Outcome, Position};
use crate::bench::{Observer, Row, RowKey, Summary, report, run};
use crate::calib::task::StemHeadPolicy;
use crate::calib::{Progress, ProgressUpdate};
use crate::cli::args;
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::cli::progress::{Display, Step};
use crate::exec::Backend;
use crate::quant::{BitWidth, Precision};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder; repeatable.
    #[arg(long = "checkpoint", value_name = "DIR", required = true)]
    checkpoints: Vec<PathBuf>,
    /// Calibration data set: a folder of class folders. Needed by every method but float.
    #[arg(long, value_name = "DIR")]
    calib: Option<PathBuf>,
    /// Data set that is scored: a folder of class folders.
    #[arg(long, value_name = "DIR")]
    val: PathBuf,
    /// Methods to compare; `float` is the checkpoint itself.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', required = true, value_parser = args::method)]
    methods: Vec<String>,
    /// Bits of weights and activations, 3 to 8.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = args::bit_width,
        conflicts_with_all = ["weight_bits", "activation_bits"])]
    bits: Vec<BitWidth>,
    /// Bits of the weights, or float, with each of --activation-bits.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = args::precision, requires = "activation_bits")]
    weight_bits: Vec<Precision>,
    /// Bits of the activations, or float.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = args::precision, requires = "weight_bits")]
    activation_bits: Vec<Precision>,
    /// Quantize the weights alone, with each of --bits: activations stay float.
    #[arg(long, requires = "bits", conflicts_with_all = ["weight_bits", "activation_bits"])]
    weights_only: bool,
    /// Bits of one kind of product, before all else: WEIGHTS/ACTIVATIONS, each 3 to 8 or float, or
    /// for query_key and score_value ACTIVATIONS alone; repeatable. `reduction=8/8`, `fc2=4/float`.
    #[arg(long = "role-bits", value_name = "ROLE=W/A")]
    role_bits: Vec<String>,
    /// Number of calibration images, drawn by the seed.
    #[arg(long, value_name = "N", default_value = "32", value_parser = args::positive)]
    calib_images: usize,
    /// Text file with exactly the images to use, one path a line, relative to --calib.
    #[arg(long, value_name = "LIST", conflicts_with = "calib_images")]
    calib_files: Option<PathBuf>,
    /// Seeds of calibration; the table shows their mean and spread.
    #[arg(long = "seed", value_name = "N,…", value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,
    /// Arithmetic of the quantized models: simulated, integer, float.
    #[arg(
        long = "executor",
        value_name = "NAME,…",
        value_delimiter = ',',
        default_value = "simulated"
    )]
    executors: Vec<Backend>,
    /// Where to run: auto, cpu, cuda:N.
    #[arg(long, value_name = "NAME,…", default_value = "auto")]
    device: String,
    /// Treatment of the patch embedding and the classifier: float, int8, same.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "float", value_parser = args::stem_head)]
    stem_head: Vec<StemHeadPolicy>,
    /// Option, given to the methods that have it; repeatable.
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = args::key_value)]
    options: Vec<(String, String)>,
    /// Score at most that many images, spread over the classes.
    #[arg(long, value_name = "N", value_parser = args::positive)]
    limit: Option<usize>,
    /// Images per forward.
    #[arg(long = "batch-size", value_name = "N,…", value_delimiter = ',', default_value = "32", value_parser = args::positive)]
    batch_sizes: Vec<usize>,
    /// Keep the artifacts in DIR/artifacts.
    #[arg(long)]
    save_artifacts: bool,
    /// Folder of the results; rows that it already holds are not computed again.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let out = self.out.clone();
        let matrix = self.matrix()?;
        let watcher = Watcher { display: Display::new() };
        let (results, summary) = run(&matrix, &out, &watcher)?;
        drop(watcher);
        report::write(results.rows(), &out)?;
        let json = json!({
            "computed": summary.computed,
            "kept": summary.kept,
            "rows": results.rows(),
        });
        output.result(text(&out, results.rows(), summary), &json)
    }

    fn matrix(self) -> Result<Matrix, Failure> {
        let needs_bits = self.methods.iter().any(|method| method != FLOAT_METHOD);
        let bits: Vec<(Precision, Precision)> = if self.weight_bits.is_empty() {
            let widths = self.bits.iter().map(|bits| Precision::Bits(*bits));
            let activations = |bits| if self.weights_only { Precision::Float } else { bits };
            widths.map(|bits| (bits, activations(bits))).collect()
        } else {
            let pairs = self.weight_bits.iter();
            pairs.flat_map(|w| self.activation_bits.iter().map(|a| (*w, *a))).collect()
        };
        if needs_bits && bits.is_empty() {
            return Err(Failure::Usage(
                "--bits, or --weight-bits and --activation-bits, must be given".to_owned(),
            ));
        }
        if needs_bits && self.calib.is_none() {
            return Err(Failure::Usage("--calib must be given".to_owned()));
        }
        let selection = match &self.calib_files {
            Some(list) => Selection::Listed(args::list_file(list)?),
            None => Selection::Count(self.calib_images),
        };
        Ok(Matrix {
            checkpoints: self.checkpoints,
            calibration: self.calib.map(|dataset| CalibrationChoice { dataset, selection }),
            validation: self.val,
            limit: self.limit,
            methods: self.methods,
            bits,
            role_bits: args::role_bits(&self.role_bits)?,
            stem_heads: self.stem_head,
            options: args::unique(self.options, "option")?,
            seeds: self.seeds,
            executors: self.executors,
            devices: args::devices(&self.device)?,
            batch_sizes: self.batch_sizes,
            artifacts: if self.save_artifacts {
                ArtifactPolicy::Keep
            } else {
                ArtifactPolicy::Discard
            },
        })
    }
}

/// Shows rows as they become known.
struct Watcher {
    display: Display,
}

impl Progress for Watcher {
    fn report(&self, update: ProgressUpdate) {
        let ProgressUpdate { stage, unit, units, images: _, images_total: _, site, loss: _ } =
            update;
        let note = site
            .map(|site| format!("{} {} {:.1} dB", site.path, site.operand, site.sqnr_db))
            .unwrap_or_default();
        self.display.step(&Step { stage, unit: unit as u64, units: units as u64, note });
    }

    fn is_cancelled(&self) -> bool {
        false // Ctrl-C ends the process: everything but the running row is saved
    }
}

impl Observer for Watcher {
    fn started(&self, key: &RowKey, position: Position) {
        let stage = format!("{}/{}", position.row, position.rows);
        self.display.step(&Step { stage, note: key_text(key), ..Step::default() });
    }

    fn finished(&self, row: &Row, outcome: Outcome, position: Position) {
        let Position { row: number, rows } = position;
        let source = match outcome {
            Outcome::Computed => "",
            Outcome::Kept => " (from an earlier run)",
        };
        let sqnr = row.sqnr_db.map(|sqnr| format!(", {sqnr:.1} dB")).unwrap_or_default();
        self.display.say(&format!(
            "[{number}/{rows}] {}: top-1 {:.2} %, agreement {:.2} %{sqnr}, {:.0} images/s{source}",
            key_text(&row.key),
            row.top1,
            row.agreement,
            row.images_per_second
        ));
    }
}

fn key_text(key: &RowKey) -> String {
    let mut parts = vec![key.checkpoint.clone(), key.method.clone()];
    if let Some(seed) = key.seed {
        let exceptions = format!("{} {}", key.bits(), key.role_bits);
        parts.push(format!("{} {}, seed {seed}", exceptions.trim_end(), key.executor));
    }
    format!("{} on {}, batch {}", parts.join(" "), key.device, key.batch_size)
}

fn text(out: &Path, rows: &[Row], summary: Summary) -> String {
    let Summary { computed, kept } = summary;
    format!(
        "{}\n{computed} rows computed, {kept} kept; results.json, results.csv, table.md and \
         accuracy.svg are in {}",
        report::markdown(rows),
        out.display()
    )
}
