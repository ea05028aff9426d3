//! The accuracy plot: a panel per bit width, models along x, a mark per method, float as a line.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::bench::lines::{Line, Lines, mean_and_spread};
use crate::bench::results::Row;
use crate::error::{Error, Result};

/// Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 110, 30),
];
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(225, 225, 225);
const FONT: &str = "sans-serif";

/// Width of a model's column and heights of the parts, in pixels.
const COLUMN: i32 = 150;
const PANEL_HEIGHT: i32 = 260;
const TITLE_HEIGHT: i32 = 48;
const LEGEND_LINE: i32 = 22;
const MARGIN_LEFT: i32 = 58;
const MARGIN_RIGHT: i32 = 20;
/// Below this many marks in a column there is room for their values.
const LABELLED_MARKS: usize = 4;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The plot of all rows as SVG text.
///
/// # Errors
/// `Internal` when the backend refuses.
pub fn accuracy(rows: &[Row]) -> Result<String> {
    let lines = Lines::of(rows);
    let mut svg = String::new();
    draw(&lines, &mut svg).map_err(|error| Error::internal(format!("plot: {error}")))?;
    Ok(svg)
}

type Drawn<T = ()> = std::result::Result<T, DrawingAreaErrorKind<std::io::Error>>;

fn draw(lines: &Lines<'_>, svg: &mut String) -> Drawn {
    let (float, quantized): (Vec<_>, Vec<_>) =
        lines.lines.iter().partition(|line| line.key.is_float());
    let mut bits: Vec<String> = quantized.iter().map(|line| line.key.bits()).collect();
    bits.dedup();
    if bits.is_empty() {
        bits.push("float".to_owned());
    }
    let mut series: Vec<String> = Vec::new();
    for line in &quantized {
        if !series.contains(&line.label()) {
            series.push(line.label());
        }
    }
    let columns = lines.checkpoints.len().max(1) as i32;
    let panel_width = MARGIN_LEFT + MARGIN_RIGHT + columns.max(2) * COLUMN;
    let width = panel_width * bits.len() as i32;
    let legend = LEGEND_LINE * (series.len() as i32 + 1);
    let height = TITLE_HEIGHT + PANEL_HEIGHT + 40 + legend;
    let root = SVGBackend::with_string(svg, (width as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let range = value_range(&lines.lines);
    for (index, bits) in bits.iter().enumerate() {
        let left = panel_width * index as i32;
        let panel = Panel { left, width: panel_width, columns, range, series: &series };
        let shown: Vec<_> = quantized.iter().filter(|line| line.key.bits() == *bits).collect();
        panel.frame(&root, bits, &lines.checkpoints)?;
        for line in &float {
            panel.float(&root, line)?;
        }
        for line in shown {
            panel.marks(&root, line)?;
        }
    }
    draw_legend(&root, &series, TITLE_HEIGHT + PANEL_HEIGHT + 40)?;
    root.present()
}

/// One panel: where it lies and what its axes mean.
struct Panel<'a> {
    left: i32,
    width: i32,
    columns: i32,
    range: (f64, f64), // percent at the bottom and top
    series: &'a [String],
}

impl Panel<'_> {
    fn column_width(&self) -> f64 {
        f64::from(self.width - MARGIN_LEFT - MARGIN_RIGHT) / f64::from(self.columns)
    }

    /// x of a place in a column, 0 at its left and 1 at its right edge.
    fn x(&self, column: usize, place: f64) -> i32 {
        let offset = (column as f64 + place) * self.column_width();
        self.left + MARGIN_LEFT + offset.round() as i32
    }

    fn y(&self, percent: f64) -> i32 {
        let (low, high) = self.range;
        let share = (percent - low) / (high - low);
        TITLE_HEIGHT + ((1.0 - share) * f64::from(PANEL_HEIGHT)).round() as i32
    }

    /// Title, grid, axis labels, names of the models.
    fn frame(&self, root: &Area<'_>, bits: &str, checkpoints: &[&str]) -> Drawn {
        let (left, right) = (self.left + MARGIN_LEFT, self.left + self.width - MARGIN_RIGHT);
        let title = format!("{bits}: top-1 accuracy (%)");
        text(root, &title, (left, TITLE_HEIGHT / 3), (15, HPos::Left), INK)?;
        let (low, high) = self.range;
        let step = tick_step(high - low);
        let mut tick = low;
        while tick <= high + 1e-9 {
            let y = self.y(tick);
            root.draw(&PathElement::new([(left, y), (right, y)], GRID))?;
            text(root, &format!("{tick:.0}"), (left - 8, y), (12, HPos::Right), INK)?;
            tick += step;
        }
        for (column, name) in checkpoints.iter().enumerate() {
            let below = TITLE_HEIGHT + PANEL_HEIGHT + 18;
            text(root, name, (self.x(column, 0.5), below), (13, HPos::Center), INK)?;
        }
        Ok(())
    }

    /// The float accuracy as a dashed line across each model's column.
    fn float(&self, root: &Area<'_>, line: &Line<'_>) -> Drawn {
        for (column, rows) in line.cells.iter().enumerate() {
            let Some(mean) = mean_and_spread(&top1(rows)).map(|(mean, _)| mean) else { continue };
            let y = self.y(mean);
            let (from, to) = (self.x(column, 0.04), self.x(column, 0.96));
            dashes(root, (from, to), y)?;
            let place = (to, y - 9);
            text(root, &format!("float {mean:.2}"), place, (11, HPos::Right), INK)?;
        }
        Ok(())
    }

    /// A mark at the mean over seeds, a bar from the lowest to the highest, its value beside it.
    fn marks(&self, root: &Area<'_>, line: &Line<'_>) -> Drawn {
        let label = line.label();
        let index = self.series.iter().position(|name| *name == label).unwrap_or(0);
        let color = COLORS[index % COLORS.len()];
        let place = (index as f64 + 0.75) / (self.series.len() as f64 + 0.75);
        for (column, rows) in line.cells.iter().enumerate() {
            let values = top1(rows);
            let Some((mean, _)) = mean_and_spread(&values) else { continue };
            let (x, y) = (self.x(column, place), self.y(mean));
            let low = values.iter().copied().fold(f64::MAX, f64::min);
            let high = values.iter().copied().fold(f64::MIN, f64::max);
            let bar = [(x, self.y(low)), (x, self.y(high))];
            root.draw(&PathElement::new(bar, color.stroke_width(2)))?;
            root.draw(&Circle::new((x, y), 5, color.filled()))?;
            if self.series.len() <= LABELLED_MARKS {
                let below = (x, self.y(low) + 15);
                text(root, &format!("{mean:.2}"), below, (11, HPos::Center), color)?;
            }
        }
        Ok(())
    }
}

