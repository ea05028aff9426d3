//! The accuracy plot: a panel per bit width, models along x, a mark per method, float as a line.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos as Side, Pos, VPos};

use crate::bench::drawing::{Area, Drawn, FONT, INK, canvas, text};
use crate::bench::lines::{Line, Lines, mean_and_spread};
use crate::bench::results::Row;
use crate::error::Result;

/// Colours that stay apart in print and for colour-blind readers (Okabe and Ito, and three more);
/// shapes tell apart what colours do not.
const COLORS: [RGBColor; 9] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(200, 140, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 110, 30),
    RGBColor(110, 60, 160),
    RGBColor(90, 90, 90),
];
const GRID: RGBColor = RGBColor(225, 225, 225);
/// Behind every other model, so that its marks are read together.
const BAND: RGBColor = RGBColor(246, 246, 246);

/// Sizes in pixels: a panel's plot, what is above and below it, and its sides.
const PLOT_HEIGHT: i32 = 240;
const ABOVE: i32 = 40;
const BELOW: i32 = 56;
const MARGIN_LEFT: i32 = 58;
const MARGIN_RIGHT: i32 = 20;
/// Least width of a model's column, and the width that each mark adds.
const MIN_COLUMN: i32 = 110;
const MARK_WIDTH: i32 = 16;
/// Panels stand side by side up to this width.
const MAX_WIDTH: i32 = 1500;
const LEGEND_LINE: i32 = 22;
const LEGEND_COLUMN: i32 = 250;
/// Below this many marks in a column there is room for their values.
const LABELLED_MARKS: usize = 4;
/// Percentage points that a panel shows below the worst of the models' best results: a method that
/// fails altogether must not press all others together.
const SHOWN_BELOW_BEST: f64 = 15.0;

/// The plot of all rows as SVG text.
///
/// # Errors
/// `Internal` when the backend refuses.
pub fn accuracy(rows: &[Row]) -> Result<String> {
    let lines = Lines::of(rows);
    let plot = Plot::new(&lines);
    canvas(plot.size(), |root| plot.draw(root))
}

/// What is drawn where.
struct Plot<'a> {
    float: Vec<&'a Line<'a>>,
    panels: Vec<(String, Vec<&'a Line<'a>>)>,
    series: Vec<String>,
    checkpoints: &'a [&'a str],
}

impl<'a> Plot<'a> {
    fn new(lines: &'a Lines<'a>) -> Self {
        let (float, quantized): (Vec<_>, Vec<_>) =
            lines.lines.iter().partition(|line| line.key.is_float());
        let mut panels: Vec<(String, Vec<&Line<'_>>)> = Vec::new();
        let mut series: Vec<String> = Vec::new();
        for line in quantized {
            let (bits, label) = (line.key.bits(), line.label());
            match panels.iter_mut().find(|(name, _)| *name == bits) {
                Some((_, lines)) => lines.push(line),
                None => panels.push((bits, vec![line])),
            }
            if !series.contains(&label) {
                series.push(label);
            }
        }
        if panels.is_empty() {
            panels.push(("float".to_owned(), Vec::new()));
        }
        Self { float, panels, series, checkpoints: &lines.checkpoints }
    }

    fn panel_width(&self) -> i32 {
        let column = MIN_COLUMN.max(MARK_WIDTH * (self.series.len() as i32 + 1));
        let columns = self.checkpoints.len().max(1) as i32;
        (MARGIN_LEFT + MARGIN_RIGHT + columns * column).max(LEGEND_COLUMN)
    }

    /// Panels beside each other.
    fn panels_a_row(&self) -> usize {
        let fitting = (MAX_WIDTH / self.panel_width()).max(1) as usize;
        fitting.min(self.panels.len())
    }

    fn width(&self) -> i32 {
        self.panel_width() * self.panels_a_row() as i32
    }

    fn legend_top(&self) -> i32 {
        self.panels.len().div_ceil(self.panels_a_row()) as i32 * (ABOVE + PLOT_HEIGHT + BELOW)
    }

    fn legend_columns(&self) -> usize {
        ((self.width() - MARGIN_LEFT) / LEGEND_COLUMN).max(1) as usize
    }

    fn size(&self) -> (u32, u32) {
        let lines = (self.series.len() + 1).div_ceil(self.legend_columns()) as i32;
        (self.width() as u32, (self.legend_top() + LEGEND_LINE * lines + 12) as u32)
    }

    fn draw(&self, root: &Area<'_>) -> Drawn {
        for (index, (bits, lines)) in self.panels.iter().enumerate() {
            let (row, column) = (index / self.panels_a_row(), index % self.panels_a_row());
            let panel = Panel {
                left: self.panel_width() * column as i32,
                top: (ABOVE + PLOT_HEIGHT + BELOW) * row as i32,
                width: self.panel_width(),
                columns: self.checkpoints.len().max(1),
                range: value_range(&self.float, lines),
                series: &self.series,
            };
            panel.frame(root, bits, self.checkpoints)?;
            for line in &self.float {
                panel.float(root, line)?;
            }
            for line in lines {
                panel.marks(root, line)?;
            }
        }
        self.draw_legend(root)
    }

    /// Float's dash, then a mark and a name for each series.
    fn draw_legend(&self, root: &Area<'_>) -> Drawn {
        let place = |index: usize| {
            let (row, column) = (index / self.legend_columns(), index % self.legend_columns());
            let y = self.legend_top() + LEGEND_LINE * row as i32 + LEGEND_LINE / 2;
            (MARGIN_LEFT + LEGEND_COLUMN * column as i32, y)
        };
        let (x, y) = place(0);
        dashes(root, (x, x + 22), y)?;
        text(root, "float", (x + 32, y), (13, Side::Left), INK)?;
        for (index, name) in self.series.iter().enumerate() {
            let (x, y) = place(index + 1);
            mark(root, (x + 11, y), index)?;
            text(root, name, (x + 32, y), (13, Side::Left), INK)?;
        }
        Ok(())
    }
}

/// One panel: where it lies and what its axes mean.
struct Panel<'a> {
    left: i32,
    top: i32,
    width: i32,
    columns: usize,
    range: (f64, f64), // percent at the bottom and top
    series: &'a [String],
}

