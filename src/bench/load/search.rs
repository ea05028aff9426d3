//! The largest rate that a server bears: doubled until it is too much, then halved in between.

use std::future::Future;
use std::time::Duration;

use super::record::Measured;
use crate::error::Result;

/// The search ends when the rates on both sides are this close.
const CLOSE: f64 = 1.05;
/// Loads that a search may try.
const MOST_STEPS: usize = 20;
/// Share of requests that may fail, or be late, at a rate that a server bears.
const MAY_FAIL: f64 = 0.01;
/// Answers that may still be due at the end of the measurement: their number varies by chance.
const MAY_BE_DUE: f64 = 0.05;

/// What a server is to do with a rate that it bears.
#[derive(Clone, Copy, Debug, Default)]
pub struct Goal {
    /// Latency that 99 of 100 requests have at most.
    pub p99: Option<Duration>,
}

impl Goal {
    /// Whether the server bore a load: nearly all requests good, as many answers as requests, and in
    /// time.
    pub fn is_met(&self, measured: &Measured) -> bool {
        let overall = measured.overall();
        let requests = measured.due() as f64;
        let in_time = self.p99.is_none_or(|most| overall.latency.quantile(0.99) <= most);
        overall.good() as f64 >= requests * (1.0 - MAY_FAIL)
            && measured.good_in_time as f64 >= requests * (1.0 - MAY_BE_DUE) - 1.0
            && in_time
    }
}

/// The outcome of a search.
#[derive(Debug)]
pub struct Found {
    /// The largest rate, in requests a second, that was borne; `None` when not even the first was.
    pub rate: Option<f64>,
    /// Every load that was tried, in order.
    pub steps: Vec<Measured>,
}

/// Searches from a rate that may be borne; `measure` puts a rate on the server.
///
/// # Errors
/// Those of `measure`.
pub async fn find_capacity<F, Done>(start: f64, goal: Goal, mut measure: F) -> Result<Found>
where
    F: FnMut(f64) -> Done,
    Done: Future<Output = Result<Measured>>,
{
    let mut found = Found { rate: None, steps: Vec::new() };
    let (mut rate, mut too_much) = (start, None::<f64>);
    while found.steps.len() < MOST_STEPS {
        let measured = measure(rate).await?;
        if measured.due() == 0 {
            // So rare are requests now that their absence says nothing.
            found.steps.push(measured);
            break;
        }
        if goal.is_met(&measured) {
            found.rate = Some(rate);
        } else {
            too_much = Some(rate);
        }
        found.steps.push(measured);
        rate = match (found.rate, too_much) {
            (Some(borne), Some(too_much)) if too_much <= borne * CLOSE => break,
            (Some(borne), Some(too_much)) => (borne * too_much).sqrt(),
            (Some(borne), None) => 2.0 * borne,
            (None, _) => rate / 2.0,
        };
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::{Choice, Mix, Outcome, Refusal, ServerSide};
    use super::*;

    /// A second of load on a server that answers `capacity` requests and refuses the others.
    fn measured(rate: f64, capacity: f64, latency: Duration) -> Measured {
        let mut measured = Measured::new(&Mix::new(vec![1.0], 1, 1).unwrap(), Some(rate));
        let choice = Choice { model: 0, first_image: 0, images: 1 };
        let (requests, answers) = (rate as u64, rate.min(capacity) as u64);
        for number in 0..requests {
            let refusal =
                Refusal { code: "RESOURCE_EXHAUSTED", message: String::new(), retry_after: None };
            let outcome = match number < answers {
                true => Outcome::Answered(ServerSide::default()),
                false => Outcome::Failed(refusal),
            };
            measured.note(choice, latency, &outcome);
        }
        (measured.time, measured.good_in_time) = (Duration::from_secs(1), answers);
        measured
    }

    async fn search(start: f64, capacity: f64) -> Found {
        let measure = async |rate| Ok(measured(rate, capacity, Duration::ZERO));
        find_capacity(start, Goal::default(), measure).await.unwrap()
    }

    #[tokio::test]
    async fn the_capacity_is_found_from_below_and_from_above() {
        for start in [10.0, 1234.0, 40_000.0] {
            let found = search(start, 1000.0).await;
            let rate = found.rate.unwrap();
            // A hundredth may be refused.
            assert!((1000.0 / CLOSE..=1012.0).contains(&rate), "from {start}: {rate}");
            assert!(found.steps.len() <= 16, "{} steps", found.steps.len());
        }
    }

    #[tokio::test]
    async fn a_server_that_bears_nothing_ends_the_search() {
        let found = search(1e6, 0.0).await;
        assert_eq!((found.rate, found.steps.len()), (None, MOST_STEPS));
        // Ten rates down to one request in the second, and the first with none.
        let found = search(1000.0, 0.0).await;
        assert_eq!((found.rate, found.steps.len()), (None, 11));
        assert_eq!(found.steps.last().unwrap().due(), 0);
    }

    #[test]
    fn late_answers_and_answers_that_stay_away_do_not_count() {
        let slow = measured(100.0, 1000.0, Duration::from_millis(20));
        let goal = |ms| Goal { p99: Some(Duration::from_millis(ms)) };
        assert!(goal(25).is_met(&slow) && !goal(15).is_met(&slow) && Goal::default().is_met(&slow));
        let mut growing = measured(100.0, 1000.0, Duration::ZERO);
        growing.good_in_time = 80;
        assert!(!Goal::default().is_met(&growing));
        growing.good_in_time = 95;
        growing.not_sent = 10;
        assert!(!Goal::default().is_met(&growing));
    }
}
