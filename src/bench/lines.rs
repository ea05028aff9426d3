//! Rows arranged as tables want them: a line per method and bit width, a column per checkpoint,
//! the seeds of a cell together.

use crate::bench::results::{Row, RowKey};

/// Rows as lines and columns.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    /// Checkpoint names, in order of appearance.
    pub(super) checkpoints: Vec<&'a str>,
    /// Float first, then by bits, then in order of appearance.
    pub(super) lines: Vec<Line<'a>>,
    /// What is equal in all lines, as `name: value`.
    pub(super) conditions: Vec<String>,
    /// Names of what differs between lines, as columns.
    pub(super) differing: Vec<&'static str>,
}

/// One line: a method at a bit width under some conditions.
#[derive(Debug)]
pub(super) struct Line<'a> {
    /// A key of the line.
    pub(super) key: &'a RowKey,
    /// Method id with the options that were given.
    pub(super) method: String,
    /// Values of [`Lines::differing`]; empty where it does not apply.
    pub(super) details: Vec<String>,
    /// Rows of each checkpoint, one per seed.
    pub(super) cells: Vec<Vec<&'a Row>>,
}

/// What may differ between the lines of a table: a name and how to read it off a key.
struct Detail {
    name: &'static str,
    applies_to_float: bool,
    of: fn(&RowKey) -> String,
}

const DETAILS: &[Detail] = &[
    Detail { name: "stem/head", applies_to_float: false, of: |key| key.stem_head.clone() },
    Detail { name: "executor", applies_to_float: false, of: |key| key.executor.clone() },
    Detail { name: "device", applies_to_float: true, of: |key| key.device.clone() },
    Detail {
        name: "calibration images",
        applies_to_float: false,
        of: |key| key.calibration_images.to_string(),
    },
    Detail {
        name: "validation images",
        applies_to_float: true,
        of: |key| key.validation_images.to_string(),
    },
];

impl<'a> Lines<'a> {
    /// Arranges rows. Of several batch sizes, which cannot change a result, the first counts.
    pub(super) fn of(rows: &'a [Row]) -> Self {
        let mut checkpoints: Vec<&str> = Vec::new();
        for row in rows {
            if !checkpoints.contains(&row.key.checkpoint.as_str()) {
                checkpoints.push(&row.key.checkpoint);
            }
        }
        let (differing, conditions) = split_details(rows);
        let mut lines: Vec<Line<'_>> = Vec::new();
        for row in rows {
            let Some(column) = checkpoints.iter().position(|name| *name == row.key.checkpoint)
            else {
                continue;
            };
            let index = lines.iter().position(|line| same_line(line.key, &row.key));
            let index = index.unwrap_or_else(|| {
                lines.push(Line::new(&row.key, &differing, checkpoints.len()));
                lines.len() - 1
            });
            let cell = &mut lines[index].cells[column];
            if cell.iter().all(|other| !same_but_batch(&other.key, &row.key)) {
                cell.push(row);
            }
        }
        lines.sort_by_key(|line| {
            (!line.key.is_float(), line.key.weight_bits, line.key.activation_bits)
        });
        let differing = differing.iter().map(|detail| detail.name).collect();
        Self { checkpoints, lines, conditions, differing }
    }

    /// The seeds of all rows, sorted.
    pub(super) fn seeds(&self) -> Vec<u64> {
        let rows = self.lines.iter().flat_map(|line| line.cells.iter().flatten());
        let mut seeds: Vec<u64> = rows.filter_map(|row| row.key.seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    }
}

impl<'a> Line<'a> {
    fn new(key: &'a RowKey, differing: &[&'static Detail], columns: usize) -> Self {
        let details = differing.iter().map(|detail| {
            let applies = detail.applies_to_float || !key.is_float();
            if applies { (detail.of)(key) } else { String::new() }
        });
        Self {
            key,
            method: method_label(key),
            details: details.collect(),
            cells: vec![Vec::new(); columns],
        }
    }

    /// The line's name where there are no columns for its details.
    pub(super) fn label(&self) -> String {
        let details = self.details.iter().filter(|detail| !detail.is_empty());
        std::iter::once(&self.method).chain(details).cloned().collect::<Vec<_>>().join(", ")
    }
}

/// Mean and, of several values, the sample standard deviation.
pub(super) fn mean_and_spread(values: &[f64]) -> Option<(f64, Option<f64>)> {
    if values.is_empty() {
        return None;
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((mean, (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt())))
}

/// Method id, and in brackets the options and the bits of single roles that were given.
pub(super) fn method_label(key: &RowKey) -> String {
    let options = key.options.iter().map(|(name, value)| format!("{name}={value}"));
    let parts: Vec<String> =
        options.chain(key.role_bits.split_whitespace().map(str::to_owned)).collect();
    if parts.is_empty() {
        key.method.clone()
    } else {
        format!("{} ({})", key.method, parts.join(", "))
    }
}

/// Details with several values, and the others as `name: value`.
fn split_details(rows: &[Row]) -> (Vec<&'static Detail>, Vec<String>) {
    let mut differing = Vec::new();
    let mut conditions = Vec::new();
    for detail in DETAILS {
        let keys = rows.iter().map(|row| &row.key);
        let keys = keys.filter(|key| detail.applies_to_float || !key.is_float());
        let mut values: Vec<String> = keys.map(detail.of).collect();
        values.sort();
        values.dedup();
        match values.as_slice() {
            [] => {}
            [value] => conditions.push(format!("{}: {value}", detail.name)),
            _ => differing.push(detail),
        }
    }
    (differing, conditions)
}

fn same_line(a: &RowKey, b: &RowKey) -> bool {
    let details = DETAILS
        .iter()
        .filter(|detail| detail.applies_to_float || !a.is_float())
        .all(|detail| (detail.of)(a) == (detail.of)(b));
    details
        && (&a.method, &a.options, &a.role_bits, a.weight_bits, a.activation_bits)
            == (&b.method, &b.options, &b.role_bits, b.weight_bits, b.activation_bits)
}

fn same_but_batch(a: &RowKey, b: &RowKey) -> bool {
    RowKey { batch_size: b.batch_size, ..a.clone() } == *b
}
