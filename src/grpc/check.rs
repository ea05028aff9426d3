//! Decisions about calls before they are served, each as a layer.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::codegen::http::request::Parts;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use crate::error::Result;

/// A decision about a call.
pub(super) trait Check: Clone + Send {
    /// Lets a call through, or says why not; may leave something in its extensions.
    ///
    /// # Errors
    /// What the client is told.
    fn check(&self, call: &mut Parts) -> Result<()>;
}

/// The layer of a decision.
#[derive(Clone, Debug)]
pub(super) struct Checks<C>(pub(super) C);

impl<S, C: Check> Layer<S> for Checks<C> {
    type Service = Checked<S, C>;

    fn layer(&self, inner: S) -> Self::Service {
        Checked { inner, check: self.0.clone() }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Checked<S, C> {
    inner: S,
    check: C,
}

impl<S, C, In, Out> Service<Request<In>> for Checked<S, C>
where
    C: Check,
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

    fn call(&mut self, request: Request<In>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        match self.check.check(&mut parts) {
            Ok(()) => Box::pin(self.inner.call(Request::from_parts(parts, body))),
            Err(error) => Box::pin(std::future::ready(Ok(Status::from(error).into_http()))),
        }
    }
}
