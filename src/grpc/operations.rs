//! `google.longrunning.Operations` over the jobs.

use std::sync::Arc;
use std::time::Duration;

use prost::{Message, Name};
use prost_types::Any;
use tonic::{Request, Response, Status};

use super::events::{job_id, operation_name};
use super::fields::timestamp;
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
use crate::engine::jobs::{JobId, JobOutput, JobRecord, JobState};
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
        let operations = found.into_iter().map(operation).collect();
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
        Ok(Response::new(operation(self.engine.jobs.store().get(&job_id(&name)?).await?)))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteOperationRequest { name } = request.into_inner();
        self.engine.jobs.store().delete(&job_id(&name)?).await?;
        Ok(Response::new(()))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let CancelOperationRequest { name } = request.into_inner();
        self.engine.jobs.cancel(&job_id(&name)?).await?;
        Ok(Response::new(()))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let WaitOperationRequest { name, timeout } = request.into_inner();
        let timeout = timeout.map(Duration::try_from).transpose();
        let timeout = timeout.map_err(|_| Error::invalid("timeout", "must not be negative"))?;
        Ok(Response::new(operation(self.engine.jobs.wait(&job_id(&name)?, timeout).await?)))
    }
}

impl Jobs {
    /// One job more than the page has, of those that the filter accepts.
    async fn list(&self, filter: &Filter, page: &PageRequest) -> Result<Vec<JobRecord>> {
        let mut found: Vec<JobRecord> = Vec::new();
        let mut before = page.after.as_deref().map(JobId::given);
        while found.len() <= page.size {
            let jobs = self.engine.jobs.store().list(before.as_ref(), page.size + 1).await?;
            let Some(last) = jobs.last() else { break };
            before = Some(last.id.clone());
            found.extend(jobs.into_iter().filter(|job| filter.accepts(job)));
        }
        Ok(found)
    }
}

/// Which jobs are listed.
#[derive(Debug, Default)]
struct Filter {
    done: Option<bool>,
    model: Option<String>,
    kind: Option<String>,
}

impl Filter {
    /// Reads `done=true`, `metadata.model=ID` and `metadata.kind=KIND`, joined by ` AND `.
    fn parse(text: &str) -> Result<Self> {
        let mut filter = Self::default();
        for term in text.split(" AND ").map(str::trim).filter(|term| !term.is_empty()) {
            let (field, value) = term.split_once('=').unwrap_or((term, ""));
            match (field.trim(), value.trim().trim_matches('"')) {
                ("done", "true") => filter.done = Some(true),
                ("done", "false") => filter.done = Some(false),
                ("metadata.model", model) => filter.model = Some(model.to_owned()),
                ("metadata.kind", kind) => filter.kind = Some(kind.to_owned()),
                _ => {
                    let reason = format!(
                        "`{term}` is none of done=true, done=false, metadata.model=ID, \
                         metadata.kind=quantize or evaluate"
                    );
                    return Err(Error::invalid("filter", reason));
                }
            }
        }
        Ok(filter)
    }

    fn accepts(&self, job: &JobRecord) -> bool {
        self.done.is_none_or(|done| done == job.state.is_done())
            && self.model.as_ref().is_none_or(|model| model == job.spec.model().as_str())
            && self.kind.as_ref().is_none_or(|kind| kind == job.spec.kind())
    }
}

fn list_request(request: ListOperationsRequest) -> Result<(Filter, PageRequest)> {
    let ListOperationsRequest { name, filter, page_size, page_token, return_partial_success } =
        request;
    if !["", "operations"].contains(&name.as_str()) {
        return Err(Error::invalid("name", "the only collection is `operations`"));
    }
    if return_partial_success {
        return Err(Error::invalid("return_partial_success", "is not supported"));
    }
    let page = PageRequest::parse(format!("operations {filter}"), page_size, &page_token)?;
    Ok((Filter::parse(&filter)?, page))
}

fn operation(job: JobRecord) -> Operation {
    let JobRecord { id, spec, state, created, started, ended, progress, last_sequence, outcome } =
        job;
    let name = operation_name(&id);
    let metadata = proto::JobMetadata {
        kind: spec.kind().to_owned(),
        state: job_state(state).into(),
        model: spec.model().to_string(),
        create_time: Some(timestamp(created)),
        start_time: started.map(timestamp),
        end_time: ended.map(timestamp),
        progress: progress.map(events::progress),
        last_sequence,
    };
    let result = outcome.map(|outcome| match outcome {
        Ok(output) => OperationResult::Response(response(&output)),
        // The cause was logged, under the operation's name, when the job ended.
        Err(error) => OperationResult::Error(rpc_status(&status(&error, &name))),
    });
    Operation { name, metadata: Some(pack(&metadata)), done: state.is_done(), result }
}

fn response(output: &JobOutput) -> Any {
    match output {
        JobOutput::Quantized(_) => quantize::result(output).as_ref().map(pack),
        JobOutput::Evaluated(_) => evaluate::result(output).as_ref().map(pack),
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
