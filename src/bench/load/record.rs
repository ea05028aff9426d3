//! Latencies and counts of a load.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::{Choice, Mix, Outcome, Refusal, ServerSide};

/// Longest time that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(3600);
/// Decimal digits to which times are told apart.
const DIGITS: u8 = 3;
/// Quantiles of reports, by name.
const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)];

/// Times, to three decimal digits, from a microsecond to an hour.
#[derive(Clone, Debug)]
pub struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        let most = LONGEST.as_micros() as u64;
        Self(
            Histogram::new_with_bounds(1, most, DIGITS).expect("the bounds are constants in range"),
        )
    }
}

impl Times {
    /// Takes note of a time; one beyond the longest counts as that.
    pub fn note(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// The time that a share of all stayed below or at; zero without any.
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_micros(self.0.value_at_quantile(share))
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    fn add(&mut self, other: &Self) {
        self.0 += &other.0;
    }

    /// Quantiles in seconds, and how many times they are of.
    pub fn json(&self) -> Value {
        let quantile = |(name, share): (&str, f64)| {
            (name.to_owned(), json!(self.quantile(share).as_secs_f64()))
        };
        let mut object: serde_json::Map<String, Value> =
            QUANTILES.into_iter().map(quantile).collect();
        object.insert("mean".to_owned(), json!(self.0.mean() / 1e6));
        object.insert("count".to_owned(), json!(self.count()));
        object.into()
    }
}

/// What was measured of requests, for one model or for all.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// From the intended start to the answer, of requests that were answered without any error.
    pub latency: Times,
    /// Requests by status. `RESOURCE_EXHAUSTED` with a time to come back is apart from that without.
    pub statuses: BTreeMap<String, u64>,
    /// What the first request of a status that is not OK was told.
    pub messages: BTreeMap<String, String>,
    /// Answered requests some of whose images failed.
    pub with_failed_images: u64,
    /// Images whose answer the server knew.
    pub cached_images: u64,
    /// What the server says: waiting for the device.
    pub queue: Times,
    /// Decoding and resizing.
    pub decode: Times,
    /// The forward pass.
    pub compute: Times,
    /// From arrival to answer.
    pub total: Times,
    batch_sizes: u64,
}

impl Record {
    /// Takes note of a request's end.
    pub(super) fn note(&mut self, latency: Duration, outcome: &Outcome) {
        match outcome {
            Outcome::Answered(server) => self.note_answer(latency, server),
            Outcome::Failed(refusal) => {
                let status = status(refusal);
                let first = self.messages.entry(status.clone());
                first.or_insert_with(|| refusal.message.clone());
                self.count(status);
            }
        }
    }

    fn note_answer(&mut self, latency: Duration, server: &ServerSide) {
        let ServerSide { queue, decode, compute, total, batch_size, .. } = *server;
        self.count("OK".to_owned());
        self.queue.note(queue);
        self.decode.note(decode);
        self.compute.note(compute);
        self.total.note(total);
        self.batch_sizes += u64::from(batch_size);
        self.cached_images += server.cached_images as u64;
        if server.failed_images == 0 {
            self.latency.note(latency);
        } else {
            self.with_failed_images += 1;
        }
    }

    fn count(&mut self, status: String) {
        *self.statuses.entry(status).or_default() += 1;
    }

    /// Requests of any status.
    pub fn requests(&self) -> u64 {
        self.statuses.values().sum()
    }

    /// Requests that were answered without any error.
    pub fn good(&self) -> u64 {
        self.latency.count()
    }

    /// Images in the batches that answered, on average over requests; zero without any.
    pub fn mean_batch(&self) -> f64 {
        self.batch_sizes as f64 / self.total.count().max(1) as f64
    }

    pub(super) fn add(&mut self, other: &Self) {
        let Self { latency, statuses, messages, with_failed_images, cached_images, .. } = other;
        self.latency.add(latency);
        for (status, count) in statuses {
            *self.statuses.entry(status.clone()).or_default() += count;
        }
        for (status, message) in messages {
            self.messages.entry(status.clone()).or_insert_with(|| message.clone());
        }
        self.with_failed_images += with_failed_images;
        self.cached_images += cached_images;
        self.queue.add(&other.queue);
        self.decode.add(&other.decode);
        self.compute.add(&other.compute);
        self.total.add(&other.total);
        self.batch_sizes += other.batch_sizes;
    }

    /// All of it, times in seconds.
    pub fn json(&self) -> Value {
        json!({
            "requests": self.requests(),
            "good": self.good(),
            "with_failed_images": self.with_failed_images,
            "cached_images": self.cached_images,
            "statuses": self.statuses,
            "messages": self.messages,
            "latency_seconds": self.latency.json(),
            "server_seconds": {
                "queue": self.queue.json(),
                "decode": self.decode.json(),
                "compute": self.compute.json(),
                "total": self.total.json(),
            },
            "mean_batch": self.mean_batch(),
        })
    }
}

fn status(refusal: &Refusal) -> String {
    match (refusal.code, refusal.retry_after) {
        (code @ "RESOURCE_EXHAUSTED", Some(_)) => format!("{code} with RetryInfo"),
        (code @ "RESOURCE_EXHAUSTED", None) => format!("{code} without RetryInfo"),
        (code, _) => code.to_owned(),
    }
}

