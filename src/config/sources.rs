//! Where values come from: flags, then environment variables, then a TOML file, then defaults.
//!
//! The file's keys are the flags' names. What it holds becomes flags that nobody gave, before the
//! command line is parsed: there is one list of settings, and it is the flags'.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::{Table, Value};

use super::environment;
use super::settings::Settings;
use crate::error::{Error, Result};

/// The flag that names the file; commands that have it have settings.
const CONFIG: &str = "config";
/// Flags that are no settings.
pub(super) const NO_SETTINGS: [&str; 5] = [CONFIG, "print-config", "json", "help", "version"];
/// Least likeness of a name that is suggested, by Jaro and Winkler.
const LIKENESS: f64 = 0.8;

/// A parsed command line.
#[derive(Debug)]
pub struct Parsed {
    /// What clap makes of it and of the file.
    pub matches: ArgMatches,
    /// The command's settings; none of commands without a configuration file.
    pub settings: Settings,
}

/// Parses a command line, with the file that it or the environment names. Mistakes in the file and
/// unknown variables are in the settings, all of them; what they spoil has its default.
///
/// # Errors
/// Usage: unusable flags and variables; then also the mistakes that were found besides.
pub fn parse(
    command: &Command,
    arguments: &[OsString],
    variables: &[(String, String)],
) -> Result<Parsed, clap::Error> {
    // The file's name is needed although the rest may be wrong without the file.
    let lenient = command.clone().ignore_errors(true).try_get_matches_from(arguments);
    let strictly = |arguments: &[OsString]| command.clone().try_get_matches_from(arguments);
    let Ok(lenient) = lenient else { return without_settings(strictly(arguments)?) };
    let mut built = command.clone();
    built.build(); // flags of outer commands reach inner ones
    let (leaf, given) = leaf(&built, &lenient);
    if !leaf.get_arguments().any(|arg| arg.get_id() == CONFIG) {
        return without_settings(strictly(arguments)?);
    }
    let mut mistakes = environment::check(&built, variables);
    let path = given.try_get_one::<PathBuf>(CONFIG).ok().flatten();
    let file = path.and_then(|path| File::read(path).map_err(|error| mistakes.push(error)).ok());
    let mut added = file
        .as_ref()
        .map(|file| file.flags(&built, leaf, given, &mut mistakes))
        .unwrap_or_default();
    let matches = loop {
        let mut all = arguments.to_vec();
        all.extend(added.values().flatten().map(OsString::from));
        let error = match strictly(&all) {
            Ok(matches) => break matches,
            Err(error) => error,
        };
        // clap stops at the first unusable value: without it, it tells the next one.
        let key = key_at_fault(&error).filter(|key| added.contains_key(key));
        match (&file, key) {
            (Some(file), Some(key)) => {
                mistakes.push(file.blame(&error));
                added.remove(&key);
            }
            (Some(file), None) if strictly(arguments).is_ok() => {
                mistakes.push(file.blame(&error));
                return Err(usage(&mistakes, ""));
            }
            _ if mistakes.is_empty() => return Err(error),
            _ => return Err(usage(&mistakes, &error.to_string())),
        }
    };
    let keys = added.into_keys().collect();
    let settings = Settings::new(leaf, self::leaf(&built, &matches).1, &keys, mistakes);
    Ok(Parsed { matches, settings })
}

/// The key, or flag, whose value clap refuses.
fn key_at_fault(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(arg)) = error.get(ContextKind::InvalidArg) else { return None };
    let name = arg.split([' ', '=']).next()?;
    name.strip_prefix("--").map(str::to_owned)
}

/// Mistakes, and what clap says besides, which begins and ends as its messages do.
fn usage(mistakes: &[Error], besides: &str) -> clap::Error {
    let mistakes = mistakes.iter().map(Error::to_string).collect::<Vec<_>>().join("\nerror: ");
    let separator = if besides.is_empty() { "" } else { "\n" };
    clap::Error::raw(
        ErrorKind::InvalidValue,
        format!("{mistakes}{separator}{}\n", besides.trim_end()),
    )
}

fn without_settings(matches: ArgMatches) -> Result<Parsed, clap::Error> {
    Ok(Parsed { matches, settings: Settings::default() })
}

/// The innermost command of a command line.
fn leaf<'a>(command: &'a Command, matches: &'a ArgMatches) -> (&'a Command, &'a ArgMatches) {
    match matches.subcommand() {
        Some((name, inner)) => match command.find_subcommand(name) {
            Some(found) => leaf(found, inner),
            None => (command, matches),
        },
        None => (command, matches),
    }
}

