//! Shards of evaluations in the store.

use std::ops::Range;

use vitq::Error;
use vitq::engine::evaluator::Metrics;
use vitq::engine::jobs::{
    JobId, JobState, JobStore, Lease, Shard, ShardLease, ShardWorker, Standing,
};

use super::{claim, evaluate, failure, on_both, submit};

const PLAN: [Range<usize>; 3] = [0..32, 32..64, 64..70];

/// A running evaluation in shards.
async fn planned(store: &JobStore) -> Lease {
    submit(store, evaluate("a")).await;
    let lease = claim(store).await.lease;
    assert_eq!(store.plan_shards(&lease, "inputs", &PLAN).await.unwrap(), Standing::Held);
    lease
}

async fn take(store: &JobStore, job: &JobId, worker: ShardWorker) -> Option<ShardLease> {
    store.claim_shard(job, "inputs", (worker, "somebody")).await.unwrap()
}

fn metrics(images: u64) -> Metrics {
    let mut metrics = Metrics::default();
    for image in 0..images {
        metrics.add(&[0.1 * image as f32, 1.0], 0, Some(&[0.3, 1.1]));
    }
    metrics
}

#[tokio::test(flavor = "multi_thread")]
async fn every_shard_is_taken_once_and_its_numbers_stay() {
    on_both(async |store| {
        let lease = planned(&store).await;
        let job = &lease.id;
        for (images, worker) in PLAN.into_iter().zip([ShardWorker::Holder, ShardWorker::Helper]) {
            let shard = take(&store, job, worker).await.unwrap();
            assert_eq!((&shard.images, shard.attempt), (&images, 1));
            assert_eq!(store.report_shard(&shard, &metrics(1)).await.unwrap(), Standing::Held);
            let images = images.len() as u64;
            let standing = store.finish_shard(&shard, &metrics(images)).await.unwrap();
            assert_eq!(standing, Standing::Held);
            let again = store.finish_shard(&shard, &metrics(1)).await.unwrap();
            assert_eq!(again, Standing::Lost, "it is done");
        }
        let last = take(&store, job, ShardWorker::Helper).await.unwrap();
        assert!(take(&store, job, ShardWorker::Holder).await.is_none());
        store.report_shard(&last, &metrics(2)).await.unwrap();
        assert_eq!(store.heartbeat_shard(&last).await.unwrap(), Standing::Held);
        let shard = |position, done, images| Shard { position, done, metrics: metrics(images) };
        let found = store.shards(job).await.unwrap();
        assert_eq!(found, [shard(0, true, 32), shard(1, true, 32), shard(2, false, 2)]);
        // Who plans again finds what is there; with other inputs it counts for nothing.
        store.plan_shards(&lease, "inputs", &PLAN).await.unwrap();
        assert_eq!(store.shards(job).await.unwrap(), found);
        store.plan_shards(&lease, "others", &PLAN).await.unwrap();
        assert_eq!(store.heartbeat_shard(&last).await.unwrap(), Standing::Lost);
        assert!(take(&store, job, ShardWorker::Helper).await.is_none());
        let shards = store.shards(job).await.unwrap();
        assert!(shards.iter().all(|shard| !shard.done && shard.metrics == Metrics::default()));
        // They go with the end of the job.
        store.finish(&lease, &failure(Error::Deadline)).await.unwrap();
        assert_eq!(store.shards(job).await.unwrap(), []);
        let lost = store.plan_shards(&lease, "inputs", &PLAN).await.unwrap();
        assert_eq!(lost, Standing::Lost);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_whose_worker_died_is_left_to_the_worker_of_the_job() {
    on_both(async |store| {
        let lease = planned(&store).await;
        let job = &lease.id;
        let dead = take(&store, job, ShardWorker::Helper).await.unwrap();
        store.report_shard(&dead, &metrics(7)).await.unwrap();
        store.forget_leases().await.unwrap();
        store.heartbeat(&lease).await.unwrap();
        let next = take(&store, job, ShardWorker::Helper).await.unwrap();
        assert_eq!(next.position, 1);
        let again = take(&store, job, ShardWorker::Holder).await.unwrap();
        assert_eq!((again.position, again.attempt, &again.images), (0, 2, &dead.images));
        assert_eq!(store.shards(job).await.unwrap()[0].metrics, Metrics::default());
        for standing in [
            store.heartbeat_shard(&dead).await.unwrap(),
            store.report_shard(&dead, &metrics(8)).await.unwrap(),
            store.finish_shard(&dead, &metrics(32)).await.unwrap(),
            store.release_shard(&dead).await.unwrap(),
        ] {
            assert_eq!(standing, Standing::Lost);
        }
        // What is given back, anybody may take.
        assert_eq!(store.release_shard(&next).await.unwrap(), Standing::Held);
        let taken = take(&store, job, ShardWorker::Helper).await.unwrap();
        assert_eq!((taken.position, taken.attempt), (1, 2));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_other_processes_find_what_there_is_to_help_with() {
    on_both(async |store| {
        let helped = async |worker: &str| {
            let jobs = store.to_help_with(worker).await.unwrap();
            jobs.into_iter().map(|job| job.id).collect::<Vec<_>>()
        };
        assert_eq!(helped("other").await, []);
        let lease = planned(&store).await;
        assert_eq!(helped("other").await, std::slice::from_ref(&lease.id));
        assert_eq!(helped("worker").await, [], "it is its own job");
        let shard = take(&store, &lease.id, ShardWorker::Helper).await.unwrap();
        for _ in 1..PLAN.len() {
            take(&store, &lease.id, ShardWorker::Helper).await.unwrap();
        }
        assert_eq!(helped("other").await, [], "all shards are taken");
        store.release_shard(&shard).await.unwrap();
        assert_eq!(helped("other").await, std::slice::from_ref(&lease.id));
        // A job that is given back is claimed, not helped with; its shards stay.
        store.release(&lease).await.unwrap();
        assert_eq!(helped("other").await, []);
        assert!(take(&store, &lease.id, ShardWorker::Helper).await.is_none());
        assert_eq!(store.shards(&lease.id).await.unwrap().len(), PLAN.len());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_computes_a_shard_learns_that_the_job_is_cancelled() {
    on_both(async |store| {
        let lease = planned(&store).await;
        let shard = take(&store, &lease.id, ShardWorker::Helper).await.unwrap();
        store.request_cancel(&lease.id).await.unwrap();
        let standing = store.heartbeat_shard(&shard).await.unwrap();
        assert_eq!(standing, Standing::CancelRequested);
        assert_eq!(store.release_shard(&shard).await.unwrap(), Standing::Held);
        assert!(take(&store, &lease.id, ShardWorker::Holder).await.is_none());
        store.finish(&lease, &failure(Error::Cancelled)).await.unwrap();
        assert_eq!(store.get(&lease.id).await.unwrap().state, JobState::Cancelled);
        assert_eq!(store.shards(&lease.id).await.unwrap(), []);
    })
    .await;
}
