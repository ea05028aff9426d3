//! `vitq uploads`: what clients have brought to a server, and what is on its way.

use clap::Subcommand;
use serde_json::{Value, json};

use crate::cli::client::{MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::Failure;
use crate::cli::output::{Output, bytes, columns};
use crate::cli::render::{time, time_json};
use crate::grpc::proto::upload_service_client::UploadServiceClient;
use crate::grpc::proto::{ListUploadsRequest, Upload, UploadKind};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Uploads of checkpoints and of data sets. Unfinished ones are forgotten a day after something
    /// last came.
    List {
        /// Only those that are not complete.
        #[arg(long)]
        unfinished: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let Action::List { unfinished, server } = self.action;
        block_on(async move {
            let mut uploads = all(&server).await?;
            uploads.retain(|upload| !(unfinished && upload.complete));
            let header = ["UPLOAD", "KIND", "RECEIVED", "OF", "LAST"].map(str::to_owned);
            let lines = std::iter::once(header.to_vec()).chain(uploads.iter().map(line));
            let json = uploads.iter().map(as_json).collect::<Value>();
            output.result(columns(&lines.collect::<Vec<_>>()), &json)
        })
    }
}

/// Checkpoints, then data sets, each by name.
async fn all(server: &ServerArgs) -> Result<Vec<Upload>, Failure> {
    let client = UploadServiceClient::new(server.connect().await?);
    let mut client = client.max_decoding_message_size(MAX_ANSWER);
    let mut uploads = Vec::new();
    for kind in [UploadKind::Checkpoint, UploadKind::Dataset] {
        let mut request = ListUploadsRequest { kind: kind.into(), ..Default::default() };
        loop {
            let page = client.list_uploads(request.clone()).await?.into_inner();
            uploads.extend(page.uploads);
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
    }
    Ok(uploads)
}

fn kind(upload: &Upload) -> &'static str {
    match upload.kind() {
        UploadKind::Checkpoint => "checkpoint",
        UploadKind::Dataset => "dataset",
        UploadKind::Unspecified => "",
    }
}

fn line(upload: &Upload) -> Vec<String> {
    // Images that come one by one have no announced size, but a number.
    let (received, all) = if upload.images > 0 {
        (format!("{} images", upload.received_images), format!("{} images", upload.images))
    } else {
        (bytes(upload.received_bytes), bytes(upload.bytes))
    };
    let name = upload.name.clone();
    vec![name, kind(upload).to_owned(), received, all, time(upload.update_time.as_ref())]
}

fn as_json(upload: &Upload) -> Value {
    json!({
        "name": upload.name, "kind": kind(upload), "complete": upload.complete,
        "bytes": upload.bytes, "received_bytes": upload.received_bytes,
        "images": upload.images, "received_images": upload.received_images,
        "sha256": upload.sha256, "create_time": time_json(upload.create_time.as_ref()),
        "update_time": time_json(upload.update_time.as_ref()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_in_bytes_and_images_one_by_one() {
        let file = Upload {
            kind: UploadKind::Checkpoint.into(),
            name: "a".to_owned(),
            bytes: 2000,
            received_bytes: 1500,
            ..Upload::default()
        };
        assert_eq!(line(&file), ["a", "checkpoint", "1.50 kB", "2.00 kB", ""]);
        let kind = UploadKind::Dataset.into();
        let images = Upload { kind, images: 9, received_images: 4, received_bytes: 7, ..file };
        assert_eq!(line(&images), ["a", "dataset", "4 images", "9 images", ""]);
    }
}
