//! The error map of one calibration: a row per unit, a column per operand, colour and number the
//! SQNR on the calibration images.

use std::collections::BTreeMap;

use plotters::prelude::*;
use plotters::style::text_anchor::HPos as Side;

use crate::bench::drawing::{Area, Drawn, INK, canvas, text};
use crate::bench::lines::method_label;
use crate::bench::results::RowKey;
use crate::calib::task::SiteReport;
use crate::error::Result;
use crate::model::Model;
use crate::nn::{Operand, Role};

/// SQNR at the two ends of the colour scale, in dB; values beyond have the colour of the end.
const RANGE_DB: (f64, f64) = (0.0, 40.0);
/// The colour scale from low to high: even steps of viridis, readable in print and for the
/// colour-blind.
const SCALE: [(f64, f64, f64); 6] = [
    (68.0, 1.0, 84.0),
    (65.0, 68.0, 135.0),
    (42.0, 120.0, 142.0),
    (34.0, 168.0, 132.0),
    (122.0, 209.0, 81.0),
    (253.0, 231.0, 37.0),
];
/// Operands that stay float.
const FLOAT: RGBColor = RGBColor(232, 232, 232);
/// Size of a cell, of the labels and of the legend, in pixels.
const CELL: (i32, i32) = (76, 24);
const LABELS: (i32, i32) = (150, 84);
const LEGEND: (i32, i32) = (360, 62);
const MARGIN: i32 = 16;

/// What a map shows: `digits-vit, ubb w4a4, stem/head float, seed 0`.
pub fn title(key: &RowKey) -> String {
    let (method, bits) = (method_label(key), key.bits());
    let seed = key.seed.map(|seed| format!(", seed {seed}")).unwrap_or_default();
    format!("{}, {method} {bits}, stem/head {}{seed}", key.checkpoint, key.stem_head)
}

/// A column: what the product computes and which of its sides.
type Column = (Role, Operand);

/// The map of a model's calibration as SVG text.
///
/// # Errors
/// `Internal` when the backend refuses.
pub fn sqnr(model: &Model, report: &[SiteReport], title: &str) -> Result<String> {
    let found: BTreeMap<(&str, &str), f64> = report
        .iter()
        .map(|site| ((site.path.as_str(), site.operand.as_str()), site.sqnr_db))
        .collect();
    let mut columns: Vec<Column> =
        model.sites.iter().flat_map(|site| operands(site.role)).collect();
    columns.sort_unstable();
    columns.dedup();
    let mut cells = Vec::new();
    let mut rows: Vec<usize> = Vec::new();
    for site in &model.sites {
        if rows.last() != Some(&site.unit) {
            rows.push(site.unit);
        }
        for column in operands(site.role) {
            let operand = site.operand_name(column.1);
            cells.push(Cell {
                row: rows.len() - 1,
                column: columns.iter().position(|other| *other == column).unwrap_or(0),
                sqnr_db: found.get(&(site.path.as_str(), operand)).copied(),
            });
        }
    }
    let map = Map {
        rows: rows.iter().map(|unit| model.units[*unit].path()).collect(),
        columns: &columns,
        cells: &cells,
        title,
    };
    canvas(map.size(), |root| map.draw(root))
}

fn operands(role: Role) -> [Column; 2] {
    [(role, Operand::Lhs), (role, Operand::Rhs)]
}

/// One operand of one site; `None` if it stays float.
struct Cell {
    row: usize,
    column: usize,
    sqnr_db: Option<f64>,
}

struct Map<'a> {
    rows: Vec<&'a str>,
    columns: &'a [Column],
    cells: &'a [Cell],
    title: &'a str,
}

