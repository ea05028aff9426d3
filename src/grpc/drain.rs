//! Refuses new calls while the server drains. Health keeps answering: it is how clients learn.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use super::Flag;
use crate::error::Error;

/// Paths that are always served.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// The layer.
#[derive(Clone, Debug)]
pub(super) struct RefuseWhileDraining {
    readiness: Flag,
}

impl RefuseWhileDraining {
    pub(super) fn new(readiness: Flag) -> Self {
        Self { readiness }
    }
}

impl<S> Layer<S> for RefuseWhileDraining {
    type Service = Refusing<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Refusing { inner, readiness: self.readiness.clone() }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Refusing<S> {
    inner: S,
    readiness: Flag,
}

impl<S, In, Out> Service<Request<In>> for Refusing<S>
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

    fn call(&mut self, request: Request<In>) -> Self::Future {
        if self.readiness.is_set() || request.uri().path().starts_with(HEALTH) {
            return Box::pin(self.inner.call(request));
        }
        let refusal = Status::from(Error::Draining).into_http();
        Box::pin(std::future::ready(Ok(refusal)))
    }
}
