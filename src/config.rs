//! The server's configuration: flags, each with an environment variable and a key of the
//! configuration file. Checked once, at start.

mod environment;
mod settings;
mod sources;

use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use tch::Device;

use crate::artifact::store;
use crate::data::DecodeLimits;
use crate::database;
use crate::device;
use crate::engine::EngineConfig;
use crate::engine::batcher::QueueLimits;
use crate::engine::device::Batching;
use crate::engine::jobs::JobLimits;
use crate::engine::names::ModelId;
use crate::engine::resources::{HubOwners, check_hub};
use crate::engine::response_cache::CacheLimits;
use crate::error::{Error, Result};
use crate::exec::Backend;
use crate::grpc::security::{Security, SecurityConfig};
use crate::grpc::{ConnectionLimits, ServerConfig};
use crate::telemetry::LogConfig;

pub use settings::{Origin, PathKind, Setting, Settings};
pub use sources::{Parsed, parse};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Flags of `vitq serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeConfig {
    /// Address of the gRPC services; port 0 takes a free one.
    #[arg(long, env = "VITQ_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Images that may be in the server at once; more are refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "VITQ_QUEUE_IMAGES", default_value_t = 256, value_name = "IMAGES",
          value_parser = at_least_one)]
    pub queue_images: usize,
    /// Bytes that the files of these images may have together.
    #[arg(long, env = "VITQ_QUEUE_BYTES", default_value_t = 512 << 20, value_name = "BYTES",
          value_parser = at_least_one)]
    pub queue_bytes: usize,
    /// Images of one client that may be in the server at once; more are refused with
    /// RESOURCE_EXHAUSTED. 0 leaves it to the bounds of all.
    #[arg(long, env = "VITQ_MAX_IMAGES_PER_CLIENT", default_value_t = 0, value_name = "IMAGES")]
    pub max_images_per_client: usize,
    /// Connections at once; more are closed.
    #[arg(long, env = "VITQ_MAX_CONNECTIONS", default_value_t = 1024, value_name = "N",
          value_parser = at_least_one)]
    pub max_connections: usize,
    /// Seconds after which a connection is asked to end, give or take a tenth, so that clients spread
    /// over new servers; what then runs on it gets 30 s. 0 lets connections live for ever.
    #[arg(long, env = "VITQ_MAX_CONNECTION_AGE", default_value = "600", value_name = "SECONDS",
          value_parser = seconds)]
    pub max_connection_age: Duration,
    /// Threads that decode images; without a number, as many as `--threads`.
    #[arg(long, env = "VITQ_DECODE_THREADS", value_name = "N", value_parser = at_least_one)]
    pub decode_threads: Option<usize>,
    /// Bytes of answers that are kept by the images' content: the same bytes for the same model are not
    /// computed again. 0 keeps none.
    #[arg(long, env = "VITQ_RESPONSE_CACHE_BYTES", default_value_t = 0, value_name = "BYTES")]
    pub response_cache_bytes: u64,
    /// Seconds for which an answer is kept; without a number, until others need its room.
    #[arg(long, env = "VITQ_RESPONSE_CACHE_TTL", value_name = "SECONDS", value_parser = seconds)]
    pub response_cache_ttl: Option<Duration>,
    /// Seconds for which a small batch waits for more images while its device is idle.
    #[arg(long, env = "VITQ_BATCH_DELAY", default_value = "0", value_name = "SECONDS",
          value_parser = seconds)]
    pub batch_delay: Duration,
    /// Seconds for which a server that was asked to stop goes on as before, not ready: load balancers
    /// look elsewhere meanwhile.
    #[arg(long, env = "VITQ_DRAIN_DELAY", default_value = "5", value_name = "SECONDS",
          value_parser = seconds)]
    pub drain_delay: Duration,
    /// Models, by id or alias, comma-separated, that the server brings to its devices before it says
    /// that it is ready; those that do not exist, as soon as they do. All others are loaded by the
    /// first call that needs them.
    #[arg(long, env = "VITQ_PRELOAD", value_name = "MODELS", value_delimiter = ',',
          value_parser = model_name)]
    pub preload: Vec<ModelId>,
    /// Quantization and evaluation jobs that this server runs at the same time; 0 leaves them to
    /// workers.
    #[arg(long, env = "VITQ_WORKERS", default_value_t = 1, value_name = "JOBS")]
    pub workers: usize,
    /// Who may connect, and who may do what.
    #[command(flatten)]
    pub security: SecurityConfig,
    /// What servers and workers have in common.
    #[command(flatten)]
    pub process: ProcessConfig,
}

/// Flags of `vitq worker`.
#[derive(Args, Clone, Debug)]
pub struct WorkerConfig {
    /// Quantization and evaluation jobs that this process runs at the same time.
    #[arg(long, env = "VITQ_WORKERS", default_value_t = 1, value_name = "JOBS",
          value_parser = at_least_one)]
    pub workers: usize,
    /// What servers and workers have in common.
    #[command(flatten)]
    pub process: ProcessConfig,
}

/// Flags that servers and workers have in common.
#[derive(Args, Clone, Debug)]
pub struct ProcessConfig {
    /// TOML file whose keys are the names of these flags; flags and variables win over it.
    #[arg(long, env = "VITQ_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address of the plaintext port of operators: /livez, /readyz, /metrics and health over gRPC.
    #[arg(long, env = "VITQ_OPS_LISTEN", default_value = "127.0.0.1:9000", value_name = "ADDRESS")]
    pub ops_listen: SocketAddr,
    /// Folder of jobs, models and artifacts, as far as they are not elsewhere; created if missing.
    #[arg(long, env = "VITQ_DATA_DIR", default_value = "./vitq-data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Database of jobs and model names, postgres://…; without one, a file in the data folder.
    #[arg(long, env = "VITQ_DATABASE", value_name = "URL", hide_env_values = true)]
    pub database: Option<DatabaseUrl>,
    /// Connections that this process keeps to the database at most. All processes together, those
    /// that are about to end included, need room in PostgreSQL's max_connections.
    #[arg(long, env = "VITQ_DATABASE_CONNECTIONS", default_value_t = 8, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub database_connections: u32,
    /// Store of artifacts: s3://, gs:// or az://BUCKET/PREFIX, or file:///DIR; without one, the data
    /// folder. Credentials come from the services' own environment variables.
    #[arg(long, env = "VITQ_STORE", value_name = "URL")]
    pub store: Option<String>,
    /// Folder of float checkpoints (folders with config.json and model.safetensors).
    #[arg(long, env = "VITQ_CHECKPOINTS", value_name = "DIR")]
    pub checkpoints: Option<PathBuf>,
    /// Folder of data sets (folders of class folders, or tar files of them).
    #[arg(long, env = "VITQ_DATASETS", value_name = "DIR")]
    pub datasets: Option<PathBuf>,
    /// Bytes that uploaded checkpoints and data sets may have together; 0 refuses uploads.
    #[arg(long, env = "VITQ_UPLOAD_QUOTA_BYTES", default_value_t = 256 << 30, value_name = "BYTES")]
    pub upload_quota_bytes: u64,
    /// Folder of local copies of uploads; without one, a folder in the data folder.
    #[arg(long, env = "VITQ_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Bytes that local copies may take; those not used for longest make room.
    #[arg(long, env = "VITQ_CACHE_BYTES", default_value_t = 256 << 30, value_name = "BYTES")]
    pub cache_bytes: u64,
    /// Whose checkpoints of the Hugging Face hub may be named in requests, as
    /// `hf-hub:OWNER/NAME[@REVISION]`: a comma-separated list of owners, or * for everybody's. Without
    /// it nobody's. Needs a build with feature `hub`.
    #[arg(long, env = "VITQ_HUB", value_name = "OWNERS")]
    pub hub: Option<HubOwners>,
    /// Devices, comma-separated: auto, cpu, cuda:N. The first also calibrates.
    #[arg(long, env = "VITQ_DEVICE", default_value = "auto", value_name = "LIST")]
    pub device: String,
    /// Seconds for which a batch may run, those of a model's warm-up included, before the process says
    /// that it is not alive: more for large batches on slow processors.
    #[arg(long, env = "VITQ_STUCK_AFTER", default_value = "60", value_name = "SECONDS",
          value_parser = some_seconds)]
    pub stuck_after: Duration,
    /// Threads that compute on a CPU; without a number, as many as OMP_NUM_THREADS says, or one for each
    /// processor.
    #[arg(long, env = "VITQ_THREADS", value_name = "N", value_parser = at_least_one)]
    pub threads: Option<usize>,
    /// Arithmetic of the models: integer (simulated on devices without kernels), simulated, float.
    #[arg(long, env = "VITQ_EXECUTOR", default_value_t = Backend::Integer, value_name = "NAME")]
    pub executor: Backend,
    /// Largest batch on a device, in images.
    #[arg(long, env = "VITQ_MAX_BATCH", default_value_t = 32, value_name = "IMAGES",
          value_parser = at_least_one)]
    pub max_batch: usize,
    /// Bytes of models that each device may hold: those not used for longest make room. Without a
    /// number, nothing is unloaded by itself.
    #[arg(long, env = "VITQ_MEMORY_BUDGET", value_name = "BYTES",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub memory_budget: Option<u64>,
    /// Jobs that may wait for a worker; more are refused with RESOURCE_EXHAUSTED.
    #[arg(long, env = "VITQ_MAX_QUEUED_JOBS", default_value_t = 64, value_name = "JOBS",
          value_parser = at_least_one)]
    pub max_queued_jobs: usize,
    /// Jobs of one client that may wait or run; more are refused with RESOURCE_EXHAUSTED. Clients are
    /// told apart by their credentials, or else by their addresses.
    #[arg(long, env = "VITQ_MAX_JOBS_PER_CLIENT", default_value_t = 64, value_name = "JOBS",
          value_parser = at_least_one)]
    pub max_jobs_per_client: usize,
    /// Crashes of a worker after which the job that it ran counts as failed.
    #[arg(long, env = "VITQ_JOB_ATTEMPTS", default_value_t = 3, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub job_attempts: u32,
    /// Seconds without a sign of life after which a worker's job is given to another one.
    #[arg(long, env = "VITQ_JOB_LEASE", default_value = "60", value_name = "SECONDS",
          value_parser = seconds)]
    pub job_lease: Duration,
    /// Images of an evaluation that a worker takes at a time, in whole batches of 32. Larger
    /// evaluations are shared by the workers of all processes on the database.
    #[arg(long, env = "VITQ_SHARD_IMAGES", default_value_t = 1024, value_name = "IMAGES",
          value_parser = at_least_one)]
    pub shard_images: usize,
    /// Days for which jobs are kept after their end; models stay.
    #[arg(long, env = "VITQ_JOB_RETENTION_DAYS", default_value_t = 30, value_name = "DAYS")]
    pub job_retention_days: u32,
    /// Seconds that calls in progress get to finish when the server stops.
    #[arg(long, env = "VITQ_DRAIN_TIMEOUT", default_value = "30", value_name = "SECONDS",
          value_parser = seconds)]
    pub drain_timeout: Duration,
    /// Largest message of the calls that carry images, in bytes. Others take 4 MiB.
    #[arg(long, env = "VITQ_MAX_MESSAGE_BYTES", default_value_t = 32 << 20, value_name = "BYTES",
          value_parser = at_least_one)]
    pub max_message_bytes: usize,
    /// How the process logs.
    #[command(flatten)]
    pub log: LogConfig,
}

impl ServeConfig {
    /// What a server refuses at its start, as far as that can be told without sockets, connections and
    /// files' contents. libtorch's CUDA side must be open.
    pub fn problems(&self, settings: &Settings) -> Vec<Error> {
        let (data, ops) = (self.listen, self.process.ops_listen);
        let mut problems = self.process.problems(settings);
        problems.extend(self.security.check(data).err());
        if collide(data, ops) {
            problems
                .push(Error::invalid("ops-listen", format!("{ops} is taken by --listen {data}")));
        }
        problems
    }

    /// The engine's part; `devices` is what `device` stands for on this machine.
    pub fn engine(&self, devices: Vec<Device>) -> EngineConfig {
        let Self { process, workers, .. } = self;
        EngineConfig {
            batching: Batching { max_batch: process.max_batch, delay: self.batch_delay },
            queue: QueueLimits { images: self.queue_images, bytes: self.queue_bytes },
            images_per_client: self.max_images_per_client,
            decode_threads: self.decode_threads.unwrap_or_else(|| process.threads()),
            response_cache: CacheLimits {
                bytes: self.response_cache_bytes,
                lifetime: self.response_cache_ttl,
            },
            ..process.engine(devices, *workers)
        }
    }

    /// The services' part, with what the files of security hold.
    pub fn server(&self, security: Security) -> ServerConfig {
        ServerConfig {
            max_message_bytes: self.process.max_message_bytes,
            preload: self.preload.clone(),
            drain_delay: self.drain_delay,
            drain_timeout: self.process.drain_timeout,
            stuck_after: self.process.stuck_after,
            connections: ConnectionLimits {
                connections: self.max_connections,
                age: (!self.max_connection_age.is_zero()).then_some(self.max_connection_age),
                ..ConnectionLimits::default()
            },
            security,
        }
    }
}

impl WorkerConfig {
    /// As [`ServeConfig::problems`], of a worker.
    pub fn problems(&self, settings: &Settings) -> Vec<Error> {
        let mut problems = self.process.problems(settings);
        problems.extend(self.engine(Vec::new()).err());
        problems
    }

    /// The engine's part.
    ///
    /// # Errors
    /// `InvalidArgument` on `database` when there is none: nobody could give this process a job.
    pub fn engine(&self, devices: Vec<Device>) -> Result<EngineConfig> {
        if self.process.database.is_none() {
            let reason = "a worker needs the database that it shares with the servers";
            return Err(Error::invalid("database", reason));
        }
        Ok(self.process.engine(devices, self.workers))
    }
}

impl ProcessConfig {
    fn problems(&self, settings: &Settings) -> Vec<Error> {
        let mut problems = settings.wrong_paths();
        problems.extend(self.log.filter().err());
        problems.extend(device::parse_list(&self.device).err());
        problems.extend(self.database.as_ref().and_then(|url| database::check_url(&url.0).err()));
        problems.extend(self.store.as_deref().and_then(|url| store::check_url(url).err()));
        problems.extend(self.hub.as_ref().and_then(|_| check_hub().err()));
        problems
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        let omp = std::env::var("OMP_NUM_THREADS").ok();
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        threads(self.threads, omp.as_deref(), processors)
    }

    /// Whether the data folder holds anything of this process, which then has it to itself.
    pub fn uses_data_dir(&self) -> bool {
        self.database.is_none() || self.store.is_none()
    }

    fn engine(&self, devices: Vec<Device>, workers: usize) -> EngineConfig {
        EngineConfig {
            data_dir: self.data_dir.clone(),
            database: self.database.as_ref().map(|url| url.0.clone()),
            database_connections: self.database_connections,
            store: self.store.clone(),
            checkpoints: self.checkpoints.clone(),
            datasets: self.datasets.clone(),
            cache: self.cache_dir.clone(),
            cache_bytes: self.cache_bytes,
            upload_quota: self.upload_quota_bytes,
            hub: self.hub.clone(),
            devices,
            backend: self.executor,
            batching: Batching { max_batch: self.max_batch, delay: Duration::ZERO },
            queue: QueueLimits { images: 0, bytes: 0 },
            images_per_client: 0,
            decode_threads: 1,
            response_cache: CacheLimits::default(),
            memory_budget: self.memory_budget,
            workers,
            shard_images: self.shard_images,
            jobs: JobLimits {
                queued: self.max_queued_jobs,
                per_principal: self.max_jobs_per_client,
                attempts: self.job_attempts,
                lease: self.job_lease,
                keep: DAY * self.job_retention_days,
                ..JobLimits::default()
            },
            limits: DecodeLimits { max_bytes: self.max_message_bytes, ..DecodeLimits::default() },
        }
    }
}

/// A URL that may hold a password: never shown.
#[derive(Clone)]
pub struct DatabaseUrl(String);

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(database URL)")
    }
}

impl FromStr for DatabaseUrl {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

/// Whether only one of two addresses can be listened at.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let all = |ip: IpAddr, other: IpAddr| ip.is_unspecified() && ip.is_ipv4() == other.is_ipv4();
    let (x, y) = (a.ip(), b.ip());
    a.port() != 0 && a.port() == b.port() && (x == y || all(x, y) || all(y, x))
}

fn at_least_one(text: &str) -> Result<usize> {
    text.parse()
        .ok()
        .filter(|value| *value > 0)
        .ok_or_else(|| Error::invalid("value", "must be a whole number from 1"))
}

fn model_name(text: &str) -> Result<ModelId> {
    ModelId::parse(text, "preload")
}

pub(crate) fn seconds(text: &str) -> Result<Duration> {
    text.parse()
        .ok()
        .and_then(|value| Duration::try_from_secs_f64(value).ok())
        .ok_or_else(|| Error::invalid("value", "must be a number of seconds"))
}

fn some_seconds(text: &str) -> Result<Duration> {
    seconds(text)
        .ok()
        .filter(|time| !time.is_zero())
        .ok_or_else(|| Error::invalid("value", "must be a number of seconds above 0"))
}

/// As many as the setting says, or OpenMP's variable (of which nested regions have numbers of their own),
/// but no more than there are processors for.
fn threads(setting: Option<usize>, omp: Option<&str>, processors: usize) -> usize {
    let omp = omp.and_then(|text| text.split(',').next()?.trim().parse().ok());
    setting.unwrap_or_else(|| omp.map_or(processors, |omp: usize| omp.clamp(1, processors)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        serve: ServeConfig,
    }

    #[test]
    fn defaults_are_local_and_bounded() {
        let Command { serve } = Command::try_parse_from(["vitq"]).unwrap();
        let ServeConfig { listen, queue_images, workers, process, .. } = &serve;
        assert!(listen.ip().is_loopback() && process.ops_listen.ip().is_loopback());
        assert_eq!((process.max_batch, *queue_images, *workers), (32, 256, 1));
        assert!(process.uses_data_dir());
        let server = serve.server(Security::default());
        assert_eq!(server.drain_timeout, Duration::from_secs(30));
        assert_eq!(server.connections.age, Some(Duration::from_secs(600)));
        assert_eq!(server.drain_delay, Duration::from_secs(5));
        let Command { serve } = Command::try_parse_from(["vitq", "--stuck-after", "300"]).unwrap();
        assert_eq!(serve.server(Security::default()).stuck_after, Duration::from_secs(300));
    }

    #[test]
    fn a_port_is_listened_at_once() {
        for (a, b, are_one) in [
            ("127.0.0.1:1", "127.0.0.1:1", true),
            ("0.0.0.0:1", "127.0.0.1:1", true),
            ("[::1]:1", "[::]:1", true),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("127.0.0.1:1", "127.0.0.1:2", false),
            ("127.0.0.1:1", "127.0.0.2:1", false),
            ("0.0.0.0:1", "[::1]:1", false),
        ] {
            assert_eq!(collide(a.parse().unwrap(), b.parse().unwrap()), are_one, "{a} {b}");
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let url = "postgres://user:secret@host/db";
        let Command { serve } = Command::try_parse_from(["vitq", "--database", url]).unwrap();
        assert!(!format!("{serve:?}").contains("secret"));
        assert_eq!(serve.engine(vec![]).database.as_deref(), Some(url));
    }

    #[test]
    fn threads_follow_the_setting_or_openmp() {
        assert_eq!(threads(None, None, 8), 8);
        assert_eq!(threads(Some(3), Some("2"), 8), 3);
        for (omp, count) in [("2", 2), ("4,2", 4), (" 1 ", 1), ("64", 8), ("0", 1), ("many", 8)] {
            assert_eq!(threads(None, Some(omp), 8), count, "{omp}");
        }
    }

    #[test]
    fn unusable_values_are_refused_at_start() {
        for (flag, value) in [
            ("--max-batch", "0"),
            ("--threads", "0"),
            ("--queue-images", "-1"),
            ("--drain-timeout", "soon"),
            ("--drain-timeout", "-1"),
            ("--stuck-after", "0"),
            ("--workers", "-1"),
            ("--job-attempts", "0"),
            ("--executor", "magic"),
            ("--listen", "somewhere"),
            ("--preload", "a,../b"),
            ("--memory-budget", "0"),
            ("--database-connections", "0"),
            ("--queue-bytes", "0"),
            ("--unknown", "1"),
        ] {
            assert!(Command::try_parse_from(["vitq", flag, value]).is_err(), "{flag} {value}");
        }
    }
}
