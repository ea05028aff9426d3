//! `CheckpointService` and `DatasetService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::fields::timestamp;
use super::page::PageRequest;
use super::proto::checkpoint_service_server::CheckpointService;
use super::proto::dataset_service_server::DatasetService;
use super::proto::{
    Checkpoint, Dataset, DeleteCheckpointRequest, DeleteCheckpointResponse, DeleteDatasetRequest,
    DeleteDatasetResponse, GetCheckpointRequest, GetCheckpointResponse, GetDatasetRequest,
    GetDatasetResponse, ListCheckpointsRequest, ListCheckpointsResponse, ListDatasetsRequest,
    ListDatasetsResponse,
};
use crate::engine::Engine;
use crate::engine::resources::{CheckpointInfo, DatasetInfo, Origin, Page, ResourceKind};
use crate::error::Result;

/// Both services.
#[derive(Clone, Debug)]
pub(super) struct ResourceLists {
    engine: Arc<Engine>,
}

impl ResourceLists {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl CheckpointService for ResourceLists {
    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let ListCheckpointsRequest { page_size, page_token } = request.into_inner();
        let page = PageRequest::parse("checkpoints".to_owned(), page_size, &page_token)?;
        let mut found = self.engine.resources.checkpoints(with_one_more(&page)).await?;
        let next_page_token = page.cut(&mut found, |info| info.name.clone());
        let checkpoints = found.into_iter().map(checkpoint).collect();
        Ok(Response::new(ListCheckpointsResponse { checkpoints, next_page_token }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<GetCheckpointResponse>, Status> {
        let info = self.engine.resources.checkpoint(&request.into_inner().name).await?;
        Ok(Response::new(GetCheckpointResponse { checkpoint: Some(checkpoint(info)) }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        let DeleteCheckpointRequest { name } = request.into_inner();
        self.engine.delete_resource(ResourceKind::Checkpoint, &name).await?;
        Ok(Response::new(DeleteCheckpointResponse {}))
    }
}

#[tonic::async_trait]
impl DatasetService for ResourceLists {
    async fn list_datasets(
        &self,
        request: Request<ListDatasetsRequest>,
    ) -> Result<Response<ListDatasetsResponse>, Status> {
        let ListDatasetsRequest { page_size, page_token } = request.into_inner();
        let page = PageRequest::parse("datasets".to_owned(), page_size, &page_token)?;
        let mut found = self.engine.resources.datasets(with_one_more(&page)).await?;
        let next_page_token = page.cut(&mut found, |info| info.name.clone());
        let datasets = found.into_iter().map(dataset).collect();
        Ok(Response::new(ListDatasetsResponse { datasets, next_page_token }))
    }

    async fn get_dataset(
        &self,
        request: Request<GetDatasetRequest>,
    ) -> Result<Response<GetDatasetResponse>, Status> {
        let info = self.engine.resources.dataset(&request.into_inner().name).await?;
        Ok(Response::new(GetDatasetResponse { dataset: Some(dataset(info)) }))
    }

    async fn delete_dataset(
        &self,
        request: Request<DeleteDatasetRequest>,
    ) -> Result<Response<DeleteDatasetResponse>, Status> {
        let DeleteDatasetRequest { name } = request.into_inner();
        self.engine.delete_resource(ResourceKind::Dataset, &name).await?;
        Ok(Response::new(DeleteDatasetResponse {}))
    }
}

/// One entry more than the page has, to know whether another page follows.
pub(super) fn with_one_more(page: &PageRequest) -> Page {
    Page { after: page.after.clone(), count: page.size + 1 }
}

fn checkpoint(info: CheckpointInfo) -> Checkpoint {
    let CheckpointInfo { name, architecture, bytes, origin } = info;
    let (uploaded, digest, create_time) = came(origin);
    Checkpoint { name, architecture, bytes, uploaded, digest, create_time }
}

fn dataset(info: DatasetInfo) -> Dataset {
    let DatasetInfo { name, images, classes, origin } = info;
    let (uploaded, digest, create_time) = came(origin);
    Dataset { name, images: images as u64, classes, uploaded, digest, create_time }
}

fn came(origin: Origin) -> (bool, String, Option<prost_types::Timestamp>) {
    match origin {
        Origin::Folder | Origin::Hub => (false, String::new(), None),
        Origin::Upload { digest, created } => (true, digest, Some(timestamp(created))),
    }
}
