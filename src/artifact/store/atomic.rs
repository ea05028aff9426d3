//! Files that exist whole or not at all: written beside their place, synced, then linked into it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use crate::error::{Error, Result};

/// Prefix of files that are being written. A crash may leave one; nobody ever reads it.
const TEMPORARY: &str = ".writing-";

/// How the content reaches the file; tests put a full disk here.
pub(super) type WriteFn = fn(&mut File, &[u8]) -> io::Result<()>;

/// The ordinary [`WriteFn`].
pub(super) fn write_all(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)
}

/// What to do when the place is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Leave the old file alone and report `false`.
    Free,
    /// Replace the old file.
    Any,
}

/// Puts a complete, synced file at `path`; `false` if the place was to be free and is not.
///
/// # Errors
/// `Io` on `path`; then the place is as it was, and the temporary file is gone.
pub(super) fn put(path: &Path, bytes: &[u8], place: Place, write: WriteFn) -> Result<bool> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let temporary = folder.join(format!("{TEMPORARY}{}", ulid::Ulid::generate()));
    let placed = write_synced(&temporary, bytes, write).and_then(|()| match place {
        Place::Any => fs::rename(&temporary, path).map(|()| true),
        // Unlike a rename, a hard link refuses a name that is taken.
        Place::Free => match fs::hard_link(&temporary, path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        },
    });
    // After a rename there is nothing to remove; after a failure the write's error matters more.
    let _ = fs::remove_file(&temporary);
    let placed = placed.map_err(|error| Error::io(path, error))?;
    sync_folder(folder)?;
    Ok(placed)
}

/// Makes additions and removals in a folder survive a power failure.
///
/// # Errors
/// `Io` on the folder.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|error| Error::io(folder, error))
}

/// Removes what interrupted writes left in the folder, if this process is the only one to write.
///
/// # Errors
/// `Io` on the folder.
pub(super) fn clear_interrupted(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let entry = entry.map_err(|error| Error::io(folder, error))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_file(entry.path()).map_err(|error| Error::io(entry.path(), error))?;
        }
    }
    Ok(())
}

fn write_synced(path: &Path, bytes: &[u8], write: WriteFn) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).open(path)?;
    write(&mut file, bytes)?;
    file.sync_all()
}

/// A disk with room for three bytes.
#[cfg(test)]
pub(super) fn full_disk(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(&bytes[..bytes.len().min(3)])?;
    Err(io::ErrorKind::StorageFull.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn a_taken_place_is_reported_or_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        assert!(put(&path, b"one", Place::Free, write_all).unwrap());
        assert!(!put(&path, b"two", Place::Free, write_all).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert!(put(&path, b"three", Place::Any, write_all).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn a_full_disk_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        for place in [Place::Free, Place::Any] {
            let error = put(&folder.path().join("a"), b"content", place, full_disk).unwrap_err();
            let Error::Io { source, .. } = error else { panic!("{error}") };
            assert_eq!(source.kind(), io::ErrorKind::StorageFull);
            assert!(names(folder.path()).is_empty());
        }
    }

    #[test]
    fn interrupted_writes_and_nothing_else_are_cleared() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".writing-01"), b"half").unwrap();
        fs::write(folder.path().join("whole"), b"whole").unwrap();
        clear_interrupted(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["whole"]);
    }
}
