//! Labelled image sets: `CLASS/*.{jpg,jpeg,png,webp}`, ImageNet's own layout, in a folder or in a tar
//! file.
//!
//! Classes are numbered in the bytewise order of their folder names, or in the order of
//! `classes.txt` (one folder name a line) where that file lies beside the class folders.
//! [`Dataset::for_model`] tells which classes of a model they are.

mod archive;
mod classes;
mod folder;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::DecodeLimits;
use super::decode::is_image;
use crate::error::{Error, Result};
use crate::random::{GOLDEN, fnv1a, mix};

pub use archive::check_tar_start;
pub use classes::check_classes;

/// Name of the optional file that fixes the order of the classes.
const CLASSES_FILE: &str = "classes.txt";
/// File extensions of images, in lower case.
const IMAGE_EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// File extension of data sets in one file.
const TAR_EXTENSION: &str = "tar";
/// Bytes that tell what a file is.
const SNIFFED: u64 = 16;

/// One image of a data set.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Where its bytes lie.
    pub source: Source,
    /// `CLASS/FILE`, relative to the root, whatever the platform's separator.
    pub name: String,
    /// Index into [`Dataset::classes`].
    pub class: usize,
}

/// Where the bytes of an image lie.
#[derive(Clone, Debug)]
pub enum Source {
    /// In a file of their own.
    File(PathBuf),
    /// In a tar file.
    Member(Member),
}

/// A file within a tar file, which stays open: it can be read even when its name is gone.
#[derive(Clone, Debug)]
pub struct Member {
    tar: Arc<TarFile>,
    offset: u64,
    bytes: u64,
}

#[derive(Debug)]
struct TarFile {
    path: PathBuf,
    file: File,
}

impl Sample {
    /// The encoded image, or its first `most` bytes if it has more. Blocking.
    ///
    /// # Errors
    /// `Io`.
    pub fn read(&self, most: u64) -> Result<Vec<u8>> {
        match &self.source {
            Source::File(path) => {
                let mut bytes = Vec::new();
                File::open(path)
                    .and_then(|file| file.take(most).read_to_end(&mut bytes))
                    .map_err(|error| Error::io(path, error))?;
                Ok(bytes)
            }
            Source::Member(Member { tar, offset, bytes }) => {
                let size = usize::try_from(most.min(*bytes)).unwrap_or(usize::MAX);
                let mut bytes = vec![0; size];
                let read = tar.file.read_exact_at(&mut bytes, *offset);
                read.map_err(|error| Error::io(&tar.path, error))?;
                Ok(bytes)
            }
        }
    }

    /// Size of the encoded image in bytes.
    ///
    /// # Errors
    /// `Io`.
    fn size(&self) -> Result<u64> {
        match &self.source {
            Source::File(path) => {
                path.metadata().map(|about| about.len()).map_err(|error| Error::io(path, error))
            }
            Source::Member(member) => Ok(member.bytes),
        }
    }
}

/// A set of labelled images.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The folder, or the tar file.
    pub root: PathBuf,
    /// Folder names of the classes; a class may have no image.
    pub classes: Vec<String>,
    /// Whether `classes.txt` lists them.
    pub has_class_list: bool,
    /// All images, by class folder and then bytewise by file name.
    pub samples: Vec<Sample>,
}

/// What a folder or a tar file holds.
#[derive(Debug, Default)]
struct Contents {
    /// The text of `classes.txt`, if there is one.
    classes: Option<String>,
    /// Images of each class folder.
    folders: BTreeMap<String, Vec<(String, Source)>>,
}

