//! What is promised of the API, and the references in docs/ that are made of the program: the API's
//! from proto/, the configuration's from the command line. `UPDATE_REFERENCE=1` writes them anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use clap::{Arg, Args as _, Command};
use prost::Message as _;
use prost_types::field_descriptor_proto::Label;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet, ServiceDescriptorProto,
};
use vitq::config::{ServeConfig, WorkerConfig};
use vitq::grpc::proto::DESCRIPTORS;

fn update() -> bool {
    env::var_os("UPDATE_REFERENCE").is_some()
}

/// Compares a file of the repository with what it should be, or writes it.
fn is_current(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if update() {
        fs::write(file, text).unwrap();
        return;
    }
    let found = fs::read_to_string(file).unwrap_or_default();
    let differing = found.lines().zip(text.lines()).find(|(old, new)| old != new);
    assert!(found == text, "{path} is out of date (UPDATE_REFERENCE=1 writes it): {differing:?}");
}

/// Our files and the inference protocol's, by name.
fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let ours = |file: &FileDescriptorProto| ["vitq.v1", "inference"].contains(&file.package());
    set.file.into_iter().filter(ours).collect()
}

fn type_name(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    let full = field.type_name().trim_start_matches('.');
    let entry = message.nested_type.iter().find(|nested| {
        full.ends_with(&format!("{}.{}", message.name(), nested.name()))
            && nested.options.as_ref().is_some_and(|options| options.map_entry())
    });
    if let Some(entry) = entry {
        let of = |index: usize| type_name(&entry.field[index], entry);
        return format!("map<{}, {}>", of(0), of(1));
    }
    let name = if full.is_empty() {
        format!("{:?}", field.r#type()).to_lowercase()
    } else {
        full.to_owned()
    };
    if field.label() == Label::Repeated {
        format!("repeated {name}")
    } else if field.proto3_optional() {
        format!("optional {name}")
    } else {
        name
    }
}

/// What other programs rely on, a line each: calls, fields with numbers and types, values of enums.
fn promises() -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for file in files() {
        let package = file.package();
        for service in &file.service {
            for call in &service.method {
                let stream = |is| if is { "stream " } else { "" };
                lines.insert(format!(
                    "rpc {package}.{}/{} ({}{}) returns ({}{})",
                    service.name(),
                    call.name(),
                    stream(call.client_streaming()),
                    call.input_type().trim_start_matches('.'),
                    stream(call.server_streaming()),
                    call.output_type().trim_start_matches('.'),
                ));
            }
        }
        for message in &file.message_type {
            of_message(&format!("{package}.{}", message.name()), message, &mut lines);
        }
        for values in &file.enum_type {
            of_enum(&format!("{package}.{}", values.name()), values, &mut lines);
        }
    }
    lines
}

fn of_message(name: &str, message: &DescriptorProto, lines: &mut BTreeSet<String>) {
    for field in &message.field {
        let oneof = field.oneof_index.filter(|_| !field.proto3_optional());
        let oneof = oneof.map(|index| format!(" of {}", message.oneof_decl[index as usize].name()));
        lines.insert(format!(
            "field {name}.{} = {} {}{}",
            field.name(),
            field.number(),
            type_name(field, message),
            oneof.unwrap_or_default(),
        ));
    }
    for nested in &message.nested_type {
        of_message(&format!("{name}.{}", nested.name()), nested, lines);
    }
    for values in &message.enum_type {
        of_enum(&format!("{name}.{}", values.name()), values, lines);
    }
}

fn of_enum(name: &str, values: &EnumDescriptorProto, lines: &mut BTreeSet<String>) {
    for value in &values.value {
        lines.insert(format!("value {name}.{} = {}", value.name(), value.number()));
    }
}

/// `tests/fixtures/api.txt` only grows: what a client was built with goes on working.
#[test]
fn the_api_keeps_what_it_promised() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/api.txt");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let promised: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let now = promises();
    let broken: Vec<_> = promised.difference(&now).collect();
    assert!(broken.is_empty(), "clients rely on this: {broken:#?}");
    let lines: Vec<&str> = now.iter().map(String::as_str).collect();
    is_current("tests/fixtures/api.txt", &(lines.join("\n") + "\n"));
}

/// Comments by the path of what they are of.
fn comments(file: &FileDescriptorProto) -> BTreeMap<Vec<i32>, String> {
    let locations = file.source_code_info.iter().flat_map(|info| &info.location);
    let comment = |text: &str| {
        let lines = text.lines().map(str::trim).collect::<Vec<_>>();
        lines.join(" ").trim().to_owned()
    };
    locations
        .filter_map(|location| {
            Some((location.path.clone(), comment(location.leading_comments.as_deref()?)))
        })
        .collect()
}

/// A cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

fn short(name: &str) -> &str {
    name.trim_start_matches('.').trim_start_matches("vitq.v1.")
}

struct Page {
    text: String,
    comments: BTreeMap<Vec<i32>, String>,
}

impl Page {
    fn comment(&self, path: &[i32]) -> String {
        self.comments.get(path).cloned().unwrap_or_default()
    }

    fn service(&mut self, service: &ServiceDescriptorProto, path: &[i32]) {
        let about = self.comment(path);
        writeln!(self.text, "\n## {}\n\n{about}\n", service.name()).unwrap();
        writeln!(self.text, "| call | takes | gives | |\n|---|---|---|---|").unwrap();
        for (index, call) in service.method.iter().enumerate() {
            let about = self.comment(&[path, &[2, index as i32]].concat());
            let stream =
                |is, name: &str| format!("{}`{}`", if is { "stream of " } else { "" }, short(name));
            let takes = stream(call.client_streaming(), call.input_type());
            let gives = stream(call.server_streaming(), call.output_type());
            writeln!(self.text, "| `{}` | {takes} | {gives} | {} |", call.name(), cell(&about))
                .unwrap();
        }
    }

