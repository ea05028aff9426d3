//! What models have done, in the protocol's form.

use std::time::Duration;

use super::describe::{VERSION, gpu};
use crate::engine::Engine;
use crate::engine::names::ModelId;
use crate::engine::registry::{ModelState, ModelView};
use crate::engine::statistics::{Snapshot, Total};
use crate::error::Result;
use crate::grpc::proto::inference::{
    InferBatchStatistics, InferStatistics, MemoryUsage, ModelStatistics, StatisticDuration,
};

/// The statistics of a model, under the name that the client uses.
///
/// # Errors
/// `InvalidArgument` when its id is none.
pub(super) fn statistics(
    engine: &Engine,
    name: String,
    view: &ModelView,
) -> Result<ModelStatistics> {
    let id = ModelId::parse(&view.record.id, "name")?;
    let snapshot = engine.registry.statistics(&id).snapshot();
    let memory_usage = memory(&view.state);
    Ok(ModelStatistics { name, memory_usage, ..counts(&snapshot) })
}

fn counts(snapshot: &Snapshot) -> ModelStatistics {
    let Snapshot { success, failure, queue, decode, compute, batches, last_batch_ms } = snapshot;
    let batch = |(size, total): (&usize, &Total)| InferBatchStatistics {
        batch_size: *size as u64,
        compute_infer: Some(duration(total)),
        // Not by batch: images are decoded one by one.
        compute_input: None,
        compute_output: None,
    };
    let output = Total { count: success.count, time: Duration::ZERO };
    let none = Total::default();
    ModelStatistics {
        version: VERSION.to_owned(),
        last_inference: *last_batch_ms,
        inference_count: snapshot.images(),
        execution_count: snapshot.executions(),
        inference_stats: Some(InferStatistics {
            success: Some(duration(success)),
            fail: Some(duration(failure)),
            queue: Some(duration(queue)),
            compute_input: Some(duration(decode)),
            compute_infer: Some(duration(compute)),
            compute_output: Some(duration(&output)),
            cache_hit: Some(duration(&none)),
            cache_miss: Some(duration(&none)),
        }),
        batch_stats: batches.iter().map(batch).collect(),
        ..ModelStatistics::default()
    }
}

fn duration(total: &Total) -> StatisticDuration {
    let ns = u64::try_from(total.time.as_nanos()).unwrap_or(u64::MAX);
    StatisticDuration { count: total.count, ns }
}

/// Memory of a model where it is loaded.
fn memory(state: &ModelState) -> Vec<MemoryUsage> {
    let ModelState::Ready(placement) = state else { return Vec::new() };
    let gpu = gpu(placement.device.name());
    vec![MemoryUsage {
        r#type: if gpu.is_some() { "GPU" } else { "CPU" }.to_owned(),
        id: gpu.unwrap_or(0).into(),
        byte_size: placement.residence.bytes,
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_times_are_those_of_the_snapshot() {
        let total = |count, ms| Total { count, time: Duration::from_millis(ms) };
        let snapshot = Snapshot {
            success: total(3, 30),
            failure: total(1, 2),
            batches: [(1, total(2, 4)), (4, total(5, 6))].into(),
            last_batch_ms: 7,
            ..Snapshot::default()
        };
        let statistics = counts(&snapshot);
        assert_eq!((statistics.inference_count, statistics.execution_count), (22, 7));
        let calls = statistics.inference_stats.unwrap();
        assert_eq!(calls.success, Some(StatisticDuration { count: 3, ns: 30_000_000 }));
        assert_eq!(calls.fail, Some(StatisticDuration { count: 1, ns: 2_000_000 }));
        assert_eq!(statistics.batch_stats[1].batch_size, 4);
        let infer = statistics.batch_stats[1].compute_infer;
        assert_eq!(infer, Some(StatisticDuration { count: 5, ns: 6_000_000 }));
    }
}
