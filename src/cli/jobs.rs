//! `vitq jobs`: the long-running work of a server.

use std::time::{Duration, Instant};

use clap::Subcommand;
use prost::Message;
use serde_json::{Value, json};

use crate::cli::client::{Connection, MAX_ANSWER, ServerArgs, block_on};
use crate::cli::failure::{Failure, inner_status, status_json, status_text};
use crate::cli::follow::{Outcome, Patience, follow, step};
use crate::cli::output::{Output, columns};
use crate::cli::render::{
    evaluated_json, evaluated_text, job_json, job_state, quantized_json, quantized_text, time,
};
use crate::grpc::proto::evaluation_service_client::EvaluationServiceClient;
use crate::grpc::proto::longrunning::operation::Result as Ended;
use crate::grpc::proto::longrunning::operations_client::OperationsClient;
use crate::grpc::proto::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    Operation, WaitOperationRequest,
};
use crate::grpc::proto::quantization_service_client::QuantizationServiceClient;
use crate::grpc::proto::{EvaluateResult, JobMetadata, QuantizeResult, WatchRequest};

/// How long one call waits; the server may answer earlier.
const WAIT_PER_CALL: Duration = Duration::from_secs(20);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// All jobs.
    List {
        /// Only jobs in that state: queued, running, cancelling, succeeded, failed, cancelled.
        #[arg(long, value_name = "STATE")]
        state: Option<String>,
        /// Only jobs that make or read that model.
        #[arg(long, value_name = "ID")]
        model: Option<String>,
        /// Only jobs of that kind: quantize, evaluate.
        #[arg(long, value_name = "KIND")]
        kind: Option<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// The state of a job.
    Get(One),
    /// Watch a job from its beginning to its end.
    Watch(One),
    /// Wait for a job to end.
    Wait {
        #[command(flatten)]
        one: One,
        /// Give up after that many seconds; the job goes on.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Ask a job to stop.
    Cancel(One),
    /// Forget an ended job.
    Delete(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// Name of the job: `operations/ID`, or the id alone.
    #[arg(value_name = "JOB", value_parser = full_name)]
    job: String,
    #[command(flatten)]
    server: ServerArgs,
}

type Client = OperationsClient<Connection>;

impl Args {
    pub(super) fn run(self, output: &Output) -> Result<(), Failure> {
        block_on(async move {
            match self.action {
                Action::List { state, model, kind, server } => {
                    let terms = [("state", state), ("model", model), ("kind", kind)];
                    let terms = terms.into_iter().filter_map(|(name, value)| Some((name, value?)));
                    let terms = terms.map(|(name, value)| format!("metadata.{name}={value}"));
                    let filter = terms.collect::<Vec<_>>().join(" AND ");
                    list(connect(&server).await?, filter, output).await
                }
                Action::Get(One { job, server }) => {
                    let mut client = connect(&server).await?;
                    let operation = client.get_operation(GetOperationRequest { name: job }).await?;
                    let job = Job::of(operation.into_inner())?;
                    output.result(job.text()?, &job.json()?)
                }
                Action::Watch(one) => watch(one, output).await,
                Action::Wait { one, timeout } => {
                    wait(one, timeout.map(Duration::from_secs), output).await
                }
                Action::Cancel(One { job, server }) => {
                    cancel(connect(&server).await?, job, output).await
                }
                Action::Delete(One { job, server }) => {
                    let request = DeleteOperationRequest { name: job.clone() };
                    connect(&server).await?.delete_operation(request).await?;
                    output.result(format!("forgot {job}"), &json!({ "deleted": job }))
                }
            }
        })
    }
}

async fn connect(server: &ServerArgs) -> Result<Client, Failure> {
    Ok(Client::new(server.connect().await?).max_decoding_message_size(MAX_ANSWER))
}

async fn list(mut client: Client, filter: String, output: &Output) -> Result<(), Failure> {
    let mut jobs = Vec::new();
    let mut request = ListOperationsRequest { filter, ..ListOperationsRequest::default() };
    loop {
        let page = client.list_operations(request.clone()).await?.into_inner();
        jobs.extend(page.operations.into_iter().map(Job::of).collect::<Result<Vec<_>, _>>()?);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let header = ["JOB", "KIND", "STATE", "MODEL", "CREATED"];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    lines.extend(jobs.iter().map(|job| {
        vec![
            job.name.clone(),
            job.metadata.kind.clone(),
            job_state(&job.metadata).to_owned(),
            job.metadata.model.clone(),
            time(job.metadata.create_time.as_ref()),
        ]
    }));
    output.result(columns(&lines), &jobs.iter().map(Job::json).collect::<Result<Value, _>>()?)
}

/// Cancelling an ended job changes nothing, and the server does not say so: it is looked at before.
async fn cancel(mut client: Client, name: String, output: &Output) -> Result<(), Failure> {
    let request = GetOperationRequest { name: name.clone() };
    let operation = client.get_operation(request).await?.into_inner();
    if operation.done {
        let job = Job::of(operation)?;
        let state = job_state(&job.metadata);
        let text = format!("{name} has ended already ({state})");
        return output.result(text, &json!({ "ended": name, "state": state }));
    }
    client.cancel_operation(CancelOperationRequest { name: name.clone() }).await?;
    output.result(format!("{name} was asked to stop"), &json!({ "cancelled": name }))
}

async fn watch(one: One, output: &Output) -> Result<(), Failure> {
    let channel = one.server.connect().await?;
    let mut operations = Client::new(channel.clone());
    let request = GetOperationRequest { name: one.job.clone() };
    let job = Job::of(operations.get_operation(request).await?.into_inner())?;
    let request = WatchRequest { name: one.job, after_sequence: 0 };
    if job.metadata.kind == "evaluate" {
        let client = EvaluationServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let again = async |from| Ok(client.clone().watch(from).await?.into_inner());
        let outcome =
            follow(again(request).await?, again, Patience::ToTheEnd, &one.server.server).await?;
        if let Outcome::Done { operation, result } = outcome {
            output.result(evaluated_text(&result), &evaluated_json(&operation, &result))?;
        }
    } else {
        let client = QuantizationServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let again = async |from| Ok(client.clone().watch(from).await?.into_inner());
        let outcome =
            follow(again(request).await?, again, Patience::ToTheEnd, &one.server.server).await?;
        if let Outcome::Done { operation, result } = outcome {
            output.result(quantized_text(&result), &quantized_json(&operation, &result))?;
        }
    }
    Ok(())
}

/// Waits in calls of limited length, so that a server may be restarted behind a balancer.
async fn wait(one: One, timeout: Option<Duration>, output: &Output) -> Result<(), Failure> {
    let mut client = connect(&one.server).await?;
    let start = Instant::now();
    loop {
        let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
        let patience = left.map_or(WAIT_PER_CALL, |left| left.min(WAIT_PER_CALL));
        let request = WaitOperationRequest {
            name: one.job.clone(),
            timeout: prost_types::Duration::try_from(patience).ok(),
        };
        let operation = client.wait_operation(request).await?.into_inner();
        if operation.done {
            let job = Job::of(operation)?;
            if let Some(Ended::Error(status)) = job.ended {
                return Err(inner_status(status).into());
            }
            return output.result(job.text()?, &job.json()?);
        }
        if left.is_some_and(|left| left.is_zero()) {
            return Err(Failure::Unfinished(format!("{} has not ended yet", one.job)));
        }
    }
}

/// An operation with its metadata decoded.
struct Job {
    name: String,
    metadata: JobMetadata,
    ended: Option<Ended>,
}

impl Job {
    fn of(operation: Operation) -> Result<Self, Failure> {
        let Operation { name, metadata, done: _, result } = operation;
        let metadata = match metadata {
            Some(any) => decode(&any.value)?,
            None => JobMetadata::default(),
        };
        Ok(Self { name, metadata, ended: result })
    }

    fn text(&self) -> Result<String, Failure> {
        let JobMetadata { kind, model, progress, .. } = &self.metadata;
        let state = job_state(&self.metadata);
        let mut lines = vec![format!("job {} ({state})", self.name)];
        lines.push(format!("  {kind} {model}"));
        lines.push(format!("  created {}", time(self.metadata.create_time.as_ref())));
        if !self.metadata.worker.is_empty() {
            let JobMetadata { worker, attempt, .. } = &self.metadata;
            lines.push(format!("  running on {worker}, attempt {attempt}"));
        }
        match &self.ended {
            None => lines.extend(progress.clone().map(|progress| {
                let step = step(progress, None);
                format!("  {} {}/{} ({})", step.stage, step.unit, step.units, step.note)
            })),
            Some(Ended::Error(status)) => {
                lines.push(format!("  {}", status_text(&inner_status(status.clone()))));
            }
            Some(Ended::Response(any)) if kind == "evaluate" => {
                lines.push(evaluated_text(&decode::<EvaluateResult>(&any.value)?));
            }
            Some(Ended::Response(any)) => {
                lines.push(quantized_text(&decode::<QuantizeResult>(&any.value)?));
            }
        }
        Ok(lines.join("\n"))
    }

    fn json(&self) -> Result<Value, Failure> {
        let mut json = job_json(&self.name, &self.metadata);
        match &self.ended {
            None => {}
            Some(Ended::Error(status)) => {
                json["error"] = status_json(&inner_status(status.clone()));
            }
            Some(Ended::Response(any)) if self.metadata.kind == "evaluate" => {
                json["result"] = evaluated_json(&self.name, &decode(&any.value)?);
            }
            Some(Ended::Response(any)) => {
                json["result"] = quantized_json(&self.name, &decode(&any.value)?);
            }
        }
        Ok(json)
    }
}

fn decode<T: Message + Default>(bytes: &[u8]) -> Result<T, Failure> {
    T::decode(bytes)
        .map_err(|error| Failure::Unfinished(format!("the server's answer is unreadable: {error}")))
}

/// Ids are shown as `operations/ID`; the prefix may be left out.
#[expect(clippy::unnecessary_wraps, reason = "a value parser returns a result")]
fn full_name(text: &str) -> Result<String, String> {
    let id = text.strip_prefix("operations/").unwrap_or(text);
    Ok(format!("operations/{id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_job_shows_why() {
        let metadata = JobMetadata { kind: "quantize".to_owned(), ..JobMetadata::default() };
        let any = prost_types::Any { type_url: String::new(), value: metadata.encode_to_vec() };
        let job = Job::of(Operation {
            name: "operations/1".to_owned(),
            metadata: Some(any),
            done: true,
            result: Some(Ended::Error(tonic_types::pb::Status {
                code: 1,
                message: "cancelled".to_owned(),
                details: vec![],
            })),
        })
        .unwrap();
        assert!(job.text().unwrap().contains("cancelled\n  code: CANCELLED"));
        let json = job.json().unwrap();
        assert_eq!(json["error"]["code"], "CANCELLED");
        assert!(json["end_time"].is_null(), "it has none: {json}");
    }

    #[test]
    fn the_prefix_of_a_name_may_be_left_out() {
        assert_eq!(full_name("operations/7"), full_name("7"));
    }
}
