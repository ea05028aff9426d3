//! The receiving side of an upload: bytes in, parts into the store, and a check of the whole.

use std::collections::HashSet;
use std::mem;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tar::{Builder, Header};
use tokio::sync::OwnedSemaphorePermit;

use super::table::{Claim, Content, Part, Summary, Upload};
use super::{ResourceKind, Resources};
use crate::artifact::store::put_named;
use crate::data::{Dataset, check_tar_start, has_image_name, is_image};
use crate::digest::sha256_hex;
use crate::engine::registry::blocking;
use crate::error::{Error, Result};
use crate::model::Checkpoint;

/// Size of the parts; what a broken connection loses at most.
const PART: usize = 8 << 20;
/// Bytes that tell what a file is, and where the header of a checkpoint's ends.
const START: usize = 8;

/// Takes the content of one upload. Dropped without [`Receiver::finish`] or [`Receiver::pause`], what
/// is not stored yet has to be sent again.
#[derive(Debug)]
pub struct Receiver {
    resources: Arc<Resources>,
    claim: Claim,
    upload: Upload,
    buffer: BytesMut,
    /// The file from its beginning, until what its first bytes tell was checked.
    start: Option<BytesMut>,
    /// Images in the buffer, of those that come one by one.
    images: u64,
    /// Names of the images that came on this stream.
    names: HashSet<String>,
    /// Bytes or images that came before and are sent again.
    skip: u64,
    _permit: OwnedSemaphorePermit,
}