/// Float's dash, then a dot and a name for each series.
fn draw_legend(root: &Area<'_>, series: &[String], top: i32) -> Drawn {
    let y = |line: usize| top + LEGEND_LINE * line as i32 + LEGEND_LINE / 2;
    dashes(root, (MARGIN_LEFT, MARGIN_LEFT + 22), y(0))?;
    text(root, "float", (MARGIN_LEFT + 32, y(0)), (13, HPos::Left), INK)?;
    for (index, name) in series.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        root.draw(&Circle::new((MARGIN_LEFT + 11, y(index + 1)), 5, color.filled()))?;
        text(root, name, (MARGIN_LEFT + 32, y(index + 1)), (13, HPos::Left), INK)?;
    }
    Ok(())
}

fn text(
    root: &Area<'_>,
    words: &str,
    at: (i32, i32),
    (size, side): (i32, HPos),
    color: RGBColor,
) -> Drawn {
    let style = (FONT, size).into_font().color(&color).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(words.to_owned(), at, style))
}

fn dashes(root: &Area<'_>, (from, to): (i32, i32), y: i32) -> Drawn {
    let mut x = from;
    while x < to {
        let end = (x + 6).min(to);
        root.draw(&PathElement::new([(x, y), (end, y)], INK.stroke_width(1)))?;
        x += 10;
    }
    Ok(())
}

fn top1(rows: &[&Row]) -> Vec<f64> {
    rows.iter().map(|row| row.top1).collect()
}

/// Whole percents around all values, with room for labels, at most 0..100.
fn value_range(lines: &[Line<'_>]) -> (f64, f64) {
    let values = lines.iter().flat_map(|line| line.cells.iter().flatten()).map(|row| row.top1);
    let (low, high) = values.fold((100.0f64, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    let room = ((high - low) * 0.12).max(1.0);
    let step = tick_step(high - low + 2.0 * room);
    let low = ((low - room) / step).floor() * step;
    let high = ((high + room) / step).ceil() * step;
    (low.max(0.0), high.min(100.0).max(low + step))
}

/// A round distance between grid lines: about six of them.
fn tick_step(span: f64) -> f64 {
    [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| span / step <= 7.0).unwrap_or(20.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::row;
    use crate::quant::bits::FLOAT_BITS;

    #[test]
    fn the_plot_names_panels_models_methods_and_values() {
        let rows = [
            row("digits-vit", "float", FLOAT_BITS, 0, 96.0),
            row("digits-swin", "float", FLOAT_BITS, 0, 98.0),
            row("digits-vit", "ubb", 4, 0, 95.33),
            row("digits-vit", "ubb", 4, 1, 94.67),
            row("digits-swin", "ubb", 4, 0, 97.11),
            row("digits-vit", "minmax", 4, 0, 81.5),
            row("digits-vit", "ubb", 6, 0, 96.0),
        ];
        let svg = accuracy(&rows).unwrap();
        for words in ["w4a4", "w6a6", "digits-vit", "digits-swin", "ubb", "95.00", "float 98.00"] {
            assert!(svg.contains(words), "{words}: {svg}");
        }
    }

    #[test]
    fn a_plot_without_rows_or_with_float_alone_is_still_a_plot() {
        for rows in [vec![], vec![row("a", "float", FLOAT_BITS, 0, 100.0)]] {
            assert!(accuracy(&rows).unwrap().ends_with("</svg>\n"));
        }
    }
}
