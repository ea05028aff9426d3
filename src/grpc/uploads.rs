//! `UploadService`.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status, Streaming};

use super::fields::timestamp;
use super::page::PageRequest;
use super::proto::upload_request::Part;
use super::proto::upload_service_server::UploadService;
use super::proto::{
    self, GetUploadRequest, GetUploadResponse, ListUploadsRequest, ListUploadsResponse,
    UploadHeader, UploadImage, UploadKind, UploadRequest, UploadResponse,
};
use super::resources::with_one_more;
use crate::engine::Engine;
use crate::engine::resources::{Announced, Content, ResourceKind, Upload};
use crate::error::{Error, Result};

/// A client that sends nothing for so long has to come back later.
const SILENCE: Duration = Duration::from_secs(60);

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Uploads {
    engine: Arc<Engine>,
}

impl Uploads {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl UploadService for Uploads {
    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadResponse>, Status> {
        // On a task of its own: what has come is stored, and a check goes on, when the client has
        // hung up.
        let task = tokio::spawn(receive(Arc::clone(&self.engine), request.into_inner()));
        let upload = task.await.map_err(|error| Error::internal(format!("upload: {error}")))??;
        Ok(Response::new(UploadResponse { upload: Some(message(&upload)) }))
    }

    async fn get_upload(
        &self,
        request: Request<GetUploadRequest>,
    ) -> Result<Response<GetUploadResponse>, Status> {
        let GetUploadRequest { kind, name } = request.into_inner();
        let upload = self.engine.resources.upload(kind_from(kind, "kind")?, &name).await?;
        Ok(Response::new(GetUploadResponse { upload: Some(message(&upload)) }))
    }

    async fn list_uploads(
        &self,
        request: Request<ListUploadsRequest>,
    ) -> Result<Response<ListUploadsResponse>, Status> {
        let ListUploadsRequest { kind, page_size, page_token } = request.into_inner();
        let kind = kind_from(kind, "kind")?;
        let page = PageRequest::parse(format!("uploads {}", kind.name()), page_size, &page_token)?;
        let mut found = self.engine.resources.uploads(kind, &with_one_more(&page)).await?;
        let next_page_token = page.cut(&mut found, |upload| upload.announced.name.clone());
        let uploads = found.iter().map(message).collect();
        Ok(Response::new(ListUploadsResponse { uploads, next_page_token }))
    }
}

async fn receive(
    engine: Arc<Engine>,
    mut stream: Streaming<UploadRequest>,
) -> Result<Upload, Status> {
    let Some(Part::Header(header)) = next(&mut stream).await? else {
        return Err(Error::invalid("header", "must come first").into());
    };
    let (announced, offset) = announced(header)?;
    let mut receiver = engine.resources.receive(announced, offset).await?;
    loop {
        let part = tokio::select! {
            part = next(&mut stream) => part,
            () = engine.jobs.stopping() => Err(Error::Draining.into()),
        };
        let taken = match part {
            Ok(Some(Part::Chunk(chunk))) => receiver.chunk(chunk).await,
            Ok(Some(Part::Image(UploadImage { name, content, sha256 }))) => {
                receiver.image(&name, &content, &sha256).await
            }
            Ok(Some(Part::Header(_))) => Err(Error::invalid("header", "must come once")),
            Ok(None) => return Ok(receiver.finish().await?),
            Err(status) => {
                if let Err(error) = receiver.pause().await {
                    tracing::warn!(%error, "the end of a broken stream was not stored");
                }
                return Err(status);
            }
        };
        if let Err(error) = taken {
            return Err(receiver.refuse(error).await.into());
        }
    }
}

/// The next part; `None` at the end of the stream.
async fn next(stream: &mut Streaming<UploadRequest>) -> Result<Option<Part>, Status> {
    let message = tokio::time::timeout(SILENCE, stream.message());
    match message.await.map_err(|_| Error::Deadline)?? {
        None => Ok(None),
        Some(UploadRequest { part: Some(part) }) => Ok(Some(part)),
        Some(UploadRequest { part: None }) => {
            Err(Error::invalid("part", "must be a header, a chunk or an image").into())
        }
    }
}

fn announced(header: UploadHeader) -> Result<(Announced, u64)> {
    let UploadHeader { kind, name, config, bytes, sha256, images, offset } = header;
    let content = match (bytes, images) {
        (0, 0) => {
            return Err(Error::invalid("header.bytes", "must be the size of the file"));
        }
        (bytes, 0) => Content::File { bytes, sha256 },
        (0, images) => Content::Images(images),
        _ => return Err(Error::invalid("header.images", "must be 0 if a file comes")),
    };
    let kind = kind_from(kind, "header.kind")?;
    Ok((Announced { kind, name, config, content }, offset))
}

fn kind_from(value: i32, field: &str) -> Result<ResourceKind> {
    match UploadKind::try_from(value) {
        Ok(UploadKind::Checkpoint) => Ok(ResourceKind::Checkpoint),
        Ok(UploadKind::Dataset) => Ok(ResourceKind::Dataset),
        Ok(UploadKind::Unspecified) | Err(_) => {
            Err(Error::invalid(field, "must be a checkpoint or a data set"))
        }
    }
}

fn message(upload: &Upload) -> proto::Upload {
    let Announced { kind, name, config: _, content } = &upload.announced;
    let kind = match kind {
        ResourceKind::Checkpoint => UploadKind::Checkpoint,
        ResourceKind::Dataset => UploadKind::Dataset,
    };
    let (bytes, images, sha256) = match content {
        Content::File { bytes, sha256 } => (*bytes, 0, sha256.clone()),
        Content::Images(images) => (0, *images, String::new()),
    };
    proto::Upload {
        kind: kind.into(),
        name: name.clone(),
        complete: upload.summary.is_some(),
        bytes,
        received_bytes: upload.received_bytes,
        images,
        received_images: upload.received_images,
        sha256,
        create_time: Some(timestamp(upload.created)),
        update_time: Some(timestamp(upload.touched)),
    }
}