impl Panel<'_> {
    /// x of a place in a column, 0 at its left and 1 at its right edge.
    fn x(&self, column: usize, place: f64) -> i32 {
        let width = f64::from(self.width - MARGIN_LEFT - MARGIN_RIGHT) / self.columns as f64;
        self.left + MARGIN_LEFT + ((column as f64 + place) * width).round() as i32
    }

    /// y of a value; one below the axis lies on it.
    fn y(&self, percent: f64) -> i32 {
        let (low, high) = self.range;
        let share = ((percent - low) / (high - low)).clamp(0.0, 1.0);
        self.top + ABOVE + ((1.0 - share) * f64::from(PLOT_HEIGHT)).round() as i32
    }

    /// Title, grid, axis labels, names of the models.
    fn frame(&self, root: &Area<'_>, bits: &str, checkpoints: &[&str]) -> Drawn {
        let (left, right) = (self.left + MARGIN_LEFT, self.left + self.width - MARGIN_RIGHT);
        let (top, bottom) = (self.top + ABOVE, self.top + ABOVE + PLOT_HEIGHT);
        for column in (1..self.columns).step_by(2) {
            let band = [(self.x(column, 0.0), top), (self.x(column, 1.0), bottom)];
            root.draw(&Rectangle::new(band, BAND.filled()))?;
        }
        let title = format!("{bits}: top-1 accuracy (%)");
        text(root, &title, (left, self.top + ABOVE / 3), (15, Side::Left), INK)?;
        let (low, high) = self.range;
        let step = tick_step(high - low);
        let mut tick = (low / step).ceil() * step;
        while tick <= high + 1e-9 {
            let y = self.y(tick);
            root.draw(&PathElement::new([(left, y), (right, y)], GRID))?;
            text(root, &format!("{tick:.0}"), (left - 8, y), (12, Side::Right), INK)?;
            tick += step;
        }
        for (column, name) in checkpoints.iter().enumerate() {
            text(root, name, (self.x(column, 0.5), bottom + 18), (13, Side::Center), INK)?;
        }
        Ok(())
    }

    /// The float accuracy as a dashed line across each model's column, its value below the name.
    fn float(&self, root: &Area<'_>, line: &Line<'_>) -> Drawn {
        for (column, rows) in line.cells.iter().enumerate() {
            let Some(mean) = mean_and_spread(&top1(rows)).map(|(mean, _)| mean) else { continue };
            let y = self.y(mean);
            let (from, to) = (self.x(column, 0.04), self.x(column, 0.96));
            dashes(root, (from, to), y)?;
            let below = (self.x(column, 0.5), self.top + ABOVE + PLOT_HEIGHT + 34);
            text(root, &format!("float {mean:.2}"), below, (11, Side::Center), INK)?;
        }
        Ok(())
    }

    /// A mark at the mean over seeds, a bar from the lowest to the highest, its value beside it.
    fn marks(&self, root: &Area<'_>, line: &Line<'_>) -> Drawn {
        let label = line.label();
        let index = self.series.iter().position(|name| *name == label).unwrap_or(0);
        let color = COLORS[index % COLORS.len()];
        let place = (index as f64 + 0.75) / (self.series.len() as f64 + 0.5);
        for (column, rows) in line.cells.iter().enumerate() {
            let values = top1(rows);
            let Some((mean, _)) = mean_and_spread(&values) else { continue };
            let (x, y) = (self.x(column, place), self.y(mean));
            if mean < self.range.0 {
                below_axis(root, (x, y), mean, color)?;
                continue;
            }
            let low = values.iter().copied().fold(f64::MAX, f64::min);
            let high = values.iter().copied().fold(f64::MIN, f64::max);
            let bar = [(x, self.y(low)), (x, self.y(high))];
            root.draw(&PathElement::new(bar, color.stroke_width(2)))?;
            mark(root, (x, y), index)?;
            if self.series.len() <= LABELLED_MARKS {
                let below = (x, self.y(low) + 15);
                text(root, &format!("{mean:.2}"), below, (11, Side::Center), color)?;
            }
        }
        Ok(())
    }
}

