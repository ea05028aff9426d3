//! What metrics read from an engine when somebody asks: queues, models, jobs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Engine;
use crate::engine::batcher::Priority;
use crate::engine::registry::{ModelState, Placement};
use crate::error::{Error, Result};
use crate::exec::SiteCounts;
use crate::telemetry::metrics::{Samples, table};

/// How long the database may take to tell of its jobs: scrapes have a timeout of their own.
const PATIENCE: Duration = Duration::from_secs(2);

impl Engine {
    /// The gauges now. While the database does not answer, those of the jobs are missing.
    pub async fn sample(&self) -> Samples {
        let mut samples = Samples::default();
        self.sample_models(&mut samples);
        if let Err(error) = self.sample_jobs(&mut samples).await {
            tracing::debug!(%error, "the jobs were not counted");
        }
        samples
    }

    fn sample_models(&self, samples: &mut Samples) {
        let models = self.registry.list(None, usize::MAX);
        let loaded: Vec<(&str, &Placement)> = models
            .iter()
            .filter_map(|model| match &model.state {
                ModelState::Ready(placement) => Some((model.record.id.as_str(), placement)),
                ModelState::Stored | ModelState::Loading | ModelState::Failed(_) => None,
            })
            .collect();
        samples.add(&table::MODELS_LOADED, &[], loaded.len() as f64);
        // A loaded model for which nothing waits has a line of its own, of length zero.
        let mut depths: BTreeMap<(Arc<str>, Priority), usize> = BTreeMap::new();
        let mut ages: BTreeMap<Arc<str>, Duration> = BTreeMap::new();
        for (id, placement) in loaded {
            samples.add(&table::MODEL_BYTES, &[id], placement.residence.bytes as f64);
            let SiteCounts { integer, simulated, float } = placement.residence.sites;
            for (executor, sites) in
                [("integer", integer), ("simulated", simulated), ("float", float)]
            {
                samples.add(&table::MODEL_SITES, &[id, executor], sites as f64);
            }
            let id: Arc<str> = id.into();
            ages.insert(Arc::clone(&id), Duration::ZERO);
            for priority in Priority::ALL {
                depths.insert((Arc::clone(&id), priority), 0);
            }
        }
        for line in self.classifier.admission().waiting() {
            let age = ages.entry(Arc::clone(&line.model)).or_default();
            *age = line.age.max(*age);
            depths.insert((line.model, line.priority), line.images);
        }
        for ((model, priority), images) in &depths {
            samples.add(&table::QUEUE_DEPTH, &[model, priority.name()], *images as f64);
        }
        for (model, age) in &ages {
            samples.add(&table::QUEUE_AGE, &[model], age.as_secs_f64());
        }
    }

    async fn sample_jobs(&self, samples: &mut Samples) -> Result<()> {
        let workload = tokio::time::timeout(PATIENCE, self.jobs.store().workload()).await;
        let workload = workload.map_err(|_| Error::Deadline)??;
        for (state, jobs) in [
            ("queued", workload.queued),
            ("running", workload.running),
            ("cancelling", workload.cancelling),
        ] {
            samples.add(&table::JOBS, &[state], jobs as f64);
        }
        samples.add(&table::JOB_QUEUE_AGE, &[], workload.oldest.as_secs_f64());
        Ok(())
    }
}
