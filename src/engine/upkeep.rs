//! What a server does by itself, every now and then.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::engine::garbage::Garbage;
use crate::engine::jobs::JobStore;
use crate::engine::registry::ModelRegistry;
use crate::engine::resources::Resources;

/// How soon a server learns of models that another one made or deleted.
const REFRESH: Duration = Duration::from_secs(2);
/// How often old jobs and unused artifacts are looked for.
const CLEANING: Duration = Duration::from_secs(60 * 60);
/// Age from which an artifact without a name is nobody's: no job is that long between storing an
/// artifact and naming it. So long an unfinished upload waits for its client, too.
const ORPHAN_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Keeps the names of models up to date and the stores clean until it is stopped.
pub(super) async fn run(
    registry: Arc<ModelRegistry>,
    resources: Arc<Resources>,
    jobs: Arc<JobStore>,
    garbage: Garbage,
    stop: CancellationToken,
) {
    let mut refresh = interval(REFRESH);
    let mut cleaning = interval(CLEANING);
    // After an outage once is enough.
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    cleaning.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = refresh.tick() => {
                if let Err(error) = registry.refresh().await {
                    tracing::warn!(%error, "the catalogue cannot be read, models stay as they are");
                }
            }
            _ = cleaning.tick() => {
                match jobs.expire().await {
                    Ok(0) => {}
                    Ok(count) => tracing::info!(count, "forgot old jobs"),
                    Err(error) => tracing::warn!(%error, "old jobs stay"),
                }
                match resources.expire(ORPHAN_AGE).await {
                    Ok(0) => {}
                    Ok(count) => tracing::info!(count, "forgot unfinished uploads"),
                    Err(error) => tracing::warn!(%error, "unfinished uploads stay"),
                }
                garbage.collect_orphans(ORPHAN_AGE).await;
            }
        }
    }
}
