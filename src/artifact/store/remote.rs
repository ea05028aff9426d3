//! Artifacts in an object store: `<prefix>/sha256/<digest>.safetensors` in a bucket.

use std::ffi::OsString;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use object_store::path::Path as ObjectPath;
use object_store::{
    ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, RetryConfig,
};
use tokio_stream::StreamExt as _;

use super::{ArtifactStore, OWNER, is_digest, not_found, owner_in, verified};
use crate::digest::sha256_hex;
use crate::error::{Error, Result};

/// How long a request is repeated before the store counts as unavailable.
const RETRY_TIMEOUT: Duration = Duration::from_secs(15);

/// An [`ArtifactStore`] in a bucket of S3, Google Cloud Storage, Azure, or what speaks their
/// protocol. Credentials, region and endpoint come from the services' usual environment variables
/// (`AWS_…`, `GOOGLE_…`, `AZURE_…`).
#[derive(Debug)]
pub struct RemoteArtifactStore {
    objects: Box<dyn ObjectStore>,
    folder: ObjectPath,
    owner: ObjectPath,
}

impl RemoteArtifactStore {
    /// Prepares the store at `s3://bucket/prefix`, `gs://…`, `az://…`; nothing is asked of it yet.
    ///
    /// # Errors
    /// `InvalidArgument` on `store` for an unusable URL or settings that do not fit.
    pub fn open(url: &str) -> Result<Self> {
        // A variable that is no text is no setting.
        let text = |(key, value): (OsString, OsString)| {
            Some((key.into_string().ok()?, value.into_string().ok()?))
        };
        Self::with_settings(url, std::env::vars_os().filter_map(text))
    }

    /// As [`RemoteArtifactStore::open`], with these settings instead of the environment's.
    ///
    /// # Errors
    /// As [`RemoteArtifactStore::open`].
    pub fn with_settings(
        url: &str,
        settings: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let unusable = |reason: String| Error::invalid("store", reason);
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        let url = url::Url::parse(url).map_err(|error| unusable(error.to_string()))?;
        let bucket = url.host_str().unwrap_or_default().to_owned();
        if bucket.is_empty() && ["s3", "gs", "az"].map(Some).contains(&scheme) {
            return Err(unusable("names no bucket: SERVICE://BUCKET/PREFIX".to_owned()));
        }
        let settings = settings.into_iter().map(|(key, value)| (key.to_ascii_lowercase(), value));
        let retry = RetryConfig { retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() };
        let failed = |error: object_store::Error| unusable(error.to_string());
        let objects: Box<dyn ObjectStore> = match scheme {
            Some("s3") => {
                use object_store::aws::AmazonS3Builder;
                let builder = settings
                    .filter_map(|(key, value)| Some((key.parse().ok()?, value)))
                    .fold(AmazonS3Builder::new(), |b, (key, value)| b.with_config(key, value));
                let builder = builder.with_bucket_name(bucket).with_retry(retry);
                Box::new(builder.build().map_err(failed)?)
            }
            Some("gs") => {
                use object_store::gcp::GoogleCloudStorageBuilder;
                let builder = settings
                    .filter_map(|(key, value)| Some((key.parse().ok()?, value)))
                    .fold(GoogleCloudStorageBuilder::new(), |b, (k, v)| b.with_config(k, v));
                let builder = builder.with_bucket_name(bucket).with_retry(retry);
                Box::new(builder.build().map_err(failed)?)
            }
            Some("az") => {
                use object_store::azure::MicrosoftAzureBuilder;
                let builder = settings
                    .filter_map(|(key, value)| Some((key.parse().ok()?, value)))
                    .fold(MicrosoftAzureBuilder::new(), |b, (k, v)| b.with_config(k, v));
                let builder = builder.with_container_name(bucket).with_retry(retry);
                Box::new(builder.build().map_err(failed)?)
            }
            _ => {
                return Err(unusable("must be an s3://, gs://, az:// or file:/// URL".to_owned()));
            }
        };
        let prefix =
            ObjectPath::from_url_path(url.path()).map_err(|error| unusable(error.to_string()))?;
        let owner = prefix.clone().join(OWNER);
        Ok(Self { objects, folder: prefix.join("sha256"), owner })
    }

    /// The only way from a digest to a name in the bucket.
    fn path(&self, digest: &str) -> Result<ObjectPath> {
        if !is_digest(digest) {
            return Err(not_found(digest));
        }
        Ok(self.folder.clone().join(format!("{digest}.safetensors")))
    }