impl Map<'_> {
    fn size(&self) -> (u32, u32) {
        let width = LABELS.0 + CELL.0 * self.columns.len() as i32 + 2 * MARGIN;
        let height = LABELS.1 + CELL.1 * self.rows.len() as i32 + LEGEND.1 + 2 * MARGIN;
        (width.max(LABELS.0 + LEGEND.0 + 2 * MARGIN) as u32, height as u32)
    }

    fn draw(&self, root: &Area<'_>) -> Drawn {
        text(root, self.title, (MARGIN, MARGIN + 8), (15, Side::Left), INK)?;
        let (left, top) = (MARGIN + LABELS.0, MARGIN + LABELS.1);
        for (index, (role, operand)) in self.columns.iter().enumerate() {
            let x = left + CELL.0 * index as i32 + CELL.0 / 2;
            let (what, side) = column_label(*role, *operand);
            text(root, what, (x, top - 28), (12, Side::Center), INK)?;
            text(root, side, (x, top - 12), (12, Side::Center), INK)?;
        }
        for (index, unit) in self.rows.iter().enumerate() {
            let y = top + CELL.1 * index as i32 + CELL.1 / 2;
            text(root, unit, (left - 8, y), (12, Side::Right), INK)?;
        }
        for cell in self.cells {
            let x = left + CELL.0 * cell.column as i32;
            let y = top + CELL.1 * cell.row as i32;
            draw_cell(root, (x, y), cell.sqnr_db)?;
        }
        self.draw_legend(root, (left, top + CELL.1 * self.rows.len() as i32 + 18))
    }

    /// The colour scale with its numbers, and the colour of what stays float.
    fn draw_legend(&self, root: &Area<'_>, (left, top): (i32, i32)) -> Drawn {
        let (width, height) = (LEGEND.0 - 110, 14);
        for step in 0..width {
            let share = f64::from(step) / f64::from(width - 1);
            let x = left + step;
            let bar = [(x, top), (x + 1, top + height)];
            root.draw(&Rectangle::new(bar, color(share).filled()))?;
        }
        let (low, high) = RANGE_DB;
        for tick in 0..=4 {
            let share = f64::from(tick) / 4.0;
            let x = left + (share * f64::from(width)).round() as i32;
            let value = format!("{:.0}", low + share * (high - low));
            text(root, &value, (x, top + height + 10), (12, Side::Center), INK)?;
        }
        text(root, "SQNR dB", (left - 8, top + 7), (12, Side::Right), INK)?;
        let box_left = left + width + 30;
        let float = [(box_left, top), (box_left + 22, top + height)];
        root.draw(&Rectangle::new(float, FLOAT.filled()))?;
        text(root, "float", (box_left + 30, top + 7), (12, Side::Left), INK)
    }
}

/// Two lines over a column: the product and its side.
fn column_label(role: Role, operand: Operand) -> (&'static str, &'static str) {
    let side = match (role, operand) {
        (Role::QueryKey, Operand::Lhs) => "q",
        (Role::QueryKey, Operand::Rhs) => "k",
        (Role::ScoreValue, Operand::Lhs) => "scores",
        (Role::ScoreValue, Operand::Rhs) => "v",
        (_, Operand::Lhs) => "input",
        (_, Operand::Rhs) => "weight",
    };
    (role.name(), side)
}

fn draw_cell(root: &Area<'_>, (x, y): (i32, i32), sqnr_db: Option<f64>) -> Drawn {
    let inside = [(x + 1, y + 1), (x + CELL.0 - 1, y + CELL.1 - 1)];
    let Some(db) = sqnr_db else {
        return root.draw(&Rectangle::new(inside, FLOAT.filled()));
    };
    let share = ((db - RANGE_DB.0) / (RANGE_DB.1 - RANGE_DB.0)).clamp(0.0, 1.0);
    root.draw(&Rectangle::new(inside, color(share).filled()))?;
    let ink = if share < 0.55 { WHITE } else { INK };
    let middle = (x + CELL.0 / 2, y + CELL.1 / 2);
    text(root, &format!("{db:.1}"), middle, (12, Side::Center), ink)
}

/// The colour at a share of the scale, 0 to 1.
fn color(share: f64) -> RGBColor {
    let position = share * (SCALE.len() - 1) as f64;
    let index = (position as usize).min(SCALE.len() - 2);
    let part = position - index as f64;
    let (from, to) = (SCALE[index], SCALE[index + 1]);
    let mix = |a: f64, b: f64| (a + part * (b - a)).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::generated::{GeneratedOptions, generate};

    #[test]
    fn every_operand_has_a_cell_and_float_ones_have_no_number() {
        let args = json!({"img_size": 56, "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]});
        let options = GeneratedOptions {
            num_classes: 3,
            model_args: args.as_object().unwrap().clone(),
            seed: 0,
        };
        let checkpoint = generate("swin_tiny", options).unwrap();
        let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
        let report = [("layers.0.blocks.0.attn.qkv", "input", 21.25), ("head", "weight", -3.0)]
            .map(|(path, operand, sqnr_db)| SiteReport {
                path: path.to_owned(),
                role: Role::Qkv,
                operand: operand.to_owned(),
                kind: "uniform".to_owned(),
                bits: 4,
                sqnr_db,
            });
        let svg = sqnr(&model, &report, "a title").unwrap();
        for words in ["a title", "layers.0.downsample", "scores", "21.2", "-3.0", "SQNR dB"] {
            assert!(svg.contains(words), "{words}: {svg}");
        }
        let grey = svg.matches("#E8E8E8").count();
        // All but the two reported ones, and the legend's.
        assert_eq!(grey, 2 * model.sites.len() - 2 + 1);
    }

    #[test]
    fn the_scale_runs_from_dark_to_light() {
        assert_eq!(color(0.0), RGBColor(68, 1, 84));
        assert_eq!(color(1.0), RGBColor(253, 231, 37));
        let brightness = |share| {
            let RGBColor(r, g, b) = color(share);
            0.3 * f64::from(r) + 0.6 * f64::from(g) + 0.1 * f64::from(b)
        };
        assert!(
            (0..10).all(|i| brightness(f64::from(i) / 10.0) < brightness(f64::from(i + 1) / 10.0))
        );
    }
}
