//! Refuses new calls while the server drains. Health keeps answering: it is how clients learn.

use tonic::codegen::http::request::Parts;

use super::Flag;
use super::check::Check;
use crate::error::{Error, Result};

/// Paths that are always served.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// Whether calls are taken.
#[derive(Clone, Debug)]
pub(super) struct RefuseWhileDraining {
    taking: Flag,
}

impl RefuseWhileDraining {
    pub(super) fn new(taking: Flag) -> Self {
        Self { taking }
    }
}

impl Check for RefuseWhileDraining {
    fn check(&self, call: &mut Parts) -> Result<()> {
        if self.taking.is_set() || call.uri.path().starts_with(HEALTH) {
            return Ok(());
        }
        Err(Error::Draining)
    }
}
