//! The hub over HTTP, and its cache on the local disk.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::{HFRepository, RepoTypeModel};
use hf_hub::{HFClient, HFError, HFResult};
use sha1::{Digest as _, Sha1};
use tokio::runtime::Handle;

use super::{HubName, Snapshot};
use crate::digest::{hex, sha256_hex_of};
use crate::engine::resources::GoingOn;
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
/// More is not fetched as a config.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Time for an answer about a file.
const ANSWER: Duration = Duration::from_secs(30);
/// Time without a byte after which a download counts as dead.
const STALLED: Duration = Duration::from_secs(60);
/// How often a download is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// The hub's words for what does not exist.
const ABSENT: [&str; 2] = ["RepoNotFound", "RevisionNotFound"];
/// Branch that is meant when none is named.
const MAIN: &str = "main";
/// Variables that name a cache folder of the hub's clients.
const CACHES: [&str; 3] = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"];

/// The hub's client.
#[derive(Debug)]
pub(super) struct Client {
    client: HFClient,
    offline: bool,
    max_bytes: u64,
    runtime: Handle,
}

/// A file of a repository.
#[derive(Clone, Copy, Debug)]
struct RemoteFile<'a> {
    name: &'a HubName,
    revision: &'a str,
    file: &'a str,
    /// It may have so many bytes.
    max_bytes: u64,
}

/// Bytes of a download so far.
#[derive(Debug, Default)]
struct Meter(AtomicU64);

impl ProgressHandler for Meter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let bytes = match event {
            DownloadEvent::Progress { files } => files.iter().map(|f| f.bytes_completed).sum(),
            DownloadEvent::AggregateProgress { bytes_completed, .. } => *bytes_completed,
            DownloadEvent::Start { .. } | DownloadEvent::Complete => return,
        };
        self.0.fetch_max(bytes, Ordering::Relaxed);
    }
}

fn unusable(error: &impl std::fmt::Display) -> Error {
    Error::invalid("hub", format!("the hub's settings: {error}"))
}

impl Client {
    /// See [`super::check_hub`].
    pub(super) fn check() -> Result<()> {
        HFClient::builder().build().map(drop).map_err(|error| unusable(&error))
    }

    /// See [`super::Hub::open`].
    pub(super) fn new(cache: &Path, max_bytes: u64, runtime: Handle) -> Result<Self> {
        let mut builder = HFClient::builder();
        if CACHES.iter().all(|name| env::var_os(name).is_none()) {
            builder = builder.cache_dir(cache);
        }
        let client = builder.build().map_err(|error| unusable(&error))?;
        let offline = env::var("HF_HUB_OFFLINE").is_ok_and(|value| is_true(&value));
        tracing::info!(endpoint = client.endpoint(), offline, "using the hub");
        Ok(Self { client, offline, max_bytes, runtime })
    }

    /// The commit that a name stands for now, with its config at hand.
    pub(super) fn config(&self, name: &HubName) -> Result<Snapshot> {
        let revision = name.revision.as_deref().unwrap_or(MAIN);
        let file = RemoteFile { name, revision, file: CONFIG, max_bytes: MAX_CONFIG_BYTES };
        // What a branch stands for is asked for again and again.
        let cached = if self.offline || name.is_pinned() { self.cached(&file)? } else { None };
        let path = cached.map_or_else(|| self.fetch(&file, &|| Ok(())), Ok)?;
        Snapshot::of(&path)
    }

    /// Size of the weights in bytes.
    pub(super) fn weights_size(&self, name: &HubName, snapshot: &Snapshot) -> Result<u64> {
        let file = self.weights_of(name, snapshot);
        match self.cached(&file)? {
            Some(path) => fs::metadata(&path).map(|m| m.len()).map_err(|e| Error::io(path, e)),
            None => self.size(&file),
        }
    }

    /// The file of the weights, fetched if it is not there.
    pub(super) fn weights(
        &self,
        name: &HubName,
        snapshot: &Snapshot,
        going_on: GoingOn<'_>,
    ) -> Result<PathBuf> {
        let file = self.weights_of(name, snapshot);
        self.cached(&file)?.map_or_else(|| self.fetch(&file, going_on), Ok)
    }

    fn weights_of<'a>(&self, name: &'a HubName, snapshot: &'a Snapshot) -> RemoteFile<'a> {
        let (revision, max_bytes) = (snapshot.commit.as_str(), self.max_bytes);
        RemoteFile { name, revision, file: WEIGHTS, max_bytes }
    }

    fn repository(&self, name: &HubName) -> HFRepository<RepoTypeModel> {
        self.client.model(&name.owner, &name.name)
    }

