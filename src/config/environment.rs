//! Environment variables that nobody reads are mistakes.

use std::collections::BTreeSet;

use clap::Command;

use super::sources::suggestion;

/// What our variables begin with.
const PREFIX: &str = "VITQ_";
/// Variables of the build, which may still be set when its result runs.
const OF_THE_BUILD: [&str; 1] = ["VITQ_CUDA"];

/// Looks for variables of ours that no command knows.
///
/// # Errors
/// A sentence that names them all.
pub(super) fn check(command: &Command, variables: &[(String, String)]) -> Result<(), String> {
    let known: BTreeSet<String> = known(command);
    let unknown: Vec<String> = variables
        .iter()
        .filter(|(name, value)| {
            name.starts_with(PREFIX) && !known.contains(name) && !is_service_link(name, value)
        })
        .map(|(name, _)| format!("`{name}`{}", suggestion(name, known.iter().map(String::as_str))))
        .collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(format!("unknown environment variables: {}", unknown.join("; ")))
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

    fn complaint(variables: &[(&str, &str)]) -> Option<String> {
        let inner = Command::new("serve").arg(Arg::new("a").long("a").env("VITQ_LISTEN"));
        let command = Command::new("vitq").subcommand(inner);
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        check(&command, &variables.iter().map(owned).collect::<Vec<_>>()).err()
    }

    #[test]
    fn unknown_variables_are_named_with_what_was_meant() {
        assert_eq!(complaint(&[("VITQ_LISTEN", "x"), ("PATH", "x"), ("VITQ_CUDA", "1")]), None);
        let text = complaint(&[("VITQ_LISTN", "x"), ("VITQ_PORT", "50051")]).unwrap();
        assert!(text.contains("`VITQ_LISTN`, did you mean `VITQ_LISTEN`?"), "{text}");
        assert!(text.contains("`VITQ_PORT`"), "{text}");
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
        assert_eq!(complaint(&links), None);
    }
}
