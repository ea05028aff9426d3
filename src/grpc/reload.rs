//! What is made from files, and made again when they change: certificates, tokens, keys.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// A value made from files.
pub(super) struct Reloadable<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    current: RwLock<Arc<T>>,
    /// Digest of the contents that were tried last, usable or not.
    tried: Mutex<[u8; 32]>,
}

/// Makes the value from the contents of its files, in their order.
type Make<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T> + Send + Sync>;

/// Something that follows its files.
pub(super) trait Reload: Send + Sync {
    /// Makes the value anew if the files have changed; says whether it did. A failure leaves the
    /// value as it was, and is reported once per change. Blocking.
    ///
    /// # Errors
    /// `Io`, or whatever the value reports of its files.
    fn reload(&self) -> Result<bool>;

    /// The files.
    fn files(&self) -> &[PathBuf];
}

impl<T> Reloadable<T> {
    /// Reads the files for the first time. Blocking.
    ///
    /// # Errors
    /// `Io`, or whatever `make` gives.
    pub(super) fn open(
        files: Vec<PathBuf>,
        make: impl Fn(&[Vec<u8>]) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let contents = read(&files)?;
        let value = Arc::new(make(&contents)?);
        let tried = Mutex::new(digest(&contents));
        Ok(Self { files, make: Box::new(make), current: RwLock::new(value), tried })
    }

    /// The value of now.
    pub(super) fn get(&self) -> Arc<T> {
        // Only whole values are ever put there.
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T: Send + Sync> Reload for Reloadable<T> {
    fn reload(&self) -> Result<bool> {
        let contents = read(&self.files)?;
        let digest = digest(&contents);
        let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
        if *tried == digest {
            return Ok(false);
        }
        *tried = digest;
        let value = Arc::new((self.make)(&contents)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = value;
        Ok(true)
    }

    fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

fn read(files: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    files.iter().map(|file| read_one(file)).collect()
}

fn read_one(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let mut contents = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut contents))
        .map_err(|error| Error::io(path, error))?;
    if contents.len() as u64 > MAX_FILE {
        let reason = format!("{} has more than {MAX_FILE} bytes", path.display());
        return Err(Error::FailedPrecondition { reason });
    }
    Ok(contents)
}

fn digest(contents: &[Vec<u8>]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for content in contents {
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_changed_file_counts_and_a_broken_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        fs::write(&path, "1").unwrap();
        let number = |contents: &[Vec<u8>]| {
            let text = String::from_utf8_lossy(&contents[0]).into_owned();
            text.parse::<u32>().map_err(|error| Error::invalid("number", error.to_string()))
        };
        let value = Reloadable::open(vec![path.clone()], number).unwrap();
        assert_eq!((*value.get(), value.reload().unwrap()), (1, false));
        fs::write(&path, "2").unwrap();
        assert_eq!((value.reload().unwrap(), *value.get()), (true, 2));
        fs::write(&path, "two").unwrap();
        assert!(value.reload().is_err());
        assert!(!value.reload().unwrap(), "the same content is reported once");
        fs::remove_file(&path).unwrap();
        assert!(matches!(value.reload().unwrap_err(), Error::Io { .. }));
        assert_eq!(*value.get(), 2);
        fs::write(&path, "3").unwrap();
        assert!(value.reload().unwrap());
        assert!(Reloadable::open(vec![folder.path().join("none")], number).is_err());
    }
}