impl Receiver {
    pub(super) async fn new(
        resources: Arc<Resources>,
        (upload, claim): (Upload, Claim),
        offset: u64,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self> {
        let received = match upload.announced.content {
            Content::File { .. } => upload.received_bytes,
            Content::Images(_) => upload.received_images,
        };
        let Some(skip) = received.checked_sub(offset) else {
            let reason = format!("only {received} were received so far, go on there");
            let error = Error::invalid("header.offset", reason);
            // What was received before can be gone on with; an upload of nothing holds but a name.
            if received == 0 {
                forget_unusable(&resources, &claim, &error).await;
            }
            return Err(error);
        };
        let start = stored_start(&resources, &upload).await?;
        Ok(Self {
            resources,
            claim,
            upload,
            buffer: BytesMut::new(),
            start,
            images: 0,
            names: HashSet::new(),
            skip,
            _permit: permit,
        })
    }

    /// Ends an upload with an error of what came; forgets it if that is unusable.
    pub async fn refuse(self, error: Error) -> Error {
        forget_unusable(&self.resources, &self.claim, &error).await;
        error
    }

    /// The upload, and what of it is stored.
    pub fn upload(&self) -> &Upload {
        &self.upload
    }

    /// Takes the next bytes of the announced file.
    ///
    /// # Errors
    /// `InvalidArgument` on `chunk` for more bytes than announced, and for content that cannot be
    /// what was announced: [`Receiver::refuse`] is for these. `FailedPrecondition` when another
    /// stream took over; `Io` or `Unavailable` when a part cannot be stored: then what was stored
    /// stays.
    pub async fn chunk(&mut self, mut chunk: Bytes) -> Result<()> {
        let Content::File { bytes, .. } = self.upload.announced.content else {
            return Err(Error::invalid("chunk", "images were announced: send them as `image`"));
        };
        let again = usize::try_from(self.skip).unwrap_or(usize::MAX).min(chunk.len());
        self.skip -= again as u64;
        let mut chunk = chunk.split_off(again);
        let so_far = self.upload.received_bytes + self.buffer.len() as u64;
        if bytes - so_far < chunk.len() as u64 {
            let reason = format!("goes beyond the {bytes} bytes that were announced");
            return Err(Error::invalid("chunk", reason));
        }
        self.check_start(&chunk, bytes).await?;
        while !chunk.is_empty() {
            let room = PART - self.buffer.len();
            self.buffer.extend_from_slice(&chunk.split_to(room.min(chunk.len())));
            if self.buffer.len() == PART {
                self.store().await?;
            }
        }
        Ok(())
    }

    /// Refuses what its first bytes speak against, before the rest is sent: another format, or a
    /// checkpoint whose tensors are not those of its config.
    async fn check_start(&mut self, next: &[u8], size: u64) -> Result<()> {
        let Some(start) = &mut self.start else { return Ok(()) };
        start.extend_from_slice(&next[..next.len().min(PART.saturating_sub(start.len()))]);
        let Some(first) = start.first_chunk::<START>() else { return Ok(()) };
        match self.upload.announced.kind {
            ResourceKind::Dataset => check_tar_start(first, "chunk")?,
            ResourceKind::Checkpoint => {
                let on_chunk = |error: Error| error.on_field("chunk");
                let end = Checkpoint::check_start(first, size).map_err(on_chunk)?;
                // A longer header is left to the check of the whole: no model of ours has one.
                if end <= PART as u64 {
                    let Some(header) = start.get(..end as usize) else { return Ok(()) };
                    let header = Bytes::copy_from_slice(header);
                    let config = self.upload.announced.config.clone();
                    blocking(move || Checkpoint::check_header(config.as_bytes(), &header, size))
                        .await
                        .map_err(on_chunk)?;
                }
            }
        }
        self.start = None;
        Ok(())
    }

    /// Takes the next image, `CLASS/FILE`; its sha256 is checked if it is not empty.
    ///
    /// # Errors
    /// `InvalidArgument` on `image.name`, `image.content` or `image.sha256`; otherwise as
    /// [`Receiver::chunk`].
    pub async fn image(&mut self, name: &str, content: &Bytes, sha256: &str) -> Result<()> {
        let Content::Images(announced) = self.upload.announced.content else {
            return Err(Error::invalid("image", "a file was announced: send it as `chunk`"));
        };
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(());
        }
        if self.upload.received_images + self.images == announced {
            let reason = format!("is one more than the {announced} that were announced");
            return Err(Error::invalid("image", reason));
        }
        let part = |part: &str| !part.is_empty() && !part.starts_with('.');
        let plain = name.split_once('/').is_some_and(|(class, file)| {
            part(class) && part(file) && !file.contains('/') && !name.contains(['\\', '\0'])
        });
        if !plain || !has_image_name(Path::new(name)) {
            let name = name.escape_debug();
            let reason = format!("`{name}` is not CLASS/FILE with the ending of an image");
            return Err(Error::invalid("image.name", reason));
        }
        if !self.names.insert(name.to_owned()) {
            return Err(Error::invalid("image.name", format!("`{name}` came before")));
        }
        let refuse =
            |reason: String| Error::invalid("image.content", format!("`{name}`: {reason}"));
        let max = self.resources.limits.max_bytes;
        if content.len() > max {
            return Err(refuse(format!("{} bytes exceed the limit of {max} bytes", content.len())));
        }
        if !is_image(content) {
            return Err(refuse("is neither a JPEG nor a PNG nor a WebP image".to_owned()));
        }
        if !sha256.is_empty() && sha256_hex(content) != sha256.to_ascii_lowercase() {
            let reason = format!("`{name}`: is not that of the content that came");
            return Err(Error::invalid("image.sha256", reason));
        }
        self.buffer.extend_from_slice(&as_member(name, content)?);
        self.images += 1;
        if self.buffer.len() >= PART {
            self.store().await?;
        }
        Ok(())
    }

    /// Stores what has come, and returns the upload: visible if all has come and passed the checks.
    /// What fails them is forgotten.
    ///
    /// # Errors
    /// `InvalidArgument` on the field of the announcement that the content belies, or for unusable
    /// content; `Io` or `Unavailable`: then the upload stays and may be finished later.
    pub async fn finish(mut self) -> Result<Upload> {
        if !self.buffer.is_empty() {
            self.store().await?;
        }
        let whole = match self.upload.announced.content {
            Content::File { bytes, .. } => self.upload.received_bytes == bytes,
            Content::Images(images) => self.upload.received_images == images,
        };
        if whole && self.upload.summary.is_none() {
            self.upload.summary = Some(self.complete().await?);
        }
        Ok(self.upload)
    }

