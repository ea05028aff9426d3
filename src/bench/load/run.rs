//! One load on a target.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::record::Measured;
use super::schedule::{Arrival, Arrivals, Choice, Mix, Random};
use super::{Outcome, Target};
use crate::error::{Error, Result};

/// Arrivals that the thread of the schedule may be ahead of their tasks.
const AHEAD: usize = 1024;
/// For how long a client of a closed loop that failed waits when it is not told.
const PAUSE: Duration = Duration::from_millis(10);
/// The longest that it waits, whatever it is told.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Who starts requests when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// At random, so many a second on average.
    Open {
        /// Requests a second.
        rate: f64,
        /// Requests that may be on their way at once: what the generator's memory is bounded by.
        outstanding: usize,
    },
    /// So many clients, each of which waits for its answer. Who is refused comes back when told to.
    Closed {
        /// Clients.
        clients: usize,
    },
}

/// A load and how long it goes on.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who starts requests when.
    pub load: Load,
    /// Which requests.
    pub mix: Mix,
    /// Time before the measurement.
    pub warm_up: Duration,
    /// Longest measurement.
    pub time: Duration,
    /// Most requests of the measurement.
    pub requests: Option<u64>,
    /// Seed of times and choices.
    pub seed: u64,
}

/// Runs a load until its time is over or its requests are sent, and waits for the answers.
///
/// # Errors
/// `Io` when the operating system has no thread for the schedule.
pub async fn run<T: Target>(target: Arc<T>, plan: &Plan) -> Result<Measured> {
    let rate = match plan.load {
        Load::Open { rate, .. } => Some(rate),
        Load::Closed { .. } => None,
    };
    let opens = Instant::now() + plan.warm_up;
    let window =
        Window { opens, closes: opens + plan.time, left: plan.requests.unwrap_or(u64::MAX) };
    let mut run = Run { measured: Measured::new(&plan.mix, rate), window };
    match plan.load {
        Load::Open { rate, outstanding } => run.open(target, plan, rate, outstanding).await?,
        Load::Closed { clients } => run.closed(&target, plan, clients).await,
    }
    Ok(run.measured)
}

/// The measurement: what starts in it has its latency counted.
struct Window {
    opens: Instant,
    closes: Instant,
    /// Requests that may still start in it.
    left: u64,
}

/// What became of one request.
struct Done {
    choice: Choice,
    /// Whether its latency counts.
    counts: bool,
    intended: Instant,
    sent: Instant,
    ended: Instant,
    outcome: Outcome,
}

struct Run {
    measured: Measured,
    window: Window,
}

impl Run {
    async fn open<T: Target>(
        &mut self,
        target: Arc<T>,
        plan: &Plan,
        rate: f64,
        outstanding: usize,
    ) -> Result<()> {
        let start = self.window.opens - plan.warm_up;
        let arrivals = Arrivals::new(plan.mix.clone(), rate, plan.seed);
        let mut arriving = paced(arrivals, start, self.window.closes)?;
        let mut in_flight = JoinSet::new();
        while self.window.left > 0 {
            tokio::select! {
                Some(done) = in_flight.join_next() => self.note(done),
                arrival = arriving.recv() => {
                    let Some(Arrival { at, choice }) = arrival else { break };
                    let intended = start + at;
                    let Some(counts) = self.admit(intended) else { break };
                    if in_flight.len() >= outstanding {
                        self.measured.not_sent += u64::from(counts);
                        continue;
                    }
                    let target = Arc::clone(&target);
                    in_flight.spawn(async move { send(&*target, choice, intended, counts).await });
                }
            }
        }
        drop(arriving);
        self.finish(in_flight).await;
        Ok(())
    }

