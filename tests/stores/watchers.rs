//! Readers of a job's events that do not keep up.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::Receiver;
use vitq::Error;
use vitq::engine::jobs::{
    Afterwards, ImageChoice, JobEvent, JobProgress, JobSpec, NewJob, QuantizeJob,
};
use vitq::engine::names::ModelId;
use vitq::engine::{Engine, EngineConfig};

fn job() -> NewJob {
    let request = serde_json::json!({
        "method": "minmax", "weight_bits": 4, "activation_bits": 4, "stem_head": "float", "seed": 0,
    });
    let spec = QuantizeJob {
        model: ModelId::parse("m", "model_id").unwrap(),
        checkpoint: "digits-vit".to_owned(),
        pinned: None,
        request: serde_json::from_value(request).unwrap(),
        images: ImageChoice::Drawn { dataset: "digits/calib".to_owned(), count: 8 },
        labels: BTreeMap::new(),
        afterwards: Afterwards::Keep,
    };
    NewJob {
        spec: JobSpec::Quantize(spec),
        request_id: None,
        priority: 0,
        principal: "somebody".to_owned(),
        trace: None,
    }
}

/// Everything that still comes.
async fn numbers(mut events: Receiver<vitq::Result<JobEvent>>) -> Vec<u64> {
    let mut numbers = Vec::new();
    while let Some(event) = events.recv().await {
        numbers.push(event.unwrap().sequence);
    }
    numbers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_gets_the_latest_state_and_the_end() {
    let data = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let engine = Engine::start(EngineConfig {
        checkpoints: Some(demo.join("checkpoints")),
        datasets: Some(demo.join("datasets")),
        workers: 0, // the test is the worker
        ..EngineConfig::local(data.path(), tch::Device::Cpu)
    })
    .await
    .unwrap();
    let id = engine.jobs.submit(job()).await.unwrap().id;
    let slow = engine.jobs.watch(&id, 0).await.unwrap();
    let quick = tokio::spawn(numbers(engine.jobs.watch(&id, 0).await.unwrap()));

    let store = engine.jobs.store();
    let lease = store.claim("test").await.unwrap().unwrap().lease;
    let report = async |unit| {
        let progress = JobProgress { unit, ..JobProgress::default() };
        store.report(&lease, &progress).await.unwrap();
    };
    for unit in 0..100 {
        report(unit).await;
    }
    // Longer than anybody waits for a reader.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    report(100).await;
    store.finish(&lease, &Err(Arc::new(Error::Deadline))).await.unwrap();

    let last = 103; // accepted, 101 steps, ended
    let all: Vec<u64> = (1..=last).collect();
    assert_eq!(quick.await.unwrap(), all, "who keeps up misses nothing");
    let seen = numbers(slow).await;
    assert!(seen.is_sorted() && seen.len() < 30, "{seen:?}");
    assert_eq!(seen.last(), Some(&last));
    // Who comes later finds the whole history.
    assert_eq!(numbers(engine.jobs.watch(&id, 0).await.unwrap()).await, all);
}
