//! A bound on messages that have begun to come in and are not complete: what clients can make the
//! server hold before anything is validated, let alone admitted.
//!
//! Per connection, streams times largest message would be gigabytes. Complete messages are bounded by
//! the admission of what they ask for.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::Request;
use tower::{Layer, Service};

use crate::error::Error;

/// Flag and length in front of each message.
const PREFIX: usize = 5;
/// When those who are refused should come back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The layer.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    held: Arc<AtomicUsize>,
    limit: usize,
}

impl Intake {
    /// At most `limit` bytes of incomplete messages in the whole server.
    pub(super) fn new(limit: usize) -> Self {
        Self { held: Arc::default(), limit }
    }
}

impl<S> Layer<S> for Intake {
    type Service = Counting<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Counting { inner, intake: self.clone() }
    }
}

/// The layered service.
#[derive(Clone, Debug)]
pub(super) struct Counting<S> {
    inner: S,
    intake: Intake,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Counting<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let intake = self.intake.clone();
        self.inner.call(request.map(|body| Body::new(Counted { body, held: Held::new(intake) })))
    }
}

/// A request's body, counted as it comes in.
struct Counted {
    body: Body,
    held: Held,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.held.take(data)?;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What a call holds of the bound: the bytes of a message that is not complete.
struct Held {
    intake: Intake,
    bytes: usize,
    /// The prefix, as far as it is known, or what is still to come of its message.
    place: Place,
}

enum Place {
    Prefix { known: usize, length: u32 },
    Message { missing: usize },
}

impl Place {
    const START: Self = Self::Prefix { known: 0, length: 0 };
}

impl Held {
    fn new(intake: Intake) -> Self {
        Self { intake, bytes: 0, place: Place::START }
    }

    /// Follows the messages through a piece of the body.
    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while let Some((&first, rest)) = data.split_first() {
            match &mut self.place {
                Place::Prefix { known, length } => {
                    // The flag is shifted out by the length's four bytes.
                    *length = *length << 8 | u32::from(first);
                    *known += 1;
                    if *known == PREFIX {
                        let missing = usize::try_from(*length).unwrap_or(usize::MAX);
                        self.place =
                            if missing == 0 { Place::START } else { Place::Message { missing } };
                    }
                    data = rest;
                }
                Place::Message { missing } => {
                    let taken = data.len().min(*missing);
                    *missing -= taken;
                    let is_complete = *missing == 0;
                    data = &data[taken..];
                    if is_complete {
                        self.place = Place::START;
                        self.release();
                    } else {
                        self.grow(taken)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn grow(&mut self, bytes: usize) -> Result<(), Status> {
        self.bytes += bytes;
        let all = self.intake.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if all <= self.intake.limit {
            return Ok(());
        }
        Err(Status::from(Error::Overloaded {
            reason: "too many large messages are coming in at once".to_owned(),
            retry_after: RETRY_AFTER,
        }))
    }

    fn release(&mut self) {
        self.intake.held.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        bytes.resize(PREFIX + length, 0xff);
        bytes
    }

    #[test]
    fn what_is_incomplete_counts_until_it_is_complete_or_given_up() {
        let intake = Intake::new(100);
        let held = || intake.held.load(Ordering::Relaxed);
        let mut first = Held::new(intake.clone());
        first.take(&message(90)[..85]).unwrap();
        assert_eq!(held(), 80);
        let mut second = Held::new(intake.clone());
        let status = second.take(&message(50)[..45]).unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        drop(second);
        assert_eq!(held(), 80);
        first.take(&[0xff; 10]).unwrap();
        assert_eq!(held(), 0);
        first.take(&message(90)[..50]).unwrap();
        assert_eq!(held(), 45);
        drop(first);
        assert_eq!(held(), 0);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            lengths in prop::collection::vec(0_usize..40, 1..6),
            cuts in prop::collection::vec(1_usize..20, 1..60),
        ) {
            let intake = Intake::new(usize::MAX);
            let mut call = Held::new(intake.clone());
            let bytes: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            let (mut rest, mut cuts) = (&bytes[..], cuts.into_iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                call.take(piece).unwrap();
                prop_assert!(intake.held.load(Ordering::Relaxed) < 40);
                rest = after;
            }
            prop_assert_eq!(intake.held.load(Ordering::Relaxed), 0);
        }
    }
}
