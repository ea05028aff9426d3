//! Environment variables that nobody reads are mistakes.

use std::collections::BTreeSet;

use clap::Command;

use super::sources::nearest;
use crate::error::Error;

/// What our variables begin with.
const PREFIX: &str = "VITQ_";
/// Variables of the build, which may still be set when its result runs.
const OF_THE_BUILD: [&str; 1] = ["VITQ_CUDA"];

/// Variables of ours that no command knows, each with what was probably meant.
pub(super) fn check(command: &Command, variables: &[(String, String)]) -> Vec<Error> {
    let known = known(command);
    let mistake = |(name, value): &(String, String)| {
        let own = name.strip_prefix(PREFIX)?;
        if known.contains(name) || is_service_link(name, value) {
            return None;
        }
        // What all have in common says nothing about likeness.
        let known = known.iter().filter_map(|name| name.strip_prefix(PREFIX));
        let near = nearest(own, known)
            .map(|near| format!(", did you mean `{PREFIX}{near}`?"))
            .unwrap_or_default();
        Some(Error::invalid(name, format!("unknown environment variable{near}")))
    };
    variables.iter().filter_map(mistake).collect()
}

/// The variables of a command and of those below it.
fn known(command: &Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|arg| arg.get_env()?.to_str());
    let mut names: BTreeSet<String> = own.chain(OF_THE_BUILD).map(str::to_owned).collect();
    names.extend(command.get_subcommands().flat_map(known));
    names
}

/// Kubernetes gives every pod variables for the services around it: VITQ_SERVICE_HOST and
/// VITQ_PORT_50051_TCP_ADDR, say, for one that is called vitq.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_address = value.starts_with("tcp://") || value.starts_with("udp://");
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || (name.contains("_PORT_") && (name.contains("_TCP") || name.contains("_UDP")))
        || (name.ends_with("_PORT") && is_address)
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn complaints(variables: &[(&str, &str)]) -> Vec<String> {
        let inner = Command::new("serve")
            .arg(Arg::new("a").long("a").env("VITQ_LISTEN"))
            .arg(Arg::new("b").long("b").env("VITQ_LOG"));
        let command = Command::new("vitq").subcommand(inner);
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables: Vec<_> = variables.iter().map(owned).collect();
        check(&command, &variables).iter().map(Error::to_string).collect()
    }

    #[test]
    fn unknown_variables_are_named_with_what_was_meant() {
        let known = [("VITQ_LISTEN", "x"), ("PATH", "x"), ("VITQ_CUDA", "1")];
        assert_eq!(complaints(&known), [""; 0]);
        let unknown = [("VITQ_LISTN", "x"), ("VITQ_PORT", "50051"), ("VITQ_FOO", "x")];
        assert_eq!(
            complaints(&unknown),
            [
                "VITQ_LISTN: unknown environment variable, did you mean `VITQ_LISTEN`?",
                "VITQ_PORT: unknown environment variable",
                "VITQ_FOO: unknown environment variable",
            ]
        );
    }

    #[test]
    fn what_kubernetes_says_of_services_is_no_mistake() {
        let links = [
            ("VITQ_SERVICE_HOST", "10.0.0.1"),
            ("VITQ_SERVICE_PORT", "50051"),
            ("VITQ_SERVICE_PORT_GRPC", "50051"),
            ("VITQ_PORT", "tcp://10.0.0.1:50051"),
            ("VITQ_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
            ("VITQ_SERVER_PORT_50051_TCP_PROTO", "tcp"),
        ];
        assert_eq!(complaints(&links), [""; 0]);
    }
}
