//! The parts of the benchmark.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;
use tch::Tensor;
use tokio_util::sync::CancellationToken;
use vitq::data::Pixels;
use vitq::engine::pipeline::image_batch;

use crate::load::load;
use crate::subject::{MODEL, OTHER, Subject};
use crate::{Args, Figures};

/// Seconds of load before each measurement.
const WARM_UP: u64 = 1;
/// Offered load, as a share of the capacity: overload; one model's light traffic; a server that has time.
const OVERLOAD: f64 = 4.0;
const LIGHT: f64 = 0.05;
const MODERATE: f64 = 0.3;
/// About what lies between two forwards of a client that asks again at once.
const PAUSE: Duration = Duration::from_millis(1);

/// Images a second over gRPC, when there is always another batch, over those of the bare executor.
/// Once with a batch in each call, once with calls of one image.
pub(crate) async fn throughput(subject: &Subject, args: &Args) -> Figures {
    let batch = batch(subject, args.max_batch);
    // Two batches wait while one is computed.
    let whole = format!("--concurrency 3 --images-per-request {}", args.max_batch);
    let single = format!("--concurrency {}", 3 * args.max_batch);
    let (mut bare, mut in_batches, mut one_by_one) = (Vec::new(), Vec::new(), Vec::new());
    let mut mean_batch = 0.0;
    for _ in 0..args.rounds {
        bare.push(bare_throughput(subject, &batch, args));
        let report = load(subject, &flags(MODEL, &whole, args)).await;
        in_batches.push(report.number("images_per_second"));
        bare.push(bare_throughput(subject, &batch, args));
        let report = load(subject, &flags(MODEL, &single, args)).await;
        one_by_one.push(report.number("images_per_second"));
        mean_batch = report.number("overall.mean_batch");
    }
    let (best, middle) = (best(&bare), median(&mut bare));
    vec![
        ("bare images/s, median", json!(middle)),
        ("bare images/s, best", json!(best)),
        ("gRPC images/s in calls of a batch, median", json!(median(&mut in_batches))),
        ("gRPC images/s in calls of a batch, best", json!(self::best(&in_batches))),
        ("gRPC images/s in calls of one, median", json!(median(&mut one_by_one))),
        ("gRPC images/s in calls of one, best", json!(self::best(&one_by_one))),
        ("images in a batch, calls of one", json!(mean_batch)),
        ("ratio in calls of a batch, medians", json!(median(&mut in_batches) / middle)),
        ("ratio in calls of one, medians", json!(median(&mut one_by_one) / middle)),
    ]
}

fn flags(model: &str, load: &str, args: &Args) -> String {
    format!("--model {model} {load} --duration {} --warm-up {WARM_UP}", args.seconds)
}

/// As many of the images as a batch has.
fn batch(subject: &Subject, count: usize) -> Tensor {
    let pixels = subject.pixels(&fs::read(subject.image()).unwrap());
    let image_size = subject.bare.spec().preprocessing.image_size;
    let data = pixels.repeat(count);
    image_batch(&Pixels { count, image_size, data }).unwrap()
}

fn bare_throughput(subject: &Subject, batch: &Tensor, args: &Args) -> f64 {
    let forward = || {
        let logits = subject.bare.forward(batch).unwrap();
        assert_eq!(logits.size()[0], batch.size()[0]);
    };
    let times = repeat(Duration::from_secs(args.seconds), Duration::ZERO, forward);
    let all: f64 = times.iter().sum();
    batch.size()[0] as f64 * times.len() as f64 / all
}

/// Seconds of each call, made over and over for a time with pauses before, after a few that do not
/// count.
fn repeat(time: Duration, pause: Duration, mut call: impl FnMut()) -> Vec<f64> {
    (0..3).for_each(|_| call());
    let start = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || start.elapsed() < time {
        std::thread::sleep(pause);
        let before = Instant::now();
        call();
        times.push(before.elapsed().as_secs_f64());
    }
    times
}

/// What an idle server adds to the time of one image: client, wire, queue and threads.
///
/// A processor that slept is slower at first, so there are two references: one without pauses, and one
/// that sleeps before each image for as long as a request is not being computed. A call that does
/// nothing tells what gRPC takes.
pub(crate) async fn latency(subject: &Subject, args: &Args) -> Figures {
    let path = subject.image();
    let file = fs::read(&path).unwrap();
    let image_size = subject.bare.spec().preprocessing.image_size;
    let one = format!("--concurrency 1 --connections 1 --images {}", path.display());
    let answer = || {
        let data = subject.pixels(&file);
        let images = image_batch(&Pixels { count: 1, image_size, data }).unwrap();
        let logits = subject.bare.forward(&images).unwrap();
        Vec::<f32>::try_from(logits.reshape([-1])).unwrap();
    };
    let time = Duration::from_secs(args.seconds);
    let [mut local, mut rested, mut remote, mut inside, mut empty] = [const { Vec::new() }; 5];
    for _ in 0..args.rounds {
        local.push(median(&mut repeat(time, Duration::ZERO, answer)));
        rested.push(median(&mut repeat(time, PAUSE, answer)));
        empty.push(subject.empty_call(time / 4).await);
        let report = load(subject, &flags(MODEL, &one, args)).await;
        remote.push(report.number("overall.latency_seconds.p50"));
        inside.push(report.number("overall.server_seconds.total.p50"));
    }
    let [local, rested, remote, inside, empty] =
        [local, rested, remote, inside, empty].map(|mut times| 1e3 * median(&mut times));
    vec![
        ("decode and forward in this process, ms", json!(local)),
        ("the same after a pause, ms", json!(rested)),
        ("over gRPC, ms", json!(remote)),
        ("of this inside the server, ms", json!(inside)),
        ("a call that does nothing, ms", json!(empty)),
        ("added, ms", json!(remote - local)),
        ("added to the time after a pause, ms", json!(remote - rested)),
    ]
}

