//! Who asks for a classification, and for how long.

use std::sync::Arc;
use std::time::Instant;

use tonic::Request;

use super::auth::principal;
use super::deadline;

/// What the engine is to know of who asks.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// What quotas are counted by.
    pub(super) client: Arc<str>,
    /// When the caller gives up, if ever.
    pub(super) deadline: Option<Instant>,
}

impl Caller {
    /// Who made a request.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        Self { client: principal(request).name, deadline: deadline::of(request) }
    }

    /// The same caller, who gives up then if not earlier.
    pub(super) fn until(self, deadline: Option<Instant>) -> Self {
        let deadline = [self.deadline, deadline].into_iter().flatten().min();
        Self { deadline, ..self }
    }
}