/// Everything that one load showed.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Requests a second that were to be sent; `None` in a closed loop.
    pub offered_rate: Option<f64>,
    /// Length of the measurement, without the warm-up.
    pub time: Duration,
    /// Requests that were not sent because too many were outstanding.
    pub not_sent: u64,
    /// Requests without any error whose answer came within the measurement, whenever they were sent:
    /// what the rate of good answers counts.
    pub good_in_time: u64,
    /// How late requests were sent: the load generator's own delay, which is in every latency.
    pub lateness: Times,
    /// Images per request.
    pub images_per_request: usize,
    /// Per model, in the order of the mix; requests that were meant to start within the measurement.
    pub models: Vec<Record>,
}

impl Measured {
    pub(super) fn new(mix: &Mix, offered_rate: Option<f64>) -> Self {
        Self {
            offered_rate,
            time: Duration::ZERO,
            not_sent: 0,
            good_in_time: 0,
            lateness: Times::default(),
            images_per_request: mix.images_per_request(),
            models: vec![Record::default(); mix.models()],
        }
    }

    pub(super) fn note(&mut self, choice: Choice, latency: Duration, outcome: &Outcome) {
        if let Some(record) = self.models.get_mut(choice.model) {
            record.note(latency, outcome);
        }
    }

    /// All models together.
    pub fn overall(&self) -> Record {
        let mut overall = Record::default();
        self.models.iter().for_each(|record| overall.add(record));
        overall
    }

    /// Requests that were to be sent within the measurement.
    pub fn due(&self) -> u64 {
        self.models.iter().map(Record::requests).sum::<u64>() + self.not_sent
    }

    /// Good answers a second.
    pub fn goodput(&self) -> f64 {
        self.good_in_time as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// All of it; `names` are the models'.
    pub fn json(&self, names: &[String]) -> Value {
        let models = names.iter().zip(&self.models);
        let models: serde_json::Map<String, Value> =
            models.map(|(name, record)| (name.clone(), record.json())).collect();
        json!({
            "offered_rate": self.offered_rate,
            "seconds": self.time.as_secs_f64(),
            "goodput": self.goodput(),
            "images_per_second": self.goodput() * self.images_per_request as f64,
            "not_sent": self.not_sent,
            "lateness_seconds": self.lateness.json(),
            "overall": self.overall().json(),
            "models": models,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn refused(code: &'static str, retry_after: Option<Duration>) -> Outcome {
        let message = format!("{code} of {retry_after:?}");
        Outcome::Failed(Refusal { code, message, retry_after })
    }

    fn answered(failed_images: usize) -> Outcome {
        let server =
            ServerSide { queue: 3 * MS, batch_size: 4, failed_images, ..Default::default() };
        Outcome::Answered(server)
    }

    #[test]
    fn quantiles_have_three_digits() {
        let mut times = Times::default();
        for ms in 1..=1000 {
            times.note(ms * MS);
        }
        for (share, expected) in [(0.5, 0.5), (0.99, 0.99), (1.0, 1.0)] {
            let found = times.quantile(share).as_secs_f64();
            assert!((found / expected - 1.0).abs() < 2e-3, "{share}: {found}");
        }
        times.note(LONGEST * 5);
        assert!(times.quantile(1.0) >= LONGEST, "what is too long is not lost");
    }

    #[test]
    fn answers_and_refusals_are_told_apart() {
        let mut record = Record::default();
        record.note(5 * MS, &answered(0));
        record.note(5 * MS, &answered(1));
        record.note(MS, &refused("RESOURCE_EXHAUSTED", Some(MS)));
        record.note(MS, &refused("RESOURCE_EXHAUSTED", None));
        record.note(MS, &refused("UNAVAILABLE", Some(MS)));
        assert_eq!((record.requests(), record.good(), record.with_failed_images), (5, 1, 1));
        let statuses: Vec<_> = record.statuses.iter().map(|(s, n)| (s.as_str(), *n)).collect();
        let expected = [
            ("OK", 2),
            ("RESOURCE_EXHAUSTED with RetryInfo", 1),
            ("RESOURCE_EXHAUSTED without RetryInfo", 1),
            ("UNAVAILABLE", 1),
        ];
        assert_eq!(statuses, expected);
        assert_eq!(record.messages["UNAVAILABLE"], "UNAVAILABLE of Some(1ms)");
        assert!(!record.messages.contains_key("OK"));
        assert!((record.mean_batch() - 4.0).abs() < 1e-9);
        let json = record.json();
        assert!((json["server_seconds"]["queue"]["p50"].as_f64().unwrap() - 3e-3).abs() < 1e-5);
    }

    #[test]
    fn models_add_up_to_the_whole() {
        let mut measured = Measured::new(&Mix::new(vec![1.0, 1.0], 5, 3).unwrap(), Some(10.0));
        let choice = |model| Choice { model, first_image: 0, images: 3 };
        measured.note(choice(0), 2 * MS, &answered(0));
        measured.note(choice(1), 4 * MS, &answered(0));
        measured.note(choice(1), MS, &refused("INTERNAL", None));
        (measured.time, measured.good_in_time) = (Duration::from_secs(2), 2);
        let json = measured.json(&["a".to_owned(), "b".to_owned()]);
        assert_eq!(json["overall"]["requests"], 3);
        assert_eq!(
            (&json["models"]["a"]["good"], &json["models"]["b"]["good"]),
            (&1.into(), &1.into())
        );
        assert_eq!((&json["goodput"], &json["images_per_second"]), (&1.0.into(), &3.0.into()));
    }
}