impl Dataset {
    /// Lists the images of a folder or a `.tar` file. Hidden entries, other files and, in a folder,
    /// nested folders are ignored. Blocking.
    ///
    /// # Errors
    /// `NotFound` of kind `dataset` when there is nothing; `InvalidArgument` on `field` for another
    /// file, a set without images, a `classes.txt` that does not fit the folders, a symbolic link
    /// that leaves the root, a tar file with links, special files or paths that are not plain, or a
    /// name that is not UTF-8; `Io`.
    pub fn open(root: &Path, field: &str) -> Result<Self> {
        let canonical = match root.canonicalize() {
            Ok(path) => path,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                let name = root.display().to_string();
                return Err(Error::NotFound { kind: "dataset", name });
            }
            Err(error) => return Err(Error::io(root, error)),
        };
        let contents = if canonical.is_dir() {
            folder::contents(root, &canonical, field)?
        } else if is_tar(root) {
            archive::contents(root, field)?
        } else {
            return Err(no_set(&canonical, field));
        };
        Self::from_contents(root, contents, field)
    }

    fn from_contents(root: &Path, contents: Contents, field: &str) -> Result<Self> {
        let Contents { classes, mut folders } = contents;
        let has_class_list = classes.is_some();
        let classes = match classes {
            Some(text) => {
                let classes = classes::parse(&text, field)?;
                if let Some(other) = folders.keys().find(|folder| !classes.contains(folder)) {
                    let reason = format!("class folder `{other}` is not in {CLASSES_FILE}");
                    return Err(Error::invalid(field, reason));
                }
                classes
            }
            None => folders.keys().cloned().collect(),
        };
        let mut samples = Vec::new();
        for (class, folder) in classes.iter().enumerate() {
            // A class listed in classes.txt keeps its number even when the set has none of it.
            let mut images = folders.remove(folder).unwrap_or_default();
            images.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            samples.extend(images.into_iter().map(|(file, source)| Sample {
                source,
                name: format!("{folder}/{file}"),
                class,
            }));
        }
        if samples.is_empty() {
            let reason = "holds no images: expected CLASS/*.jpg, png or webp";
            return Err(Error::invalid(field, reason));
        }
        Ok(Self { root: root.to_path_buf(), classes, has_class_list, samples })
    }

    /// Looks into every file: whether it begins as an image does, and is no larger than allowed.
    /// Blocking.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` naming the first file that does not; `Io`.
    pub fn check_files(&self, limits: &DecodeLimits, field: &str) -> Result<()> {
        for sample in &self.samples {
            let size = sample.size()?;
            let reason = if size > limits.max_bytes as u64 {
                format!("{size} bytes exceed the limit of {} bytes", limits.max_bytes)
            } else if !is_image(&sample.read(SNIFFED)?) {
                "is neither a JPEG nor a PNG nor a WebP image".to_owned()
            } else {
                continue;
            };
            return Err(Error::invalid(field, format!("`{}`: {reason}", sample.name)));
        }
        Ok(())
    }

    /// Draws `count` images. A seed stands for the same images for ever: the samples are ordered
    /// by a fixed hash of seed and name (never by position, so another order of the classes draws
    /// the same) and the first `count` are taken, in that order. A smaller subset of a seed is
    /// therefore the beginning of a larger one.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` when `count` is zero or exceeds the number of images.
    pub fn subset(&self, count: usize, seed: u64, field: &str) -> Result<Vec<Sample>> {
        check_subset(count, self.samples.len(), field)?;
        let mut order: Vec<(u64, &Sample)> =
            self.samples.iter().map(|sample| (draw(seed, &sample.name), sample)).collect();
        order.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| x.name.cmp(&y.name)));
        Ok(order.into_iter().take(count).map(|(_, sample)| sample.clone()).collect())
    }

    /// The images with the given names (`CLASS/FILE`), in the given order.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` for an empty list or a name that the data set lacks.
    pub fn listed(&self, names: &[String], field: &str) -> Result<Vec<Sample>> {
        if names.is_empty() {
            return Err(Error::invalid(field, "the list of images is empty"));
        }
        let by_name: HashMap<&str, &Sample> =
            self.samples.iter().map(|sample| (sample.name.as_str(), sample)).collect();
        let find = |name: &String| {
            let known = by_name.get(name.strip_prefix("./").unwrap_or(name));
            known.map(|sample| (*sample).clone()).ok_or_else(|| {
                Error::invalid(field, format!("`{name}` is not an image of the data set"))
            })
        };
        names.iter().map(find).collect()
    }
}

/// Whether so many images can be drawn from the available ones.
///
/// # Errors
/// As [`Dataset::subset`].
pub fn check_subset(count: usize, available: usize, field: &str) -> Result<()> {
    if (1..=available).contains(&count) {
        return Ok(());
    }
    let reason = format!("{count} images asked for, the data set has {available}");
    Err(Error::invalid(field, reason))
}

