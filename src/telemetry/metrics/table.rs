//! Every metric there is: name, kind, labels, help. docs/metrics.md lists the same ones.

/// What Prometheus knows of a metric.
#[derive(Debug)]
pub struct Metric {
    /// Name; in seconds, bytes or counts.
    pub name: &'static str,
    /// How it is to be read.
    pub kind: Kind,
    /// Names of its labels, in the order of their values.
    pub labels: &'static [&'static str],
    /// One line on what it says.
    pub help: &'static str,
}

/// How a metric is to be read.
#[derive(Debug)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// As it is when somebody asks.
    Gauge,
    /// Counts by size; upper bounds of the buckets.
    Histogram(&'static [f64]),
    /// Of the process, from the operating system: read and described by a library.
    Process,
}

/// From half a millisecond to 30 s, in steps of about 1.6.
const SECONDS: &[f64] = &[
    0.0005, 0.0008, 0.0013, 0.002, 0.0032, 0.005, 0.008, 0.013, 0.02, 0.032, 0.05, 0.08, 0.13, 0.2,
    0.32, 0.5, 0.8, 1.3, 2.0, 3.2, 5.0, 8.0, 13.0, 20.0, 30.0,
];
/// From a second to the better part of a day.
const LONG_SECONDS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4];
/// The sizes that devices run.
const BATCHES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
/// Latency bounds of gRFC A66, whose zero has no use here.
const CALL_SECONDS: &[f64] = &[
    0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006,
    0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2,
    0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
];
/// Size bounds of gRFC A66.
const CALL_BYTES: &[f64] = &[
    0.0,
    1024.0,
    2048.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
];

