//! Checkpoints and data sets: those in the server's folders, those that clients bring, and those of
//! the hub.

mod cache;
mod hub;
mod receive;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::artifact::store::ArtifactStore;
use crate::data::{Dataset, DecodeLimits, check_subset, has_image_name, is_tar};
use crate::database::Database;
use crate::engine::garbage::Garbage;
use crate::engine::names::NamedFolder;
use crate::engine::registry::blocking;
use crate::error::{Error, Result};
use crate::model::Checkpoint;
use crate::telemetry::metrics;

use cache::{Blueprint, Cache, Copy, Draft};
use hub::{Hub, HubName, Pinned};
use table::{Part, UploadTable};

pub use hub::{HubOwners, check_hub};
pub use receive::Receiver;
pub use table::{Announced, Content, Summary, Upload};

/// How deep names are looked for: `a/b/c`.
const DEPTH: usize = 3;
/// A `config.json` is small; more is not read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Uploads that one server receives at once; each holds one part in memory.
const MAX_RECEIVERS: usize = 16;
/// When somebody who met too many of them should come back.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Most characters of a name, and of what is between its slashes.
const MAX_NAME: (usize, usize) = (200, 100);

/// What can be named in requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceKind {
    /// A float model.
    Checkpoint,
    /// Labelled images.
    Dataset,
}

impl ResourceKind {
    /// `checkpoint` or `dataset`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Dataset => "dataset",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Checkpoint, Self::Dataset].into_iter().find(|kind| kind.name() == name)
    }

    /// What is opened in the folder of an upload's copy.
    fn file_in(self, folder: &Path) -> PathBuf {
        match self {
            Self::Checkpoint => folder.to_owned(),
            Self::Dataset => folder.join(DATASET_FILE),
        }
    }
}

/// Where the hub's files lie in the cache; the dot keeps them apart from the copies of uploads.
const HUB_FOLDER: &str = ".hub";
/// Name of an uploaded data set's file in the folder of its copy.
const DATASET_FILE: &str = "dataset.tar";

/// A float checkpoint on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// Its name in requests.
    pub name: String,
    /// Architecture that its config names; empty if that cannot be read.
    pub architecture: String,
    /// Size of the weights in bytes.
    pub bytes: u64,
    /// How it came.
    pub origin: Origin,
}

/// A labelled data set on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetInfo {
    /// Its name in requests.
    pub name: String,
    /// Number of images.
    pub images: usize,
    /// Class names, in class order.
    pub classes: Vec<String>,
    /// How it came.
    pub origin: Origin,
}

impl DatasetInfo {
    /// Whether so many images can be drawn.
    ///
    /// # Errors
    /// As [`Dataset::subset`].
    pub fn check_count(&self, count: usize, field: &str) -> Result<()> {
        check_subset(count, self.images, field)
    }
}

/// How something came to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It lies in a folder of the server.
    Folder,
    /// A client brought it.
    Upload {
        /// Of a data set, sha256 of its tar file; of a checkpoint, sha256 over `config.json` and
        /// `model.safetensors`.
        digest: String,
        /// When the upload began.
        created: Timestamp,
    },
    /// It is the hub's; its name has the commit.
    Hub,
}

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Page {
    /// Last name of the page before.
    pub after: Option<String>,
    /// Most entries to return.
    pub count: usize,
}

/// What [`Resources`] are made of.
#[derive(Debug)]
pub struct ResourceParts {
    /// Folder of checkpoints, if there is one.
    pub checkpoints: Option<PathBuf>,
    /// Folder of data sets, if there is one.
    pub datasets: Option<PathBuf>,
    /// Where uploads are listed.
    pub database: Database,
    /// Where their content lies.
    pub artifacts: Arc<dyn ArtifactStore>,
    /// Removes content that is not needed any more.
    pub garbage: Garbage,
    /// Folder of their local copies.
    pub cache: PathBuf,
    /// Bytes that local copies may take.
    pub cache_bytes: u64,
    /// Bytes that all uploads together may have.
    pub upload_quota: u64,
    /// Whose checkpoints of the hub may be used; without, nobody's.
    pub hub: Option<HubOwners>,
    /// What is accepted as an image.
    pub limits: DecodeLimits,
}

