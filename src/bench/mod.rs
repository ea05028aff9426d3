//! Method × model × bits runs in this process, resumable, and their reports.
//!
//! - [`results`]: rows, their keys, the result file
//! - [`validation`]: the labelled images a run scores
//! - [`matrix`]: what to run, and the runner
//! - [`report`]: CSV and Markdown tables; [`chart`]: the SVG plot

pub mod chart;
pub mod matrix;
pub mod report;
pub mod results;
pub mod validation;

pub use matrix::{Matrix, Observer, Summary, run};
pub use results::{Results, Row, RowKey};
