//! Log lines that say which request they belong to.
//!
//! Text shows the fields of the spans around a line, ids included. JSON gets `trace_id`, `span_id` and
//! `request_id` beside its other keys, where log systems look for them.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::{Format, Json, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Fields of a span that its lines carry, in order.
const FIELDS: [&str; 3] = ["trace_id", "span_id", "request_id"];

/// The values of [`FIELDS`]. They come from this program or were checked by it: nothing in them
/// needs an escape in JSON.
#[derive(Clone, Debug, Default)]
struct Ids([Option<String>; FIELDS.len()]);

impl Visit for Ids {
    fn record_str(&mut self, field: &Field, value: &str) {
        if let Some(index) = FIELDS.iter().position(|name| *name == field.name()) {
            self.0[index] = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if FIELDS.contains(&field.name()) {
            self.record_str(field, &format!("{value:?}"));
        }
    }
}

/// Keeps the ids of spans for [`JsonLines`].
#[derive(Debug)]
pub(super) struct KeepIds;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for KeepIds {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut ids = Ids::default();
        attributes.record(&mut ids);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(ids);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(ids) = span.extensions_mut().get_mut::<Ids>()
        {
            values.record(ids);
        }
    }
}

/// One JSON object a line, with the ids of the innermost span that has any.
#[derive(Debug)]
pub(super) struct JsonLines(Format<Json>);

impl JsonLines {
    pub(super) fn new() -> Self {
        Self(tracing_subscriber::fmt::format().json())
    }
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        let ids = context.event_scope().into_iter().flatten().find_map(|span| {
            let ids = span.extensions().get::<Ids>()?.clone();
            ids.0.iter().any(Option::is_some).then_some(ids)
        });
        let (Some(Ids(ids)), Some(rest)) = (ids, line.strip_prefix('{')) else {
            return writer.write_str(&line);
        };
        writer.write_char('{')?;
        for (name, id) in FIELDS.iter().zip(ids) {
            if let Some(id) = id {
                write!(writer, "\"{name}\":\"{id}\",")?;
            }
        }
        writer.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use serde_json::Value;
    use tracing_subscriber::fmt::format::JsonFields;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_carry_the_ids_of_the_innermost_request() {
        let sink = Sink::default();
        let writer = sink.clone();
        let lines = tracing_subscriber::fmt::layer()
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines::new())
            .with_writer(move || writer.clone());
        let subscriber = tracing_subscriber::registry().with(KeepIds).with(lines);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("outside");
            let span = tracing::info_span!(
                "request",
                trace_id = tracing::field::Empty,
                span_id = "02",
                request_id = "r-1"
            );
            span.record("trace_id", format!("{:04x}", 1));
            let _entered = span.enter();
            tracing::info_span!("inner", step = 3).in_scope(|| tracing::info!("in \"quotes\""));
        });
        let bytes = sink.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0].get("trace_id"), None);
        let ids: Vec<_> = FIELDS.iter().map(|name| lines[1][name].as_str().unwrap()).collect();
        assert_eq!(ids, ["0001", "02", "r-1"]);
        assert_eq!(lines[1]["fields"]["message"], "in \"quotes\"");
    }
}