/// Checkpoints and data sets by name.
#[derive(Debug)]
pub struct Resources {
    checkpoints: NamedFolder,
    datasets: NamedFolder,
    table: UploadTable,
    artifacts: Arc<dyn ArtifactStore>,
    garbage: Garbage,
    cache: Cache,
    hub: Option<Hub>,
    limits: DecodeLimits,
    receivers: Arc<Semaphore>,
    runtime: Handle,
}

impl Resources {
    /// Opens the folders; `runtime` is used by the blocking methods. Blocking.
    ///
    /// # Errors
    /// `Io` when a folder cannot be used; `InvalidArgument` on `hub` when it cannot be used.
    pub fn open(parts: ResourceParts, runtime: Handle) -> Result<Self> {
        let ResourceParts {
            checkpoints,
            datasets,
            database,
            artifacts,
            garbage,
            cache,
            cache_bytes,
            upload_quota,
            hub,
            limits,
        } = parts;
        let hub = hub
            .map(|owners| Hub::open(owners, &cache.join(HUB_FOLDER), cache_bytes, runtime.clone()));
        let open = |root: Option<PathBuf>, kind: ResourceKind, accepts| {
            NamedFolder::open(root.as_deref(), kind.name(), accepts)
        };
        Ok(Self {
            checkpoints: open(checkpoints, ResourceKind::Checkpoint, is_checkpoint)?,
            datasets: open(datasets, ResourceKind::Dataset, is_dataset)?,
            table: UploadTable::new(database, upload_quota),
            artifacts,
            garbage,
            cache: Cache::new(cache, cache_bytes),
            hub: hub.transpose()?,
            limits,
            receivers: Arc::new(Semaphore::new(MAX_RECEIVERS)),
            runtime,
        })
    }

    /// Checkpoints by name.
    ///
    /// # Errors
    /// `Unavailable`; `Internal` when the server stops.
    pub async fn checkpoints(&self, page: Page) -> Result<Vec<CheckpointInfo>> {
        let uploads = self.table.list(ResourceKind::Checkpoint, true, &page).await?;
        let uploaded = uploads.iter().filter_map(checkpoint_of_upload);
        let uploaded = uploaded.map(|info| (info.name.clone(), Some(info))).collect();
        let folder = self.checkpoints.clone();
        blocking(move || {
            let names = merge(folder.list(DEPTH), uploaded, &page);
            let infos = names.into_iter();
            Ok(infos.filter_map(|(name, i)| i.or_else(|| checkpoint(&folder, name))).collect())
        })
        .await
    }

    /// Data sets by name: folders with class folders that hold images, tar files, uploads.
    ///
    /// # Errors
    /// `Unavailable`; `Internal` when the server stops.
    pub async fn datasets(&self, page: Page) -> Result<Vec<DatasetInfo>> {
        let uploads = self.table.list(ResourceKind::Dataset, true, &page).await?;
        let uploaded = uploads.iter().filter_map(dataset_of_upload);
        let uploaded = uploaded.map(|info| (info.name.clone(), Some(info))).collect();
        let folder = self.datasets.clone();
        blocking(move || {
            let names = merge(folder.list(DEPTH), uploaded, &page);
            let infos = names.into_iter();
            Ok(infos.filter_map(|(name, i)| i.or_else(|| dataset(&folder, name).ok())).collect())
        })
        .await
    }