    /// Stores what has come, for somebody to go on with.
    ///
    /// # Errors
    /// As [`Receiver::finish`]; then it has to be sent again.
    pub async fn pause(mut self) -> Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.store().await }
    }

    async fn complete(&self) -> Result<Summary> {
        let Self { resources, claim, upload, .. } = self;
        let parts = resources.table.parts(&claim.id).await?;
        let (checker, upload) = (Arc::clone(resources), upload.clone());
        let checked = blocking(move || checker.keep_checked(&upload, &parts)).await;
        match checked {
            Ok(summary) => {
                resources.table.complete(claim, &summary).await?;
                Ok(summary)
            }
            Err(error) => {
                forget_unusable(resources, claim, &error).await;
                Err(error)
            }
        }
    }

    /// Stores the buffer as a part.
    async fn store(&mut self) -> Result<()> {
        let bytes = mem::take(&mut self.buffer).freeze();
        let images = mem::take(&mut self.images);
        let (size, received) = (bytes.len() as u64, self.upload.received_bytes);
        let Self { resources, claim, .. } = &*self;
        put_named(&*resources.artifacts, bytes, |digest| async move {
            let part = Part { bytes: size, digest };
            let named = resources.table.append(claim, received, &part, images).await;
            if named.as_ref().is_err_and(|error| !matches!(error, Error::Unavailable { .. })) {
                resources.garbage.forget_unused(&[part.digest]).await;
            }
            named
        })
        .await?;
        self.upload.received_bytes += size;
        self.upload.received_images += images;
        Ok(())
    }
}

/// Forgets an upload that failed a check which it would fail again.
async fn forget_unusable(resources: &Resources, claim: &Claim, error: &Error) {
    if !matches!(error, Error::InvalidArgument { .. } | Error::CorruptArtifact { .. }) {
        return;
    }
    match resources.table.discard(claim).await {
        Ok(()) => resources.garbage.collect().await,
        Err(error) => tracing::warn!(%error, "an unusable upload stays until it expires"),
    }
}

/// What earlier streams have stored of a file whose first bytes may not be checked yet; `None` if
/// there is nothing more to check before the end.
async fn stored_start(resources: &Resources, upload: &Upload) -> Result<Option<BytesMut>> {
    let most = match (&upload.announced.content, upload.announced.kind) {
        (Content::Images(_), _) => return Ok(None),
        (Content::File { .. }, ResourceKind::Checkpoint) => PART,
        (Content::File { .. }, ResourceKind::Dataset) => START,
    };
    if upload.summary.is_some() || upload.received_bytes >= most as u64 {
        return Ok(None);
    }
    let mut start = BytesMut::new();
    for part in resources.table.parts(&upload.id).await? {
        start.extend_from_slice(&resources.artifacts.get(&part.digest).await?);
    }
    Ok(Some(start))
}

impl Resources {
    /// Copies a whole upload to the local disk, checks it and keeps the copy. Blocking.
    fn keep_checked(&self, upload: &Upload, parts: &[Part]) -> Result<Summary> {
        let draft = self.draft(upload, parts, &|| Ok(()))?;
        if let Content::File { sha256, .. } = &upload.announced.content
            && *sha256 != draft.sha256
        {
            let reason = format!("the content that came has {}", draft.sha256);
            return Err(Error::invalid("header.sha256", reason));
        }
        let kind = upload.announced.kind;
        let path = kind.file_in(draft.folder());
        let summary = match kind {
            ResourceKind::Checkpoint => {
                let checkpoint = Checkpoint::open(&path).map_err(|e| e.on_field("chunk"))?;
                Summary::Checkpoint {
                    architecture: checkpoint.spec.architecture.clone(),
                    digest: checkpoint.digest,
                }
            }
            ResourceKind::Dataset => {
                let field = match upload.announced.content {
                    Content::File { .. } => "chunk",
                    Content::Images(_) => "image",
                };
                let dataset = Dataset::open(&path, field)?;
                dataset.check_files(&self.limits, field)?;
                let images = dataset.samples.len() as u64;
                let digest = draft.sha256.clone();
                Summary::Dataset { digest, images, classes: dataset.classes }
            }
        };
        self.cache.keep(&upload.id, draft)?;
        Ok(summary)
    }
}

/// An image as a member of a tar file.
fn as_member(name: &str, content: &[u8]) -> Result<Vec<u8>> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    let mut builder = Builder::new(Vec::new());
    builder
        .append_data(&mut header, name, content)
        .map_err(|error| Error::invalid("image.name", error.to_string()))?;
    // Without the end mark that `into_inner` would add.
    Ok(mem::take(builder.get_mut()))
}
