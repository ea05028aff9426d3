//! `CheckpointService` and `DatasetService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::page::PageRequest;
use super::proto::checkpoint_service_server::CheckpointService;
use super::proto::dataset_service_server::DatasetService;
use super::proto::{
    Checkpoint, Dataset, ListCheckpointsRequest, ListCheckpointsResponse, ListDatasetsRequest,
    ListDatasetsResponse,
};
use crate::engine::Engine;
use crate::engine::resources::{CheckpointInfo, DatasetInfo, Page};
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
}

/// One entry more than the page has, to know whether another page follows.
fn with_one_more(page: &PageRequest) -> Page {
    Page { after: page.after.clone(), count: page.size + 1 }
}

fn checkpoint(info: CheckpointInfo) -> Checkpoint {
    let CheckpointInfo { name, architecture, bytes } = info;
    Checkpoint { name, architecture, bytes }
}

fn dataset(info: DatasetInfo) -> Dataset {
    let DatasetInfo { name, images, classes } = info;
    Dataset { name, images: images as u64, classes }
}