    async fn closed<T: Target>(&mut self, target: &Arc<T>, plan: &Plan, clients: usize) {
        let mut random = Random::new(plan.seed);
        let mut in_flight = JoinSet::new();
        let mut start = |run: &mut Self, in_flight: &mut JoinSet<Done>, pause: Duration| {
            let Some(counts) = run.admit(Instant::now() + pause) else { return };
            let (target, choice) = (Arc::clone(target), plan.mix.choose(&mut random));
            in_flight.spawn(async move {
                tokio::time::sleep(pause).await;
                send(&*target, choice, Instant::now(), counts).await
            });
        };
        for _ in 0..clients {
            start(self, &mut in_flight, Duration::ZERO);
        }
        while let Some(done) = in_flight.join_next().await {
            let pause = done.as_ref().map_or(PAUSE, |done| pause(&done.outcome));
            self.note(done);
            start(self, &mut in_flight, pause);
        }
        self.close();
    }

    /// Whether a request that starts then counts; `None` when it is not to start any more.
    fn admit(&mut self, intended: Instant) -> Option<bool> {
        let Window { opens, closes, left } = &mut self.window;
        if intended >= *closes || *left == 0 {
            return None;
        }
        let counts = intended >= *opens;
        *left -= u64::from(counts);
        Some(counts)
    }

    fn note(&mut self, done: Result<Done, tokio::task::JoinError>) {
        // A task fails by a panic only, which has been printed.
        let Ok(Done { choice, counts, intended, sent, ended, outcome }) = done else { return };
        if counts {
            self.measured.note(choice, ended - intended, &outcome);
            self.measured.lateness.note(sent - intended);
        }
        let is_good = matches!(&outcome, Outcome::Answered(server) if server.failed_images == 0);
        let in_window = ended >= self.window.opens && ended < self.window.closes;
        self.measured.good_in_time += u64::from(is_good && in_window);
    }

    async fn finish(&mut self, mut in_flight: JoinSet<Done>) {
        if self.window.left == 0 {
            // All requests are sent: the measurement ends with the last answer.
            while let Some(done) = in_flight.join_next().await {
                self.note(done);
            }
            self.close();
        } else {
            self.close();
            while let Some(done) = in_flight.join_next().await {
                self.note(done);
            }
        }
    }

    /// Fixes the length of the measurement, which ends now if not earlier.
    fn close(&mut self) {
        self.window.closes = self.window.closes.min(Instant::now());
        self.measured.time = self.window.closes.saturating_duration_since(self.window.opens);
    }
}

async fn send<T: Target>(target: &T, choice: Choice, intended: Instant, counts: bool) -> Done {
    let sent = Instant::now().max(intended);
    let outcome = target.send(choice).await;
    let ended = Instant::now().max(sent);
    Done { choice, counts, intended, sent, ended, outcome }
}

/// When a client of a closed loop sends its next request.
fn pause(outcome: &Outcome) -> Duration {
    match outcome {
        Outcome::Answered(_) => Duration::ZERO,
        Outcome::Failed(refusal) => refusal.retry_after.unwrap_or(PAUSE).min(LONGEST_PAUSE),
    }
}

