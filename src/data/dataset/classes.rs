//! Which classes of a model the folders of a data set are.

use std::collections::HashMap;

use super::{CLASSES_FILE, Dataset};
use crate::error::{Error, Result};

impl Dataset {
    /// The same images with the classes of a model: those of `classes.txt` where there is one; else
    /// those whose labels the folders are named by, if every folder is; else the first ones, in the
    /// order of the folders. The order of the images stays. Classes that are guessed and not all
    /// of the model's may be others: then it also says what was done.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` when there are more classes than the model knows.
    pub fn for_model(
        mut self,
        labels: &[String],
        known: i64,
        field: &str,
    ) -> Result<(Self, Option<String>)> {
        let found = self.classes.len();
        check_classes(found, known, field)?;
        if self.has_class_list {
            return Ok((self, None));
        }
        if let Some(numbers) = by_label(&self.classes, labels) {
            for sample in &mut self.samples {
                let number = numbers.get(sample.class).copied();
                sample.class = number.ok_or_else(|| Error::internal("a sample of no class"))?;
            }
            self.classes = labels.to_vec();
            return Ok((self, None));
        }
        let guessed = i64::try_from(found).is_ok_and(|found| found < known);
        let remark = self.classes.first().filter(|_| guessed).map(|first| {
            format!(
                "holds {found} of the model's {known} classes, and its folders were taken in \
                 sorted order, `{first}` as class 0: if they are others, list the folder names of \
                 all classes in the model's order in a {CLASSES_FILE} beside the folders"
            )
        });
        Ok((self, remark))
    }
}

/// Whether a model that knows so many classes can be measured on a set that has so many.
///
/// # Errors
/// As [`Dataset::for_model`].
pub fn check_classes(found: usize, known: i64, field: &str) -> Result<()> {
    if i64::try_from(found).is_ok_and(|found| found <= known) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("has {found} classes, the model knows {known}")))
}

/// The numbers of the classes if each is a label, and no two labels are equal.
fn by_label(classes: &[String], labels: &[String]) -> Option<Vec<usize>> {
    let numbers: HashMap<&String, usize> =
        labels.iter().enumerate().map(|(number, label)| (label, number)).collect();
    if numbers.len() < labels.len() {
        return None;
    }
    classes.iter().map(|class| numbers.get(class).copied()).collect()
}

/// The classes that `classes.txt` lists; blank lines do not count.
pub(super) fn parse(text: &str, field: &str) -> Result<Vec<String>> {
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
    Ok(classes)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{Sample, Source};
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// One image in each folder.
    fn set(folders: &[&str], has_class_list: bool) -> Dataset {
        let samples = folders.iter().enumerate().map(|(class, folder)| Sample {
            source: Source::File(PathBuf::new()),
            name: format!("{folder}/1.png"),
            class,
        });
        let (samples, classes) = (samples.collect(), names(folders));
        Dataset { root: PathBuf::new(), classes, has_class_list, samples }
    }

    /// The classes of the images, and whether they may be others.
    fn numbers(set: Dataset, labels: &[&str], known: i64) -> (Vec<usize>, bool) {
        let (set, remark) = set.for_model(&names(labels), known, "dataset").unwrap();
        (set.samples.iter().map(|sample| sample.class).collect(), remark.is_some())
    }

    #[test]
    fn folders_are_the_classes_that_a_list_or_their_names_say() {
        let digits = ["0", "1", "2", "3"];
        for (folders, labels, known, expected) in [
            (&["1", "3"][..], &digits[..], 4, (vec![1, 3], false)),
            // Sorted by name, and numbered otherwise.
            (&["10", "2"], &["2", "10"], 2, (vec![1, 0], false)),
            // ImageNet: names of synsets, and labels for people, two of which are equal.
            (&["n1", "n2", "n3"], &["tench", "crane", "crane"], 3, (vec![0, 1, 2], false)),
            (&["crane", "tench"], &["tench", "crane", "crane"], 3, (vec![0, 1], true)),
            (&["n1", "n2"], &["tench", "crane", "shark"], 3, (vec![0, 1], true)),
            (&["1", "x"], &digits, 4, (vec![0, 1], true)),
            (&["1", "3"], &[], 4, (vec![0, 1], true)),
            (&["1", "3"], &[], 2, (vec![0, 1], false)),
        ] {
            assert_eq!(numbers(set(folders, false), labels, known), expected, "{folders:?}");
        }
        // Whoever writes a list knows better.
        assert_eq!(numbers(set(&["1", "3"], true), &digits, 4), (vec![0, 1], false));
    }

    #[test]
    fn more_classes_than_the_model_knows_are_refused_and_guesses_told() {
        let open = |known| set(&["b", "c"], false).for_model(&[], known, "val");
        let reason = open(1).unwrap_err().to_string();
        assert_eq!(reason, "val: has 2 classes, the model knows 1");
        let remark = open(3).unwrap().1.unwrap();
        assert!(remark.starts_with("holds 2 of the model's 3 classes"), "{remark}");
        assert!(remark.contains("`b` as class 0") && remark.contains(CLASSES_FILE), "{remark}");
    }
}