/// Images a second, in calls of one image, that the server answers without a pause.
async fn capacity(subject: &Subject, args: &Args) -> f64 {
    let saturated = format!("--concurrency {}", 3 * args.max_batch);
    load(subject, &flags(MODEL, &saturated, args)).await.number("goodput")
}

/// Several times the load that the server bears.
pub(crate) async fn overload(subject: &Subject, args: &Args) -> Figures {
    let capacity = capacity(subject, args).await;
    let offered = format!("--rate {} --connections 8", OVERLOAD * capacity);
    let report = load(subject, &flags(MODEL, &offered, args)).await;
    vec![
        ("capacity, images/s", json!(capacity)),
        ("offered, images/s", json!(OVERLOAD * capacity)),
        ("goodput, images/s", json!(report.number("goodput"))),
        ("goodput over capacity", json!(report.number("goodput") / capacity)),
        ("answers", report.statuses().clone()),
        ("requests that the client could not send", json!(report.number("not_sent"))),
        ("client's own delay p99, ms", json!(1e3 * report.number("lateness_seconds.p99"))),
        ("p50 of the admitted, ms", json!(1e3 * report.number("overall.latency_seconds.p50"))),
        ("p99 of the admitted, ms", json!(1e3 * report.number("overall.latency_seconds.p99"))),
        ("a full queue takes, ms", json!(1e3 * args.queue_images as f64 / capacity)),
    ]
}

/// One model's light traffic alone, and beside a flood for another one.
pub(crate) async fn fairness(subject: &Subject, args: &Args) -> Figures {
    let capacity = capacity(subject, args).await;
    let light = flags(OTHER, &format!("--rate {}", LIGHT * capacity), args);
    let alone = load(subject, &light).await;
    // It begins earlier and ends later than the light traffic.
    let concurrency = 8 * args.max_batch;
    let flood = format!(
        "--model {MODEL} --concurrency {concurrency} --warm-up 0 --duration {}",
        args.seconds + WARM_UP + 2
    );
    let (beside, flood) = tokio::join!(load(subject, &light), load(subject, &flood));
    vec![
        ("light traffic, images/s", json!(LIGHT * capacity)),
        ("alone p50, ms", json!(1e3 * alone.number("overall.latency_seconds.p50"))),
        ("alone p99, ms", json!(1e3 * alone.number("overall.latency_seconds.p99"))),
        ("beside the flood p50, ms", json!(1e3 * beside.number("overall.latency_seconds.p50"))),
        ("beside the flood p99, ms", json!(1e3 * beside.number("overall.latency_seconds.p99"))),
        ("light traffic's answers", beside.statuses().clone()),
        ("flood, images/s", json!(flood.number("goodput"))),
        ("flood's answers", flood.statuses().clone()),
    ]
}

/// Classification alone, and beside calibrations in the same server.
pub(crate) async fn calibration(subject: &Subject, args: &Args) -> Figures {
    let capacity = capacity(subject, args).await;
    let moderate = flags(MODEL, &format!("--rate {}", MODERATE * capacity), args);
    let alone = load(subject, &moderate).await;
    let over = CancellationToken::new();
    let jobs = async {
        let mut times = Vec::new();
        while !over.is_cancelled() {
            let time = subject.calibrate(times.len() as u64).await;
            times.push(time.as_secs_f64());
        }
        times
    };
    let loaded = async {
        let report = load(subject, &moderate).await;
        over.cancel();
        report
    };
    let (mut times, beside) = tokio::join!(jobs, loaded);
    vec![
        ("traffic, images/s", json!(MODERATE * capacity)),
        ("alone p50, ms", json!(1e3 * alone.number("overall.latency_seconds.p50"))),
        ("alone p99, ms", json!(1e3 * alone.number("overall.latency_seconds.p99"))),
        ("beside p50, ms", json!(1e3 * beside.number("overall.latency_seconds.p50"))),
        ("beside p99, ms", json!(1e3 * beside.number("overall.latency_seconds.p99"))),
        ("answers beside", beside.statuses().clone()),
        ("calibrations", json!(times.len())),
        ("a calibration takes, s", json!(median(&mut times))),
    ]
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}
