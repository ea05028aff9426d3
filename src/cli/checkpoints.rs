//! `vitq checkpoints`: the float checkpoints of a server.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::{Value, json};

use crate::cli::client::{Connection, MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, bytes, columns};
use crate::cli::render::{time, time_json};
use crate::cli::upload::{Destination, Load, upload};
use crate::grpc::proto::checkpoint_service_client::CheckpointServiceClient;
use crate::grpc::proto::{
    Checkpoint, DeleteCheckpointRequest, GetCheckpointRequest, ListCheckpointsRequest,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// All checkpoints.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// One checkpoint.
    Get(One),
    /// Bring a checkpoint to the server. A broken upload goes on where it broke off.
    Upload {
        /// Folder with config.json and model.safetensors.
        #[arg(value_name = "PATH")]
        path: PathBuf,
        #[command(flatten)]
        destination: Destination,
    },
    /// Delete an uploaded checkpoint, or an unfinished upload of one; models made from it stay.
    Delete(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// Name of the checkpoint.
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    server: ServerArgs,
}

type Client = CheckpointServiceClient<Connection>;

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        block_on(async move {
            match self.action {
                Action::List { server } => list(connect(&server).await?, output).await,
                Action::Get(One { name, server }) => {
                    let checkpoint = get(&mut connect(&server).await?, name).await?;
                    output.result(text(&checkpoint), &as_json(&checkpoint))
                }
                Action::Upload { path, destination } => {
                    let server = destination.server.clone();
                    let name = upload(Load::checkpoint(&path)?, destination).await?.name;
                    let checkpoint = get(&mut connect(&server).await?, name).await?;
                    output.result(text(&checkpoint), &as_json(&checkpoint))
                }
                Action::Delete(One { name, server }) => {
                    let request = DeleteCheckpointRequest { name: name.clone() };
                    connect(&server).await?.delete_checkpoint(request).await?;
                    output.result(format!("deleted {name}"), &json!({ "deleted": name }))
                }
            }
        })
    }
}

async fn connect(server: &ServerArgs) -> Result<Client, Failure> {
    Ok(Client::new(server.connect().await?).max_decoding_message_size(MAX_ANSWER))
}

async fn get(client: &mut Client, name: String) -> Result<Checkpoint, Failure> {
    let answer = client.get_checkpoint(GetCheckpointRequest { name }).await?;
    Ok(answer.into_inner().checkpoint.unwrap_or_default())
}

async fn list(mut client: Client, output: &Output) -> Result<(), Failure> {
    let mut checkpoints = Vec::new();
    let mut request = ListCheckpointsRequest::default();
    loop {
        let page = client.list_checkpoints(request.clone()).await?.into_inner();
        checkpoints.extend(page.checkpoints);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let header = ["CHECKPOINT", "ARCHITECTURE", "SIZE", "UPLOADED"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    lines.extend(checkpoints.iter().map(|checkpoint| {
        vec![
            checkpoint.name.clone(),
            checkpoint.architecture.clone(),
            bytes(checkpoint.bytes),
            time(checkpoint.create_time.as_ref()),
        ]
    }));
    output.result(columns(&lines), &checkpoints.iter().map(as_json).collect::<Value>())
}

fn text(checkpoint: &Checkpoint) -> String {
    let Checkpoint { name, architecture, bytes: size, uploaded, digest, create_time: _ } =
        checkpoint;
    let mut text = format!("{name}: {architecture}, {}", bytes(*size));
    if *uploaded {
        text.push_str(&format!("\n  sha256 {digest}"));
    }
    text
}

fn as_json(checkpoint: &Checkpoint) -> Value {
    let Checkpoint { name, architecture, bytes, uploaded, digest, create_time } = checkpoint;
    json!({
        "name": name, "architecture": architecture, "bytes": bytes, "uploaded": uploaded,
        "digest": uploaded.then_some(digest),
        "create_time": time_json(create_time.as_ref()),
    })
}
