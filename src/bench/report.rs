//! Results as CSV and as Markdown tables.
//!
//! The tables have the layout of the field's papers: method, bits, and a column for each model.

use std::fmt::Write;
use std::path::Path;

use crate::bench::bit_cost::BitCost;
use crate::bench::chart;
use crate::bench::lines::{Line, Lines, mean_and_spread};
use crate::bench::results::{Row, write_atomically};
use crate::error::Result;

/// Writes `results.csv`, `table.md` and `accuracy.svg` beside `results.json`.
///
/// # Errors
/// `Io` when a file cannot be written; `Internal` when the plot cannot be drawn.
pub fn write(rows: &[Row], folder: &Path) -> Result<()> {
    write_atomically(&folder.join("results.csv"), csv(rows).as_bytes())?;
    write_atomically(&folder.join("table.md"), markdown(rows).as_bytes())?;
    write_atomically(&folder.join("accuracy.svg"), chart::accuracy(rows)?.as_bytes())
}

/// A CSV column: its name and a row's value.
type Column = (&'static str, fn(&Row) -> String);

const COLUMNS: &[Column] = &[
    ("checkpoint", |row| row.key.checkpoint.clone()),
    ("method", |row| row.key.method.clone()),
    ("weight_bits", |row| row.key.weight_bits.to_string()),
    ("activation_bits", |row| row.key.activation_bits.to_string()),
    ("executor", |row| row.key.executor.clone()),
    ("device", |row| row.key.device.clone()),
    ("seed", |row| optional(row.key.seed)),
    ("top1", |row| row.top1.to_string()),
    ("top5", |row| row.top5.to_string()),
    ("agreement", |row| row.agreement.to_string()),
    ("sqnr_db", |row| optional(row.sqnr_db)),
    ("calibration_seconds", |row| row.calibration_seconds.to_string()),
    ("images_per_second", |row| row.images_per_second.to_string()),
    ("artifact_bytes", |row| row.artifact_bytes.to_string()),
    ("resident_bytes", |row| row.resident_bytes.to_string()),
    ("calibration_peak_bytes", |row| optional(row.calibration_peak_bytes)),
    ("effective_weight_bits", |row| optional(row.bit_cost.map(|cost| cost.weight_bits))),
    ("effective_activation_bits", |row| optional(row.bit_cost.map(|cost| cost.activation_bits))),
    ("metadata_bits", |row| optional(row.bit_cost.map(|cost| cost.metadata_bits))),
    ("gbops", |row| optional(row.bit_cost.map(|cost| cost.gbops))),
    ("overhead_percent", |row| optional(row.bit_cost.map(|cost| cost.overhead_percent))),
    ("stem_head", |row| row.key.stem_head.clone()),
    ("role_bits", |row| row.key.role_bits.clone()),
    ("options", |row| {
        let options = row.key.options.iter().map(|(name, value)| format!("{name}={value}"));
        options.collect::<Vec<_>>().join(";")
    }),
    ("batch_size", |row| row.key.batch_size.to_string()),
    ("calibration_images", |row| row.key.calibration_images.to_string()),
    ("calibration_digest", |row| optional(row.key.calibration_digest.clone())),
    ("checkpoint_digest", |row| row.key.checkpoint_digest.clone()),
    ("validation_images", |row| row.key.validation_images.to_string()),
    ("validation_digest", |row| row.key.validation_digest.clone()),
    ("vitq_version", |row| row.key.vitq_version.clone()),
];

/// All rows as CSV (RFC 4180), absent values empty.
pub fn csv(rows: &[Row]) -> String {
    let header = COLUMNS.iter().map(|(name, _)| (*name).to_owned());
    let mut text = csv_line(header);
    for row in rows {
        text.push_str(&csv_line(COLUMNS.iter().map(|(_, value)| value(row))));
    }
    text
}

/// Tables of accuracy, fidelity and cost.
pub fn markdown(rows: &[Row]) -> String {
    let lines = Lines::of(rows);
    let mut text = String::new();
    let quality: [(&str, Value); 3] = [
        ("Top-1 accuracy (%)", |row| Some(row.top1)),
        ("Agreement with the float model's top-1 (%)", |row| {
            (!row.key.is_float()).then_some(row.agreement)
        }),
        ("Logits SQNR (dB)", |row| row.sqnr_db),
    ];
    for (title, value) in quality {
        let table = quality_table(&lines, value);
        if !table.is_empty() {
            push_section(&mut text, title, &table);
        }
    }
    let precision = precision_table(&lines);
    if !precision.is_empty() {
        push_section(&mut text, "Effective bits and bit operations", &precision);
    }
    push_section(&mut text, "Cost", &cost_table(rows));
    text.push_str(&notes(&lines));
    text
}

/// What a quality table shows of a row; `None` leaves the cell empty.
type Value = fn(&Row) -> Option<f64>;

fn push_section(text: &mut String, title: &str, table: &str) {
    text.push_str("## ");
    text.push_str(title);
    text.push_str("\n\n");
    text.push_str(table);
    text.push('\n');
}

/// Method, bits, one column a checkpoint; the best of each bit width in bold.
fn quality_table(lines: &Lines<'_>, value: Value) -> String {
    let shown: Vec<(&Line<'_>, Vec<Cell>)> = lines
        .lines
        .iter()
        .map(|line| (line, line.cells.iter().map(|rows| Cell::of(rows, value)).collect()))
        .filter(|(_, cells): &(_, Vec<Cell>)| cells.iter().any(|cell| cell.0.is_some()))
        .collect();
    if shown.is_empty() {
        return String::new();
    }
    let mut header = vec!["Method".to_owned(), "Bits (W/A)".to_owned()];
    header.extend(lines.differing.iter().map(|name| (*name).to_owned()));
    header.extend(lines.checkpoints.iter().map(|name| (*name).to_owned()));
    let mut table = table_header(&header, 1);
    for (line, cells) in &shown {
        let mut fields = line_name(line);
        for (column, cell) in cells.iter().enumerate() {
            let rivals = shown.iter().filter(|(other, _)| other.key.bits() == line.key.bits());
            let best =
                rivals.clone().map(|(_, cells)| cells[column].mean()).fold(f64::MIN, f64::max);
            let contested = rivals.count() > 1;
            fields.push(cell.text(contested && cell.mean() == best));
        }
        table.push_str(&table_line(&fields));
    }
    table
}

/// Mean and spread of a cell's seeds.
struct Cell(Option<(f64, Option<f64>)>);

impl Cell {
    fn of(rows: &[&Row], value: Value) -> Self {
        Self(mean_and_spread(&rows.iter().filter_map(|row| value(row)).collect::<Vec<_>>()))
    }

    fn mean(&self) -> f64 {
        self.0.map_or(f64::NEG_INFINITY, |(mean, _)| mean)
    }

    fn text(&self, best: bool) -> String {
        let text = match self.0 {
            None => return "–".to_owned(),
            Some((mean, None)) => format!("{mean:.2}"),
            Some((mean, Some(spread))) => format!("{mean:.2} ± {spread:.2}"),
        };
        if best { format!("**{text}**") } else { text }
    }
}

/// One line per method, bit width and model: what the bits really are, and what they cost.
fn precision_table(lines: &Lines<'_>) -> String {
    let mut header = vec!["Method".to_owned(), "Bits (W/A)".to_owned()];
    header.extend(lines.differing.iter().map(|name| (*name).to_owned()));
    header.extend(
        [
            "Model",
            "Weight bits",
            "Activation bits",
            "Run-time parameters (bits per activation)",
            "GBOPs per image",
            "of which not products (%)",
        ]
        .map(str::to_owned),
    );
    let words = 3 + lines.differing.len();
    let mut table = String::new();
    for line in &lines.lines {
        for (column, rows) in line.cells.iter().enumerate() {
            let costs: Vec<BitCost> = rows.iter().filter_map(|row| row.bit_cost).collect();
            if costs.is_empty() {
                continue;
            }
            let mean = |value: fn(&BitCost) -> f64| {
                costs.iter().map(value).sum::<f64>() / costs.len() as f64
            };
            let mut fields = line_name(line);
            fields.extend([
                lines.checkpoints[column].to_owned(),
                format!("{:.2}", mean(|cost| cost.weight_bits)),
                format!("{:.2}", mean(|cost| cost.activation_bits)),
                format!("{:.2}", mean(|cost| cost.metadata_bits)),
                format!("{:.3}", mean(|cost| cost.gbops)),
                format!("{:.1}", mean(|cost| cost.overhead_percent)),
            ]);
            table.push_str(&table_line(&fields));
        }
    }
    if table.is_empty() { table } else { table_header(&header, words) + &table }
}

/// Method, bits and details of a line.
fn line_name(line: &Line<'_>) -> Vec<String> {
    let mut fields = if line.key.is_float() {
        vec!["Full precision".to_owned(), "32/32".to_owned()]
    } else {
        let (weights, activations) = (line.key.weight_bits, line.key.activation_bits);
        vec![line.method.clone(), format!("{weights}/{activations}")]
    };
    fields.extend(line.details.iter().cloned());
    fields
}

/// One line per row but for the seeds: calibration time, speed, size.
fn cost_table(rows: &[Row]) -> String {
    let header = [
        "Method",
        "Bits",
        "Model",
        "Executor",
        "Device",
        "Batch",
        "Calibration (s)",
        "Peak memory (MB)",
        "Images/s",
        "Size (kB)",
        "Resident (kB)",
    ];
    let mut table = table_header(&header.map(str::to_owned), 5);
    let mut groups: Vec<Vec<&Row>> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|group| same_cost(group[0], row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    for group in groups {
        let mean = |value: fn(&Row) -> f64| {
            group.iter().map(|row| value(row)).sum::<f64>() / group.len() as f64
        };
        let key = &group[0].key;
        let calibration = mean(|row| row.calibration_seconds);
        let peak = group.iter().filter_map(|row| row.calibration_peak_bytes).max();
        table.push_str(&table_line(&[
            crate::bench::lines::method_label(key),
            key.bits(),
            key.checkpoint.clone(),
            key.executor.clone(),
            key.device.clone(),
            key.batch_size.to_string(),
            if key.is_float() { "–".to_owned() } else { format!("{calibration:.2}") },
            peak.map_or("–".to_owned(), |bytes| format!("{:.0}", bytes as f64 / 1e6)),
            format!("{:.1}", mean(|row| row.images_per_second)),
            format!("{:.0}", mean(|row| row.artifact_bytes as f64) / 1e3),
            format!("{:.0}", mean(|row| row.resident_bytes as f64) / 1e3),
        ]));
    }
    table
}

fn same_cost(a: &Row, b: &Row) -> bool {
    let (a, b) = (&a.key, &b.key);
    (&a.checkpoint, &a.method, &a.options, a.bits(), &a.executor, &a.device, a.batch_size)
        == (&b.checkpoint, &b.method, &b.options, b.bits(), &b.executor, &b.device, b.batch_size)
        && (&a.stem_head, &a.role_bits) == (&b.stem_head, &b.role_bits)
}

/// What a reader must know to compare the numbers.
fn notes(lines: &Lines<'_>) -> String {
    let mut text = String::new();
    if !lines.conditions.is_empty() {
        let _infallible = writeln!(text, "Conditions: {}.", lines.conditions.join(", "));
    }
    let seeds = lines.seeds();
    if seeds.len() > 1 {
        let seeds = seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let _infallible =
            writeln!(text, "Mean ± standard deviation over calibration seeds {seeds}.");
    }
    text
}

fn table_header(names: &[String], first_number: usize) -> String {
    let rules = (0..names.len()).map(|i| if i < first_number { "---" } else { "---:" }.to_owned());
    table_line(names) + &table_line(&rules.collect::<Vec<_>>())
}

fn table_line(fields: &[String]) -> String {
    format!("| {} |\n", fields.join(" | "))
}

fn csv_line(fields: impl Iterator<Item = String>) -> String {
    let quoted = fields.map(|field| {
        if field.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", field.replace('"', "\"\""))
        } else {
            field
        }
    });
    quoted.collect::<Vec<_>>().join(",") + "\n"
}

fn optional(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::row;
    use crate::quant::bits::FLOAT_BITS;

    #[test]
    fn the_table_has_a_column_a_model_and_averages_seeds() {
        let rows = [
            row("vit", "float", FLOAT_BITS, 0, 96.0),
            row("swin", "float", FLOAT_BITS, 0, 98.0),
            row("vit", "ubb", 6, 0, 96.0),
            row("vit", "ubb", 4, 0, 95.0),
            row("vit", "ubb", 4, 1, 96.0),
            row("vit", "minmax", 4, 0, 60.0),
        ];
        let text = markdown(&rows);
        let top1: Vec<&str> =
            text.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
        assert_eq!(
            top1,
            [
                "| Method | Bits (W/A) | vit | swin |",
                "| --- | ---: | ---: | ---: |",
                "| Full precision | 32/32 | 96.00 | 98.00 |",
                "| ubb | 4/4 | **95.50 ± 0.71** | – |",
                "| minmax | 4/4 | 60.00 | – |",
                "| ubb | 6/6 | 96.00 | – |",
            ]
        );
        assert!(text.contains("calibration seeds 0, 1"), "{text}");
        assert!(text.contains("stem/head: float, executor: simulated"), "{text}");
    }

    #[test]
    fn rows_under_different_policies_are_never_merged() {
        let mut other = row("vit", "ubb", 4, 0, 90.0);
        other.key.stem_head = "int8".to_owned();
        let text = markdown(&[row("vit", "ubb", 4, 0, 95.0), other]);
        assert!(text.contains("| ubb | 4/4 | float | **95.00** |"), "{text}");
        assert!(text.contains("| ubb | 4/4 | int8 | 90.00 |"), "{text}");
    }

    #[test]
    fn mixed_plans_are_lines_of_their_own() {
        let mut exception = row("vit", "ubb", 4, 0, 96.0);
        exception.key.role_bits = "fc2=8/8 reduction=8/8".to_owned();
        let mut weights_only = row("vit", "ubb", 4, 0, 97.0);
        weights_only.key.activation_bits = FLOAT_BITS;
        let text = markdown(&[row("vit", "ubb", 4, 0, 95.0), exception, weights_only]);
        assert!(text.contains("| ubb | 4/4 | 95.00 |"), "{text}");
        assert!(text.contains("| ubb (fc2=8/8, reduction=8/8) | 4/4 | **96.00** |"), "{text}");
        assert!(text.contains("| ubb | 4/32 | 97.00 |"), "{text}");
    }

    #[test]
    fn effective_bits_are_a_table_of_their_own_where_they_are_known() {
        let mut unknown = row("swin", "ubb", 4, 0, 95.0);
        unknown.bit_cost = None;
        let rows = [row("vit", "ubb", 4, 0, 95.0), row("vit", "ubb", 4, 1, 95.0), unknown];
        let text = markdown(&rows);
        let line = "| ubb | 4/4 | vit | 4.25 | 4.50 | 0.12 | 1.500 | 3.2 |";
        assert!(text.contains(line), "{text}");
        assert_eq!(text.matches("| swin | 4.25").count(), 0, "{text}");
        assert!(!markdown(&rows[2..]).contains("Effective bits"), "nothing known, no table");
    }

    #[test]
    fn batch_sizes_are_rows_of_the_cost_table_only() {
        let mut other = row("vit", "ubb", 4, 0, 95.0);
        other.key.batch_size = 1;
        let text = markdown(&[row("vit", "ubb", 4, 0, 95.0), other]);
        assert!(text.contains("| ubb | 4/4 | 95.00 |"), "{text}");
        assert_eq!(text.matches("| ubb | w4a4 | vit | simulated | cpu |").count(), 2, "{text}");
    }

    #[test]
    fn csv_quotes_what_needs_it_and_leaves_absent_values_empty() {
        let mut float = row("a,\"b\"", "float", FLOAT_BITS, 0, 96.0);
        float.key.options.insert("x".to_owned(), "1".to_owned());
        let text = csv(&[float]);
        let (header, line) = text.split_once('\n').unwrap();
        assert!(header.starts_with("checkpoint,method,weight_bits,activation_bits,executor,device,seed,top1,top5,agreement,sqnr_db,calibration_seconds,images_per_second,artifact_bytes"));
        assert!(line.starts_with("\"a,\"\"b\"\"\",float,32,32,float,cpu,,96,99.5,100,,0,120,"));
    }
}