    /// A file of the cache, if it is there and whole.
    fn cached(&self, file: &RemoteFile<'_>) -> Result<Option<PathBuf>> {
        let look = self.repository(file.name);
        let look = look.download_file().filename(file.file).revision(file.revision);
        let path = match self.runtime.block_on(look.local_files_only(true).send()) {
            Ok(path) => path,
            Err(HFError::LocalEntryNotFound { .. } | HFError::EntryNotFound { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(self.refused(file, error)),
        };
        if is_whole(&path)? {
            return Ok(Some(path));
        }
        tracing::warn!(path = %path.display(), "a file of the hub is damaged");
        self.forget(&path)?;
        Ok(None)
    }

    /// How many bytes the hub says that a file has: not too many.
    fn size(&self, file: &RemoteFile<'_>) -> Result<u64> {
        let RemoteFile { name, revision, file: path, max_bytes } = *file;
        if self.offline {
            let reason = format!(
                "`{}` is not in the cache, and this server is offline (HF_HUB_OFFLINE)",
                name.text()
            );
            return Err(Error::FailedPrecondition { reason });
        }
        let repository = self.repository(name);
        let ask = repository.get_file_metadata().filepath(path).revision(revision).send();
        let answer = self.runtime.block_on(async { tokio::time::timeout(ANSWER, ask).await });
        let bytes = match answer {
            Ok(answer) => answer.map_err(|error| self.refused(file, error))?.file_size,
            Err(_) => return Err(unavailable(format!("no answer within {} s", ANSWER.as_secs()))),
        };
        if bytes <= max_bytes {
            return Ok(bytes);
        }
        let name = name.text();
        let reason = format!("{path} of `{name}` has {bytes} bytes, at most {max_bytes} are taken");
        Err(Error::invalid("checkpoint", reason))
    }

    fn fetch(&self, file: &RemoteFile<'_>, going_on: GoingOn<'_>) -> Result<PathBuf> {
        let announced = self.size(file)?;
        let meter = Arc::new(Meter::default());
        let repository = self.repository(file.name);
        let download = repository
            .download_file()
            .filename(file.file)
            .revision(file.revision)
            .progress(Arc::clone(&meter))
            .send();
        let watched = self.runtime.block_on(watch(download, &meter, going_on))?;
        let path = watched.map_err(|error| self.refused(file, error))?;
        // The library does not look at what came: an error's text lands in the file, too.
        let bytes = fs::metadata(&path).map_err(|error| Error::io(&path, error))?.len();
        if bytes != announced {
            self.forget(&path)?;
            return Err(unavailable(format!("{announced} bytes were announced, {bytes} came")));
        }
        if !is_whole(&path)? {
            self.forget(&path)?;
            return Err(Error::corrupt(
                file.name.text(),
                "the hub gave other bytes than announced",
            ));
        }
        Ok(path)
    }

    /// Removes a file of the cache and the content that it points to.
    fn forget(&self, path: &Path) -> Result<()> {
        let gone = |path: &Path| match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path, error)),
            Ok(()) | Err(_) => Ok(()),
        };
        if let Ok(content) = path.canonicalize() {
            gone(&content)?;
        }
        gone(path)
    }

    #[allow(clippy::wildcard_enum_match_arm, reason = "the enum is non-exhaustive")]
    fn refused(&self, file: &RemoteFile<'_>, error: HFError) -> Error {
        let text = file.name.text();
        let absent = || Error::NotFound { kind: "checkpoint", name: text.clone() };
        match error {
            // The hub does not tell those without rights what exists.
            HFError::AuthRequired { context }
            | HFError::EntryNotFound { context: Some(context), .. }
                if context.error_code.as_deref().is_some_and(|code| ABSENT.contains(&code)) =>
            {
                absent()
            }
            HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => absent(),
            HFError::EntryNotFound { .. } => {
                Error::invalid("checkpoint", format!("`{text}` has no {}", file.file))
            }
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
                let reason =
                    format!("the hub does not let this server read `{text}` (see HF_TOKEN)");
                Error::FailedPrecondition { reason }
            }
            HFError::Io(error) => Error::io(self.client.cache_dir(), error),
            other => unavailable(other.to_string()),
        }
    }
}

/// Waits for a download as long as bytes come and nobody has asked it to stop.
async fn watch<T>(
    download: impl Future<Output = HFResult<T>>,
    meter: &Meter,
    going_on: GoingOn<'_>,
) -> Result<HFResult<T>> {
    let mut download = std::pin::pin!(download);
    let (mut bytes, mut since) = (0, Instant::now());
    loop {
        tokio::select! {
            done = &mut download => return Ok(done),
            () = tokio::time::sleep(LOOK) => going_on()?,
        }
        let now = meter.0.load(Ordering::Relaxed);
        if now != bytes {
            (bytes, since) = (now, Instant::now());
        } else if since.elapsed() > STALLED {
            return Err(unavailable(format!("not a byte in {} s", STALLED.as_secs())));
        }
    }
}

/// Whether a file of the cache is what its name says: large files are named after their sha256,
/// small ones after git's sha1 of them.
fn is_whole(path: &Path) -> Result<bool> {
    let failed = |error| Error::io(path, error);
    let content = path.canonicalize().map_err(failed)?;
    let announced = content.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let found = match announced.len() {
        64 => sha256_hex_of(File::open(&content).map_err(failed)?).map_err(failed)?,
        40 => {
            let bytes = fs::read(&content).map_err(failed)?;
            let git = Sha1::new().chain_update(format!("blob {}\0", bytes.len()));
            hex(&git.chain_update(&bytes).finalize())
        }
        _ => return Ok(true), // another kind of tag, of another kind of hub
    };
    Ok(found == announced)
}

/// As the hub's own clients read it.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

fn unavailable(reason: String) -> Error {
    Error::Unavailable { what: "hub", reason }
}
