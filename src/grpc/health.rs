//! `grpc.health.v1.Health`: readiness by service and by model, liveness apart from it.

use std::collections::BTreeSet;
use std::sync::LazyLock;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::ops::Probes;
use super::proto;
use crate::engine::names::ModelId;
use crate::engine::registry::ModelState;

/// Name of the process as such, whatever its readiness.
const LIVENESS: &str = "liveness";
/// Before the id or the alias of a model.
const MODEL: &str = "model/";
/// How often watchers of a model look at it.
const POLL: Duration = Duration::from_secs(1);

/// The service, on whatever port.
#[derive(Clone, Debug)]
pub(super) struct HealthChecks {
    probes: Probes,
}

impl HealthChecks {
    pub(super) fn new(probes: Probes) -> Self {
        Self { probes }
    }

    /// `None` for what there is not.
    fn status(&self, service: &str) -> Option<ServingStatus> {
        let is_serving = match service.strip_prefix(MODEL) {
            Some(model) => self.is_loaded(model)? && self.probes.readiness.is_set(),
            None if service == LIVENESS => self.probes.alive.is_set(),
            None if is_served(service) => self.probes.readiness.is_set(),
            None => return None,
        };
        Some(if is_serving { ServingStatus::Serving } else { ServingStatus::NotServing })
    }

    fn is_loaded(&self, model: &str) -> Option<bool> {
        let id = ModelId::parse(model, "service").ok()?;
        let view = self.probes.engine()?.registry.get(&id).ok()?;
        Some(matches!(view.state, ModelState::Ready(_)))
    }
}

/// Whether the name is the server's as a whole, or that of one of its services.
fn is_served(service: &str) -> bool {
    static SERVICES: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
        let methods = proto::methods(proto::DESCRIPTORS).into_iter();
        methods.filter_map(|name| Some(name.split_once('/')?.0.to_owned())).collect()
    });
    service.is_empty() || SERVICES.contains(service)
}

#[tonic::async_trait]
impl Health for HealthChecks {
    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let status = self.status(&service);
        let status = status.ok_or_else(|| Status::not_found(format!("no service `{service}`")))?;
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let service = request.into_inner().service;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(follow(self.clone(), service, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Tells every change of a service's status, until nobody listens. What is not there may come.
async fn follow(
    checks: HealthChecks,
    service: String,
    watcher: mpsc::Sender<Result<HealthCheckResponse, Status>>,
) {
    let (mut ready, mut alive) = (checks.probes.readiness.changes(), checks.probes.alive.changes());
    let mut told = None;
    loop {
        let status = checks.status(&service).unwrap_or(ServingStatus::ServiceUnknown);
        if told != Some(status) {
            let response = HealthCheckResponse { status: status.into() };
            if watcher.send(Ok(response)).await.is_err() {
                return;
            }
            told = Some(status);
        }
        tokio::select! {
            () = watcher.closed() => return,
            () = changed(&mut ready) => {}
            () = changed(&mut alive) => {}
            () = tokio::time::sleep(POLL), if service.starts_with(MODEL) => {}
        }
    }
}

async fn changed(flag: &mut watch::Receiver<bool>) {
    if flag.changed().await.is_err() {
        std::future::pending::<()>().await; // it will not change any more
    }
}
