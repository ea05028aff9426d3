//! Method × model × bits runs in this process, resumable, and their reports.
//!
//! - [`results`]: rows, their keys, the result file
//! - [`validation`]: the labelled images a run scores
//! - [`matrix`]: what to run; [`runner`]: running it
//! - [`bit_cost`]: effective bits and bit operations; [`memory`]: the peak of a calibration
//! - [`load`]: load on a server, its latencies and its capacity
//! - [`report`]: CSV and Markdown tables; [`chart`]: the accuracy plot; [`heatmap`]: SQNR by site

pub mod bit_cost;
pub mod chart;
mod drawing;
pub mod heatmap;
mod lines;
pub mod load;
pub mod matrix;
pub mod memory;
pub mod report;
pub mod results;
pub mod runner;
mod subject;
pub mod validation;

pub use matrix::Matrix;
pub use results::{Results, Row, RowKey};
pub use runner::{Observer, Summary, run};