    /// One checkpoint; of the hub, what the name stands for now.
    ///
    /// # Errors
    /// `InvalidArgument` on `name`; `NotFound`; `Unavailable`; for the hub's also
    /// `FailedPrecondition` without the right to use it.
    pub async fn checkpoint(self: &Arc<Self>, name: &str) -> Result<CheckpointInfo> {
        if let Some(name) = HubName::parse(name, "name")? {
            let resources = Arc::clone(self);
            return blocking(move || {
                let Pinned { name, config, bytes } = resources.hub()?.pin(&name, "name")?;
                let architecture = architecture(&config).unwrap_or_default();
                Ok(CheckpointInfo { name, architecture, bytes, origin: Origin::Hub })
            })
            .await;
        }
        let (folder, owned) = (self.checkpoints.clone(), name.to_owned());
        match blocking(move || folder.resolve(&owned, "name").map(|_| checkpoint(&folder, owned)))
            .await
        {
            Ok(Some(info)) => Ok(info),
            Ok(None) | Err(Error::NotFound { .. }) => {
                let upload = self.table.find(ResourceKind::Checkpoint, name).await?;
                checkpoint_of_upload(&upload).ok_or_else(|| not_found(&upload))
            }
            Err(error) => Err(error),
        }
    }

    /// One data set.
    ///
    /// # Errors
    /// As [`Resources::checkpoint`].
    pub async fn dataset(&self, name: &str) -> Result<DatasetInfo> {
        let (folder, owned) = (self.datasets.clone(), name.to_owned());
        match blocking(move || dataset(&folder, owned)).await {
            Err(Error::NotFound { .. }) => {
                let upload = self.table.find(ResourceKind::Dataset, name).await?;
                dataset_of_upload(&upload).ok_or_else(|| not_found(&upload))
            }
            found => found,
        }
    }

    /// Checks that a checkpoint exists, without opening its weights; the name under which it will
    /// stay the same, if that is another one. Blocking; not for async threads.
    ///
    /// # Errors
    /// As [`Resources::checkpoint`], with `InvalidArgument` on `field`.
    pub fn check_checkpoint(&self, name: &str, field: &str) -> Result<Option<String>> {
        if let Some(name) = HubName::parse(name, field)? {
            return Ok(Some(self.hub()?.pin(&name, field)?.name));
        }
        match self.checkpoints.resolve(name, field) {
            Ok(path) if path.join("config.json").is_file() => Ok(None),
            Ok(_) | Err(Error::NotFound { .. }) => {
                self.uploaded(ResourceKind::Checkpoint, name).map(|_| None)
            }
            Err(error) => Err(error),
        }
    }

