//! Names that clients send: checked before they touch a map or a file system.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest model id.
const MAX_ID: usize = 63;

/// Id of a model: `[a-z0-9]`, or that with inner hyphens, at most 63 characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelId(String);

impl ModelId {
    /// Checks an id.
    ///
    /// # Errors
    /// `InvalidArgument` on `field`.
    pub fn parse(text: &str, field: &str) -> Result<Self> {
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let ends_are_alphanumeric =
            bytes.first().is_some_and(inner) && bytes.last().is_some_and(inner);
        if bytes.len() <= MAX_ID
            && ends_are_alphanumeric
            && bytes.iter().all(|b| inner(b) || *b == b'-')
        {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::invalid(
            field,
            format!(
                "an id has 1 to {MAX_ID} lower-case letters, digits and inner hyphens, not `{}`",
                text.escape_debug()
            ),
        ))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A folder of the server that clients name things in: `--checkpoints` or `--datasets`.
#[derive(Clone, Debug)]
pub struct NamedFolder {
    root: Option<PathBuf>,
    kind: &'static str,
    accepts: fn(&Path) -> bool,
}

impl NamedFolder {
    /// Names of `kind` (`checkpoint`, `dataset`) live below `root`; without one there are none.
    /// `accepts` tells what is listed, and which files have names besides the folders.
    ///
    /// # Errors
    /// `Io` when the folder cannot be opened.
    pub fn open(
        root: Option<&Path>,
        kind: &'static str,
        accepts: fn(&Path) -> bool,
    ) -> Result<Self> {
        let canonical = |root: &Path| root.canonicalize().map_err(|e| Error::io(root, e));
        Ok(Self { root: root.map(canonical).transpose()?, kind, accepts })
    }

    /// The folder, or the accepted file, of that name. Blocking.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` for a name that is no plain relative path, or that leads out of
    /// the root itself or by a link in its folder; `NotFound` when there is nothing.
    pub fn resolve(&self, name: &str, field: &str) -> Result<PathBuf> {
        let refused = || {
            let reason = format!(
                "`{}` is not a {} name: plain names joined by `/` are",
                name.escape_debug(),
                self.kind
            );
            Error::invalid(field, reason)
        };
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if name.contains(['\0', '\\']) || !name.split('/').all(plain) {
            return Err(refused());
        }
        if !Path::new(name).components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(refused());
        }
        let not_found = || Error::NotFound { kind: self.kind, name: name.to_owned() };
        let root = self.root.as_ref().ok_or_else(not_found)?;
        // A symbolic link may lead out of the root, so the real path decides.
        let path = root.join(name).canonicalize().map_err(|_| not_found())?;
        if !path.starts_with(root) {
            let reason = format!("`{name}` is a link, or below one, that leads elsewhere");
            return Err(Error::invalid(field, reason));
        }
        if path.is_dir() {
            match escaping_link(&path, root) {
                None => return Ok(path),
                Some(link) => {
                    let reason = format!("`{name}` holds `{link}`, a link that leads elsewhere");
                    return Err(Error::invalid(field, reason));
                }
            }
        }
        if (self.accepts)(&path) { Ok(path) } else { Err(not_found()) }
    }

    /// Names of what is accepted below the root, at most `depth` levels down; the search does not
    /// go below an accepted folder. Sorted. Blocking.
    pub fn list(&self, depth: usize) -> Vec<String> {
        let mut names = Vec::new();
        if let Some(root) = &self.root {
            collect(root, "", depth, &mut |path, name| {
                let accepted = (self.accepts)(path);
                if accepted {
                    names.push(name.to_owned());
                }
                accepted
            });
        }
        names.sort();
        names
    }
}

/// An entry of a folder that is a symbolic link to something outside the root. Links within the root
/// are how caches are laid out; one that leads nowhere is found when it is opened.
fn escaping_link(folder: &Path, root: &Path) -> Option<String> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let mut links = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
    let leaves = |path: &Path| path.canonicalize().is_ok_and(|target| !target.starts_with(root));
    links
        .find(|link| leaves(&link.path()))
        .map(|link| link.file_name().to_string_lossy().escape_debug().to_string())
}

/// Visits files and folders below `folder`; `visit` says whether a folder is a leaf. Unreadable
/// ones and symbolic links are passed over.
fn collect(folder: &Path, prefix: &str, depth: usize, visit: &mut dyn FnMut(&Path, &str) -> bool) {
    let Ok(entries) = folder.read_dir() else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_symlink() {
            continue;
        }
        let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
            continue;
        };
        if !visit(&entry.path(), &name) && kind.is_dir() && depth > 1 {
            collect(&entry.path(), &format!("{name}/"), depth - 1, visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn ids_are_lower_case_words_with_inner_hyphens() {
        for good in ["a", "7", "digits-vit-ubb-w4a4", &"x".repeat(63)] {
            assert_eq!(ModelId::parse(good, "model").unwrap().as_str(), good);
        }
        for bad in ["", "-", "-a", "a-", "A", "a_b", "a/b", "..", "a.b", "é", &"x".repeat(64)] {
            let error = ModelId::parse(bad, "model").unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { field, .. } if field == "model"));
        }
    }

    #[test]
    fn names_never_leave_their_root() {
        let outside = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("digits/calib")).unwrap();
        fs::write(folder.path().join("file"), b"").unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("out")).unwrap();
        let names = NamedFolder::open(Some(folder.path()), "dataset", |_| false).unwrap();
        assert!(names.resolve("digits/calib", "dataset").is_ok());
        for bad in ["", "/", "/etc", "..", "a/../b", "a//b", "./a", "a/", "a\0b", "a\\b", "out"] {
            let error = names.resolve(bad, "dataset").unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }), "{bad}: {error}");
        }
        for absent in ["digits/val", "file"] {
            let error = names.resolve(absent, "dataset").unwrap_err();
            assert!(matches!(error, Error::NotFound { kind: "dataset", .. }), "{absent}: {error}");
        }
    }

    #[test]
    fn links_in_a_folder_stay_below_the_root() {
        use std::os::unix::fs::symlink;
        let outside = tempfile::NamedTempFile::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for name in ["blobs", "inside", "outside", "nowhere"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        fs::write(root.join("blobs/1"), b"").unwrap();
        symlink("../blobs/1", root.join("inside/model.safetensors")).unwrap();
        symlink(outside.path(), root.join("outside/config.json")).unwrap();
        symlink("../gone", root.join("nowhere/config.json")).unwrap();
        let names = NamedFolder::open(Some(root), "checkpoint", |_| false).unwrap();
        assert!(names.resolve("inside", "x").is_ok() && names.resolve("nowhere", "x").is_ok());
        let error = names.resolve("outside", "x").unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn listing_stops_at_accepted_folders() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b/x", "a/inner", "c/d/e/too-deep"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("b/x.tar"), "").unwrap();
        fs::write(folder.path().join("b/other"), "").unwrap();
        let accepts = |path: &Path| ["a", "x", "e", "x.tar"].iter().any(|end| path.ends_with(end));
        let names = NamedFolder::open(Some(folder.path()), "dataset", accepts).unwrap();
        assert_eq!(names.list(2), ["a", "b/x", "b/x.tar"]);
        assert!(names.resolve("b/x.tar", "dataset").is_ok());
        assert!(matches!(names.resolve("b/other", "x").unwrap_err(), Error::NotFound { .. }));
        let none = NamedFolder::open(None, "dataset", accepts).unwrap();
        assert!(none.list(2).is_empty());
        assert!(matches!(none.resolve("a", "dataset").unwrap_err(), Error::NotFound { .. }));
    }
}
