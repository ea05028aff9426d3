//! `ModelService`.

use std::sync::Arc;

use jiff::Timestamp;
use tonic::{Request, Response, Status};

use super::fields::{count, stem_head, timestamp};
use super::page::PageRequest;
use super::proto::model_service_server::ModelService;
use super::proto::{
    self, DeleteAliasRequest, DeleteAliasResponse, DeleteModelRequest, DeleteModelResponse,
    GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse, LoadModelRequest,
    LoadModelResponse, SetAliasRequest, SetAliasResponse, UnloadModelRequest, UnloadModelResponse,
    model::State,
};
use super::status::{rpc_status, status};
use crate::artifact::store::ModelRecord;
use crate::calib::task::{CalibrationReport, QuantizeSpec, SiteReport};
use crate::engine::Engine;
use crate::engine::device::Residence;
use crate::engine::names::ModelId;
use crate::engine::registry::{ModelState, ModelView, Placement};
use crate::error::Result;
use crate::exec::SiteCounts;

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Models {
    engine: Arc<Engine>,
}

impl Models {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl ModelService for Models {
    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let ListModelsRequest { page_size, page_token } = request.into_inner();
        let page = PageRequest::parse("models".to_owned(), page_size, &page_token)?;
        self.engine.registry.refresh().await?;
        let mut views = self.engine.registry.list(page.after.as_deref(), page.size + 1);
        let next_page_token = page.cut(&mut views, |view| view.record.id.clone());
        let models = views.iter().map(model).collect();
        Ok(Response::new(ListModelsResponse { models, next_page_token }))
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        let GetModelRequest { model: id } = request.into_inner();
        self.engine.registry.refresh().await?;
        let view = self.engine.registry.get(&ModelId::parse(&id, "model")?)?;
        Ok(Response::new(GetModelResponse {
            model: Some(model(&view)),
            report: Some(report(&view.record.report)),
            class_labels: view.record.model.labels.clone(),
        }))
    }

    async fn load_model(
        &self,
        request: Request<LoadModelRequest>,
    ) -> Result<Response<LoadModelResponse>, Status> {
        let LoadModelRequest { model: id } = request.into_inner();
        let id = ModelId::parse(&id, "model")?;
        self.engine.registry.ensure_loaded(&id).await?;
        let view = self.engine.registry.get(&id)?;
        Ok(Response::new(LoadModelResponse { model: Some(model(&view)) }))
    }

    async fn unload_model(
        &self,
        request: Request<UnloadModelRequest>,
    ) -> Result<Response<UnloadModelResponse>, Status> {
        let UnloadModelRequest { model: id } = request.into_inner();
        let view = self.engine.registry.unload(&ModelId::parse(&id, "model")?).await?;
        Ok(Response::new(UnloadModelResponse { model: Some(model(&view)) }))
    }

    async fn delete_model(
        &self,
        request: Request<DeleteModelRequest>,
    ) -> Result<Response<DeleteModelResponse>, Status> {
        let DeleteModelRequest { model: id } = request.into_inner();
        self.engine.registry.delete(&ModelId::parse(&id, "model")?).await?;
        Ok(Response::new(DeleteModelResponse {}))
    }

    async fn set_alias(
        &self,
        request: Request<SetAliasRequest>,
    ) -> Result<Response<SetAliasResponse>, Status> {
        let SetAliasRequest { alias, model: id } = request.into_inner();
        let (alias, id) = (ModelId::parse(&alias, "alias")?, ModelId::parse(&id, "model")?);
        self.engine.registry.set_alias(&alias, &id).await?;
        let view = self.engine.registry.get(&id)?;
        Ok(Response::new(SetAliasResponse { model: Some(model(&view)) }))
    }

    async fn delete_alias(
        &self,
        request: Request<DeleteAliasRequest>,
    ) -> Result<Response<DeleteAliasResponse>, Status> {
        let DeleteAliasRequest { alias } = request.into_inner();
        self.engine.registry.remove_alias(&ModelId::parse(&alias, "alias")?).await?;
        Ok(Response::new(DeleteAliasResponse {}))
    }
}

/// A model as clients see it.
pub(super) fn model(view: &ModelView) -> proto::Model {
    let ModelView { record, state, backend, aliases } = view;
    let ModelRecord {
        id,
        digest,
        artifact_bytes,
        checkpoint,
        labels,
        created_ms,
        calibration_seconds: _,
        model,
        request,
        calibration,
        source_digest,
        source_bytes,
        report: _,
    } = &**record;
    let QuantizeSpec {
        method,
        options,
        weight_bits,
        activation_bits,
        stem_head: policy,
        seed,
        role_bits,
    } = request;
    let mut message = proto::Model {
        id: id.clone(),
        state: State::Stored.into(),
        digest: digest.clone(),
        architecture: model.architecture.clone(),
        image_size: count(model.preprocessing.image_size),
        num_classes: count(model.num_classes),
        method: method.clone(),
        options: options.clone(),
        weight_bits: (*weight_bits).into(),
        activation_bits: (*activation_bits).into(),
        stem_head: stem_head(*policy).into(),
        seed: *seed,
        checkpoint: checkpoint.clone(),
        source_digest: source_digest.clone(),
        source_bytes: *source_bytes,
        calibration_images: count(calibration.images),
        calibration_digest: calibration.digest.clone(),
        artifact_bytes: *artifact_bytes,
        resident_bytes: 0,
        device: String::new(),
        executor: backend.name().to_owned(),
        labels: labels.clone(),
        create_time: Timestamp::from_millisecond(*created_ms).ok().map(timestamp),
        error: None,
        role_bits: role_bits.iter().map(proto::RoleBits::from).collect(),
        aliases: aliases.clone(),
        sites: None,
    };
    match state {
        ModelState::Stored => {}
        ModelState::Loading => message.set_state(State::Loading),
        ModelState::Ready(Placement { device, residence, .. }) => {
            let Residence { bytes, sites } = residence;
            message.set_state(State::Ready);
            message.resident_bytes = *bytes;
            message.sites = Some(site_counts(*sites));
            message.device = device.name().to_owned();
        }
        ModelState::Failed(error) => {
            message.set_state(State::Failed);
            // The cause was logged, with the model's id, when the load failed.
            message.error = Some(rpc_status(&status(error, id)));
        }
    }
    message
}

fn site_counts(sites: SiteCounts) -> proto::SiteCounts {
    let SiteCounts { integer, simulated, float } = sites;
    proto::SiteCounts { integer: count(integer), simulated: count(simulated), float: count(float) }
}

/// A calibration's report as clients see it.
pub(super) fn report(report: &CalibrationReport) -> proto::CalibrationReport {
    let CalibrationReport { images, sites, warnings } = report;
    proto::CalibrationReport {
        images: count(*images),
        sites: sites.iter().map(site).collect(),
        warnings: warnings.clone(),
    }
}

fn site(site: &SiteReport) -> proto::SiteReport {
    let SiteReport { path, role, operand, kind, bits, sqnr_db } = site;
    proto::SiteReport {
        path: path.clone(),
        role: role.name().to_owned(),
        operand: operand.clone(),
        kind: kind.clone(),
        bits: (*bits).into(),
        sqnr_db: *sqnr_db,
    }
}
