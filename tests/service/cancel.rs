//! Cancelling jobs.

use std::fs;

use tokio_stream::StreamExt as _;
use tonic::Code;
use vitq::grpc::proto::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest,
};
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::{JobMetadata, JobState, ListModelsRequest};

use crate::server::{TestServer, failure, quick, refusal, slow};

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_stops_and_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let mut running = server.quantization().quantize(slow("m")).await.unwrap().into_inner();
    let mut events = Vec::new();
    let name = loop {
        let event = running.next().await.unwrap().unwrap();
        let name = event.operation.clone();
        let calibrates = matches!(&event.event, Some(Event::Progress(p)) if p.units > 0);
        events.push(event);
        if calibrates {
            break name;
        }
    };
    let mut waiting = server.quantization().quantize(quick("n")).await.unwrap().into_inner();
    let queued = waiting.next().await.unwrap().unwrap().operation;

    let mut operations = server.operations();
    let status = operations
        .delete_operation(DeleteOperationRequest { name: name.clone() })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    for name in [&queued, &name] {
        let cancel = CancelOperationRequest { name: name.clone() };
        operations.cancel_operation(cancel).await.unwrap();
    }
    events.extend(running.collect::<Result<Vec<_>, _>>().await.unwrap());
    assert_eq!(failure(events).code, i32::from(Code::Cancelled));
    let rest = waiting.collect::<Result<Vec<_>, _>>().await.unwrap();
    assert_eq!(failure(rest).code, i32::from(Code::Cancelled));

    let get = GetOperationRequest { name: name.clone() };
    let operation = operations.get_operation(get).await.unwrap().into_inner();
    let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
    assert_eq!((operation.done, metadata.state()), (true, JobState::Cancelled));
    let models = server.models().list_models(ListModelsRequest::default()).await.unwrap();
    assert!(models.into_inner().models.is_empty());
    assert_eq!(fs::read_dir(data.path().join("objects/sha256")).unwrap().count(), 0);

    // The id is free again, and cancelling what has ended changes nothing.
    server.make("m").await;
    operations.cancel_operation(CancelOperationRequest { name }).await.unwrap();
    let unknown = CancelOperationRequest { name: "operations/unknown".to_owned() };
    let status = operations.cancel_operation(unknown).await.unwrap_err();
    assert_eq!(refusal(&status).2, "OPERATION_NOT_FOUND");
    server.stop().await;
}
