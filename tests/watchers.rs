//! Readers of a job's events that do not keep up.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use vitq::data::DecodeLimits;
use vitq::engine::jobs::{
    Afterwards, ImageChoice, JobEventKind, JobLimits, JobSpec, NewJob, QuantizeJob,
};
use vitq::engine::names::ModelId;
use vitq::engine::{Engine, EngineConfig};
use vitq::exec::Backend;

/// A calibration with many steps, each of which is an event.
fn job() -> NewJob {
    let request = serde_json::json!({
        "method": "ias", "weight_bits": 4, "activation_bits": 4, "stem_head": "float", "seed": 0,
        "options": { "iterations": "24", "batch": "8" },
    });
    let spec = QuantizeJob {
        model: ModelId::parse("m", "model_id").unwrap(),
        checkpoint: "digits-vit".to_owned(),
        request: serde_json::from_value(request).unwrap(),
        images: ImageChoice::Drawn { dataset: "digits/calib".to_owned(), count: 8 },
        labels: BTreeMap::new(),
        afterwards: Afterwards::Keep,
    };
    NewJob { spec: JobSpec::Quantize(spec), request_id: None, priority: 0 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_gets_the_latest_state_and_the_end() {
    let data = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let engine = Engine::start(EngineConfig {
        data_dir: data.path().to_path_buf(),
        database: None,
        store: None,
        checkpoints: Some(demo.join("checkpoints")),
        datasets: Some(demo.join("datasets")),
        devices: vec![tch::Device::Cpu],
        backend: Backend::Simulated,
        max_batch: 8,
        queue_images: 8,
        workers: 1,
        jobs: JobLimits::default(),
        limits: DecodeLimits::default(),
    })
    .await
    .unwrap();
    let id = engine.jobs.submit(job()).await.unwrap().id;
    let mut slow = engine.jobs.watch(&id, 0).await.unwrap();
    let mut quick = engine.jobs.watch(&id, 0).await.unwrap();
    let mut all = Vec::new();
    while let Some(event) = quick.recv().await {
        all.push(event.unwrap().sequence);
    }
    let last = *all.last().unwrap();
    assert!(last > 20, "{last} events are too few to be slow with");
    assert_eq!(all, (1..=last).collect::<Vec<_>>(), "who keeps up misses nothing");

    let mut seen = Vec::new();
    let mut end = None;
    while let Some(event) = slow.recv().await {
        let event = event.unwrap();
        seen.push(event.sequence);
        end = Some(event.kind);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(seen.is_sorted() && seen.len() < all.len(), "{seen:?}");
    assert_eq!(*seen.last().unwrap(), last);
    assert!(matches!(end, Some(JobEventKind::Ended(Ok(_)))));
    // Who comes later still finds the whole history.
    let mut late = engine.jobs.watch(&id, 0).await.unwrap();
    let mut count = 0;
    while let Some(event) = late.recv().await {
        count += 1;
        assert_eq!(event.unwrap().sequence, count);
    }
    assert_eq!(count, last);
}
