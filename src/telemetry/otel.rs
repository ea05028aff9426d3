//! Traces over OTLP/gRPC, as the standard variables `OTEL_*` ask for it.

use std::env;
use std::time::Duration;

use opentelemetry::trace::{
    SpanContext, SpanId, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::level_filters::LevelFilter;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt as _};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use super::TraceContext;
use crate::error::{Error, Result};

/// Where traces go; without either nothing is exported.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
/// What the service is called unless the environment says otherwise.
const SERVICE: &str = "vitq";
/// How long the collector may take for what is left at the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends spans to a collector, in batches, on a thread of its own.
#[derive(Debug)]
pub(super) struct Exporter(SdkTracerProvider);

impl Exporter {
    /// Sends what is left. Blocking.
    pub(super) fn end(self) {
        if let Err(error) = self.0.shutdown_with_timeout(PATIENCE) {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

/// What exports this crate's spans, if that is asked for.
///
/// # Errors
/// `InvalidArgument` on the endpoint.
pub(super) fn layer<S>() -> Result<Option<(impl Layer<S>, Exporter)>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    if !is_wanted() {
        return Ok(None);
    }
    let exporter = SpanExporter::builder()
        .with_tonic()
        .build()
        .map_err(|error| Error::invalid(ENDPOINTS[1], error.to_string()))?;
    let provider = SdkTracerProvider::builder()
        .with_resource(resource())
        .with_batch_exporter(exporter)
        .build();
    let tracer: SdkTracer = provider.tracer(SERVICE);
    let spans = OpenTelemetryLayer::new(tracer).with_location(false).with_threads(false);
    // The exporter's own calls must not make spans: they would be exported, too.
    let ours = Targets::new().with_target("vitq", LevelFilter::INFO);
    Ok(Some((spans.with_filter(ours), Exporter(provider))))
}

fn is_wanted() -> bool {
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|v| v.eq_ignore_ascii_case(value));
    let has_endpoint = ENDPOINTS.iter().any(|name| env::var(name).is_ok_and(|v| !v.is_empty()));
    has_endpoint && !is("OTEL_SDK_DISABLED", "true") && !is("OTEL_TRACES_EXPORTER", "none")
}

fn resource() -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    // The builder has read the environment; a name from the code would win over it.
    let named = env::var("OTEL_SERVICE_NAME").is_ok_and(|name| !name.is_empty())
        || env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|all| all.contains("service.name="));
    if named { resource.build() } else { resource.with_service_name(SERVICE).build() }
}

/// The trace and span that the exporter knows this span by; `None` when it does not.
pub(super) fn adopt(
    span: &Span,
    name: &str,
    caller: Option<&TraceContext>,
) -> Option<TraceContext> {
    span.record("otel.name", name);
    if let Some(caller) = caller {
        let parent = Context::new().with_remote_span_context(remote(caller));
        span.set_parent(parent).ok()?;
    }
    let context = span.context();
    let own = context.span().span_context().clone();
    own.is_valid().then(|| TraceContext {
        trace_id: u128::from_be_bytes(own.trace_id().to_bytes()),
        span_id: u64::from_be_bytes(own.span_id().to_bytes()),
        flags: own.trace_flags().to_u8(),
        state: own.trace_state().header(),
    })
}

pub(super) fn link(span: &Span, cause: &TraceContext) {
    span.add_link(remote(cause));
}

/// Attributes and status by OpenTelemetry's conventions for gRPC servers.
pub(super) fn ended(span: &Span, status: &'static str, is_fault: bool) {
    span.set_attribute("rpc.status_code", status);
    if status != "OK" {
        span.set_attribute("error.type", status);
    }
    if is_fault {
        span.set_status(Status::error(status));
    }
}

fn remote(context: &TraceContext) -> SpanContext {
    SpanContext::new(
        TraceId::from(context.trace_id),
        SpanId::from(context.span_id),
        TraceFlags::new(context.flags),
        true,
        context.state.parse().unwrap_or(TraceState::NONE),
    )
}
