//! Which trace a call belongs to: W3C Trace Context and `x-request-id` in, a span around the call, the
//! request's id out.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::codegen::http::{HeaderMap, HeaderValue, Request, Response};
use tower::{Layer, Service};
use tracing::field::Empty;
use tracing::{Instrument as _, Span};

use crate::telemetry::{self, TraceContext};

/// The client's id of a call, or ours.
const REQUEST_ID: &str = "x-request-id";
/// Longest id that is taken over.
const MAX_ID: usize = 128;

/// The trace of a call.
pub(super) fn of<T>(request: &tonic::Request<T>) -> Option<TraceContext> {
    request.extensions().get().cloned()
}

/// The layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traces;

impl<S> Layer<S> for Traces {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Traced { inner }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Traced<S> {
    inner: S,
}

impl<S, In, Out> Service<Request<In>> for Traced<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<In>) -> Self::Future {
        let id = request_id(request.headers());
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let span = span(&method, &id);
        let trace = telemetry::adopt(&span, &method, caller(request.headers()).as_ref());
        request.extensions_mut().insert(trace);
        let answer = span.in_scope(|| self.inner.call(request));
        let answer = async move {
            let mut response = answer.await?;
            if let Ok(id) = HeaderValue::try_from(id) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            Ok(response)
        };
        Box::pin(answer.instrument(span))
    }
}

/// Of the level of errors, so that every line of the call has it, whatever is logged.
fn span(method: &str, request_id: &str) -> Span {
    tracing::error_span!(
        "request",
        otel.name = Empty,
        otel.kind = "server",
        rpc.system.name = "grpc",
        rpc.method = method,
        trace_id = Empty,
        span_id = Empty,
        request_id,
    )
}

fn caller(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    TraceContext::parse(text("traceparent")?, text("tracestate"))
}

/// The client's id if it can stand in a log line as it is; otherwise a new one.
fn request_id(headers: &HeaderMap) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/+=@".contains(&b);
    headers
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(|id| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(is_plain))
        .map_or_else(|| ulid::Ulid::generate().to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_break_a_line_are_replaced() {
        let id = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, text.parse().unwrap());
            request_id(&headers)
        };
        assert_eq!(id("order-7:a/b"), "order-7:a/b");
        for bad in ["", "a b", "a\"b", "a\\b", &"x".repeat(MAX_ID + 1)] {
            assert_eq!(id(bad).len(), 26, "{bad}");
        }
    }
}