/// A configuration file.
struct File {
    path: PathBuf,
    content: Table,
}

impl File {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| in_file(path, error.to_string()))?;
        let content = text.parse().map_err(|error: toml::de::Error| {
            in_file(path, error.to_string().trim_end()) // says the line and shows it
        })?;
        Ok(Self { path: path.to_owned(), content })
    }

    /// The flags that each key stands for, without those that were given otherwise. A key of another
    /// command is none of this one's business: servers and workers may share a file.
    fn flags(
        &self,
        all: &Command,
        leaf: &Command,
        given: &ArgMatches,
        mistakes: &mut Vec<Error>,
    ) -> BTreeMap<String, Vec<String>> {
        let keys: BTreeSet<&str> = with_settings(all).into_iter().flat_map(keys).collect();
        let mut added = BTreeMap::new();
        for (key, value) in &self.content {
            if !keys.contains(key.as_str()) {
                let near = suggestion(key, keys.iter().copied());
                mistakes.push(in_file(&self.path, format!("unknown key `{key}`{near}")));
                continue;
            }
            let Some(arg) = leaf.get_arguments().find(|arg| arg.get_long() == Some(key)) else {
                continue;
            };
            let source = given.value_source(arg.get_id().as_str());
            let is_given =
                matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable));
            if is_given {
                continue;
            }
            match as_flags(arg, key, value) {
                Ok(flags) => {
                    added.insert(key.clone(), flags);
                }
                Err(reason) => mistakes.push(in_file(&self.path, reason)),
            }
        }
        added
    }

    /// What clap says of a flag that came from here.
    fn blame(&self, error: &clap::Error) -> Error {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        in_file(&self.path, first.trim_start_matches("error: "))
    }
}

fn in_file(path: &Path, reason: impl Into<String>) -> Error {
    Error::invalid(path.display().to_string(), reason)
}

/// A key and its value as flags.
fn as_flags(arg: &Arg, key: &str, value: &Value) -> Result<Vec<String>, String> {
    match (arg.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(true)) => Ok(vec![format!("--{key}")]),
        (ArgAction::SetTrue, Value::Boolean(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, _) => Err(format!("`{key}` is either true or false")),
        (ArgAction::Append, Value::Array(values)) => {
            values.iter().map(|value| Ok(format!("--{key}={}", scalar(key, value)?))).collect()
        }
        // A list in one text.
        (_, Value::Array(values)) => {
            let values: Result<Vec<_>, String> = values.iter().map(|v| scalar(key, v)).collect();
            Ok(vec![format!("--{key}={}", values?.join(","))])
        }
        (_, value) => Ok(vec![format!("--{key}={}", scalar(key, value)?)]),
    }
}

fn scalar(key: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(value) => Ok(value.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
            Err(format!("`{key}` must be text, a number, true or false, or a list of these"))
        }
    }
}

/// Every command that has settings.
fn with_settings(command: &Command) -> Vec<&Command> {
    let mut found: Vec<&Command> = command.get_subcommands().flat_map(with_settings).collect();
    if command.get_arguments().any(|arg| arg.get_id() == CONFIG) {
        found.push(command);
    }
    found
}

/// The settings of a command.
fn keys(command: &Command) -> impl Iterator<Item = &str> {
    let names = command.get_arguments().filter_map(Arg::get_long);
    names.filter(|name| !NO_SETTINGS.contains(name))
}

/// `, did you mean …?`, if one of the names is close.
fn suggestion<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    nearest(name, known).map(|near| format!(", did you mean `{near}`?")).unwrap_or_default()
}

