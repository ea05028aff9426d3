//! Method × model × bits runs in this process, resumable, and their reports.
//!
//! - [`results`]: rows, their keys, the result file
//! - [`validation`]: the labelled images a run scores
//! - [`matrix`]: what to run; [`runner`]: running it
//! - [`report`]: CSV and Markdown tables; [`chart`]: the SVG plot

pub mod chart;
mod lines;
pub mod matrix;
pub mod report;
pub mod results;
pub mod runner;
pub mod validation;

pub use matrix::Matrix;
pub use results::{Results, Row, RowKey};
pub use runner::{Observer, Summary, run};
