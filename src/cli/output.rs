//! Results on stdout, as text or as one JSON document.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use serde_json::Value;

use crate::cli::failure::Failure;
use crate::error::Error;

/// The form of results and errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Where and how a command answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    format: Format,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { format: if json { Format::Json } else { Format::Text } }
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Prints a result in the form that was asked for. A reader that went away is no failure.
    ///
    /// # Errors
    /// `Io` when stdout cannot be written.
    pub(super) fn result(&self, text: impl Display, json: &Value) -> Result<(), Failure> {
        let mut stdout = std::io::stdout().lock();
        let written = match self.format {
            Format::Text => writeln!(stdout, "{text}"),
            Format::Json => writeln!(stdout, "{json:#}"),
        };
        match written.and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Error::io("stdout", error).into())
            }
            _ => Ok(()),
        }
    }
}

/// Columns as wide as their widest cell, two spaces apart; the first line is the header.
pub(super) fn columns(lines: &[Vec<String>]) -> String {
    let count = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let rendered = lines.iter().map(|line| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    rendered.collect::<Vec<_>>().join("\n")
}

/// Bytes for people: `2.74 MB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1000)];
    match UNITS.iter().find(|(_, size)| count >= *size) {
        Some((unit, size)) => format!("{:.2} {unit}", count as f64 / *size as f64),
        None => format!("{count} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_by_characters() {
        let lines = [vec!["id", "state"], vec!["größe-4", "ready"], vec!["b", ""]];
        let lines: Vec<Vec<String>> =
            lines.iter().map(|line| line.iter().map(|cell| (*cell).to_owned()).collect()).collect();
        assert_eq!(columns(&lines), "id       state\ngröße-4  ready\nb");
    }

    #[test]
    fn sizes_have_three_digits_and_a_unit() {
        assert_eq!([bytes(999), bytes(2_739_904)], ["999 B", "2.74 MB"]);
    }
}