/// Declares the metrics and the list of them, so that none can be left out of it.
macro_rules! metrics {
    ($($constant:ident = $kind:expr, $name:literal, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Metric =
                Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help };
        )*
        /// All of them.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

use Kind::{Counter, Gauge, Histogram, Process};

metrics! {
    CALLS_STARTED = Counter, "grpc_server_call_started_total", ["grpc_method"],
        "Calls that came in";
    CALL_DURATION = Histogram(CALL_SECONDS), "grpc_server_call_duration_seconds",
        ["grpc_method", "grpc_status"], "Time from the first byte of a call to the end of its answer";
    CALL_RECEIVED = Histogram(CALL_BYTES),
        "grpc_server_call_rcvd_total_compressed_message_size_bytes", ["grpc_method", "grpc_status"],
        "Bytes of the messages of a call, as they were sent";
    CALL_SENT = Histogram(CALL_BYTES), "grpc_server_call_sent_total_compressed_message_size_bytes",
        ["grpc_method", "grpc_status"], "Bytes of the messages of an answer, as they were sent";

    REQUESTS = Counter, "vitq_inference_requests_total", ["model", "version", "status"],
        "Classifications by how they ended";
    IMAGES = Counter, "vitq_inference_images_total", ["model"],
        "Images that devices answered; divided by the batches, the mean batch";
    BATCHES_RUN = Counter, "vitq_inference_batches_total", ["model"], "Batches that devices answered";
    FAILURES = Counter, "vitq_inference_failures_total", ["model", "reason"],
        "Images without an answer by why";
    QUEUE_DEPTH = Gauge, "vitq_queue_depth", ["model", "priority"],
        "Decoded images that wait for a device";
    QUEUE_AGE = Gauge, "vitq_queue_oldest_age_seconds", ["model"],
        "Age of the oldest image that waits for a device";
    REQUEST_DURATION = Histogram(SECONDS), "vitq_request_duration_seconds", ["model"],
        "Time of a classification in the engine";
    QUEUE_DURATION = Histogram(SECONDS), "vitq_queue_duration_seconds", ["model"],
        "Time of an image between its decoding and its batch";
    DECODE_DURATION = Histogram(SECONDS), "vitq_decode_duration_seconds", ["model"],
        "Time of decoding and resizing an image";
    COMPUTE_DURATION = Histogram(SECONDS), "vitq_compute_duration_seconds", ["model"],
        "Time of a batch on its device";
    BATCH_SIZE = Histogram(BATCHES), "vitq_batch_size", ["model"], "Images of a batch";

    JOBS = Gauge, "vitq_jobs", ["state"], "Jobs that have not ended, of all servers on the database";
    JOBS_ENDED = Counter, "vitq_jobs_total", ["kind", "result"],
        "Jobs that ended in this process, or were given back";
    JOB_DURATION = Histogram(LONG_SECONDS), "vitq_job_duration_seconds", ["kind", "result"],
        "Time of a job on its worker";
    SHARDS = Counter, "vitq_job_shards_total", ["result"],
        "Shards of evaluations that this process computed, gave back or lost";
    LEASES_LOST = Counter, "vitq_job_lease_lost_total", [],
        "Jobs that were given to another worker while this process ran them";
    TAKEOVERS = Counter, "vitq_job_takeovers_total", [],
        "Jobs that this process took from workers that gave no sign of life";
    JOB_QUEUE_AGE = Gauge, "vitq_job_queue_oldest_age_seconds", [],
        "Age of the oldest job that waits for a worker";

    LOAD_DURATION = Histogram(SECONDS), "vitq_model_load_duration_seconds", ["result"],
        "Time from the store to the end of the warm-up";
    MODELS_LOADED = Gauge, "vitq_models_loaded", [], "Models on devices";
    MODEL_BYTES = Gauge, "vitq_model_bytes", ["model"], "Bytes of a loaded model on its device";
    MODEL_SITES = Gauge, "vitq_model_sites", ["model", "executor"],
        "Products of a loaded model by the arithmetic that computes them";
    GPU_FALLBACKS = Counter, "vitq_gpu_kernel_fallbacks_total", [],
        "GPUs on which libtorch computes because the kernels did not compile or were wrong there";
    GPU_MEMORY_USED = Gauge, "vitq_gpu_memory_used_bytes", ["gpu_uuid"],
        "Memory of a GPU that is in use, by whatever process";
    GPU_MEMORY_TOTAL = Gauge, "vitq_gpu_memory_total_bytes", ["gpu_uuid"], "Memory of a GPU";
    GPU_UTILIZATION = Gauge, "vitq_gpu_utilization_ratio", ["gpu_uuid"],
        "Share of the driver's last sampling period in which a GPU computed";
    STORE_OPERATIONS = Counter, "vitq_store_operations_total", ["op", "result"],
        "Operations on the artifact store";
    CACHE_HITS = Counter, "vitq_cache_hits_total", ["cache"],
        "What did not have to be fetched or computed again";

    BUILD = Gauge, "vitq_build_info", ["version", "libtorch", "cuda"], "This build; always 1";

    PROCESS_CPU = Process, "process_cpu_seconds_total", [], "Processor time, user and system";
    PROCESS_FILES = Process, "process_open_fds", [], "Open file descriptors";
    PROCESS_MAX_FILES = Process, "process_max_fds", [], "File descriptors that may be open";
    PROCESS_VIRTUAL = Process, "process_virtual_memory_bytes", [], "Virtual memory";
    PROCESS_MAX_VIRTUAL = Process, "process_virtual_memory_max_bytes", [],
        "Virtual memory that there may be";
    PROCESS_RESIDENT = Process, "process_resident_memory_bytes", [], "Resident memory";
    PROCESS_START = Process, "process_start_time_seconds", [], "Start of the process, Unix time";
    PROCESS_THREADS = Process, "process_threads", [], "Threads";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name is taken twice");
        for Metric { name, kind, help, .. } in ALL {
            let counts = matches!(kind, Counter) || *name == PROCESS_CPU.name;
            assert_eq!(counts, name.ends_with("_total"), "{name}");
            assert!(!help.is_empty() && !help.ends_with('.'), "{name}");
            if let Histogram(bounds) = kind {
                assert!(bounds.is_sorted_by(|a, b| a < b), "{name}");
            }
        }
    }

    /// The rows of the tables in docs/metrics.md.
    #[test]
    fn the_document_lists_every_metric_and_no_other() {
        let text = include_str!("../../../docs/metrics.md");
        let rows: BTreeSet<(String, String)> = text
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split('|');
                let name = cells.next()?.trim().trim_end_matches('`');
                Some((name.to_owned(), cells.next()?.replace('`', "").trim().to_owned()))
            })
            .collect();
        let table =
            ALL.iter().map(|metric| (metric.name.to_owned(), metric.labels.join(", "))).collect();
        assert_eq!(rows, table);
    }
}