/// Arrivals, each when it is its time, up to the end. A thread waits for them: the runtime's timers tell
/// milliseconds apart, the operating system's microseconds.
fn paced(arrivals: Arrivals, start: Instant, end: Instant) -> Result<mpsc::Receiver<Arrival>> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let pace = move || {
        for arrival in arrivals {
            let at = start + arrival.at;
            if at >= end {
                break;
            }
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if sender.blocking_send(arrival).is_err() {
                return; // nobody listens any more
            }
        }
        // The measurement is as long as it was to be, even if nothing arrives at its end.
        thread::sleep(end.saturating_duration_since(Instant::now()));
    };
    thread::Builder::new()
        .name("arrivals".to_owned())
        .spawn(pace)
        .map_err(|error| Error::io("thread of arrivals", error))?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::{Mutex, Semaphore};

    use super::super::{Refusal, ServerSide};
    use super::*;

    const STALL: Duration = Duration::from_millis(50);

    fn plan(load: Load, requests: u64) -> Plan {
        Plan {
            load,
            mix: Mix::new(vec![1.0], 4, 1).unwrap(),
            warm_up: Duration::ZERO,
            time: Duration::from_secs(60),
            requests: Some(requests),
            seed: 1,
        }
    }

    fn open(rate: f64, outstanding: usize) -> Load {
        Load::Open { rate, outstanding }
    }

    /// Serves one request at a time; stalls once, in the first.
    struct Stalling(Mutex<bool>);

    impl Target for Stalling {
        async fn send(&self, _: Choice) -> Outcome {
            let mut has_stalled = self.0.lock().await;
            if !*has_stalled {
                tokio::time::sleep(STALL).await;
                *has_stalled = true;
            }
            Outcome::Answered(ServerSide::default())
        }
    }

    #[tokio::test]
    async fn a_stall_counts_for_everybody_who_would_have_come_meanwhile() {
        let stalling = || Arc::new(Stalling(Mutex::new(false)));
        // All of the 50 are meant to start within a millisecond or so.
        let measured = run(stalling(), &plan(open(1e5, 1000), 50)).await.unwrap();
        let overall = measured.overall();
        assert_eq!((overall.good(), measured.not_sent), (50, 0));
        assert!(overall.latency.quantile(0.01) > STALL / 2, "{:?}", overall.latency.quantile(0.01));

        let closed = run(stalling(), &plan(Load::Closed { clients: 1 }, 50)).await.unwrap();
        let latency = closed.overall().latency;
        assert_eq!(latency.count(), 50);
        assert!(latency.quantile(1.0) >= STALL && latency.quantile(0.9) < STALL);
    }

    /// Answers nobody before so many have come.
    struct Gathering {
        gathered: AtomicUsize,
        least: usize,
        gate: Semaphore,
    }

    impl Target for Gathering {
        async fn send(&self, _: Choice) -> Outcome {
            if self.gathered.fetch_add(1, Ordering::Relaxed) + 1 == self.least {
                self.gate.close();
            }
            assert!(self.gate.acquire().await.is_err(), "the gate has no permits");
            Outcome::Answered(ServerSide::default())
        }
    }

    #[tokio::test]
    async fn clients_are_as_many_as_asked_for_and_requests_bounded() {
        let gathering = |least| {
            let (gathered, gate) = (AtomicUsize::new(0), Semaphore::new(0));
            Arc::new(Gathering { gathered, least, gate })
        };
        // Seven clients are needed to get past the gate, and seven there are.
        let target = gathering(7);
        let measured =
            run(Arc::clone(&target), &plan(Load::Closed { clients: 7 }, 20)).await.unwrap();
        assert_eq!(measured.overall().good(), 20);
        assert_eq!(target.gathered.load(Ordering::Relaxed), 20);
        assert!(measured.time < Duration::from_secs(60) && measured.good_in_time >= 19);
        // The fifth is the last that is on its way; the others are counted and not sent.
        let measured = run(gathering(5), &plan(open(1e5, 5), 30)).await.unwrap();
        let requests = measured.overall().requests();
        assert_eq!(requests + measured.not_sent, 30);
        assert!(requests >= 5);
    }

    struct Refusing;

    impl Target for Refusing {
        async fn send(&self, _: Choice) -> Outcome {
            let retry_after = Some(Duration::from_millis(100));
            let message = "the queue is full".to_owned();
            Outcome::Failed(Refusal { code: "RESOURCE_EXHAUSTED", message, retry_after })
        }
    }

    #[tokio::test]
    async fn the_refused_come_back_when_they_are_told() {
        let mut plan = plan(Load::Closed { clients: 2 }, 1000);
        plan.time = Duration::from_millis(250);
        let measured = run(Arc::new(Refusing), &plan).await.unwrap();
        // At 0, 100 and 200 ms, each of the two.
        let requests = measured.overall().requests();
        assert!((2..=6).contains(&requests), "{requests}");
        assert_eq!((measured.overall().good(), measured.good_in_time), (0, 0));
    }

    #[tokio::test]
    async fn the_warm_up_does_not_count() {
        let mut plan = plan(open(1000.0, 1000), u64::MAX);
        (plan.warm_up, plan.time) = (Duration::from_millis(100), Duration::from_millis(100));
        let stalled_before = Arc::new(Stalling(Mutex::new(true)));
        let measured = run(stalled_before, &plan).await.unwrap();
        // A hundred on average; a fixed seed.
        let requests = measured.overall().requests();
        assert!((50..150).contains(&requests), "{requests}");
        assert!(measured.time <= plan.time);
    }
}
