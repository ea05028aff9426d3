//! What is in force, and where it comes from.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, ValueHint};
use serde::Serialize;

use super::sources::NO_SETTINGS;
use crate::error::Error;

/// Stands for the value of a secret.
const HIDDEN: &str = "(hidden)";
/// How the help calls the value of a flag that takes a folder.
const FOLDER: &str = "DIR";
/// Folders that are made when they are missing.
const MADE: [&str; 2] = ["data-dir", "cache-dir"];

/// The settings of a command, in the order of its help.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Settings {
    /// One for each flag.
    pub list: Vec<Setting>,
    /// What the file and the environment say that nobody can use.
    #[serde(skip)]
    pub mistakes: Vec<Error>,
}

/// A setting.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// Name of the flag, and of the file's key.
    pub key: String,
    /// Its environment variable.
    pub variable: Option<String>,
    /// Its value as it was given; hidden if it is a secret.
    pub value: Option<String>,
    /// Where the value comes from.
    pub origin: Origin,
    /// Files and folders that it names.
    #[serde(skip)]
    pub paths: Vec<(PathBuf, PathKind)>,
}

/// What a path has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// A file that is there.
    File,
    /// A folder that is there.
    Folder,
    /// A folder, which is made when it is missing.
    MadeFolder,
}

/// Where a value comes from, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The command line.
    Flag,
    /// The environment.
    Env,
    /// The configuration file.
    File,
    /// Nobody said anything.
    Default,
}

impl Origin {
    /// The origin as a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Env => "env",
            Self::File => "file",
            Self::Default => "default",
        }
    }
}

impl Settings {
    /// Those of a command line, of which these keys came from the file.
    pub(super) fn new(
        command: &Command,
        matches: &ArgMatches,
        from_file: &BTreeSet<String>,
        mistakes: Vec<Error>,
    ) -> Self {
        let setting = |arg: &Arg| {
            let key = arg.get_long().filter(|key| !NO_SETTINGS.contains(key))?;
            let id = arg.get_id().as_str();
            let origin = match matches.value_source(id) {
                Some(ValueSource::CommandLine) if from_file.contains(key) => Origin::File,
                Some(ValueSource::CommandLine) => Origin::Flag,
                Some(ValueSource::EnvVariable) => Origin::Env,
                _ => Origin::Default,
            };
            let raw: Vec<_> = matches.get_raw(id).into_iter().flatten().collect();
            let path = |value| path_kind(arg, key).map(|kind| (PathBuf::from(value), kind));
            let value = raw.iter().map(|v| v.to_string_lossy()).collect::<Vec<_>>().join(",");
            let value = if arg.is_hide_env_values_set() { HIDDEN.to_owned() } else { value };
            Some(Setting {
                key: key.to_owned(),
                variable: arg.get_env().map(|name| name.to_string_lossy().into_owned()),
                value: (!raw.is_empty()).then_some(value),
                origin,
                paths: raw.iter().filter_map(path).collect(),
            })
        };
        Self { list: command.get_arguments().filter_map(setting).collect(), mistakes }
    }

    /// All of them in one line, with the origins of those that somebody chose.
    pub fn line(&self) -> String {
        let text = |setting: &Setting| {
            let value = setting.value.as_deref()?;
            Some(match setting.origin {
                Origin::Default => format!("{}={value}", setting.key),
                origin @ (Origin::Flag | Origin::Env | Origin::File) => {
                    format!("{}={value} [{}]", setting.key, origin.name())
                }
            })
        };
        self.list.iter().filter_map(text).collect::<Vec<_>>().join(", ")
    }

    /// Files and folders that are not what they have to be, each with its key.
    pub fn wrong_paths(&self) -> Vec<Error> {
        let wrong = |setting: &Setting| -> Vec<Error> {
            let complaints = setting.paths.iter().filter_map(|(path, kind)| kind.complaint(path));
            complaints.map(|reason| Error::invalid(&setting.key, reason)).collect()
        };
        self.list.iter().flat_map(wrong).collect()
    }
}

impl PathKind {
    /// Why a path cannot be used.
    fn complaint(self, path: &Path) -> Option<String> {
        let shown = path.display();
        match (self, fs::metadata(path)) {
            (Self::File, Ok(found)) if found.is_dir() => Some(format!("{shown} is a folder")),
            (Self::Folder | Self::MadeFolder, Ok(found)) if !found.is_dir() => {
                Some(format!("{shown} is not a folder"))
            }
            (Self::File | Self::Folder | Self::MadeFolder, Ok(_)) => None,
            (kind, Err(error)) if error.kind() == ErrorKind::NotFound => {
                (kind != Self::MadeFolder).then(|| format!("{shown} does not exist"))
            }
            (_, Err(error)) => Some(format!("{shown}: {error}")),
        }
    }
}

/// What the paths of a flag have to be, if it takes any: its help says so.
fn path_kind(arg: &Arg, key: &str) -> Option<PathKind> {
    if arg.get_value_hint() != ValueHint::AnyPath {
        return None;
    }
    let is_folder = arg.get_value_names().is_some_and(|names| names.iter().any(|n| n == FOLDER));
    Some(match is_folder {
        true if MADE.contains(&key) => PathKind::MadeFolder,
        true => PathKind::Folder,
        false => PathKind::File,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_to_be_what_its_flag_says() {
        let folder = tempfile::tempdir().unwrap();
        let (there, missing) = (folder.path(), folder.path().join("missing"));
        let file = there.join("file");
        fs::write(&file, "").unwrap();
        let below = file.join("below");
        for (kind, path, complaint) in [
            (PathKind::File, file.as_path(), None),
            (PathKind::File, there, Some("is a folder")),
            (PathKind::File, &missing, Some("does not exist")),
            (PathKind::Folder, there, None),
            (PathKind::Folder, &file, Some("is not a folder")),
            (PathKind::Folder, &missing, Some("does not exist")),
            (PathKind::MadeFolder, &missing, None),
            (PathKind::MadeFolder, &file, Some("is not a folder")),
            (PathKind::MadeFolder, &below, Some("Not a directory")),
        ] {
            let said = kind.complaint(path);
            let as_expected = match (&said, complaint) {
                (Some(said), Some(text)) => said.contains(text) && said.contains("/"),
                (said, text) => said.is_none() && text.is_none(),
            };
            assert!(as_expected, "{kind:?} {path:?}: {said:?}");
        }
    }
}
