//! Deadlines: what the client allows, or what a call of its kind may take at most.
//!
//! tonic ends late calls as CANCELLED. This layer ends them a little earlier, as DEADLINE_EXCEEDED,
//! and tells the services, so that nobody works for callers that have given up.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tonic::Status;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

use crate::error::Error;

/// The header of the client's deadline.
const HEADER: &str = "grpc-timeout";
/// How much earlier than tonic this layer answers, at most.
const MARGIN: Duration = Duration::from_millis(2);
/// Limit of a classification whose client sets none.
pub(super) const CLASSIFY: Duration = Duration::from_secs(10);
/// Limit of the other calls that answer once.
const OTHERS: Duration = Duration::from_secs(30);
/// Calls that stream, wait or load: as long as the client likes.
const UNLIMITED: [&str; 11] = [
    "/Quantize",
    "/Evaluate",
    "/Watch",
    "/Upload",
    "/WaitOperation",
    "/LoadModel",
    "/RepositoryModelLoad",
    "/SetAlias",
    "/ClassifyStream",
    "/ModelStreamInfer",
    "/ServerReflectionInfo",
];

/// When a call is over, in its extensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(pub(super) Instant);

/// When a call is over, if ever.
pub(super) fn of<T>(request: &tonic::Request<T>) -> Option<Instant> {
    request.extensions().get::<Deadline>().map(|deadline| deadline.0)
}

/// The layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines;

impl<S> Layer<S> for Deadlines {
    type Service = Timed<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Timed { inner }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Timed<S> {
    inner: S,
}

impl<S, In, Out> Service<Request<In>> for Timed<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    Out: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<In>) -> Self::Future {
        let limit = allowed(request.headers()).or_else(|| limit_of(request.uri().path()));
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let Some(deadline) = deadline else { return Box::pin(self.inner.call(request)) };
        request.extensions_mut().insert(Deadline(deadline));
        let answer = tokio::time::timeout_at(deadline.into(), self.inner.call(request));
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| Ok(Status::from(Error::Deadline).into_http()))
        })
    }
}

/// The client's time, less the margin. What is not a timeout is ignored, as tonic does.
fn allowed(headers: &HeaderMap) -> Option<Duration> {
    let limit = parse(headers.get(HEADER)?.to_str().ok()?)?;
    Some(limit - MARGIN.min(limit / 5))
}

/// `100m`: at most eight digits, and a unit.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

fn limit_of(path: &str) -> Option<Duration> {
    if path.ends_with("/Classify") || path.ends_with("/ModelInfer") {
        return Some(CLASSIFY);
    }
    (!UNLIMITED.iter().any(|call| path.ends_with(call))).then_some(OTHERS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn timeouts_have_a_unit_and_few_digits() {
        assert_eq!(parse("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(parse("99999999H").map(|d| d.as_secs()), Some(359_999_996_400));
        assert_eq!(parse("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse("0n"), Some(Duration::ZERO));
        for bad in ["", "m", "10", "123456789S", "-1S", "+1S", "1.5S", "1x", "1é", "é"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn calls_have_a_limit_unless_they_stream_or_wait() {
        assert_eq!(limit_of("/vitq.v1.InferenceService/Classify"), Some(CLASSIFY));
        assert_eq!(limit_of("/vitq.v1.ModelService/GetModel"), Some(OTHERS));
        assert_eq!(limit_of("/vitq.v1.QuantizationService/Watch"), None);
        assert_eq!(limit_of("/inference.GRPCInferenceService/ModelInfer"), Some(CLASSIFY));
        assert_eq!(limit_of("/inference.GRPCInferenceService/ModelStreamInfer"), None);
        assert_eq!(limit_of("/grpc.health.v1.Health/Check"), Some(OTHERS));
    }

    proptest! {
        #[test]
        fn nothing_breaks_the_parser(text in ".{0,12}") {
            let _ = parse(&text);
        }
    }
}
