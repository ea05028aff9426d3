//! `vitq classify`: the most probable labels of images.

use std::collections::VecDeque;
use std::mem;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

use crate::cli::args;
use crate::cli::client::{MAX_ANSWER, ServerArgs, block_on, in_time};
use crate::cli::failure::{Failure, inner_status, status_json};
use crate::cli::output::Output;
use crate::cli::render::{label_json, seconds};
use crate::error::Error;
use crate::grpc::MESSAGE_TOO_LARGE;
use crate::grpc::proto::classify_item::Outcome;
use crate::grpc::proto::inference_service_client::InferenceServiceClient;
use crate::grpc::proto::{
    ClassifyItem, ClassifyPriority, ClassifyRequest, ClassifyResponse, Image,
};

/// Images of one call; more are sent in several calls.
const IMAGES_PER_CALL: usize = 32;
/// Bytes of one call, below the size that servers accept by default.
const BYTES_PER_CALL: usize = 24 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model id.
    #[arg(long, value_name = "ID")]
    model: String,
    /// Labels to show per image.
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    /// Whether somebody waits for the answer.
    #[arg(long, value_name = "NAME", default_value = "interactive")]
    priority: Priority,
    /// Seconds that a call, of at most 32 images, may take; without it, the server's 10.
    #[arg(long, value_name = "SECONDS", value_parser = args::timeout)]
    timeout: Option<Duration>,
    /// JPEG, PNG or WebP files.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// A flag's priority.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Priority {
    /// Somebody waits.
    Interactive,
    /// Runs when nothing else waits.
    Bulk,
}

impl From<Priority> for i32 {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Interactive => ClassifyPriority::Interactive.into(),
            Priority::Bulk => ClassifyPriority::Bulk.into(),
        }
    }
}

/// What became of an image.
#[derive(Debug)]
enum Answer {
    /// The server has seen it.
    Item(ClassifyItem),
    /// It could not be read, or not be sent.
    Failed(Failure),
}

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        let contents: Vec<_> = self.images.iter().map(|path| read(path)).collect();
        let (mut readable, mut unreadable) = (Vec::new(), Vec::new());
        for content in contents {
            let error = content.map(|content| readable.push(content)).err();
            unreadable.push(error);
        }
        block_on(async move {
            let (mut asked, responses) = match readable.is_empty() {
                true => Default::default(),
                false => self.ask(readable).await?,
            };
            let answers = unreadable.into_iter().map(|error| match error {
                Some(error) => Answer::Failed(error.into()),
                None => asked.pop_front().unwrap_or(Answer::Item(ClassifyItem::default())),
            });
            show(&self.images, &answers.collect::<Vec<_>>(), &responses, output)
        })
    }

    /// An answer for each image, and the server's without them.
    async fn ask(
        &self,
        contents: Vec<Vec<u8>>,
    ) -> Result<(VecDeque<Answer>, Vec<ClassifyResponse>), Failure> {
        let sizes: Vec<usize> = contents.iter().map(Vec::len).collect();
        let channel = self.server.connect().await?;
        let mut client = InferenceServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let mut contents = contents.into_iter();
        let (mut answers, mut responses) = (VecDeque::new(), Vec::new());
        for count in calls(&sizes) {
            let images = contents.by_ref().take(count);
            let mut request = Request::new(ClassifyRequest {
                model: self.model.clone(),
                images: images.map(|content| Image { content: content.into() }).collect(),
                top_k: self.top_k,
                priority: self.priority.into(),
            });
            if let Some(timeout) = self.timeout {
                request.set_timeout(timeout);
            }
            match in_time(client.classify(request).await) {
                Ok(response) => {
                    let mut response = response.into_inner();
                    let mut items = mem::take(&mut response.items);
                    items.resize_with(count, ClassifyItem::default);
                    answers.extend(items.into_iter().map(Answer::Item));
                    responses.push(response);
                }
                // A bad image fails alone.
                Err(status) if count == 1 && is_too_large(&status) => {
                    answers.push_back(Answer::Failed(status.into()));
                }
                Err(status) => return Err(status.into()),
            }
        }
        Ok((answers, responses))
    }
}

