//! What stands in for the client in builds without feature `hub`: there is never one.

use std::path::{Path, PathBuf};

use tokio::runtime::Handle;

use super::{HubName, Snapshot};
use crate::engine::resources::GoingOn;
use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) enum Client {}

impl Client {
    pub(super) fn check() -> Result<()> {
        Err(missing())
    }

    pub(super) fn new(_cache: &Path, _max_bytes: u64, _runtime: Handle) -> Result<Self> {
        Err(missing())
    }

    pub(super) fn config(&self, _name: &HubName) -> Result<Snapshot> {
        match *self {}
    }

    pub(super) fn weights_size(&self, _name: &HubName, _snapshot: &Snapshot) -> Result<u64> {
        match *self {}
    }

    pub(super) fn weights(
        &self,
        _name: &HubName,
        _snapshot: &Snapshot,
        _going_on: GoingOn<'_>,
    ) -> Result<PathBuf> {
        match *self {}
    }
}

fn missing() -> Error {
    Error::invalid("hub", "this build cannot use the hub: it was made without feature `hub`")
}