    /// Whether it is this call that made the object.
    async fn create(&self, name: &str, path: &ObjectPath, bytes: &Bytes) -> Result<bool> {
        if self.contains(name).await? {
            return Ok(false);
        }
        match self.write(path, bytes, PutMode::Create).await {
            // A server may refuse an object that is there before it has read all of it, and close:
            // the refusal is lost in the broken connection.
            Err(error) => {
                if self.contains(name).await? {
                    Ok(false)
                } else {
                    Err(error)
                }
            }
            created => created,
        }
    }

    async fn write(&self, path: &ObjectPath, bytes: &Bytes, mode: PutMode) -> Result<bool> {
        let options = PutOptions { mode, ..PutOptions::default() };
        match self.objects.put_opts(path, PutPayload::from(bytes.clone()), options).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(unavailable(&error)),
        }
    }
}

#[async_trait]
impl ArtifactStore for RemoteArtifactStore {
    /// By the beginning of a list: of a bucket that is not there, too, there are no objects.
    async fn reach(&self) -> Result<()> {
        match self.objects.list(Some(&self.folder)).next().await {
            None | Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(unavailable(&error)),
        }
    }

    async fn put(&self, bytes: Bytes) -> Result<String> {
        let name = sha256_hex(&bytes);
        let path = self.path(&name)?;
        if !self.create(&name, &path, &bytes).await? {
            // The same artifact is stored already. Should that copy have rotted, this one heals it.
            match self.get(&name).await {
                Ok(_) => {}
                Err(Error::CorruptArtifact { .. } | Error::NotFound { .. }) => {
                    self.write(&path, &bytes, PutMode::Overwrite).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(name)
    }

    async fn get(&self, digest: &str) -> Result<Bytes> {
        let read =
            async { self.objects.get(&self.path(digest)?).await.map_err(|e| of(digest, &e)) };
        let bytes = read.await?.bytes().await.map_err(|error| of(digest, &error))?;
        verified(digest, bytes)
    }

    async fn contains(&self, digest: &str) -> Result<bool> {
        match self.objects.head(&self.path(digest)?).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(unavailable(&error)),
        }
    }

    async fn older_than(&self, age: Duration) -> Result<Vec<String>> {
        let now = Timestamp::now().as_millisecond();
        let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        let mut names = Vec::new();
        let mut listing = self.objects.list(Some(&self.folder));
        while let Some(object) = listing.next().await {
            let object = object.map_err(|error| unavailable(&error))?;
            let name =
                object.location.filename().and_then(|name| name.strip_suffix(".safetensors"));
            if let Some(name) = name
                && is_digest(name)
                && now.saturating_sub(object.last_modified.timestamp_millis()) >= age
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    async fn owner(&self) -> Result<Option<String>> {
        let found = match self.objects.get(&self.owner).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(unavailable(&error)),
        };
        let bytes = found.bytes().await.map_err(|error| unavailable(&error))?;
        Ok(Some(owner_in(&bytes)))
    }

    async fn give_to(&self, installation: &str) -> Result<()> {
        let bytes = Bytes::copy_from_slice(installation.as_bytes());
        self.write(&self.owner, &bytes, PutMode::Create).await.map(drop)
    }

    async fn delete(&self, digest: &str) -> Result<()> {
        match self.objects.delete(&self.path(digest)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(unavailable(&error)),
        }
    }
}

fn of(digest: &str, error: &object_store::Error) -> Error {
    if matches!(error, object_store::Error::NotFound { .. }) {
        not_found(digest)
    } else {
        unavailable(error)
    }
}

fn unavailable(error: &object_store::Error) -> Error {
    Error::Unavailable { what: "artifact store", reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_of_known_services_are_taken() {
        let region = || [("AWS_REGION".to_owned(), "nowhere".to_owned())];
        RemoteArtifactStore::with_settings("s3://bucket/some/prefix", region()).unwrap();
        for url in [
            "",
            "bucket",
            "http://host/bucket",
            "ftp://host",
            "s3:bucket",
            "s3://",
            "s3:///some/prefix",
            "gs:///some/prefix",
            "az://",
        ] {
            let error = RemoteArtifactStore::with_settings(url, region()).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidArgument { field, .. } if field == "store"),
                "{url}: {error}"
            );
        }
    }
}
