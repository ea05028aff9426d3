//! The documents against the program: what can be run in them is run, the rest is on a list that says
//! why not; command lines, flags and variables are the program's; links lead somewhere.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod exceptions;
mod markdown;
#[path = "../support/program.rs"]
mod program;
mod session;
mod troubles;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use exceptions::{INSTEAD, NOT_RUN, OTHERS_FLAGS, OTHERS_VARIABLES, PREPARED, Rule};
use markdown::{Block, Document, documents};
use session::Session;
use troubles::{BEFORE, GUARD, GUARDED, TROUBLES, Trouble, UNPROVOKED};

/// Documents that are run at the same time: as many as small machines have cores.
const AT_ONCE: usize = 2;
/// Languages of blocks that hold commands.
const SHELL: [&str; 2] = ["", "sh"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rules that were needed: what nobody needs any more has to go.
#[derive(Default)]
struct Used(BTreeSet<(&'static str, &'static str)>);

impl Used {
    /// The first rule of a list for a text of a document.
    fn rule<'a>(&mut self, rules: &'a [Rule], document: &str, text: &str) -> Option<&'a Rule> {
        let here = |rule: &&Rule| rule.document.is_empty() || rule.document == document;
        let fits = |rule: &&Rule| here(rule) && text.starts_with(rule.begins);
        let rule = rules.iter().find(fits)?;
        self.0.insert((rule.document, rule.begins));
        Some(rule)
    }

    fn all(&self, rules: &[Rule]) {
        for rule in rules {
            let key = (rule.document, rule.begins);
            assert!(self.0.contains(&key), "nothing needs the rule {key:?}");
        }
    }
}

/// What running a document made use of.
#[derive(Default)]
struct Uses {
    not_run: Used,
    prepared: Used,
    instead: Used,
}

#[test]
fn what_can_be_run_is_run() {
    let documents = documents();
    let left = Mutex::new(documents.iter());
    let some = || {
        let next = || left.lock().unwrap().next();
        std::iter::from_fn(next).map(run).collect::<Vec<_>>()
    };
    let uses: Vec<Uses> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(some)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let (mut not_run, mut prepared, mut instead) =
        (Used::default(), Used::default(), Used::default());
    for one in uses {
        not_run.0.extend(one.not_run.0);
        prepared.0.extend(one.prepared.0);
        instead.0.extend(one.instead.0);
    }
    not_run.all(NOT_RUN);
    prepared.all(PREPARED);
    instead.all(INSTEAD);
}

/// Runs what a document holds, from above to below.
#[allow(clippy::print_stdout, reason = "tells where a failure is")]
fn run(document: &Document) -> Uses {
    let mut uses = Uses::default();
    if document.blocks.is_empty() {
        return uses;
    }
    let mut session = Session::new();
    for block in &document.blocks {
        let place = format!("{}:{}", document.name, block.line);
        for mut piece in pieces(block) {
            for rule in INSTEAD {
                if document.name == rule.document && piece.contains(rule.begins) {
                    uses.instead.0.insert((rule.document, rule.begins));
                    piece = piece.replace(rule.begins, rule.then);
                }
            }
            if uses.not_run.rule(NOT_RUN, &document.name, &piece).is_some() {
                continue;
            }
            if let Some(rule) = uses.prepared.rule(PREPARED, &document.name, &piece) {
                session.run(rule.then);
            }
            println!("{place}: {}", piece.trim_end());
            execute(&mut session, &block.language, &piece, &place);
        }
    }
    uses
}

/// Whether a text holds the parts of a message in this order.
fn holds(text: &str, says: &str) -> bool {
    let mut rest = text;
    says.split('…').all(|part| {
        let found = rest.find(part.trim());
        rest = found.map_or(rest, |at| &rest[at + part.trim().len()..]);
        found.is_some()
    })
}

fn is_provoked(session: &mut Session, Trouble { says, after }: &Trouble) {
    let quantize = "vitq quantize --method minmax --bits 8 --calib-dataset digits/calib";
    let serve = "timeout 20 vitq serve";
    let command = after.replace("$QUANTIZE", quantize).replace("$SERVE", serve);
    let said = session.fails(&command);
    assert!(holds(&said, says), "{says}\n{command}\n{said}");
}

