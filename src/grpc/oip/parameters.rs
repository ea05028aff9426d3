//! Parameters: values by name beside tensors, of a type that the client chooses.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::batcher::Priority;
use crate::error::{Error, Result};
use crate::grpc::proto::inference::InferParameter;
use crate::grpc::proto::inference::infer_parameter::ParameterChoice;

/// Parameters of a request, an input or an output.
pub(super) type Parameters = BTreeMap<String, InferParameter>;

/// How a request wants to be scheduled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Schedule {
    /// Who goes first.
    pub(super) priority: Priority,
    /// How long the call may take at most.
    pub(super) timeout: Option<Duration>,
}

impl Schedule {
    /// `priority`: 1, and 0 for the default, is interactive; larger numbers are bulk. `timeout`:
    /// microseconds; 0 for none. Parameters of other names are for other servers.
    ///
    /// # Errors
    /// `InvalidArgument` on `parameters.NAME` for what is no such number.
    pub(super) fn parse(parameters: &Parameters) -> Result<Self> {
        Ok(Self {
            priority: match number(parameters, "priority", "parameters")? {
                None | Some(0 | 1) => Priority::Interactive,
                Some(_) => Priority::Bulk,
            },
            timeout: number(parameters, "timeout", "parameters")?
                .filter(|timeout| *timeout > 0)
                .map(Duration::from_micros),
        })
    }
}

/// A parameter that is a count, if it is there.
///
/// # Errors
/// `InvalidArgument` on `WITHIN.NAME` for another type or a negative number.
pub(super) fn number(parameters: &Parameters, name: &str, within: &str) -> Result<Option<u64>> {
    let Some(parameter) = parameters.get(name) else { return Ok(None) };
    let value = match parameter.parameter_choice {
        Some(ParameterChoice::Int64Param(value)) => u64::try_from(value).ok(),
        Some(ParameterChoice::Uint64Param(value)) => Some(value),
        Some(
            ParameterChoice::BoolParam(_)
            | ParameterChoice::StringParam(_)
            | ParameterChoice::DoubleParam(_),
        )
        | None => None,
    };
    let refused = || Error::invalid(format!("{within}.{name}"), "must be an integer from 0");
    value.map(Some).ok_or_else(refused)
}

/// Refuses tensors that lie in memory which client and server would share.
///
/// # Errors
/// `InvalidArgument` on `WITHIN.shared_memory_region`.
pub(super) fn refuse_shared_memory(parameters: &Parameters, within: &str) -> Result<()> {
    const REGION: &str = "shared_memory_region";
    if parameters.contains_key(REGION) {
        let reason = "shared memory is not supported: send the tensor itself";
        return Err(Error::invalid(format!("{within}.{REGION}"), reason));
    }
    Ok(())
}

/// A parameter that is a text.
pub(super) fn text(value: impl Into<String>) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::StringParam(value.into())) }
}

/// A parameter that is a yes or no.
pub(super) fn flag(value: bool) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(value)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(entries: &[(&str, ParameterChoice)]) -> Parameters {
        let parameter =
            |choice: &ParameterChoice| InferParameter { parameter_choice: Some(choice.clone()) };
        entries.iter().map(|(name, choice)| ((*name).to_owned(), parameter(choice))).collect()
    }

    #[test]
    fn priorities_fall_with_their_number_and_timeouts_are_microseconds() {
        use ParameterChoice::{Int64Param, Uint64Param};
        let schedule = |entries: &[_]| Schedule::parse(&parameters(entries)).unwrap();
        assert_eq!(schedule(&[]), Schedule::default());
        assert_eq!(
            schedule(&[("timeout", Int64Param(0)), ("other", Int64Param(-1))]).timeout,
            None
        );
        let timeout = schedule(&[("timeout", Int64Param(2500))]).timeout;
        assert_eq!(timeout, Some(Duration::from_micros(2500)));
        for (number, priority) in
            [(0, Priority::Interactive), (1, Priority::Interactive), (2, Priority::Bulk)]
        {
            assert_eq!(schedule(&[("priority", Uint64Param(number))]).priority, priority);
        }
    }

    #[test]
    fn what_is_no_count_is_refused_by_its_name() {
        use ParameterChoice::{BoolParam, DoubleParam, Int64Param, StringParam};
        for name in ["timeout", "priority"] {
            for bad in
                [BoolParam(true), DoubleParam(1.0), StringParam("1".to_owned()), Int64Param(-1)]
            {
                let error = Schedule::parse(&parameters(&[(name, bad)])).unwrap_err();
                let Error::InvalidArgument { field, .. } = error else { panic!("{error}") };
                assert_eq!(field, format!("parameters.{name}"));
            }
        }
    }
}
