//! The metrics of calls, by gRFC A66, and the end of their spans: one layer for all services.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use metrics::SharedString;
use tonic::Code;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};
use tracing::Span;

use super::proto;
use super::status::code_name;
use crate::telemetry::{self, metrics as noted};

/// Label of methods that the server does not have: clients can make up any number of them.
const OTHER: SharedString = SharedString::const_str("other");
/// Where gRPC says how a call ended.
const STATUS: &str = "grpc-status";
/// Bytes before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// The layer.
#[derive(Clone, Debug)]
pub(super) struct Measures {
    /// Labels by path.
    methods: Arc<HashMap<String, SharedString>>,
}

impl Default for Measures {
    fn default() -> Self {
        let sets = [
            proto::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let names = sets.into_iter().flat_map(proto::methods);
        let methods = names.map(|name| (format!("/{name}"), name.into())).collect();
        Self { methods: Arc::new(methods) }
    }
}

impl<S> Layer<S> for Measures {
    type Service = Measured<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Measured { inner, methods: Arc::clone(&self.methods) }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Measured<S> {
    inner: S,
    methods: Arc<HashMap<String, SharedString>>,
}

impl<S, Out> Service<Request<tonic::body::Body>> for Measured<S>
where
    S: Service<Request<tonic::body::Body>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    Out: Body<Data = Bytes> + Unpin + Send + 'static,
{
    type Response = Response<Counted<Out>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let method = self.methods.get(request.uri().path()).cloned();
        let mut call = Call::start(method.unwrap_or(OTHER));
        let received = Arc::clone(&call.received);
        let request = request.map(|inner| {
            let framing = Framing::default();
            tonic::body::Body::new(Counted { inner, framing, bytes: received, call: None })
        });
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await?;
            if let Some(code) = code_of(response.headers()) {
                call.code = Some(code); // an answer without a body
            }
            let bytes = Arc::clone(&call.sent);
            let framing = Framing::default();
            Ok(response.map(|inner| Counted { inner, framing, bytes, call: Some(call) }))
        })
    }
}

/// A call under way. It ends when its answer has been sent, or nobody wants it any more.
#[derive(Debug)]
struct Call {
    method: SharedString,
    started: Instant,
    span: Span,
    received: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    /// How it ended, once that is known.
    code: Option<Code>,
}

impl Call {
    fn start(method: SharedString) -> Self {
        noted::call_started(&method);
        Self {
            method,
            started: Instant::now(),
            span: Span::current(),
            received: Arc::default(),
            sent: Arc::default(),
            code: None,
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Whoever leaves before the end has cancelled.
        let code = self.code.unwrap_or(Code::Cancelled);
        let status = code_name(code);
        let time = self.started.elapsed();
        let bytes = [&self.received, &self.sent].map(|bytes| bytes.load(Ordering::Relaxed));
        noted::call_ended(&self.method, status, time, bytes.into());
        telemetry::ended(&self.span, status, is_fault(code));
        let seconds = time.as_secs_f64();
        self.span.in_scope(|| tracing::debug!(status, seconds, "call ended"));
    }
}

/// Whether it is the server's fault, by OpenTelemetry's conventions.
fn is_fault(code: Code) -> bool {
    [
        Code::Unknown,
        Code::DeadlineExceeded,
        Code::Unimplemented,
        Code::Internal,
        Code::Unavailable,
        Code::DataLoss,
    ]
    .contains(&code)
}

fn code_of(headers: &HeaderMap) -> Option<Code> {
    headers.get(STATUS).map(|status| Code::from_bytes(status.as_bytes()))
}

/// A body whose messages are counted; that of an answer holds its call, and is polled in its span.
#[derive(Debug)]
pub(super) struct Counted<B> {
    inner: B,
    framing: Framing,
    bytes: Arc<AtomicU64>,
    call: Option<Call>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        let span = this.call.as_ref().map(|call| call.span.clone());
        let _entered = span.as_ref().map(Span::enter);
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.bytes.fetch_add(this.framing.messages(data), Ordering::Relaxed);
                }
                if let (Some(trailers), Some(call)) = (frame.trailers_ref(), &mut this.call) {
                    call.code = code_of(trailers).or(call.code);
                }
            }
            Some(Err(_)) => {}
            None => this.call = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Tells messages from what is around them.
#[derive(Debug, Default)]
struct Framing {
    /// What has come of the prefix of the next message.
    prefix: Vec<u8>,
    /// What is still to come of the message.
    left: u64,
}

impl Framing {
    /// Bytes of the data that are of messages.
    fn messages(&mut self, mut data: &[u8]) -> u64 {
        let mut count = 0;
        while !data.is_empty() {
            if self.left > 0 {
                let part = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len());
                self.left -= part as u64;
                count += part as u64;
                data = &data[part..];
                continue;
            }
            let part = (PREFIX - self.prefix.len()).min(data.len());
            self.prefix.extend_from_slice(&data[..part]);
            data = &data[part..];
            if let [_, a, b, c, d] = self.prefix[..] {
                self.left = u32::from_be_bytes([a, b, c, d]).into();
                self.prefix.clear();
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_are_counted_however_they_are_cut(
            sizes in prop::collection::vec(0usize..40, 0..8),
            cut in 1usize..20,
        ) {
            let mut wire = Vec::new();
            for size in &sizes {
                wire.push(0);
                wire.extend((*size as u32).to_be_bytes());
                wire.extend(std::iter::repeat_n(7, *size));
            }
            let mut framing = Framing::default();
            let counted: u64 = wire.chunks(cut).map(|part| framing.messages(part)).sum();
            prop_assert_eq!(counted, sizes.iter().sum::<usize>() as u64);
        }
    }

    #[test]
    fn methods_have_labels_and_inventions_share_one() {
        let Measures { methods } = Measures::default();
        for path in [
            "/vitq.v1.InferenceService/Classify",
            "/google.longrunning.Operations/GetOperation",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(methods.get(path).map(|label| &**label), Some(&path[1..]));
        }
        assert!(!methods.contains_key("/vitq.v1.InferenceService/Invented"));
    }
}
