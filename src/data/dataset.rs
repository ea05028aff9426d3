//! Labelled image folders: `ROOT/CLASS/*.{jpg,jpeg,png,webp}`, ImageNet's own layout.
//!
//! Classes are numbered in the bytewise order of their folder names, or in the order of
//! `ROOT/classes.txt` (one folder name a line) where that file exists.

use std::collections::HashMap;
use std::fs::{self, DirEntry};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::random::{GOLDEN, fnv1a, mix};

/// Name of the optional file that fixes the order of the classes.
const CLASSES_FILE: &str = "classes.txt";

/// File extensions of images, in lower case.
const EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// One image of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Where the file lies.
    pub path: PathBuf,
    /// `CLASS/FILE`, relative to the root, whatever the platform's separator.
    pub name: String,
    /// Index into [`Dataset::classes`].
    pub class: usize,
}

/// A folder of labelled images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// The folder.
    pub root: PathBuf,
    /// Folder names of the classes; a class may have no image.
    pub classes: Vec<String>,
    /// All images, by class and then bytewise by file name.
    pub samples: Vec<Sample>,
}

impl Dataset {
    /// Lists the images of a folder. Hidden entries, other files and nested folders are ignored.
    ///
    /// # Errors
    /// `NotFound` of kind `dataset` when there is no such folder; `InvalidArgument` on `field` for
    /// a set without images, a `classes.txt` that does not fit the folders, a symbolic link that
    /// leaves the root, or a name that is not UTF-8; `Io`.
    pub fn open(root: &Path, field: &str) -> Result<Self> {
        let Some(canonical) = canonical_folder(root)? else {
            return Err(Error::NotFound { kind: "dataset", name: root.display().to_string() });
        };
        let listing = Listing { canonical: &canonical, field };
        let folders = listing.entries(root, Kind::Folder)?;
        let classes = match read_classes(root, field)? {
            Some(classes) => {
                if let Some(other) = folders.iter().find(|folder| !classes.contains(folder)) {
                    let reason = format!("class folder `{other}` is not in {CLASSES_FILE}");
                    return Err(Error::invalid(field, reason));
                }
                classes
            }
            None => folders.clone(),
        };
        let mut samples = Vec::new();
        for (class, folder) in classes.iter().enumerate() {
            // A class listed in classes.txt keeps its number even when the set has none of it.
            if folders.binary_search(folder).is_err() {
                continue;
            }
            let path = root.join(folder);
            for file in listing.entries(&path, Kind::Image)? {
                let name = format!("{folder}/{file}");
                samples.push(Sample { path: path.join(file), name, class });
            }
        }
        if samples.is_empty() {
            let reason =
                format!("no images in {}: expected CLASS/*.jpg, png or webp", root.display());
            return Err(Error::invalid(field, reason));
        }
        Ok(Self { root: root.to_path_buf(), classes, samples })
    }

    /// Draws `count` images. A seed stands for the same images for ever: the samples are ordered
    /// by a fixed hash of seed and name (never by position, so another order of the classes draws
    /// the same) and the first `count` are taken, in that order. A smaller subset of a seed is
    /// therefore the beginning of a larger one.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` when `count` is zero or exceeds the number of images.
    pub fn subset(&self, count: usize, seed: u64, field: &str) -> Result<Vec<Sample>> {
        let available = self.samples.len();
        if count == 0 || count > available {
            let reason = format!("{count} images asked for, the data set has {available}");
            return Err(Error::invalid(field, reason));
        }
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
                let root = self.root.display();
                Error::invalid(field, format!("`{name}` is not an image of data set {root}"))
            })
        };
        names.iter().map(find).collect()
    }
}

/// The place of a name in the order of a seed: FNV-1a (64 bits) over the name's bytes, plus
/// seed × the golden-ratio increment of SplitMix64, through the finaliser of SplitMix64. Fixed
/// for ever: stored artifacts name their calibration images by seed.
fn draw(seed: u64, name: &str) -> u64 {
    mix(fnv1a(name).wrapping_add(seed.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// The folder without symbolic links, or None when it is missing or not a folder.
fn canonical_folder(root: &Path) -> Result<Option<PathBuf>> {
    match root.canonicalize() {
        Ok(path) => Ok(path.is_dir().then_some(path)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(Error::io(root, error)),
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
    /// Names of the wanted entries, sorted bytewise.
    fn entries(&self, folder: &Path, kind: Kind) -> Result<Vec<String>> {
        let failed = |error| Error::io(folder, error);
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).map_err(failed)? {
            if let Some(name) = self.wanted(&entry.map_err(failed)?, kind)? {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The entry's name if it is of the kind.
    fn wanted(&self, entry: &DirEntry, kind: Kind) -> Result<Option<String>> {
        let (path, name) = (entry.path(), entry.file_name());
        if name.as_encoded_bytes().starts_with(b".") {
            return Ok(None);
        }
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        let image = extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()));
        if matches!(kind, Kind::Image) && !image {
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

/// The classes of `classes.txt`, if there is one; blank lines do not count.
fn read_classes(root: &Path, field: &str) -> Result<Option<Vec<String>>> {
    let path = root.join(CLASSES_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    let mut classes: Vec<String> = Vec::new();
    for class in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if class.contains(['/', '\\']) || class.starts_with('.') {
            let reason = format!("{CLASSES_FILE}: `{class}` is not the name of a class folder");
            return Err(Error::invalid(field, reason));
        }
        classes.push(class.to_owned());
    }
    let mut sorted: Vec<&String> = classes.iter().collect();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid(
            field,
            format!("{CLASSES_FILE}: `{}` is listed twice", pair[0]),
        ));
    }
    Ok(Some(classes))
}

#[cfg(test)]
mod tests {
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
        assert!(set.samples.iter().all(|sample| sample.path == root.path().join(&sample.name)));
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
        for missing in ["none", "a/readme.txt", "a/readme.txt/x"] {
            assert!(matches!(
                Dataset::open(&root.path().join(missing), "dataset"),
                Err(Error::NotFound { kind: "dataset", .. })
            ));
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
        assert_eq!(set.samples[0].path, link.join("a/1.png"));
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
                .map(|i| Sample { path: PathBuf::new(), name: format!("c/{i}"), class: 0 })
                .collect();
            let set = Dataset { root: PathBuf::new(), classes: vec!["c".to_owned()], samples };
            let (all, part) = (set.subset(40, seed, "").unwrap(), set.subset(count, seed, "").unwrap());
            prop_assert_eq!(&all[..count], &part[..]);
            let mut distinct = names(&all);
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), 40);
        }
    }
}