/// A series' mark: its colour and its shape.
fn mark(root: &Area<'_>, (x, y): (i32, i32), index: usize) -> Drawn {
    let style = COLORS[index % COLORS.len()].filled();
    let polygon = |corners: &[(i32, i32)]| {
        Polygon::new(corners.iter().map(|(dx, dy)| (x + dx, y + dy)).collect::<Vec<_>>(), style)
    };
    match index % 5 {
        0 => root.draw(&Circle::new((x, y), 5, style)),
        1 => root.draw(&Rectangle::new([(x - 4, y - 4), (x + 5, y + 5)], style)),
        2 => root.draw(&polygon(&[(0, -6), (6, 5), (-6, 5)])),
        3 => root.draw(&polygon(&[(0, -6), (6, 0), (0, 6), (-6, 0)])),
        _ => root.draw(&polygon(&[(0, 6), (6, -5), (-6, -5)])),
    }
}

/// An arrow at the bottom of the panel and the value that lies below it, written upwards.
fn below_axis(root: &Area<'_>, (x, y): (i32, i32), value: f64, color: RGBColor) -> Drawn {
    root.draw(&PathElement::new([(x, y - 12), (x, y - 2)], color.stroke_width(2)))?;
    root.draw(&Polygon::new(vec![(x, y), (x - 4, y - 6), (x + 4, y - 6)], color.filled()))?;
    let font = (FONT, 11).into_font().transform(FontTransform::Rotate270);
    let style = font.color(&color).pos(Pos::new(Side::Left, VPos::Center));
    root.draw(&Text::new(format!("{value:.1}"), (x, y - 16), style))
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

/// Whole percents around the values of a panel, with room for labels, at most 0..100. Values far
/// below every model's best one are left out.
fn value_range(float: &[&Line<'_>], lines: &[&Line<'_>]) -> (f64, f64) {
    let means = |line: &&Line<'_>| -> Vec<Option<f64>> {
        line.cells.iter().map(|rows| mean_and_spread(&top1(rows)).map(|(mean, _)| mean)).collect()
    };
    let (float, lines): (Vec<_>, Vec<_>) =
        (float.iter().map(means).collect(), lines.iter().map(means).collect());
    let columns = float.iter().chain(&lines).map(Vec::len).max().unwrap_or(0);
    let best = (0..columns).filter_map(|column| {
        let values = lines.iter().filter_map(|line| line[column]);
        values.reduce(f64::max)
    });
    let floor = best.fold(100.0, f64::min) - SHOWN_BELOW_BEST;
    let values = float.iter().chain(&lines).flatten().flatten().filter(|value| **value >= floor);
    let (low, high) = values.fold((100.0f64, 0.0f64), |(l, h), v| (l.min(*v), h.max(*v)));
    let (low, high) = (low.min(high), high.max(low));
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
    fn a_failing_method_does_not_press_the_others_together() {
        let rows = [
            row("vit", "float", FLOAT_BITS, 0, 96.0),
            row("vit", "ubb", 3, 0, 95.0),
            row("vit", "repq", 3, 0, 92.0),
            row("vit", "minmax", 3, 0, 16.7),
        ];
        let lines = Lines::of(&rows);
        let (float, others): (Vec<_>, Vec<_>) =
            lines.lines.iter().partition(|line| line.key.is_float());
        let (low, high) = value_range(&float, &others);
        assert!((80.0..=92.0).contains(&low) && high >= 96.0, "{low} {high}");
        // Its value is still told.
        assert!(accuracy(&rows).unwrap().contains("16.7"));
    }

    #[test]
    fn a_plot_without_rows_or_with_float_alone_is_still_a_plot() {
        for rows in [vec![], vec![row("a", "float", FLOAT_BITS, 0, 100.0)]] {
            assert!(accuracy(&rows).unwrap().ends_with("</svg>\n"));
        }
    }
}
