//! Data sets in tar files, read in place: the archive is never unpacked.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::Path;
use std::sync::Arc;

use tar::{Archive, Entry, EntryType};

use super::{CLASSES_FILE, Contents, Member, Source, TarFile, has_image_name};
use crate::error::{Error, Result};

/// Most members that are listed: more than ImageNet has images, few enough to hold their names.
const MAX_MEMBERS: usize = 4_000_000;
/// More is no list of classes.
pub(super) const MAX_CLASSES_BYTES: u64 = 16 << 20;
/// How compressed files begin, which cannot be read in place.
const COMPRESSED: [(&[u8], &str); 5] = [
    (&[0x1f, 0x8b], "gzip"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    (b"BZh", "bzip2"),
    (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"),
    (b"PK\x03\x04", "zip"),
];

/// Says what speaks against a file that begins like this being a tar file.
///
/// # Errors
/// `InvalidArgument` on `field` for compressed files.
pub fn check_tar_start(start: &[u8], field: &str) -> Result<()> {
    match COMPRESSED.iter().find(|(magic, _)| start.starts_with(magic)) {
        Some((_, name)) => {
            let reason = format!("the file is compressed ({name}), only plain tar is accepted");
            Err(Error::invalid(field, reason))
        }
        None => Ok(()),
    }
}

/// What a tar file holds. The class folders may lie below a common folder, as in `tar c set`.
pub(super) fn contents(path: &Path, field: &str) -> Result<Contents> {
    let failed = |error| Error::io(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut start = Vec::new();
    (&file).take(8).read_to_end(&mut start).map_err(failed)?;
    check_tar_start(&start, field)?;
    file.rewind().map_err(failed)?;
    let tar = Arc::new(TarFile { path: path.to_owned(), file: file.try_clone().map_err(failed)? });

    let broken = |error: io::Error| match error.raw_os_error() {
        Some(_) => Error::io(path, error),
        None => Error::invalid(field, format!("is not a tar file, or a damaged one: {error}")),
    };
    let mut listing = Listing::new(field, &tar, size);
    for entry in Archive::new(file).entries_with_seek().map_err(broken)? {
        listing.add(&mut entry.map_err(broken)?).map_err(|refused| match refused {
            Refused::Reason(error) => error,
            Refused::Io(error) => broken(error),
        })?;
    }
    listing.finish()
}

/// Members seen so far.
struct Listing<'a> {
    field: &'a str,
    tar: &'a Arc<TarFile>,
    size: u64,
    names: HashSet<String>,
    images: Vec<(String, Source)>,
    folders: Vec<String>,
    classes: Vec<(String, String)>,
}

/// Why a member stops the listing.
enum Refused {
    Reason(Error),
    Io(io::Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Reason(error)
    }
}

impl<'a> Listing<'a> {
    fn new(field: &'a str, tar: &'a Arc<TarFile>, size: u64) -> Self {
        Self {
            field,
            tar,
            size,
            names: HashSet::new(),
            images: Vec::new(),
            folders: Vec::new(),
            classes: Vec::new(),
        }
    }

    fn refuse(&self, reason: String) -> Error {
        Error::invalid(self.field, reason)
    }

    fn add(&mut self, entry: &mut Entry<'_, File>) -> Result<(), Refused> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(()); // a remark of git archive
        }
        let name = self.plain_name(&entry.path_bytes())?;
        if kind == EntryType::Directory {
            self.folders.push(name);
            return Ok(());
        }
        if [EntryType::Link, EntryType::Symlink].contains(&kind) {
            return Err(self.refuse(format!("`{name}` is a link, links are refused")).into());
        }
        if ![EntryType::Regular, EntryType::Continuous].contains(&kind) {
            return Err(self.refuse(format!("`{name}` is neither a file nor a folder")).into());
        }
        let (offset, bytes) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(bytes).is_none_or(|end| end > self.size) {
            return Err(self.refuse(format!("is truncated within `{name}`")).into());
        }
        if self.names.len() == MAX_MEMBERS {
            return Err(self.refuse(format!("has more than {MAX_MEMBERS} members")).into());
        }
        if !self.names.insert(name.clone()) {
            return Err(self.refuse(format!("`{name}` is in it twice")).into());
        }
        let file = name.rsplit('/').next().unwrap_or_default();
        if file == CLASSES_FILE {
            let mut text = String::new();
            let read = entry.take(MAX_CLASSES_BYTES).read_to_string(&mut text);
            read.map_err(Refused::Io)?;
            self.classes.push((name, text));
        } else if !name.split('/').any(|part| part.starts_with('.'))
            && has_image_name(Path::new(file))
        {
            let tar = Arc::clone(self.tar);
            self.images.push((name, Source::Member(Member { tar, offset, bytes })));
        }
        Ok(())
    }

    /// The path of a member without `./` and closing slashes.
    fn plain_name(&self, path: &[u8]) -> Result<String> {
        let shown = String::from_utf8_lossy(path).escape_debug().to_string();
        let text = std::str::from_utf8(path)
            .map_err(|_| self.refuse(format!("`{shown}` is not a UTF-8 name")))?;
        let parts = text.trim_end_matches('/').split('/').filter(|part| *part != ".");
        let plain = |part: &str| !part.is_empty() && part != ".." && !part.contains(['\\', '\0']);
        if text.starts_with('/') || !parts.clone().all(plain) {
            let reason = format!("`{shown}` is not a plain path below the archive");
            return Err(self.refuse(reason));
        }
        Ok(parts.collect::<Vec<_>>().join("/"))
    }

    fn finish(self) -> Result<Contents> {
        let mut contents = Contents::default();
        let Some((first, _)) = self.images.first() else { return Ok(contents) };
        let below = |name: &str| -> Option<(String, String, String)> {
            let (folder, file) = name.rsplit_once('/')?;
            let (prefix, class) = folder.rsplit_once('/').unwrap_or(("", folder));
            Some((prefix.to_owned(), class.to_owned(), file.to_owned()))
        };
        let Some((prefix, ..)) = below(first) else {
            let reason = format!("`{first}` lies in no class folder: expected CLASS/FILE");
            return Err(self.refuse(reason));
        };
        for folder in &self.folders {
            let (above, name) = folder.rsplit_once('/').unwrap_or(("", folder));
            if above == prefix && !name.is_empty() && !name.starts_with('.') {
                contents.folders.entry(name.to_owned()).or_default();
            }
        }
        for (name, source) in &self.images {
            match below(name) {
                Some((above, class, file)) if above == prefix => {
                    let images = contents.folders.entry(class).or_default();
                    images.push((file, source.clone()));
                }
                _ => {
                    let reason = format!(
                        "`{name}` does not lie beside `{first}`: expected CLASS/FILE throughout"
                    );
                    return Err(self.refuse(reason));
                }
            }
        }
        let list = if prefix.is_empty() {
            CLASSES_FILE.to_owned()
        } else {
            format!("{prefix}/{CLASSES_FILE}")
        };
        contents.classes =
            self.classes.into_iter().find(|(name, _)| *name == list).map(|(_, text)| text);
        Ok(contents)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tar::{Builder, Header};
    use tempfile::TempDir;

    use super::*;
    use crate::data::{Dataset, DecodeLimits};

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\nrest";

    /// A tar file of regular files with the given contents.
    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (name, content) in files {
            append(&mut builder, EntryType::Regular, name, content);
        }
        builder.into_inner().unwrap()
    }

    /// Adds a member under exactly this name, which the crate itself would refuse to write.
    fn append(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, content: &[u8]) {
        let mut header = Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        if kind == EntryType::GNUSparse {
            header.as_gnu_mut().unwrap().set_real_size(content.len() as u64);
        }
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }

    fn open(bytes: &[u8]) -> (TempDir, Result<Dataset>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.tar");
        fs::write(&path, bytes).unwrap();
        let set = Dataset::open(&path, "dataset");
        (folder, set)
    }

    fn refusal(bytes: &[u8]) -> String {
        let error = open(bytes).1.unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { field, .. } if field == "dataset"));
        error.to_string()
    }

    #[test]
    fn a_tar_file_reads_as_its_folder_does() {
        let files: [(&str, &[u8]); 6] = [
            ("set/b/2.png", b"two"),
            ("set/b/10.JPEG", b"ten"),
            ("set/a/1.png", b"one"),
            ("set/a/.hidden.png", b""),
            ("set/a/notes.txt", b"x"),
            ("set/._a.png", b""),
        ];
        for prefix in ["", "./"] {
            let named: Vec<(String, &[u8])> =
                files.iter().map(|(name, bytes)| (format!("{prefix}{name}"), *bytes)).collect();
            let named: Vec<(&str, &[u8])> = named.iter().map(|(n, b)| (n.as_str(), *b)).collect();
            let (folder, set) = open(&tar_of(&named));
            let set = set.unwrap();
            // What is open stays readable.
            fs::remove_file(folder.path().join("set.tar")).unwrap();
            assert_eq!(set.classes, ["a", "b"]);
            let read: Vec<(&str, usize, Vec<u8>)> = set
                .samples
                .iter()
                .map(|s| (s.name.as_str(), s.class, s.read(u64::MAX).unwrap()))
                .collect();
            let expected = [
                ("a/1.png", 0, b"one".to_vec()),
                ("b/10.JPEG", 1, b"ten".to_vec()),
                ("b/2.png", 1, b"two".to_vec()),
            ];
            assert_eq!(read, expected);
            assert_eq!(set.samples[0].read(2).unwrap(), b"on");
        }
    }

    #[test]
    fn classes_come_from_the_list_or_the_folders() {
        let mut builder = Builder::new(Vec::new());
        append(&mut builder, EntryType::Directory, "empty/", b"");
        append(&mut builder, EntryType::Regular, "z/1.png", PNG);
        let (_folder, set) = open(&builder.into_inner().unwrap());
        assert_eq!(set.unwrap().classes, ["empty", "z"]);

        let listed =
            tar_of(&[("s/classes.txt", b"z\na\n"), ("s/z/1.png", PNG), ("s/a/1.png", PNG)]);
        assert_eq!(open(&listed).1.unwrap().classes, ["z", "a"]);
        let other = tar_of(&[("classes.txt", b"a\n"), ("z/1.png", PNG)]);
        assert!(refusal(&other).contains("class folder `z` is not in classes.txt"));
    }

    #[test]
    fn links_special_files_and_paths_that_lead_out_are_refused() {
        for kind in [EntryType::Symlink, EntryType::Link] {
            let mut builder = Builder::new(Vec::new());
            append(&mut builder, kind, "a/1.png", b"");
            assert!(refusal(&builder.into_inner().unwrap()).contains("`a/1.png` is a link"));
        }
        for kind in [EntryType::Fifo, EntryType::Char, EntryType::Block, EntryType::GNUSparse] {
            let mut builder = Builder::new(Vec::new());
            append(&mut builder, kind, "a/1.png", b"");
            let reason = refusal(&builder.into_inner().unwrap());
            assert!(reason.contains("neither a file nor a folder"), "{reason}");
        }
        for name in ["../a/1.png", "a/../../1.png", "/a/1.png", "a//1.png", "a\\b/1.png", ".."] {
            let reason = refusal(&tar_of(&[(name, PNG)]));
            assert!(reason.contains("is not a plain path"), "{name}: {reason}");
        }
    }

    #[test]
    fn what_is_no_tar_file_of_class_folders_is_refused() {
        let twice = tar_of(&[("a/1.png", PNG), ("./a/1.png", PNG)]);
        let whole = tar_of(&[("a/1.png", &[7; 2000])]);
        for (bytes, part) in [
            (&b"\x1f\x8b\x08 and so on"[..], "compressed (gzip)"),
            (b"PK\x03\x04", "compressed (zip)"),
            (&[b'x'; 2000], "is not a tar file, or a damaged one"),
            (&whole[..1500], "truncated within `a/1.png`"),
            (&whole[..100], "is not a tar file, or a damaged one"),
            (b"", "holds no images"),
            (&tar_of(&[("1.png", PNG)]), "lies in no class folder"),
            (&tar_of(&[("a/1.png", PNG), ("x/a/2.png", PNG)]), "does not lie beside `a/1.png`"),
            (&twice, "`a/1.png` is in it twice"),
        ] {
            let reason = refusal(bytes);
            assert!(reason.contains(part), "{part}: {reason}");
        }
    }

    #[test]
    fn files_that_are_no_images_are_found() {
        let check = |bytes: &[u8], max_bytes: usize| {
            let (_folder, set) = open(&tar_of(&[("a/1.png", PNG), ("a/2.png", bytes)]));
            set.unwrap().check_files(&DecodeLimits { max_bytes, ..DecodeLimits::default() }, "d")
        };
        check(PNG, 100).unwrap();
        let reason = check(b"<svg>", 100).unwrap_err().to_string();
        assert_eq!(reason, "d: `a/2.png`: is neither a JPEG nor a PNG nor a WebP image");
        assert!(check(b"", 100).is_err());
        let reason = check(&[PNG, PNG].concat(), PNG.len()).unwrap_err().to_string();
        assert!(reason.contains("`a/2.png`: 24 bytes exceed the limit of 12"), "{reason}");
    }
}
