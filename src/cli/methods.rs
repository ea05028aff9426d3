//! `vitq methods`: the catalogue of methods and their options.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::cli::client::{CredentialArgs, MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::grpc::proto::catalog_service_client::CatalogServiceClient;
use crate::grpc::proto::{self, ListMethodsRequest, method_option};
use crate::methods::{METHODS, MethodEntry, OptionKind, OptionSpec};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Ask this server; without it, the methods of this program.
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    #[command(flatten)]
    credentials: CredentialArgs,
}

/// A method as it is shown, wherever it comes from.
struct Entry {
    id: String,
    summary: String,
    source: String,
    options: Vec<EntryOption>,
}

struct EntryOption {
    name: String,
    help: String,
    default: String,
    values: String,
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let Some(server) = self.server else {
            return show(&METHODS.iter().map(|method| local(method)).collect::<Vec<_>>(), output);
        };
        let server = ServerArgs { server, credentials: self.credentials };
        block_on(async move {
            let mut client = CatalogServiceClient::new(server.connect().await?)
                .max_decoding_message_size(MAX_ANSWER);
            let answer = client.list_methods(ListMethodsRequest {}).await?.into_inner();
            show(&answer.methods.into_iter().map(remote).collect::<Vec<_>>(), output)
        })
    }
}

fn local(method: &MethodEntry) -> Entry {
    let options = method.options.iter().map(|option| {
        let OptionSpec { name, help, kind, default } = option;
        let values = match kind {
            OptionKind::Bool => "true or false".to_owned(),
            OptionKind::Int { min, max } => format!("{min} to {max}"),
            OptionKind::Float { min, max } => format!("{min} to {max}, real"),
            OptionKind::Choice(names) => names.join(", "),
        };
        EntryOption {
            name: (*name).to_owned(),
            help: (*help).to_owned(),
            default: (*default).to_owned(),
            values,
        }
    });
    Entry {
        id: method.id.to_owned(),
        summary: method.summary.to_owned(),
        source: method.source.to_owned(),
        options: options.collect(),
    }
}

fn remote(method: proto::Method) -> Entry {
    let proto::Method { id, summary, source, options } = method;
    let options = options.into_iter().map(|option| {
        let proto::MethodOption { name, help, default_value, r#type } = option;
        let values = match r#type {
            Some(method_option::Type::BoolOption(_)) => "true or false".to_owned(),
            Some(method_option::Type::IntOption(int)) => format!("{} to {}", int.min, int.max),
            Some(method_option::Type::FloatOption(float)) => {
                format!("{} to {}, real", float.min, float.max)
            }
            Some(method_option::Type::ChoiceOption(choice)) => choice.choices.join(", "),
            None => String::new(),
        };
        EntryOption { name, help, default: default_value, values }
    });
    Entry { id, summary, source, options: options.collect() }
}

fn show(entries: &[Entry], output: &Output) -> Result<(), Failure> {
    let text = entries.iter().map(entry_text).collect::<Vec<_>>().join("\n");
    output.result(text.trim_end(), &entries.iter().map(entry_json).collect::<Value>())
}

fn entry_text(entry: &Entry) -> String {
    let mut text = format!("{}\n  {}\n", entry.id, entry.summary);
    let _infallible = writeln!(text, "  source: {}", entry.source);
    for option in &entry.options {
        let EntryOption { name, help, default, values } = option;
        let _infallible = writeln!(text, "  --option {name}={default}\n      {help}; {values}");
    }
    text
}

fn entry_json(entry: &Entry) -> Value {
    let options = entry.options.iter().map(|option| {
        json!({
            "name": option.name,
            "help": option.help,
            "default": option.default,
            "values": option.values,
        })
    });
    json!({
        "id": entry.id,
        "summary": entry.summary,
        "source": entry.source,
        "options": options.collect::<Vec<_>>(),
    })
}