#[test]
fn the_messages_of_troubleshooting_are_the_programs() {
    let mut session = Session::new();
    session.run(BEFORE);
    TROUBLES.iter().for_each(|trouble| is_provoked(&mut session, trouble));
    GUARD.iter().for_each(|command| session.run(command));
    GUARDED.iter().for_each(|trouble| is_provoked(&mut session, trouble));

    let provoked = TROUBLES.iter().chain(GUARDED).map(|trouble| trouble.says);
    let unprovoked = UNPROVOKED.iter().map(|(says, _)| *says);
    let listed: BTreeSet<&str> = provoked.chain(unprovoked).collect();
    let text = std::fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let says = text.split("| says |").skip(1).flat_map(|table| {
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        rows.flat_map(|row| row.split(" | ").next().unwrap().split('`').skip(1).step_by(2))
    });
    let documented: BTreeSet<&str> = says.collect();
    assert_eq!(documented, listed);
}

/// What is run by itself: the commands of a shell block, any other block as a whole.
fn pieces(block: &Block) -> Vec<String> {
    if SHELL.contains(&block.language.as_str()) {
        block.commands()
    } else {
        vec![block.text.clone()]
    }
}

fn execute(session: &mut Session, language: &str, text: &str, place: &str) {
    match language {
        "" | "sh" => session.run(text),
        "python" => {
            session.write("block.py", text);
            session.run("python block.py");
        }
        "toml" => session.write("vitq.toml", text),
        "json" => {
            let parsed: Result<serde_json::Value, _> = serde_json::from_str(text);
            assert!(parsed.is_ok(), "{place}: {parsed:?}");
        }
        "text" => is_printed(text, &session.printed, place),
        other => panic!("{place}: nothing is known of {other}: see tests/documents/exceptions.rs"),
    }
}

/// Whether every line was printed, in this order, numbers and spaces aside.
fn is_printed(shown: &str, printed: &str, place: &str) {
    let mut lines = printed.lines().map(without_numbers);
    for line in shown.lines().filter(|line| !line.trim().is_empty()) {
        let wanted = without_numbers(line);
        assert!(lines.any(|found| found == wanted), "{place}: not printed: {line}\n{printed}");
    }
}

