//! Statuses that tonic makes by itself, of messages that it cannot read and of calls that there are
//! not, get what all others have: a code that fits, and a reason that programs can read.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

use super::status;

/// The layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Explanations;

impl<S> Layer<S> for Explanations {
    type Service = Explaining<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Explaining { inner }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Explaining<S> {
    inner: S,
}

impl<S, In, Out> Service<Request<In>> for Explaining<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Explained<Out>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            explain(response.headers_mut()); // of an answer without a body
            Ok(response.map(|inner| Explained { inner }))
        })
    }
}

/// A body whose trailers are explained.
#[derive(Debug)]
pub(super) struct Explained<B> {
    inner: B,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Explained<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            explain(trailers);
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

/// Changes a status that has no details.
fn explain(headers: &mut HeaderMap) {
    if headers.contains_key(Status::GRPC_STATUS_DETAILS) {
        return;
    }
    let Some(found) = Status::from_header_map(headers) else { return };
    if let Some(explained) = status::explained(&found) {
        // Headers that cannot hold it stay as they were.
        let _ = explained.add_header(headers);
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt as _;

    use super::*;
    use crate::error::Error;

    fn after(status: &Status) -> Status {
        let mut headers = HeaderMap::new();
        status.add_header(&mut headers).unwrap();
        headers.insert("x-kept", "1".parse().unwrap());
        explain(&mut headers);
        assert!(headers.contains_key("x-kept"));
        Status::from_header_map(&headers).unwrap()
    }

    #[test]
    fn bare_statuses_get_a_reason_and_others_stay() {
        for (status, code, reason, message) in [
            (
                Status::out_of_range(
                    "Error, decoded message length too large: found 9 bytes, the limit is: 8 bytes",
                ),
                Code::ResourceExhausted,
                "MESSAGE_TOO_LARGE",
                "message length too large: found 9 bytes, the limit is: 8 bytes",
            ),
            (
                Status::resource_exhausted("Error decompressing: size limit, of 8 bytes, …"),
                Code::ResourceExhausted,
                "MESSAGE_TOO_LARGE",
                "Error decompressing: size limit, of 8 bytes, …",
            ),
            (
                Status::unimplemented(""),
                Code::Unimplemented,
                "UNIMPLEMENTED",
                "the server has no such call",
            ),
            (Status::internal("flag"), Code::Internal, "MALFORMED_MESSAGE", "flag"),
            (Status::not_found("no service"), Code::NotFound, "NOT_FOUND", "no service"),
        ] {
            let found = after(&status);
            let info = found.get_details_error_info().unwrap();
            assert_eq!((found.code(), &*info.reason, found.message()), (code, reason, message));
        }
        for status in [Status::from(Error::internal("x")), Status::ok("")] {
            let found = after(&status);
            assert_eq!((found.code(), found.details()), (status.code(), status.details()));
        }
    }
}
