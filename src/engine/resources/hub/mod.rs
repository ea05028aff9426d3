//! Checkpoints of the Hugging Face hub, under names like `hf-hub:timm/vit_tiny_patch16_224`.
//!
//! The client is compiled in with feature `hub`; without it a server cannot be told to use the hub.

#[cfg(feature = "hub")]
mod client;
#[cfg(not(feature = "hub"))]
#[path = "without.rs"]
mod client;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::model::Checkpoint;

use super::GoingOn;
use client::Client;

/// What names of the hub begin with; timm's word for it.
const PREFIX: &str = "hf-hub:";
/// Most characters of an owner, a name or a revision.
const MAX_WORD: usize = 128;

/// A checkpoint of the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubName {
    owner: String,
    name: String,
    /// A branch, a tag or a commit; the main branch if there is none.
    revision: Option<String>,
}

impl HubName {
    /// `None` for names of something else.
    ///
    /// # Errors
    /// `InvalidArgument` on `field`.
    pub(super) fn parse(text: &str, field: &str) -> Result<Option<Self>> {
        let Some(id) = text.strip_prefix(PREFIX) else { return Ok(None) };
        let (id, revision) = match id.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (id, None),
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let word = |word: &str| {
            (1..=MAX_WORD).contains(&word.len())
                && !word.starts_with('.')
                && !word.contains("..")
                && word.bytes().all(plain)
        };
        let is_revision =
            |text: &str| text.len() <= MAX_WORD && !text.is_empty() && text.split('/').all(word);
        match id.split_once('/') {
            Some((owner, name))
                if word(owner) && word(name) && revision.is_none_or(is_revision) =>
            {
                Ok(Some(Self {
                    owner: owner.to_owned(),
                    name: name.to_owned(),
                    revision: revision.map(str::to_owned),
                }))
            }
            Some(_) | None => {
                let reason = format!(
                    "`{}` is not {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION",
                    text.escape_debug()
                );
                Err(Error::invalid(field, reason))
            }
        }
    }

    fn at(&self, commit: &str) -> String {
        format!("{PREFIX}{}/{}@{commit}", self.owner, self.name)
    }

    #[cfg(feature = "hub")]
    fn is_pinned(&self) -> bool {
        self.revision.as_deref().is_some_and(is_commit)
    }

    #[cfg(any(feature = "hub", test))]
    fn text(&self) -> String {
        match &self.revision {
            Some(revision) => self.at(revision),
            None => format!("{PREFIX}{}/{}", self.owner, self.name),
        }
    }
}

/// Whose checkpoints of the hub may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HubOwners {
    /// Everybody's.
    All,
    /// Those of these users and organisations.
    Listed(BTreeSet<String>),
}

impl FromStr for HubOwners {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.trim() == "*" {
            return Ok(Self::All);
        }
        let owners: BTreeSet<String> = text.split(',').map(|o| o.trim().to_owned()).collect();
        match owners.iter().find(|owner| HubName::parse(&format!("{PREFIX}{owner}/x"), "").is_err())
        {
            None => Ok(Self::Listed(owners)),
            Some(owner) => Err(Error::invalid("hub", format!("`{owner}` is not an owner's name"))),
        }
    }
}

/// A state of a repository, whose config is in the cache.
#[derive(Clone, Debug)]
struct Snapshot {
    commit: String,
    /// The path of the config.
    config: PathBuf,
}

impl Snapshot {
    /// Of a file in the cache, which lies in a folder of the commit's name.
    #[cfg(feature = "hub")]
    fn of(config: &Path) -> Result<Self> {
        let commit = config.parent().and_then(|folder| folder.file_name());
        match commit.and_then(|commit| commit.to_str()).filter(|commit| is_commit(commit)) {
            Some(commit) => Ok(Self { commit: commit.to_owned(), config: config.to_owned() }),
            None => Err(Error::internal(format!("{} is in no commit", config.display()))),
        }
    }
}

/// A checkpoint of the hub at one commit.
#[derive(Clone, Debug)]
pub(super) struct Pinned {
    /// Its name with the commit for the revision.
    pub(super) name: String,
    /// Its config, in the cache.
    pub(super) config: PathBuf,
    /// Size of its weights in bytes.
    pub(super) bytes: u64,
}

/// Whether this build can use the hub, with the variables of its clients as they are; nobody is asked.
///
/// # Errors
/// `InvalidArgument` on `hub`.
pub fn check_hub() -> Result<()> {
    Client::check()
}