    fn message(&mut self, name: &str, message: &DescriptorProto, path: &[i32]) {
        let about = self.comment(path);
        writeln!(self.text, "\n### {name}\n\n{about}").unwrap();
        if !message.field.is_empty() {
            writeln!(self.text, "\n| | field | type | |\n|---|---|---|---|").unwrap();
        }
        for (index, field) in message.field.iter().enumerate() {
            let mut about = self.comment(&[path, &[2, index as i32]].concat());
            if let Some(oneof) = field.oneof_index.filter(|_| !field.proto3_optional()) {
                let oneof = message.oneof_decl[oneof as usize].name();
                about = format!("{about} (one of `{oneof}`)");
            }
            let kind = type_name(field, message).replace("vitq.v1.", "");
            let (number, name) = (field.number(), field.name());
            writeln!(self.text, "| {number} | `{name}` | `{kind}` | {} |", cell(&about)).unwrap();
        }
        for (index, nested) in message.nested_type.iter().enumerate() {
            if !nested.options.as_ref().is_some_and(|options| options.map_entry()) {
                let path = [path, &[3, index as i32]].concat();
                self.message(&format!("{name}.{}", nested.name()), nested, &path);
            }
        }
        for (index, values) in message.enum_type.iter().enumerate() {
            let path = [path, &[4, index as i32]].concat();
            self.values(&format!("{name}.{}", values.name()), values, &path);
        }
    }

    fn values(&mut self, name: &str, values: &EnumDescriptorProto, path: &[i32]) {
        let about = self.comment(path);
        writeln!(self.text, "\n### {name}\n\n{about}\n\n| | value | |\n|---|---|---|").unwrap();
        for (index, value) in values.value.iter().enumerate() {
            let about = self.comment(&[path, &[2, index as i32]].concat());
            let (number, name) = (value.number(), value.name());
            writeln!(self.text, "| {number} | `{name}` | {} |", cell(&about)).unwrap();
        }
    }
}

#[test]
fn the_api_reference_is_current() {
    let mut text =
        "# API\n\nMade of the comments in [proto/vitq/v1](../proto/vitq/v1); package `vitq.v1`. \
        How calls, jobs and errors go together is told in [clients.md](clients.md); the inference \
        protocol has [a page of its own](open-inference-protocol.md).\n"
            .to_owned();
    for file in files().iter().filter(|file| file.package() == "vitq.v1") {
        let mut page = Page { text: String::new(), comments: comments(file) };
        for (index, service) in file.service.iter().enumerate() {
            page.service(service, &[6, index as i32]);
        }
        if file.service.is_empty() {
            writeln!(page.text, "\n## {}", file.name().trim_start_matches("vitq/v1/")).unwrap();
        }
        for (index, message) in file.message_type.iter().enumerate() {
            page.message(message.name(), message, &[4, index as i32]);
        }
        for (index, values) in file.enum_type.iter().enumerate() {
            page.values(values.name(), values, &[5, index as i32]);
        }
        text += &page.text;
    }
    assert!(!text.contains("|  |\n"), "something in proto/vitq/v1 has no comment");
    is_current("docs/api.md", &text);
}

fn setting(arg: &Arg) -> String {
    let default = arg.get_default_values().iter().map(|value| value.to_string_lossy());
    let default = default.collect::<Vec<_>>().join(",");
    let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
    let variable = arg.get_env().map(|name| format!("`{}`", name.to_string_lossy()));
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let help = help.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let (flag, variable) = (arg.get_long().unwrap(), variable.unwrap_or_default());
    format!("| `{flag}` | {variable} | {default} | {} |", cell(&help))
}

#[test]
fn the_configuration_reference_is_current() {
    let settings = |command: Command| {
        let args: Vec<Arg> = command.get_arguments().cloned().collect();
        args.into_iter().filter(|arg| arg.get_long().is_some_and(|name| name != "help"))
    };
    let worker = settings(WorkerConfig::augment_args(Command::new("worker")));
    let worker: BTreeMap<String, Arg> =
        worker.map(|arg| (arg.get_long().unwrap().to_owned(), arg)).collect();
    let serve: Vec<Arg> = settings(ServeConfig::augment_args(Command::new("serve"))).collect();
    let (both, alone): (Vec<&Arg>, Vec<&Arg>) =
        serve.iter().partition(|arg| worker.contains_key(arg.get_long().unwrap()));
    assert_eq!(both.len(), worker.len(), "a worker has a setting that servers do not have");
    let mut text = "# Configuration\n\nMade of the flags of `vitq serve` and `vitq worker`. Each setting is a \
        flag (`--queue-images`), an environment variable, and a key of the file that `--config` names; \
        which one wins, and how to check them, is told in [operations.md](operations.md).\n"
        .to_owned();
    for (title, list) in [("Servers and workers", both), ("Servers alone", alone)] {
        writeln!(text, "\n## {title}\n\n| setting | variable | default | |\n|---|---|---|---|")
            .unwrap();
        for arg in list {
            writeln!(text, "{}", setting(arg)).unwrap();
        }
    }
    is_current("docs/configuration.md", &text);
}