/// Whether no call can carry what this one did.
fn is_too_large(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.reason == MESSAGE_TOO_LARGE)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::io(path, source))
}

/// How many images go into each call.
fn calls(sizes: &[usize]) -> Vec<usize> {
    let mut calls = Vec::new();
    let (mut images, mut bytes) = (0, 0);
    for size in sizes {
        if images == IMAGES_PER_CALL || (images > 0 && bytes + size > BYTES_PER_CALL) {
            calls.push(images);
            (images, bytes) = (0, 0);
        }
        images += 1;
        bytes += size;
    }
    if images > 0 {
        calls.push(images);
    }
    calls
}

/// Prints an answer per image; fails if an image failed.
fn show(
    paths: &[PathBuf],
    answers: &[Answer],
    responses: &[ClassifyResponse],
    output: &Output,
) -> Result<(), Failure> {
    let version = responses.first().map(|response| response.model_version.clone());
    let timings = responses.iter().filter_map(|response| response.timings.as_ref());
    let total: f64 = timings.filter_map(|t| t.total.as_ref()).map(seconds).sum();
    let lines = paths.iter().zip(answers).map(|(path, answer)| line(path, answer));
    let text = lines.collect::<Vec<_>>().join("\n");
    let images = paths.iter().zip(answers).map(|(path, answer)| answer_json(path, answer));
    let json = json!({
        "answered_by": responses.first().map(|response| response.model.clone()),
        "model_version": version,
        "total_seconds": total,
        "images": images.collect::<Vec<Value>>(),
    });
    output.result(text, &json)?;
    let is_good = |answer: &&Answer| {
        matches!(answer, Answer::Item(ClassifyItem { outcome: Some(Outcome::Result(_)), .. }))
    };
    match paths.len() - answers.iter().filter(is_good).count() {
        0 => Ok(()),
        failed => Err(Failure::Unfinished(format!("{failed} of {} images failed", paths.len()))),
    }
}

fn line(path: &Path, answer: &Answer) -> String {
    let file = path.display();
    let item = match answer {
        Answer::Item(item) => item,
        // The error names the file, too.
        Answer::Failed(Failure::Local(Error::Io { source, .. })) => {
            return format!("{file}: error: {source}");
        }
        Answer::Failed(failure) => return format!("{file}: error: {}", failure.sentence()),
    };
    let answer = match &item.outcome {
        Some(Outcome::Result(result)) => {
            let labels = result.labels.iter();
            let labels =
                labels.map(|label| format!("{} {:.1} %", label.label, 100.0 * label.probability));
            labels.collect::<Vec<_>>().join(", ")
        }
        Some(Outcome::Error(status)) => format!("error: {}", status.message),
        None => "no answer".to_owned(),
    };
    format!("{file}: {answer}")
}

fn answer_json(path: &Path, answer: &Answer) -> Value {
    let file = path.display().to_string();
    let outcome = match answer {
        Answer::Item(item) => &item.outcome,
        Answer::Failed(failure) => return json!({ "file": file, "error": failure.json() }),
    };
    match outcome {
        Some(Outcome::Result(result)) => {
            let labels: Vec<Value> = result.labels.iter().map(label_json).collect();
            json!({ "file": file, "labels": labels })
        }
        Some(Outcome::Error(status)) => {
            json!({ "file": file, "error": status_json(&inner_status(status.clone())) })
        }
        None => json!({ "file": file, "error": null }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_stay_below_their_limits_and_lose_no_image() {
        assert_eq!(calls(&[1; 70]), [32, 32, 6]);
        let large = 20 << 20;
        assert_eq!(calls(&[large, large, 1, 2 * large]), [1, 2, 1]);
        assert!(calls(&[]).is_empty());
    }
}
