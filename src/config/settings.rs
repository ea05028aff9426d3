//! What is in force, and where it comes from.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, ValueHint};
use serde::Serialize;

use super::sources::NO_SETTINGS;

/// Stands for the value of a secret.
const HIDDEN: &str = "(hidden)";
/// Folders that are made when they are missing.
const MADE: [&str; 2] = ["data-dir", "cache-dir"];

/// The settings of a command, in the order of its help.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Settings {
    /// One for each flag.
    pub list: Vec<Setting>,
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
    /// Files and folders that it names and that must be there.
    #[serde(skip)]
    pub paths: Vec<PathBuf>,
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
            let must_exist = arg.get_value_hint() == ValueHint::AnyPath && !MADE.contains(&key);
            let value = raw.iter().map(|v| v.to_string_lossy()).collect::<Vec<_>>().join(",");
            let value = if arg.is_hide_env_values_set() { HIDDEN.to_owned() } else { value };
            Some(Setting {
                key: key.to_owned(),
                variable: arg.get_env().map(|name| name.to_string_lossy().into_owned()),
                value: (!raw.is_empty()).then_some(value),
                origin,
                paths: if must_exist {
                    raw.iter().map(PathBuf::from).collect()
                } else {
                    Vec::new()
                },
            })
        };
        Self { list: command.get_arguments().filter_map(setting).collect() }
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

    /// Files and folders that should be there and are not, each with its key.
    pub fn missing_paths(&self) -> Vec<String> {
        let missing = |setting: &Setting| {
            let paths = setting.paths.iter().filter(|path| !path.exists());
            paths
                .map(|path| format!("{}: {} does not exist", setting.key, path.display()))
                .collect::<Vec<_>>()
        };
        self.list.iter().flat_map(missing).collect()
    }
}
