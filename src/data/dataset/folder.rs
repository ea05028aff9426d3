//! Data sets in folders.

use std::fs::{self, DirEntry, File};
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use super::archive::MAX_CLASSES_BYTES;
use super::{CLASSES_FILE, Contents, Source, has_image_name};
use crate::error::{Error, Result};

/// What a folder holds; `canonical` is the folder without symbolic links.
pub(super) fn contents(root: &Path, canonical: &Path, field: &str) -> Result<Contents> {
    let listing = Listing { canonical, field };
    let mut contents = Contents { classes: read_classes(root)?, ..Contents::default() };
    for folder in listing.entries(root, Kind::Folder)? {
        let path = root.join(&folder);
        let files = listing.entries(&path, Kind::Image)?.into_iter();
        let images = files.map(|file| (file.clone(), Source::File(path.join(file)))).collect();
        contents.folders.insert(folder, images);
    }
    Ok(contents)
}

fn read_classes(root: &Path) -> Result<Option<String>> {
    let path = root.join(CLASSES_FILE);
    let read = |file: File| {
        let mut text = String::new();
        file.take(MAX_CLASSES_BYTES).read_to_string(&mut text).map(|_| text)
    };
    match File::open(&path).and_then(read) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, error)),
    }
}

/// Which entries of a folder are wanted.
#[derive(Clone, Copy)]
enum Kind {
    Folder,
    Image,
}

/// Lists folders of one data set.
struct Listing<'a> {
    /// The root without symbolic links.
    canonical: &'a Path,
    field: &'a str,
}

impl Listing<'_> {
    /// Names of the wanted entries, in any order.
    fn entries(&self, folder: &Path, kind: Kind) -> Result<Vec<String>> {
        let failed = |error| Error::io(folder, error);
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).map_err(failed)? {
            if let Some(name) = self.wanted(&entry.map_err(failed)?, kind)? {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The entry's name if it is of the kind.
    fn wanted(&self, entry: &DirEntry, kind: Kind) -> Result<Option<String>> {
        let (path, name) = (entry.path(), entry.file_name());
        if name.as_encoded_bytes().starts_with(b".") {
            return Ok(None);
        }
        if matches!(kind, Kind::Image) && !has_image_name(&path) {
            return Ok(None);
        }
        let mut file_type = entry.file_type().map_err(|error| Error::io(&path, error))?;
        if file_type.is_symlink() {
            let target = path.canonicalize().map_err(|error| Error::io(&path, error))?;
            if !target.starts_with(self.canonical) {
                let reason = format!("symbolic link {} leaves the data set", path.display());
                return Err(Error::invalid(self.field, reason));
            }
            file_type = target.metadata().map_err(|error| Error::io(&path, error))?.file_type();
        }
        let fits = match kind {
            Kind::Folder => file_type.is_dir(),
            Kind::Image => file_type.is_file(),
        };
        if !fits {
            return Ok(None);
        }
        let name = name.into_string().map_err(|name| {
            Error::invalid(self.field, format!("{} is not a UTF-8 name", name.display()))
        })?;
        Ok(Some(name))
    }
}