/// The name that is most like this one, if it is close.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |known: &str| strsim::jaro_winkler(name, known);
    let nearest = known.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    nearest.filter(|nearest| likeness(nearest) >= LIKENESS)
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;
    use crate::config::{Origin, ServeConfig, WorkerConfig};

    /// Name of the configuration file.
    const NAME: &str = "vitq-test.toml";

    fn command() -> Command {
        Command::new("vitq")
            .subcommand(ServeConfig::augment_args(Command::new("serve")))
            .subcommand(WorkerConfig::augment_args(Command::new("worker")))
    }

    /// The command line, with a configuration file of this content behind it.
    fn with_file(line: &str, content: &str) -> Result<Parsed, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(NAME);
        fs::write(&file, content).unwrap();
        let mut words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        words.extend(["--config".into(), file.into()]);
        parse_of(&words)
    }

    /// What is parsed, or everything that is wrong.
    fn parse_of(words: &[OsString]) -> Result<Parsed, String> {
        let parsed = parse(&command(), words, &[]).map_err(|error| error.to_string())?;
        match parsed.settings.mistakes.as_slice() {
            [] => Ok(parsed),
            mistakes => Err(mistakes.iter().map(Error::to_string).collect::<Vec<_>>().join("\n")),
        }
    }

    fn serve(parsed: &Parsed) -> ServeConfig {
        let (_, matches) = parsed.matches.subcommand().unwrap();
        ServeConfig::from_arg_matches(matches).unwrap()
    }

    fn origin(parsed: &Parsed, key: &str) -> Origin {
        parsed.settings.list.iter().find(|setting| setting.key == key).unwrap().origin
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = "queue-images = 7\nmax-batch = 4\ndevice = [\"cpu\", \"auto\"]\n\
                    batch-delay = 0.25\nlog = \"warn\"\n";
        let parsed = with_file("vitq serve --max-batch 5", file).unwrap();
        let config = serve(&parsed);
        assert_eq!((config.queue_images, config.process.max_batch), (7, 5));
        assert_eq!(
            (config.process.device.as_str(), config.batch_delay.as_millis()),
            ("cpu,auto", 250)
        );
        let origins =
            ["queue-images", "max-batch", "log", "workers"].map(|key| origin(&parsed, key));
        assert_eq!(origins, [Origin::File, Origin::Flag, Origin::File, Origin::Default]);
        let line = parsed.settings.line();
        assert!(line.contains("queue-images=7 [file]") && line.contains("workers=1"), "{line}");
    }

    #[test]
    fn mistakes_in_the_file_are_told_with_its_name() {
        for (content, expected) in [
            ("queue_images = 7", "unknown key `queue_images`, did you mean `queue-images`?"),
            ("qqqq = 7", "unknown key `qqqq`"),
            ("config = \"other\"", "unknown key `config`"),
            ("queue-images = 0", "invalid value '0' for '--queue-images <IMAGES>'"),
            ("queue-images = \"many\"", "invalid value 'many'"),
            ("queue-images = { a = 1 }", "`queue-images` must be text, a number"),
            ("queue-images = 7\nqueue-images = 8", "duplicate key"),
            ("queue-images 7", "TOML parse error at line 1"),
        ] {
            let error = with_file("vitq serve", content).unwrap_err();
            assert!(error.contains(expected) && error.contains(NAME), "{content}: {error}");
        }
        let theirs = with_file("vitq serve --max-batch 0", "queue-images = 7").unwrap_err();
        assert!(theirs.contains("--max-batch") && !theirs.contains(NAME), "{theirs}");
        let words = ["vitq", "serve", "--config", "/nowhere/vitq.toml"].map(OsString::from);
        let missing = parse_of(&words).unwrap_err();
        assert!(missing.contains("/nowhere/vitq.toml: No such file"), "{missing}");
    }

    #[test]
    fn all_mistakes_in_a_file_are_told() {
        let content = "drain-delay = \"x\"\nmax-batch = -4\nexecutor = \"foo\"\nqueue-images = {}\n\
                       aaa = 1\nbbb = 2\nworkers = 3";
        let expected = ["drain-delay", "max-batch", "executor", "queue-images", "aaa", "bbb"];
        let told = with_file("vitq serve", content).unwrap_err();
        assert!(expected.iter().all(|key| told.contains(key)), "{told}");
        assert_eq!(told.matches(NAME).count(), expected.len(), "{told}");
    }

    #[test]
    fn a_file_may_hold_the_keys_of_the_other_command_too() {
        let parsed = with_file("vitq worker", "listen = \"127.0.0.1:1\"\nworkers = 3").unwrap();
        assert_eq!(origin(&parsed, "workers"), Origin::File);
        assert!(parsed.settings.list.iter().all(|setting| setting.key != "listen"));
    }

    #[test]
    fn secrets_are_hidden_whatever_they_come_from() {
        let parsed = with_file("vitq serve", "database = \"postgres://u:secret@h/d\"").unwrap();
        assert_eq!(origin(&parsed, "database"), Origin::File);
        assert!(!format!("{:?} {}", parsed.settings, parsed.settings.line()).contains("secret"));
    }
}
