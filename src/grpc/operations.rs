//! `google.longrunning.Operations` over the jobs.

use std::sync::Arc;
use std::time::Duration;

use prost::{Message, Name};
use prost_types::Any;
use tonic::{Request, Response, Status};

use super::auth::{Principal, Scope, principal};
use super::events::job_id;
use super::fields::{count, timestamp};
use super::page::PageRequest;
use super::proto::longrunning::operation::Result as OperationResult;
use super::proto::longrunning::operations_server::Operations;
use super::proto::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    ListOperationsResponse, Operation, WaitOperationRequest,
};
use super::status::{rpc_status, status};
use super::{evaluate, events, proto, quantize};
use crate::engine::Engine;
use crate::engine::jobs::{JobFilter, JobId, JobOutput, JobRecord, JobRunner, JobSpec, JobState};
use crate::error::{Error, Result};

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Jobs {
    engine: Arc<Engine>,
}

impl Jobs {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl Operations for Jobs {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let (filter, page) = list_request(request.into_inner())?;
        let mut found = self.list(&filter, &page).await?;
        let next_page_token = page.cut(&mut found, |job| job.id.to_string());
        let operations = found.into_iter().map(|job| operation(&self.engine.jobs, job)).collect();
        Ok(Response::new(ListOperationsResponse {
            operations,
            next_page_token,
            unreachable: Vec::new(),
        }))
    }

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let GetOperationRequest { name } = request.into_inner();
        let job = self.engine.jobs.store().get(&job_id(&name)?).await?;
        Ok(Response::new(operation(&self.engine.jobs, job)))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let caller = principal(&request);
        let DeleteOperationRequest { name } = request.into_inner();
        self.engine.jobs.store().delete(&self.in_hands_of(&caller, &name).await?).await?;
        Ok(Response::new(()))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let caller = principal(&request);
        let CancelOperationRequest { name } = request.into_inner();
        self.engine.jobs.cancel(&self.in_hands_of(&caller, &name).await?).await?;
        Ok(Response::new(()))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let WaitOperationRequest { name, timeout } = request.into_inner();
        let timeout = timeout.map(Duration::try_from).transpose();
        let timeout = timeout.map_err(|_| Error::invalid("timeout", "must not be negative"))?;
        let job = self.engine.jobs.wait(&job_id(&name)?, timeout).await?;
        Ok(Response::new(operation(&self.engine.jobs, job)))
    }
}

impl Jobs {
    /// The job of that name, if the caller may end and forget it: whoever may start jobs of its kind
    /// may, whoever started it.
    async fn in_hands_of(&self, caller: &Principal, name: &str) -> Result<JobId> {
        let id = job_id(name)?;
        let starts = match *self.engine.jobs.store().get(&id).await?.spec {
            JobSpec::Quantize(_) => Scope::Quantize,
            JobSpec::Evaluate(_) => Scope::Evaluate,
        };
        caller.needs(&[starts, Scope::Admin])?;
        Ok(id)
    }

    /// One job more than the page has, of those that the filter accepts.
    async fn list(&self, filter: &JobFilter, page: &PageRequest) -> Result<Vec<JobRecord>> {
        let before = page.after.as_deref().map(JobId::given);
        self.engine.jobs.store().list(filter, before.as_ref(), page.size + 1).await
    }
}

/// Reads `done=true`, `metadata.state=STATE`, `metadata.model=ID` and `metadata.kind=KIND`, joined
/// by ` AND `.
///
/// # Errors
/// `InvalidArgument` on `filter`.
fn parse_filter(text: &str) -> Result<JobFilter> {
    let mut filter = JobFilter::default();
    for term in text.split(" AND ").map(str::trim).filter(|term| !term.is_empty()) {
        let (field, value) = term.split_once('=').unwrap_or((term, ""));
        match (field.trim(), value.trim().trim_matches('"')) {
            ("done", "true") => filter.done = Some(true),
            ("done", "false") => filter.done = Some(false),
            ("metadata.state", state) => {
                let state = JobState::parse(&state.to_ascii_lowercase());
                filter.state = Some(state.map_err(|e| Error::invalid("filter", e.to_string()))?);
            }
            ("metadata.model", model) => filter.model = Some(model.to_owned()),
            ("metadata.kind", kind) => {
                let kind = JobSpec::parse_kind(&kind.to_ascii_lowercase());
                let kind = kind.map_err(|e| Error::invalid("filter", e.to_string()))?;
                filter.kind = Some(kind.to_owned());
            }
            _ => {
                let reason = format!(
                    "`{term}` is none of done=true, done=false, metadata.state=STATE, \
                     metadata.model=ID, metadata.kind=quantize or evaluate"
                );
                return Err(Error::invalid("filter", reason));
            }
        }
    }
    Ok(filter)
}

fn list_request(request: ListOperationsRequest) -> Result<(JobFilter, PageRequest)> {
    let ListOperationsRequest { name, filter, page_size, page_token, return_partial_success } =
        request;
    if !["", "operations"].contains(&name.as_str()) {
        return Err(Error::invalid("name", "the only collection is `operations`"));
    }
    if return_partial_success {
        return Err(Error::invalid("return_partial_success", "is not supported"));
    }
    let page = PageRequest::parse(format!("operations {filter}"), page_size, &page_token)?;
    Ok((parse_filter(&filter)?, page))
}

fn operation(jobs: &JobRunner, job: JobRecord) -> Operation {
    let JobRecord {
        id,
        spec,
        state,
        created,
        started,
        ended,
        updated,
        progress,
        last_sequence,
        outcome,
        attempt,
        worker,
        trace: _,
    } = job;
    let name = id.operation();
    let metadata = proto::JobMetadata {
        kind: spec.kind().to_owned(),
        state: job_state(state).into(),
        model: spec.model().to_string(),
        create_time: Some(timestamp(created)),
        start_time: started.map(timestamp),
        end_time: ended.map(timestamp),
        progress: progress.map(|progress| events::progress(&name, progress)),
        last_sequence,
        attempt: count(attempt),
        worker: worker.unwrap_or_default(),
        update_time: Some(timestamp(updated)),
    };
    let result = outcome.map(|outcome| match outcome {
        Ok(output) => OperationResult::Response(response(jobs, &output)),
        // The cause was logged, under the operation's name, when the job ended.
        Err(error) => OperationResult::Error(rpc_status(&status(&error, &name))),
    });
    Operation { name, metadata: Some(pack(&metadata)), done: state.is_done(), result }
}

fn response(jobs: &JobRunner, output: &JobOutput) -> Any {
    match output {
        JobOutput::Quantized(_) => quantize::result(jobs, output).as_ref().map(pack),
        JobOutput::Evaluated(_) => evaluate::result(jobs, output).as_ref().map(pack),
    }
    .unwrap_or_default()
}

fn pack<T: Message + Name>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec() }
}

fn job_state(state: JobState) -> proto::JobState {
    match state {
        JobState::Queued => proto::JobState::Queued,
        JobState::Running => proto::JobState::Running,
        JobState::Cancelling => proto::JobState::Cancelling,
        JobState::Succeeded => proto::JobState::Succeeded,
        JobState::Failed => proto::JobState::Failed,
        JobState::Cancelled => proto::JobState::Cancelled,
    }
}
