//! What the plots share: a canvas of SVG text, words on it, its colours.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos as Side, Pos, VPos};

use crate::error::{Error, Result};

/// Colour of words and lines.
pub(super) const INK: RGBColor = RGBColor(51, 51, 51);
/// Font of all words.
pub(super) const FONT: &str = "sans-serif";

/// A canvas or a part of it.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What drawing returns.
pub(super) type Drawn<T = ()> = std::result::Result<T, DrawingAreaErrorKind<std::io::Error>>;

/// SVG text of that size in pixels with what `draw` draws.
///
/// # Errors
/// `Internal` when the backend refuses.
pub(super) fn canvas(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    let drawn = || -> Drawn {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root)?;
        root.present()
    };
    drawn().map_err(|error| Error::internal(format!("plot: {error}")))?;
    Ok(svg)
}

/// Words at a point, vertically centred.
pub(super) fn text(
    root: &Area<'_>,
    words: &str,
    at: (i32, i32),
    (size, side): (i32, Side),
    color: RGBColor,
) -> Drawn {
    let style = (FONT, size).into_font().color(&color).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(words.to_owned(), at, style))
}
