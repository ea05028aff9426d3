//! Progress on stderr: a bar on a terminal, plain lines otherwise.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

/// One stage's progress, whoever reports it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Step {
    /// What is being done.
    pub(super) stage: String,
    /// Units done.
    pub(super) unit: u64,
    /// Units of the stage; 0 if it has none.
    pub(super) units: u64,
    /// What else is known: remaining time, errors, accuracy so far.
    pub(super) note: String,
}

/// Shows steps until it is dropped.
#[derive(Debug)]
pub(super) enum Display {
    /// On a terminal.
    Bar(ProgressBar),
    /// In a file or pipe: a line per stage and per tenth of it.
    Lines(Mutex<Option<(String, u64)>>),
}

impl Display {
    /// What suits stderr.
    pub(super) fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines(Mutex::default());
        }
        let template = "{prefix:>10} {bar:32} {pos}/{len} {wide_msg}";
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━╸─");
        Self::Bar(ProgressBar::no_length().with_style(style))
    }

    /// Shows a step.
    pub(super) fn step(&self, step: &Step) {
        match self {
            Self::Bar(bar) => {
                bar.set_prefix(step.stage.clone());
                bar.set_length(step.units.max(1));
                bar.set_position(step.unit);
                bar.set_message(step.note.clone());
            }
            Self::Lines(last) => {
                // A poisoned lock only means that another line was lost.
                let mut last = last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let place = (step.stage.clone(), tenths(step));
                if last.as_ref() != Some(&place) {
                    eprintln!("{}", line(step));
                    *last = Some(place);
                }
            }
        }
    }

    /// Prints a line that stays, above a bar.
    pub(super) fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Self::Lines(_) => eprintln!("{text}"),
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn tenths(step: &Step) -> u64 {
    (10 * step.unit).checked_div(step.units).unwrap_or(0)
}

fn line(step: &Step) -> String {
    let mut text = step.stage.clone();
    if step.units > 0 {
        text.push_str(&format!(" {}/{}", step.unit, step.units));
    }
    if !step.note.is_empty() {
        text.push_str(&format!(" ({})", step.note));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_stage_units_and_note() {
        let step = Step { stage: "calibrate".into(), unit: 3, units: 8, note: "2 s left".into() };
        assert_eq!(line(&step), "calibrate 3/8 (2 s left)");
        assert_eq!(tenths(&step), 3);
        assert_eq!(line(&Step { stage: "store".into(), ..Step::default() }), "store");
    }
}
