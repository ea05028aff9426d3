//! Logging: one line per event on stderr, as text or JSON.

use std::io::{self, IsTerminal as _};

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

/// How a process logs.
#[derive(Args, Clone, Debug)]
pub struct LogConfig {
    /// What is logged: levels by module, as `info` or `warn,vitq=debug`.
    #[arg(long = "log", env = "VITQ_LOG", default_value = "info", value_name = "FILTER")]
    pub filter: String,
    /// Form of the lines.
    #[arg(
        long = "log-format",
        env = "VITQ_LOG_FORMAT",
        default_value = "text",
        value_name = "FORM"
    )]
    pub format: LogFormat,
}

/// Form of the lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging; to be called once per process.
///
/// # Errors
/// `InvalidArgument` on `log` for an unusable filter; `FailedPrecondition` when logging has started.
pub fn start(config: &LogConfig) -> Result<()> {
    let filter = EnvFilter::try_new(&config.filter)
        .map_err(|error| Error::invalid("log", error.to_string()))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    let started = match config.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| Error::FailedPrecondition { reason: error.to_string() })
}