    /// Opens a checkpoint. Blocking, for long where it must be fetched, which ends with the error
    /// that `going_on` gives; not for async threads.
    ///
    /// # Errors
    /// As [`Resources::check_checkpoint`] and [`Checkpoint::open`]; `CorruptArtifact`.
    pub fn open_checkpoint(
        &self,
        name: &str,
        field: &str,
        going_on: GoingOn<'_>,
    ) -> Result<Checkpoint> {
        if let Some(hub_name) = HubName::parse(name, field)? {
            let hub = self.hub()?;
            return self.cache.one_at_a_time(name, || hub.checkpoint(&hub_name, field, going_on));
        }
        match self.checkpoints.resolve(name, field) {
            Ok(path) if path.join("config.json").is_file() => return Checkpoint::open(&path),
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let upload = self.uploaded(ResourceKind::Checkpoint, name)?;
        let expected = match &upload.summary {
            Some(Summary::Checkpoint { digest, .. }) => digest.as_str(),
            Some(Summary::Dataset { .. }) | None => "",
        };
        let open = || -> Result<(Checkpoint, Copy)> {
            let copy = self.copy(&upload, going_on)?;
            Ok((Checkpoint::open(&copy.folder)?, copy))
        };
        match open() {
            Ok((checkpoint, _)) if checkpoint.digest == expected => Ok(checkpoint),
            // The local copy is not what it was: another one is made.
            Ok(_) | Err(Error::InvalidArgument { .. } | Error::NotFound { .. }) => {
                tracing::warn!(name, "the local copy of a checkpoint is damaged");
                self.cache.forget(&upload.id);
                let (checkpoint, _) = open()?;
                if checkpoint.digest != expected {
                    return Err(Error::corrupt(name, "the stored parts are not the upload's"));
                }
                Ok(checkpoint)
            }
            Err(error) => Err(error),
        }
    }

    /// What is known of a data set, to check a request by. Of an upload nothing is opened.
    /// Blocking; not for async threads.
    ///
    /// # Errors
    /// `InvalidArgument` on `field`; `NotFound`; `Unavailable`; `Io`.
    pub fn look_at_dataset(&self, name: &str, field: &str) -> Result<DatasetLook> {
        match self.datasets.resolve(name, field) {
            Ok(path) => Ok(DatasetLook::Open(open_named(&path, name, field)?)),
            Err(Error::NotFound { .. }) => {
                let upload = self.uploaded(ResourceKind::Dataset, name)?;
                let info = dataset_of_upload(&upload).ok_or_else(|| not_found(&upload))?;
                Ok(DatasetLook::Uploaded(info))
            }
            Err(error) => Err(error),
        }
    }

    /// Opens a data set. Blocking, for long where it must be fetched, which ends with the error that
    /// `going_on` gives; not for async threads.
    ///
    /// # Errors
    /// As [`Resources::look_at_dataset`]; `CorruptArtifact`.
    pub fn open_dataset(&self, name: &str, field: &str, going_on: GoingOn<'_>) -> Result<Dataset> {
        match self.datasets.resolve(name, field) {
            Ok(path) => return open_named(&path, name, field),
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        let upload = self.uploaded(ResourceKind::Dataset, name)?;
        // The opened set holds its file, whatever becomes of the copy's name.
        let copy = self.copy(&upload, going_on)?;
        Dataset::open(&ResourceKind::Dataset.file_in(&copy.folder), field)
    }

    /// Begins an upload, or goes on with it behind the first `offset` bytes or images. Of several
    /// streams for one upload the latest counts.
    ///
    /// # Errors
    /// `InvalidArgument` on fields of the announcement; `AlreadyExists`; `FailedPrecondition` while
    /// an unfinished upload of something else has the name; `QuotaExceeded`; `Overloaded` when too
    /// many uploads come at once; `Unavailable`.
    pub async fn receive(self: &Arc<Self>, announced: Announced, offset: u64) -> Result<Receiver> {
        check_announced(&announced)?;
        let permit = Arc::clone(&self.receivers).try_acquire_owned().map_err(|_| {
            let reason = format!("{MAX_RECEIVERS} uploads are coming already");
            Error::Overloaded { reason, retry_after: RETRY_AFTER }
        })?;
        if self.is_in_folder(announced.kind, &announced.name).await? {
            let Announced { kind, name, .. } = announced;
            return Err(Error::AlreadyExists { kind: kind.name(), name });
        }
        let claimed = self.table.begin(&announced).await?;
        Receiver::new(Arc::clone(self), claimed, offset, permit).await
    }

    /// An upload, on its way or whole.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn upload(&self, kind: ResourceKind, name: &str) -> Result<Upload> {
        self.table.find(kind, name).await
    }

    /// Uploads by name, on their way or whole.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn uploads(&self, kind: ResourceKind, page: &Page) -> Result<Vec<Upload>> {
        self.table.list(kind, false, page).await
    }

