//! `vitq datasets`: the data sets of a server.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::{Value, json};

use crate::cli::client::{Connection, MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, columns};
use crate::cli::render::{time, time_json};
use crate::cli::upload::{Destination, Load, upload};
use crate::grpc::proto::dataset_service_client::DatasetServiceClient;
use crate::grpc::proto::{Dataset, DeleteDatasetRequest, GetDatasetRequest, ListDatasetsRequest};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// All data sets.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// One data set with its classes.
    Get(One),
    /// Bring a data set to the server. A broken upload goes on where it broke off.
    Upload {
        /// Folder of class folders with JPEG, PNG or WebP files, or a tar file of one.
        #[arg(value_name = "PATH")]
        path: PathBuf,
        #[command(flatten)]
        destination: Destination,
    },
    /// Delete an uploaded data set, or an unfinished upload of one.
    Delete(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// Name of the data set.
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    server: ServerArgs,
}

type Client = DatasetServiceClient<Connection>;

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        block_on(async move {
            match self.action {
                Action::List { server } => list(connect(&server).await?, output).await,
                Action::Get(One { name, server }) => {
                    let dataset = get(&mut connect(&server).await?, name).await?;
                    output.result(text(&dataset), &as_json(&dataset))
                }
                Action::Upload { path, destination } => {
                    let server = destination.server.clone();
                    let name = upload(Load::dataset(&path)?, destination).await?.name;
                    let dataset = get(&mut connect(&server).await?, name).await?;
                    output.result(text(&dataset), &as_json(&dataset))
                }
                Action::Delete(One { name, server }) => {
                    let request = DeleteDatasetRequest { name: name.clone() };
                    connect(&server).await?.delete_dataset(request).await?;
                    output.result(format!("deleted {name}"), &json!({ "deleted": name }))
                }
            }
        })
    }
}

async fn connect(server: &ServerArgs) -> Result<Client, Failure> {
    Ok(Client::new(server.connect().await?).max_decoding_message_size(MAX_ANSWER))
}

async fn get(client: &mut Client, name: String) -> Result<Dataset, Failure> {
    let answer = client.get_dataset(GetDatasetRequest { name }).await?;
    Ok(answer.into_inner().dataset.unwrap_or_default())
}

async fn list(mut client: Client, output: &Output) -> Result<(), Failure> {
    let mut datasets = Vec::new();
    let mut request = ListDatasetsRequest::default();
    loop {
        let page = client.list_datasets(request.clone()).await?.into_inner();
        datasets.extend(page.datasets);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let header = ["DATASET", "IMAGES", "CLASSES", "UPLOADED"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    lines.extend(datasets.iter().map(|dataset| {
        vec![
            dataset.name.clone(),
            dataset.images.to_string(),
            dataset.classes.len().to_string(),
            time(dataset.create_time.as_ref()),
        ]
    }));
    output.result(columns(&lines), &datasets.iter().map(as_json).collect::<Value>())
}

fn text(dataset: &Dataset) -> String {
    let Dataset { name, images, classes, uploaded, digest, create_time: _ } = dataset;
    let image = if *images == 1 { "image" } else { "images" };
    let class = if classes.len() == 1 { "class" } else { "classes" };
    let mut text = format!("{name}: {images} {image} of {} {class}", classes.len());
    if *uploaded {
        text.push_str(&format!("\n  sha256 {digest}"));
    }
    text
}

fn as_json(dataset: &Dataset) -> Value {
    let Dataset { name, images, classes, uploaded, digest, create_time } = dataset;
    json!({
        "name": name, "images": images, "classes": classes, "uploaded": uploaded,
        "digest": uploaded.then_some(digest),
        "create_time": time_json(create_time.as_ref()),
    })
}