/// Numbers, and the ids of jobs, differ from run to run and from processor to processor.
fn without_numbers(line: &str) -> String {
    let word = |word: &str| -> String {
        if word.starts_with("operations/") {
            return "operations/#".to_owned();
        }
        let mut text = String::new();
        for c in word.chars() {
            match c {
                '0'..='9' | '.' | '-' if text.ends_with('#') => {}
                '0'..='9' => text.push('#'),
                other => text.push(other),
            }
        }
        text
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// The words of a simple command, up to a comment or a redirection.
fn words(command: &str) -> Vec<String> {
    let words = command.split_whitespace();
    let words = words.take_while(|word| !word.starts_with(['#', '>', '|', '&']));
    words.map(|word| word.trim_matches(['\'', '"']).to_owned()).collect()
}

/// Also those that are not run.
#[test]
fn command_lines_are_understood() {
    let mut count = 0;
    for document in documents() {
        let shell = |block: &&Block| SHELL.contains(&block.language.as_str());
        for block in document.blocks.iter().filter(shell) {
            for command in block.commands() {
                // `vitq` or `target/release/vitq` at the beginning.
                let words = words(&command);
                if Path::new(&words[0]).file_name().is_none_or(|name| name != "vitq") {
                    continue;
                }
                let parsed = vitq::cli::command().try_get_matches_from(words);
                let place = format!("{}:{}", document.name, block.line);
                assert!(parsed.is_ok(), "{place}: {command}\n{}", parsed.unwrap_err());
                count += 1;
            }
        }
    }
    assert!(count > 40, "{count}");
}

/// Every command, with those below it.
fn all_commands() -> Vec<clap::Command> {
    let mut root = vitq::cli::command();
    root.build();
    let (mut all, mut below) = (Vec::new(), vec![root]);
    while let Some(command) = below.pop() {
        below.extend(command.get_subcommands().cloned());
        all.push(command);
    }
    all
}

/// Whether a command has such a flag.
fn has(command: &clap::Command, flag: &str) -> bool {
    command.get_arguments().any(|arg| arg.get_long() == Some(flag))
}

#[test]
fn commands_flags_and_variables_in_the_prose_exist() {
    let commands = all_commands();
    let args = || commands.iter().flat_map(clap::Command::get_arguments);
    let variables: BTreeSet<&str> =
        args().filter_map(|arg| arg.get_env()).map(|name| name.to_str().unwrap()).collect();
    let (mut others_flags, mut others_variables) = (Used::default(), Used::default());
    for document in documents() {
        let place = &document.name;
        // Results name what they measured.
        let spans = if place.starts_with("bench/results") { vec![] } else { document.spans() };
        for span in spans {
            let words = words(&span);
            let command = named(&commands[0], &words, &format!("{place}: {span}"));
            // `--flag` alone is ours, as is what begins with `vitq`; not `cargo build --release`.
            let ours =
                command.is_some() || words.first().is_some_and(|word| word.starts_with("--"));
            let flags = words.iter().filter_map(|word| word.strip_prefix("--"));
            for flag in flags.take_while(|flag| ours && !flag.is_empty()) {
                let flag = flag.split(['=', '/']).next().unwrap();
                let known = match command {
                    Some(command) => has(command, flag),
                    None => commands.iter().any(|command| has(command, flag)),
                };
                let others = known || others_flags.rule(OTHERS_FLAGS, place, flag).is_some();
                assert!(others, "{place}: unknown flag in `{span}`");
            }
            for word in span.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                let ours = word.starts_with("VITQ_") && word.len() > "VITQ_".len();
                let others = !ours
                    || variables.contains(word)
                    || others_variables.rule(OTHERS_VARIABLES, place, word).is_some();
                assert!(others, "{place}: unknown variable in `{span}`");
            }
        }
    }
    others_flags.all(OTHERS_FLAGS);
    others_variables.all(OTHERS_VARIABLES);
}

/// The command that words begin with, if they begin with `vitq`.
fn named<'a>(root: &'a clap::Command, words: &[String], place: &str) -> Option<&'a clap::Command> {
    if words.first()? != "vitq" {
        return None;
    }
    let mut command = root;
    for word in words[1..].iter().take_while(|word| !word.starts_with('-')) {
        match command.find_subcommand(word) {
            Some(below) => command = below,
            None if command.has_subcommands() && word.to_uppercase() != *word => {
                panic!("{place}: unknown command {word}")
            }
            None => break,
        }
    }
    Some(command)
}

#[test]
fn the_command_line_and_the_methods_are_documented() {
    let text = |name: &str| std::fs::read_to_string(root().join("docs").join(name)).unwrap();
    let (cli, imagenet) = (text("cli.md"), text("imagenet.md"));
    for command in vitq::cli::command().get_subcommands() {
        let name = command.get_name();
        assert!(
            cli.contains(&format!("`{name}")) || cli.contains(&format!("vitq {name}")),
            "{name}"
        );
    }
    for method in vitq::methods::METHODS {
        let lines = imagenet.lines().filter(|line| line.starts_with("    "));
        let mut ids = lines.flat_map(|line| line.split([' ', ',']));
        assert!(ids.any(|id| id == method.id), "{} is missing in imagenet.md", method.id);
    }
}

#[test]
fn links_lead_somewhere() {
    let documents = documents();
    for document in &documents {
        let folder = Path::new(&document.name).parent().unwrap();
        for link in document.links().iter().filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => PathBuf::from(&document.name),
                path => plain(&folder.join(path)),
            };
            let place = &document.name;
            assert!(root().join(&target).exists(), "{place}: {link} leads nowhere");
            if !anchor.is_empty() {
                let named = |document: &&Document| Path::new(&document.name) == target;
                let target = documents.iter().find(named);
                let found = target.is_some_and(|target| target.anchors().contains(anchor));
                assert!(found, "{place}: {link} has no such heading");
            }
        }
    }
}

/// Without `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path {
        if part == ".." {
            assert!(plain.pop(), "{} leads out of the repository", path.display());
        } else {
            plain.push(part);
        }
    }
    plain
}
