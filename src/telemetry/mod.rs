//! What the process tells of itself: log lines on stderr, as text or JSON; traces; metrics.

mod context;
mod lines;
pub mod metrics;
#[cfg(feature = "otel")]
mod otel;

use std::io::{self, IsTerminal as _};

use clap::{Args, ValueEnum};
use tracing::Span;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::error::{Error, Result};

pub use context::TraceContext;

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

impl LogConfig {
    /// What is logged.
    ///
    /// # Errors
    /// `InvalidArgument` on `log`.
    pub fn filter(&self) -> Result<EnvFilter> {
        EnvFilter::try_new(&self.filter).map_err(|error| Error::invalid("log", error.to_string()))
    }
}

/// What was started, to be ended in order.
#[derive(Debug, Default)]
pub struct Telemetry {
    #[cfg(feature = "otel")]
    exporter: Option<otel::Exporter>,
}

impl Telemetry {
    /// Sends what is left to be sent. Blocking, while the runtime still works.
    pub fn end(self) {
        #[cfg(feature = "otel")]
        if let Some(exporter) = self.exporter {
            exporter.end();
        }
    }
}

/// Starts logging, and the export of traces if the environment asks for it; to be called once per
/// process, within a tokio runtime.
///
/// # Errors
/// `InvalidArgument` on `log` for an unusable filter, on `OTEL_EXPORTER_OTLP_ENDPOINT` for an unusable
/// address; `FailedPrecondition` when logging has started.
pub fn start(config: &LogConfig) -> Result<Telemetry> {
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => {
            let lines = lines.fmt_fields(JsonFields::new()).event_format(lines::JsonLines::new());
            lines::KeepIds.and_then(lines).boxed()
        }
    };
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(config.filter()?));
    let telemetry;
    #[cfg(feature = "otel")]
    let subscriber = {
        let (layer, exporter) = otel::layer()?.unzip();
        telemetry = Telemetry { exporter };
        subscriber.with(layer)
    };
    #[cfg(not(feature = "otel"))]
    {
        telemetry = Telemetry::default();
    }
    let started = subscriber.try_init();
    started.map_err(|error| Error::FailedPrecondition { reason: error.to_string() })?;
    Ok(telemetry)
}

/// Logs warnings: for commands that compute in this process but are no server.
pub fn log_warnings() {
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .with_filter(LevelFilter::WARN);
    // Whoever started logging before has chosen what is logged.
    let _started = tracing_subscriber::registry().with(lines).try_init();
}

/// Makes a span part of the trace that its caller is in, or the root of a new one. The ids become its
/// fields `trace_id` and `span_id`, and so those of its log lines; `name` is what tracing systems show.
pub fn adopt(span: &Span, name: &str, caller: Option<&TraceContext>) -> TraceContext {
    let own = caller.map_or_else(TraceContext::root, TraceContext::child);
    #[cfg(feature = "otel")]
    let own = otel::adopt(span, name, caller).unwrap_or(own);
    #[cfg(not(feature = "otel"))]
    let _ = name;
    span.record("trace_id", format!("{:032x}", own.trace_id));
    span.record("span_id", format!("{:016x}", own.span_id));
    own
}

/// Says that a span goes back to another one, which may be over and elsewhere.
pub fn link(span: &Span, cause: &TraceContext) {
    span.record("cause_trace_id", format!("{:032x}", cause.trace_id));
    #[cfg(feature = "otel")]
    otel::link(span, cause);
}

/// Says how the call of a span ended, by gRPC's name of its status.
pub fn ended(span: &Span, status: &'static str, is_fault: bool) {
    #[cfg(feature = "otel")]
    otel::ended(span, status, is_fault);
    #[cfg(not(feature = "otel"))]
    let _ = (span, status, is_fault);
}
