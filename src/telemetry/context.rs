//! Where a piece of work stands in a trace: W3C Trace Context (w3.org/TR/trace-context), level 1.

use std::fmt;

/// Longest `tracestate` that is passed on, in bytes; the least that the standard asks for.
const MAX_STATE: usize = 512;

/// A span of a trace, here or in another process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Identifies the trace; not zero.
    pub trace_id: u128,
    /// Identifies the span; not zero.
    pub span_id: u64,
    /// Bit 0: whether the trace is recorded.
    pub flags: u8,
    /// What tracing systems tell each other, `key=value` pairs; may be empty.
    pub state: String,
}

impl TraceContext {
    /// The first span of a new trace.
    pub fn root() -> Self {
        let trace_id = u128::from(ulid::Ulid::generate()).max(1);
        Self { trace_id, span_id: new_span_id(), flags: 1, state: String::new() }
    }

    /// A new span of the same trace.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span_id: new_span_id(), ..self.clone() }
    }

    /// The span that a `traceparent` names; `None` for anything else. Of versions to come what this
    /// one knows is read.
    pub fn parse(parent: &str, state: Option<&str>) -> Option<Self> {
        let mut parts = parent.split('-');
        let version = hex(parts.next()?, 2)?;
        let (trace_id, span_id) = (hex(parts.next()?, 32)?, hex(parts.next()?, 16)?);
        let flags = hex(parts.next()?, 2)?;
        let is_valid = match version {
            0 => parts.next().is_none(),
            0xff => false,
            _ => true,
        };
        if !is_valid || trace_id == 0 || span_id == 0 {
            return None;
        }
        let state = state.filter(|state| state.len() <= MAX_STATE).unwrap_or_default();
        Some(Self {
            trace_id,
            span_id: u64::try_from(span_id).ok()?,
            flags: u8::try_from(flags).ok()?,
            state: state.to_owned(),
        })
    }
}

/// As `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace_id, span_id, flags, state: _ } = self;
        write!(f, "00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
    }
}

/// A number of so many lower-case digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != digits || !text.bytes().all(is_hex) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

/// Half of a ULID's bits are more than random enough.
fn new_span_id() -> u64 {
    (u128::from(ulid::Ulid::generate()) as u64).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_traceparent_is_read_and_written() {
        let context = TraceContext::parse(PARENT, Some("a=1")).unwrap();
        assert_eq!(context.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((context.span_id, context.flags), (0x00f0_67aa_0ba9_02b7, 1));
        assert_eq!((context.to_string().as_str(), context.state.as_str()), (PARENT, "a=1"));
        let child = context.child();
        assert_eq!((child.trace_id, child.state.as_str()), (context.trace_id, "a=1"));
        assert_ne!(child.span_id, context.span_id);
        assert_ne!(TraceContext::root().trace_id, TraceContext::root().trace_id);
    }

    #[test]
    fn what_is_no_traceparent_is_not_taken_for_one() {
        let later = PARENT.replacen("00", "01", 1) + "-more";
        assert!(TraceContext::parse(&later, None).is_some());
        for bad in [
            "",
            "00",
            &PARENT.to_uppercase(),
            &PARENT.replacen("00", "ff", 1),
            &format!("{PARENT}-more"),
            &PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &PARENT.replace("00f067aa0ba902b7", &"0".repeat(16)),
            &PARENT[..PARENT.len() - 1],
        ] {
            assert_eq!(TraceContext::parse(bad, None), None, "{bad}");
        }
        let long = "x".repeat(MAX_STATE + 1);
        assert_eq!(TraceContext::parse(PARENT, Some(&long)).unwrap().state, "");
    }

    proptest! {
        #[test]
        fn every_context_survives_the_wire(trace_id in 1u128.., span_id in 1u64.., flags: u8) {
            let context = TraceContext { trace_id, span_id, flags, state: String::new() };
            prop_assert_eq!(TraceContext::parse(&context.to_string(), None), Some(context));
        }
    }
}
