//! Why a command failed: its text, its JSON form, its exit code.

use std::process::ExitCode;

use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::cli::output::{Format, Output};
use crate::error::Error;
use crate::grpc::code_name;

/// The command ran and failed.
const FAILED: u8 = 1;
/// The command line itself is wrong; the code that clap uses, too.
const USAGE: u8 = 2;

/// Why a command failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// An error of this process.
    Local(Error),
    /// A server's refusal.
    Refused(Box<Status>),
    /// No connection to the server, or it broke.
    Unreachable {
        /// The server's URL.
        server: String,
        /// What the transport said.
        reason: String,
    },
    /// Flags that contradict each other or the world.
    Usage(String),
    /// Settings and flags whose values cannot be used, at least one.
    Unusable(Vec<Error>),
    /// The work did not succeed; the sentence says what happened and what to do next.
    Unfinished(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl Failure {
    /// An error about a setting or a flag: an unusable value is wrong usage.
    pub(super) fn of_setting(error: Error) -> Self {
        if matches!(error, Error::InvalidArgument { .. }) {
            return Self::Unusable(vec![error]);
        }
        Self::Local(error)
    }

    /// Says on stderr what happened, and gives the exit code.
    pub(super) fn report(&self, output: &Output) -> ExitCode {
        match output.format() {
            Format::Text => eprintln!("error: {}", self.text("\nerror: ")),
            Format::Json => eprintln!("{}", json!({ "error": self.json() })),
        }
        let is_usage = matches!(self, Self::Usage(_) | Self::Unusable(_));
        ExitCode::from(if is_usage { USAGE } else { FAILED })
    }

    /// What happened; several errors with this in between.
    fn text(&self, between: &str) -> String {
        match self {
            Self::Local(error) => error.to_string(),
            Self::Unusable(errors) => {
                errors.iter().map(Error::to_string).collect::<Vec<_>>().join(between)
            }
            Self::Usage(reason) | Self::Unfinished(reason) => reason.clone(),
            Self::Unreachable { server, reason } => {
                format!("no connection to {server}: {reason}")
            }
            Self::Refused(status) => status_text(status),
        }
    }

    /// What happened in one line.
    pub(super) fn sentence(&self) -> String {
        let text = self.text("; ");
        text.lines().next().unwrap_or_default().to_owned()
    }

    /// In the shape of a server's refusal, [`status_json`].
    pub(super) fn json(&self) -> Value {
        let errors = match self {
            Self::Refused(status) => return status_json(status),
            Self::Local(error) => std::slice::from_ref(error),
            Self::Unusable(errors) => errors,
            Self::Unreachable { .. } | Self::Usage(_) | Self::Unfinished(_) => &[],
        };
        json!({
            "message": self.text("\n"),
            "code": null,
            "reason": null,
            "fields": errors.iter().filter_map(field_json).collect::<Vec<_>>(),
            "retry_after_seconds": null,
            "request": null,
        })
    }
}

fn field_json(error: &Error) -> Option<Value> {
    let Error::InvalidArgument { field, reason } = error else { return None };
    Some(json!({ "field": field, "reason": reason }))
}

/// A status for people: its message, then a line for each detail that is not in the message.
pub(super) fn status_text(status: &Status) -> String {
    let details = status.get_error_details();
    let code = code_name(status.code());
    let message = if status.message().is_empty() { code } else { status.message() };
    let mut lines = vec![message.to_owned()];
    for violation in details.bad_request().iter().flat_map(|bad| &bad.field_violations) {
        let text = format!("{}: {}", violation.field, violation.description);
        if text != message {
            lines.push(format!("  field {text}"));
        }
    }
    match details.error_info() {
        Some(info) => lines.push(format!("  reason: {} ({code})", info.reason)),
        None => lines.push(format!("  code: {code}")),
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        lines.push(format!("  retry in {:.1} s", delay.as_secs_f64()));
    }
    if let Some(request) = details.request_info() {
        lines.push(format!("  request: {}", request.request_id));
    }
    lines.join("\n")
}

/// A status for programs.
pub(super) fn status_json(status: &Status) -> Value {
    let details = status.get_error_details();
    let fields: Vec<Value> = details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
        .map(|violation| json!({ "field": violation.field, "reason": violation.description }))
        .collect();
    let retry = details.retry_info().and_then(|retry| retry.retry_delay);
    json!({
        "message": status.message(),
        "code": code_name(status.code()),
        "reason": details.error_info().map(|info| &info.reason),
        "fields": fields,
        "retry_after_seconds": retry.map(|delay| delay.as_secs_f64()),
        "request": details.request_info().map(|request| &request.request_id),
    })
}

/// The status inside a message: an item's or a job's own error.
pub(super) fn inner_status(status: tonic_types::pb::Status) -> Status {
    use prost::Message;
    let details = status.encode_to_vec();
    Status::with_details(Code::from_i32(status.code), status.message, details.into())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use tonic_types::ErrorDetails;

    use super::*;

    fn refused() -> Status {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("weight_bits", "12 bits are not supported");
        details.set_error_info("INVALID_ARGUMENT_BITS", "vitq.dev", HashMap::new());
        details.set_retry_info(Some(Duration::from_millis(1500)));
        Status::with_error_details(Code::InvalidArgument, "the request is wrong", details)
    }

    #[test]
    fn a_refusal_shows_message_field_and_reason() {
        assert_eq!(
            status_text(&refused()),
            "the request is wrong\n  field weight_bits: 12 bits are not supported\n  \
             reason: INVALID_ARGUMENT_BITS (INVALID_ARGUMENT)\n  retry in 1.5 s"
        );
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("method", "unknown");
        let said = Status::with_error_details(Code::InvalidArgument, "method: unknown", details);
        assert_eq!(status_text(&said), "method: unknown\n  code: INVALID_ARGUMENT");
        let json = status_json(&refused());
        assert_eq!(json["fields"][0]["field"], "weight_bits");
        assert_eq!(json["retry_after_seconds"], 1.5);
    }

    #[test]
    fn errors_have_one_shape_whoever_made_them() {
        let unusable = Failure::Unusable(vec![
            Error::invalid("store", "must be a URL"),
            Error::invalid("hub", "is not there"),
        ]);
        let json = unusable.json();
        assert_eq!(json["message"], "store: must be a URL\nhub: is not there");
        assert_eq!(json["fields"][1], json!({ "field": "hub", "reason": "is not there" }));
        let keys = |json: &Value| json.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        for failure in [
            Failure::Refused(Box::new(refused())),
            Failure::Local(Error::Cancelled),
            Failure::Usage("wrong".to_owned()),
        ] {
            assert_eq!(keys(&failure.json()), keys(&json));
        }
    }

    #[test]
    fn a_status_inside_a_message_keeps_its_details() {
        use prost::Message;
        let outer = refused();
        let inner = tonic_types::pb::Status::decode(outer.details()).unwrap();
        assert_eq!(status_text(&inner_status(inner)), status_text(&outer));
    }
}