/// The place of a name in the order of a seed: FNV-1a (64 bits) over the name's bytes, plus
/// seed × the golden-ratio increment of SplitMix64, through the finaliser of SplitMix64. Fixed
/// for ever: stored artifacts name their calibration images by seed.
fn draw(seed: u64, name: &str) -> u64 {
    mix(fnv1a(name).wrapping_add(seed.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// What speaks against a file that is not called a tar file.
fn no_set(path: &Path, field: &str) -> Error {
    let mut start = Vec::new();
    // Only what is known to end is read; what cannot be read has no start that tells more.
    if path.is_file() {
        let _ = File::open(path).and_then(|file| file.take(SNIFFED).read_to_end(&mut start));
    }
    let other = || Error::invalid(field, "is neither a folder nor a .tar file");
    check_tar_start(&start, field).err().unwrap_or_else(other)
}

/// Whether a file name is that of a data set in one file.
pub fn is_tar(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(TAR_EXTENSION))
}

/// Whether a file name is that of an image.
pub fn has_image_name(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    extension.is_some_and(|extension| IMAGE_EXTENSIONS.contains(&extension.as_str()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// A folder with empty files at the given relative paths.
    fn folder(files: &[&str]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        root
    }

    fn names(samples: &[Sample]) -> Vec<&str> {
        samples.iter().map(|sample| sample.name.as_str()).collect()
    }

    fn path(sample: &Sample) -> &Path {
        let Source::File(path) = &sample.source else { panic!("{sample:?}") };
        path
    }

    fn reason(root: &TempDir) -> String {
        Dataset::open(root.path(), "dataset").unwrap_err().to_string()
    }

    #[test]
    fn classes_and_files_are_sorted_and_other_files_ignored() {
        let root = folder(&[
            "b/2.png",
            "b/10.JPEG",
            "B/x.WebP",
            "a/1.jpg",
            "a/notes.txt",
            "a/.hidden.png",
            ".git/c.png",
            "empty/readme",
            "top.png",
            "a/nested/deep.png",
            "a/png",
        ]);
        fs::create_dir(root.path().join("a/folder.png")).unwrap();
        let set = Dataset::open(root.path(), "dataset").unwrap();
        assert_eq!(set.classes, ["B", "a", "b", "empty"]);
        assert_eq!(names(&set.samples), ["B/x.WebP", "a/1.jpg", "b/10.JPEG", "b/2.png"]);
        assert_eq!(set.samples.iter().map(|s| s.class).collect::<Vec<_>>(), [0, 1, 2, 2]);
        assert!(set.samples.iter().all(|sample| path(sample) == root.path().join(&sample.name)));
    }

    #[test]
    fn classes_txt_fixes_the_order_and_may_list_absent_classes() {
        let root = folder(&["cat/1.png", "dog/1.png"]);
        let classes = root.path().join("classes.txt");
        fs::write(&classes, "dog\r\n\nbird\ncat\n").unwrap();
        let set = Dataset::open(root.path(), "dataset").unwrap();
        assert_eq!(set.classes, ["dog", "bird", "cat"]);
        assert_eq!(names(&set.samples), ["dog/1.png", "cat/1.png"]);
        assert_eq!(set.samples[1].class, 2);
        for (text, part) in [
            ("dog", "class folder `cat` is not in classes.txt"),
            ("dog\ncat\ndog", "`dog` is listed twice"),
            ("dog\ncat\n../x", "`../x` is not the name of a class folder"),
            ("dog\ncat\n..", "`..` is not the name of a class folder"),
        ] {
            fs::write(&classes, text).unwrap();
            assert!(reason(&root).contains(part), "{}", reason(&root));
        }
    }

    #[test]
    fn missing_and_empty_sets_are_told_apart() {
        let root = folder(&["a/readme.txt"]);
        assert!(matches!(
            Dataset::open(root.path(), "dataset"),
            Err(Error::InvalidArgument { field, .. }) if field == "dataset"
        ));
        for missing in ["none", "a/readme.txt/x"] {
            assert!(matches!(
                Dataset::open(&root.path().join(missing), "dataset"),
                Err(Error::NotFound { kind: "dataset", .. })
            ));
        }
    }

    #[test]
    fn files_that_are_no_sets_are_told_from_missing_ones() {
        let root = folder(&["one.jpg"]);
        fs::write(root.path().join("set.tar.gz"), b"\x1f\x8b\x08 and so on").unwrap();
        for (file, reason) in [
            ("one.jpg", "d: is neither a folder nor a .tar file"),
            ("set.tar.gz", "d: the file is compressed (gzip), only plain tar is accepted"),
        ] {
            let error = Dataset::open(&root.path().join(file), "d").unwrap_err();
            assert_eq!(error.to_string(), reason);
        }
    }

    #[test]
    fn links_may_not_leave_the_root() {
        let outside = folder(&["secret.png", "class/x.png"]);
        let root = folder(&["a/1.png"]);
        symlink(root.path().join("a/1.png"), root.path().join("a/2.png")).unwrap();
        assert_eq!(Dataset::open(root.path(), "dataset").unwrap().samples.len(), 2);

        let file = root.path().join("a/3.png");
        symlink(outside.path().join("secret.png"), &file).unwrap();
        assert!(reason(&root).contains("leaves the data set"));
        fs::remove_file(file).unwrap();
        symlink(outside.path().join("class"), root.path().join("b")).unwrap();
        assert!(reason(&root).contains("leaves the data set"));
    }

    #[test]
    fn a_root_that_is_itself_a_link_is_fine() {
        let root = folder(&["a/1.png"]);
        let place = tempfile::tempdir().unwrap();
        let link = place.path().join("link");
        symlink(root.path(), &link).unwrap();
        let set = Dataset::open(&link, "dataset").unwrap();
        assert_eq!(path(&set.samples[0]), link.join("a/1.png"));
    }

    #[test]
    fn a_seed_means_the_same_images_for_ever() {
        let root = folder(&["a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"]);
        let set = Dataset::open(root.path(), "dataset").unwrap();
        let drawn = |count, seed| names(&set.subset(count, seed, "images").unwrap()).join(" ");
        // Literal on purpose: stored artifacts refer to these orders.
        assert_eq!(drawn(6, 0), "a/1.png b/1.png b/3.png b/2.png a/2.png a/3.png");
        assert_eq!(drawn(6, 1), "a/1.png b/1.png b/2.png b/3.png a/3.png a/2.png");
        assert_eq!(drawn(6, u64::MAX), "b/1.png a/3.png a/1.png b/2.png a/2.png b/3.png");
        assert_eq!(draw(0, ""), 0xc381_7c01_6ba4_ff30);
        for count in [0, 7] {
            let error = set.subset(count, 0, "calibration.images").unwrap_err().to_string();
            let expected = format!("{count} images asked for, the data set has 6");
            assert_eq!(error, format!("calibration.images: {expected}"));
        }
    }

    #[test]
    fn lists_are_looked_up_and_never_followed() {
        let root = folder(&["a/1.png", "a/2.png", "a/x.txt", "b/1.png"]);
        let set = Dataset::open(root.path(), "dataset").unwrap();
        let list = |names: &[&str]| {
            set.listed(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), "calib_files")
        };
        let listed = list(&["b/1.png", "./a/2.png", "b/1.png"]).unwrap();
        assert_eq!(names(&listed), ["b/1.png", "a/2.png", "b/1.png"]);
        for unknown in ["a/3.png", "a/x.txt", "../secret", "/etc/passwd", ""] {
            assert!(matches!(list(&[unknown]), Err(Error::InvalidArgument { .. })));
        }
        assert!(matches!(list(&[]), Err(Error::InvalidArgument { .. })));
    }

    proptest! {
        #[test]
        fn smaller_subsets_begin_larger_ones(seed: u64, count in 1usize..40) {
            let samples = (0..40)
                .map(|i| Sample { source: Source::File(PathBuf::new()), name: format!("c/{i}"), class: 0 })
                .collect();
            let classes = vec!["c".to_owned()];
            let set = Dataset { root: PathBuf::new(), classes, has_class_list: false, samples };
            let (all, part) = (set.subset(40, seed, "").unwrap(), set.subset(count, seed, "").unwrap());
            prop_assert_eq!(&names(&all)[..count], &names(&part)[..]);
            let mut distinct = names(&all);
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), 40);
        }
    }
}