    /// Deletes what a client brought, on its way or whole.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for what lies in the server's folders; `Unavailable`.
    pub async fn delete(&self, kind: ResourceKind, name: &str) -> Result<()> {
        match self.table.find(kind, name).await {
            Ok(upload) => {
                self.table.remove(kind, name).await?;
                self.cache.forget(&upload.id);
                self.garbage.collect().await;
                Ok(())
            }
            Err(error @ Error::NotFound { .. }) => {
                if !self.is_in_folder(kind, name).await? {
                    return Err(error);
                }
                let reason =
                    format!("{} `{name}` is a folder of the server, not an upload", kind.name());
                Err(Error::FailedPrecondition { reason })
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets unfinished uploads to which nothing was added for so long; how many.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn expire(&self, idle: Duration) -> Result<usize> {
        self.table.expire(idle).await
    }

    async fn is_in_folder(&self, kind: ResourceKind, name: &str) -> Result<bool> {
        let folder = match kind {
            ResourceKind::Checkpoint => self.checkpoints.clone(),
            ResourceKind::Dataset => self.datasets.clone(),
        };
        let name = name.to_owned();
        blocking(move || Ok(folder.resolve(&name, "name").is_ok())).await
    }

    /// An upload that is whole.
    fn uploaded(&self, kind: ResourceKind, name: &str) -> Result<Upload> {
        let upload = self.runtime.block_on(self.table.find(kind, name))?;
        if upload.summary.is_none() {
            return Err(not_found(&upload));
        }
        Ok(upload)
    }

    /// The local copy of a whole upload; made if there is none.
    fn copy(&self, upload: &Upload, going_on: GoingOn<'_>) -> Result<Copy> {
        self.cache.one_at_a_time(&upload.id, || {
            if let Some(copy) = self.cache.find(&upload.id) {
                metrics::cache_hit("copies");
                return Ok(copy);
            }
            let parts = self.runtime.block_on(self.table.parts(&upload.id))?;
            let draft = self.draft(upload, &parts, going_on)?;
            let expected = match (&upload.announced.content, &upload.summary) {
                (Content::File { sha256, .. }, _) => Some(sha256),
                (Content::Images(_), Some(Summary::Dataset { digest, .. })) => Some(digest),
                (Content::Images(_), _) => None,
            };
            if expected.is_some_and(|expected| *expected != draft.sha256) {
                let reason = "the stored parts are not the upload's";
                return Err(Error::corrupt(&upload.announced.name, reason));
            }
            self.cache.keep(&upload.id, draft)
        })
    }

    fn hub(&self) -> Result<&Hub> {
        let reason = || "this server takes no checkpoints of the hub".to_owned();
        self.hub.as_ref().ok_or_else(|| Error::FailedPrecondition { reason: reason() })
    }

    fn draft(&self, upload: &Upload, parts: &[Part], going_on: GoingOn<'_>) -> Result<Draft> {
        let blueprint = match upload.announced.kind {
            ResourceKind::Checkpoint => Blueprint {
                parts,
                file: "model.safetensors",
                beside: &[("config.json", &upload.announced.config)],
            },
            ResourceKind::Dataset => Blueprint { parts, file: DATASET_FILE, beside: &[] },
        };
        self.cache.draft(&blueprint, &*self.artifacts, &self.runtime, going_on)
    }
}

/// Whether whoever waits for something still wants it: asked now and then, its error ends the wait.
pub type GoingOn<'a> = &'a dyn Fn() -> Result<()>;

/// A data set as far as it can be seen without fetching it.
#[derive(Debug)]
pub enum DatasetLook {
    /// It is at hand.
    Open(Dataset),
    /// It may have to be fetched first.
    Uploaded(DatasetInfo),
}

fn check_announced(announced: &Announced) -> Result<()> {
    let Announced { kind, name, config, content } = announced;
    let part = |part: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        !part.is_empty()
            && part.len() <= MAX_NAME.1
            && part.bytes().all(plain)
            && !part.starts_with(['.', '-'])
    };
    if name.len() > MAX_NAME.0 || name.split('/').count() > DEPTH || !name.split('/').all(part) {
        let reason = format!(
            "`{}` is not one to {DEPTH} words of letters, digits, `.`, `_` and `-`, joined by `/`",
            name.escape_debug()
        );
        return Err(Error::invalid("header.name", reason));
    }
    match content {
        Content::File { bytes: 0, .. } => {
            return Err(Error::invalid("header.bytes", "must be the size of the file"));
        }
        Content::File { sha256, .. }
            if sha256.len() != 64 || !sha256.bytes().all(|b| b"0123456789abcdef".contains(&b)) =>
        {
            let reason = "must be the file's sha256 in 64 lower-case hexadecimal digits";
            return Err(Error::invalid("header.sha256", reason));
        }
        Content::File { bytes, .. } if *kind == ResourceKind::Checkpoint => {
            Checkpoint::check_size(*bytes).map_err(|error| error.on_field("header.bytes"))?;
        }
        Content::File { .. } => {}
        Content::Images(0) => {
            return Err(Error::invalid("header.images", "must be the number of images"));
        }
        Content::Images(_) if *kind == ResourceKind::Checkpoint => {
            return Err(Error::invalid("header.images", "a checkpoint has no images"));
        }
        Content::Images(_) => {}
    }
    match kind {
        ResourceKind::Checkpoint => {
            Checkpoint::check_config(config.as_bytes()).map_err(|e| e.on_field("header.config"))
        }
        ResourceKind::Dataset if config.is_empty() => Ok(()),
        ResourceKind::Dataset => {
            Err(Error::invalid("header.config", "must be empty: a data set has no config"))
        }
    }
}

/// The names of a page, of folders and of uploads; a folder hides an upload of the same name.
fn merge<T>(
    folders: Vec<String>,
    mut uploaded: BTreeMap<String, Option<T>>,
    page: &Page,
) -> Vec<(String, Option<T>)> {
    let follows = |name: &String| page.after.as_ref().is_none_or(|after| name > after);
    uploaded.extend(folders.into_iter().filter(follows).map(|name| (name, None)));
    uploaded.into_iter().take(page.count).collect()
}

fn is_checkpoint(path: &Path) -> bool {
    path.join("config.json").is_file() && path.join("model.safetensors").is_file()
}

/// Whether it is a tar file, or a folder in the folder holds an image. Opening the set would list
/// every image.
fn is_dataset(path: &Path) -> bool {
    if path.is_file() {
        return is_tar(path);
    }
    let entries = |path: &Path| path.read_dir().into_iter().flatten().flatten();
    let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries(path)
        .filter(is_folder)
        .any(|class| entries(&class.path()).any(|entry| has_image_name(&entry.path())))
}

fn checkpoint(folder: &NamedFolder, name: String) -> Option<CheckpointInfo> {
    let path = folder.resolve(&name, "checkpoint").ok()?;
    let bytes = fs::metadata(path.join("model.safetensors")).ok()?.len();
    let architecture = architecture(&path.join("config.json")).unwrap_or_default();
    Some(CheckpointInfo { name, architecture, bytes, origin: Origin::Folder })
}

fn architecture(config: &Path) -> Option<String> {
    if fs::metadata(config).ok()?.len() > MAX_CONFIG_BYTES {
        return None;
    }
    let config: Value = serde_json::from_slice(&fs::read(config).ok()?).ok()?;
    config.get("architecture")?.as_str().map(str::to_owned)
}

fn dataset(folder: &NamedFolder, name: String) -> Result<DatasetInfo> {
    let path = folder.resolve(&name, "name")?;
    let Dataset { classes, samples, .. } = open_named(&path, &name, "name")?;
    Ok(DatasetInfo { name, images: samples.len(), classes, origin: Origin::Folder })
}

/// Opens a data set; what speaks against it says its name.
fn open_named(path: &Path, name: &str, field: &str) -> Result<Dataset> {
    Dataset::open(path, field).map_err(|error| {
        if let Error::InvalidArgument { field, reason } = error {
            return Error::invalid(field, format!("`{name}`: {reason}"));
        }
        error
    })
}

fn checkpoint_of_upload(upload: &Upload) -> Option<CheckpointInfo> {
    let Some(Summary::Checkpoint { architecture, digest }) = &upload.summary else { return None };
    Some(CheckpointInfo {
        name: upload.announced.name.clone(),
        architecture: architecture.clone(),
        bytes: upload.received_bytes,
        origin: Origin::Upload { digest: digest.clone(), created: upload.created },
    })
}

fn dataset_of_upload(upload: &Upload) -> Option<DatasetInfo> {
    let Some(Summary::Dataset { digest, images, classes }) = &upload.summary else { return None };
    Some(DatasetInfo {
        name: upload.announced.name.clone(),
        images: usize::try_from(*images).unwrap_or(usize::MAX),
        classes: classes.clone(),
        origin: Origin::Upload { digest: digest.clone(), created: upload.created },
    })
}

fn not_found(upload: &Upload) -> Error {
    let Announced { kind, name, .. } = &upload.announced;
    Error::NotFound { kind: kind.name(), name: name.clone() }
}
