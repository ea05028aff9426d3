//! `vitq models`: the quantized models of a server.

use clap::Subcommand;
use serde_json::{Value, json};

use crate::cli::client::{Connection, MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, bytes, columns};
use crate::cli::render::{bits, model_json, model_state, model_text, report_json, report_text};
use crate::grpc::proto::model_service_client::ModelServiceClient;
use crate::grpc::proto::{
    DeleteAliasRequest, DeleteModelRequest, GetModelRequest, ListModelsRequest, LoadModelRequest,
    Model, SetAliasRequest, UnloadModelRequest,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// All models.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// One model with its calibration report.
    Get(One),
    /// Load a model, so that its first call is fast.
    Load(One),
    /// Free a model's memory; it stays stored.
    Unload(One),
    /// Remove a model for good.
    Delete(One),
    /// Point an alias to a model: calls that name the alias go there from now on.
    Alias {
        /// The alias, new or old.
        #[arg(value_name = "ALIAS")]
        alias: String,
        /// Model id.
        #[arg(value_name = "ID")]
        model: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Forget an alias; its model stays.
    Unalias {
        /// The alias.
        #[arg(value_name = "ALIAS")]
        alias: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

#[derive(Debug, clap::Args)]
struct One {
    /// Model id.
    #[arg(value_name = "ID")]
    model: String,
    #[command(flatten)]
    server: ServerArgs,
}

type Client = ModelServiceClient<Connection>;

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        block_on(async move {
            match self.action {
                Action::List { server } => list(connect(&server).await?, output).await,
                Action::Get(One { model, server }) => {
                    get(connect(&server).await?, model, output).await
                }
                Action::Load(One { model, server }) => {
                    let mut client = connect(&server).await?;
                    let answer = client.load_model(LoadModelRequest { model }).await?;
                    show(answer.into_inner().model, output)
                }
                Action::Unload(One { model, server }) => {
                    let mut client = connect(&server).await?;
                    let answer = client.unload_model(UnloadModelRequest { model }).await?;
                    show(answer.into_inner().model, output)
                }
                Action::Delete(One { model, server }) => {
                    let mut client = connect(&server).await?;
                    client.delete_model(DeleteModelRequest { model: model.clone() }).await?;
                    output.result(format!("deleted {model}"), &json!({ "deleted": model }))
                }
                Action::Alias { alias, model, server } => {
                    let mut client = connect(&server).await?;
                    let request = SetAliasRequest { alias: alias.clone(), model };
                    show(client.set_alias(request).await?.into_inner().model, output)
                }
                Action::Unalias { alias, server } => {
                    let mut client = connect(&server).await?;
                    client.delete_alias(DeleteAliasRequest { alias: alias.clone() }).await?;
                    output.result(format!("forgot {alias}"), &json!({ "forgot": alias }))
                }
            }
        })
    }
}

async fn connect(server: &ServerArgs) -> Result<Client, Failure> {
    Ok(Client::new(server.connect().await?).max_decoding_message_size(MAX_ANSWER))
}

async fn list(mut client: Client, output: &Output) -> Result<(), Failure> {
    let mut models = Vec::new();
    let mut request = ListModelsRequest::default();
    loop {
        let page = client.list_models(request.clone()).await?.into_inner();
        models.extend(page.models);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let header = ["MODEL", "STATE", "METHOD", "BITS", "ARCHITECTURE", "SIZE", "VERSION", "ALIASES"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    lines.extend(models.iter().map(|model| {
        vec![
            model.id.clone(),
            model_state(model).to_owned(),
            model.method.clone(),
            bits(model),
            model.architecture.clone(),
            bytes(model.artifact_bytes),
            model.digest.chars().take(12).collect(),
            model.aliases.join(", "),
        ]
    }));
    output.result(columns(&lines), &models.iter().map(model_json).collect::<Value>())
}

async fn get(mut client: Client, model: String, output: &Output) -> Result<(), Failure> {
    let answer = client.get_model(GetModelRequest { model }).await?.into_inner();
    let mut text: Vec<String> = answer.model.iter().map(model_text).collect();
    text.extend(answer.report.iter().map(report_text).filter(|text| !text.is_empty()));
    let json = json!({
        "model": answer.model.as_ref().map(model_json),
        "report": answer.report.as_ref().map(report_json),
        "class_labels": answer.class_labels,
    });
    output.result(text.join("\n"), &json)
}

fn show(model: Option<Model>, output: &Output) -> Result<(), Failure> {
    let model = model.unwrap_or_default();
    output.result(model_text(&model), &model_json(&model))
}
