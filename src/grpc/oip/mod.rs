//! The Open Inference Protocol, version 2, with Triton's extensions: `GRPCInferenceService`.
//!
//! A second way to the same engine as `InferenceService` and `ModelService`, for clients that speak
//! of tensors: `docs/open-inference-protocol.md` describes it to them.

mod describe;
mod infer;
mod input;
mod output;
mod parameters;
mod statistics;
pub mod tensors;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::ops::Probes;
use super::proto::inference::grpc_inference_service_server::GrpcInferenceService;
use super::proto::inference::{
    ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInferResponse,
    ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
    ModelRepositoryParameter, ModelStatisticsRequest, ModelStatisticsResponse,
    ModelStreamInferResponse, RepositoryIndexRequest, RepositoryIndexResponse,
    RepositoryModelLoadRequest, RepositoryModelLoadResponse, RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
};
use crate::engine::Engine;
use crate::engine::names::ModelId;
use crate::engine::registry::ModelState;
use crate::error::{Error, Result};

/// What of Triton's extensions works here.
const EXTENSIONS: [&str; 5] =
    ["binary_tensor_data", "classification", "model_repository", "schedule_policy", "statistics"];
/// The one parameter of unloading: it is accepted and changes nothing.
const DEPENDENTS: &str = "unload_dependents";

/// The service.
#[derive(Clone, Debug)]
pub(super) struct OpenInference {
    engine: Arc<Engine>,
    probes: Probes,
}

impl OpenInference {
    /// The service; `probes` tell whether the server is alive and ready.
    pub(super) fn new(engine: Arc<Engine>, probes: Probes) -> Self {
        Self { engine, probes }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for OpenInference {
    async fn server_live(
        &self,
        _request: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: self.probes.alive.is_set() }))
    }

    async fn server_ready(
        &self,
        _request: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.probes.readiness.is_set() }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = match describe::find(&self.engine, ("name", &name), &version).await {
            Ok(view) => matches!(view.state, ModelState::Ready(_)),
            Err(Error::NotFound { .. } | Error::InvalidArgument { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let view = describe::find(&self.engine, ("name", &name), &version).await?;
        Ok(Response::new(describe::metadata(name, &view)?))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let caller = Caller::of(&request);
        let answer = infer::infer(&self.engine, request.into_inner(), caller).await?;
        Ok(Response::new(answer))
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let caller = Caller::of(&request);
        let engine = Arc::clone(&self.engine);
        let answers = infer::infer_all(engine, request.into_inner(), caller);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.into_inner();
        let view = describe::find(&self.engine, ("name", &name), &version).await?;
        let images = self.engine.classifier.admission().capacity();
        let config = describe::config(name, &view, images)?;
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        let models = if name.is_empty() {
            let views = self.engine.registry.list(None, usize::MAX).into_iter();
            views.map(|view| (view.record.id.clone(), view)).collect()
        } else {
            let view = describe::find(&self.engine, ("name", &name), &version).await?;
            vec![(name, view)]
        };
        let of = |(name, view)| statistics::statistics(&self.engine, name, &view);
        let model_stats = models.into_iter().map(of).collect::<Result<_>>()?;
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let RepositoryIndexRequest { repository_name, ready } = request.into_inner();
        check_repository(&repository_name)?;
        self.engine.registry.refresh().await?;
        let views = self.engine.registry.list(None, usize::MAX).into_iter();
        let listed = views.filter(|view| !ready || matches!(view.state, ModelState::Ready(_)));
        let models = listed.map(|view| describe::index(&view)).collect();
        Ok(Response::new(RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        let RepositoryModelLoadRequest { repository_name, model_name, parameters } =
            request.into_inner();
        check_repository(&repository_name)?;
        check_parameters(&parameters, &[])?;
        let name = ModelId::parse(&model_name, "model_name")?;
        self.engine.registry.ensure_loaded(&name).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        let RepositoryModelUnloadRequest { repository_name, model_name, parameters } =
            request.into_inner();
        check_repository(&repository_name)?;
        check_parameters(&parameters, &[DEPENDENTS])?;
        let name = ModelId::parse(&model_name, "model_name")?;
        let id = self.engine.registry.answering(&name).await?;
        self.engine.registry.unload(&id).await?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }
}

/// There is one repository, without a name.
fn check_repository(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::invalid("repository_name", "must be empty: there is one repository"))
}

/// Whether all parameters are known. Clients bring neither configurations nor files: that would be
/// a way to run what they like.
fn check_parameters(
    parameters: &BTreeMap<String, ModelRepositoryParameter>,
    known: &[&str],
) -> Result<()> {
    match parameters.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let field = format!("parameters.{}", name.escape_debug());
            Err(Error::invalid(field, "is not supported"))
        }
    }
}