/// The hub.
#[derive(Debug)]
pub(super) struct Hub {
    owners: HubOwners,
    client: Client,
}

impl Hub {
    /// `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and the other variables of the hub's own
    /// clients hold. What is fetched lies in `cache` unless they name another folder; weights of
    /// more than `max_bytes` are not fetched. `runtime` is used by the blocking methods.
    ///
    /// # Errors
    /// `InvalidArgument` on `hub` when this build has no client, or when a variable is unusable.
    pub(super) fn open(
        owners: HubOwners,
        cache: &Path,
        max_bytes: u64,
        runtime: Handle,
    ) -> Result<Self> {
        Ok(Self { owners, client: Client::new(cache, max_bytes, runtime)? })
    }

    /// Finds out what a name stands for now, and looks at the config. Blocking.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` for what cannot be a checkpoint; `NotFound`;
    /// `FailedPrecondition` for an owner who is not listed, without the right to read, and for what
    /// is not in the cache while offline; `Unavailable`; `Io`.
    pub(super) fn pin(&self, name: &HubName, field: &str) -> Result<Pinned> {
        self.check_owner(name)?;
        let look = || {
            let snapshot = self.client.config(name)?;
            let config = &snapshot.config;
            let read = fs::read(config).map_err(|error| Error::io(config, error))?;
            Checkpoint::check_config(&read)?;
            let bytes = self.client.weights_size(name, &snapshot)?;
            Ok(Pinned { name: name.at(&snapshot.commit), config: snapshot.config, bytes })
        };
        look().map_err(|error: Error| error.on_field(field))
    }

    /// Opens a checkpoint, which is fetched if it is not in the cache. Blocking.
    ///
    /// # Errors
    /// As [`Hub::pin`] and [`Checkpoint::open`]; `CorruptArtifact` when something else came than
    /// was announced; what `going_on` gives.
    pub(super) fn checkpoint(
        &self,
        name: &HubName,
        field: &str,
        going_on: GoingOn<'_>,
    ) -> Result<Checkpoint> {
        self.check_owner(name)?;
        let open = || {
            let snapshot = self.client.config(name)?;
            let weights = self.client.weights(name, &snapshot, going_on)?;
            // Both lie in the folder of the commit.
            Checkpoint::open(weights.parent().unwrap_or(&weights))
        };
        open().map_err(|error: Error| error.on_field(field))
    }

    fn check_owner(&self, name: &HubName) -> Result<()> {
        match &self.owners {
            HubOwners::Listed(owners) if !owners.contains(&name.owner) => {
                let reason =
                    format!("this server takes no checkpoints of the hub's `{}`", name.owner);
                Err(Error::FailedPrecondition { reason })
            }
            HubOwners::Listed(_) | HubOwners::All => Ok(()),
        }
    }
}

#[cfg(feature = "hub")]
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_an_owner_a_name_and_a_revision() {
        let full = "hf-hub:timm/vit_tiny.augreg-in21k@refs/pr/1";
        let name = HubName::parse(full, "checkpoint").unwrap().unwrap();
        assert_eq!((name.owner.as_str(), name.revision.as_deref()), ("timm", Some("refs/pr/1")));
        assert_eq!(name.text(), full);
        assert_eq!(name.at("0a"), "hf-hub:timm/vit_tiny.augreg-in21k@0a");
        let name = HubName::parse("hf-hub:a/b", "checkpoint").unwrap().unwrap();
        assert_eq!((name.revision.as_ref(), name.text().as_str()), (None, "hf-hub:a/b"));
        assert_eq!(HubName::parse("timm/vit_tiny", "checkpoint").unwrap(), None);
    }

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for bad in [
            "",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@x/../y",
            "a/b?x",
            "a/b@/x",
            "a/b c",
        ] {
            let error = HubName::parse(&format!("hf-hub:{bad}"), "checkpoint").unwrap_err();
            assert!(
                matches!(&error, Error::InvalidArgument { field, .. } if field == "checkpoint"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn owners_are_a_list_or_everybody() {
        assert_eq!("*".parse::<HubOwners>().unwrap(), HubOwners::All);
        let listed = HubOwners::Listed(["timm", "me"].map(str::to_owned).into());
        assert_eq!("timm, me".parse::<HubOwners>().unwrap(), listed);
        for bad in ["", "timm,", "a/b", "a b"] {
            assert!(bad.parse::<HubOwners>().is_err(), "{bad}");
        }
    }
}
